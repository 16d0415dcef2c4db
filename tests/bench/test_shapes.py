"""Models by name, at any depth."""

import pytest
import torch

from deltatune.bench.shapes import SHAPES, build_model, shape_named
from deltatune.errors import UserError

CPU = torch.device("cpu")
# parameters of the released text models, from their shapes: embeddings, layers, head
BILLIONS = {
    "qwen3.5-0.8b": 0.75,
    "qwen3.5-2b": 1.88,
    "qwen3.5-4b": 4.2,
    "qwen3.5-9b": 8.95,
    "qwen3.5-27b": 26.9,
    "qwen3.5-35b-a3b": 34.7,
    "qwen3-next-80b-a3b": 79.7,
    "qwen3-8b": 8.2,
}


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_the_size_is_the_checkpoint_s(name: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name].config())
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions == pytest.approx(BILLIONS[name], rel=0.02)


def test_depth_keeps_the_pattern_of_layers() -> None:
    config = shape_named("qwen3.5-9b").config(10)
    assert config.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2 + ["linear_attention"] * 2
    assert config.hidden_size == 4096


def test_a_depth_without_every_type_of_layer_is_refused() -> None:
    with pytest.raises(UserError, match="at least 4 layers"):
        shape_named("qwen3.5-2b").config(3)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="qwen3-8b"):
        shape_named("qwen3.5-3b")


def test_weights_are_seeded_and_decay_is_slow() -> None:
    first, second, other = (build_model(SHAPES["tiny"], CPU, dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    decay = first.model.layers[0].linear_attn.A_log.exp()
    assert 0.01 < float(decay.min()) < float(decay.max()) < 0.25
    assert first.lm_head.weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
