"""16-bit checkpoints to nf4 and fp8 as they are read: what is made, and what is never in memory at once."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from deltatune import ops
from deltatune.config.schema import ModelSection
from deltatune.errors import UserError
from deltatune.hf.quantizable import quantizable
from deltatune.quantization.blank import Encoding
from deltatune.quantization.tensor import QuantizedTensor
from deltatune.training.checkpoint import empty_model, load_checkpoint
from quantized_cases import same
from released_checkpoints import edit
from tiny import tiny_model

FAMILIES = ("qwen3_5_moe", "gpt_oss", "qwen3_moe", "qwen3_5")
KINDS = {"nf4": {"type": "nf4"}, "fp8": {"type": "fp8"}, "fp8, blocks": {"type": "fp8", "blocks": True}}
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 32}


def section(folder: Path, quantization: dict[str, Any] | None) -> ModelSection:
    return ModelSection.model_validate({"name_or_path": str(folder), "quantization": quantization})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_is_what_quantize_makes_of_it(family: str, kind: str, tmp_path: Path) -> None:
    tiny_model(family, dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path)
    given = KINDS[kind]
    wide, found = (load_checkpoint(section(tmp_path, q)).model for q in (None, given))
    empty = dict(empty_model(section(tmp_path, given)).named_parameters())
    encoding = Encoding(given["type"], given.get("blocks", False))
    chosen = quantizable(wide, encoding)
    for name, weight in wide.named_parameters():
        there = found.get_parameter(name)
        assert (type(there), there.shape, there.dtype) == (type(empty[name]), weight.shape, weight.dtype), name
        if name not in chosen:
            assert type(there) is torch.nn.Parameter
            assert torch.equal(there, weight), name
            continue
        assert isinstance(there, QuantizedTensor)
        assert not there.requires_grad
        transposed = family == "gpt_oss" and weight.ndim == 3
        expected = ops.quantize(
            weight.detach().mT if transposed else weight.detach(), encoding.format, blocks=encoding.blocks
        )
        values = ops.dequantize(expected, weight.dtype)
        assert same(there.detach().decoded(), values.mT if transposed else values), name
    matrices = {name for name, weight in wide.named_parameters() if weight.ndim > 1 and not name.endswith("bias")}
    kept = {name.removesuffix(".weight").rpartition(".")[2] for name in matrices - chosen.keys()}
    narrow = {"gate", "router", "shared_expert_gate", "in_proj_a", "in_proj_b", "conv1d"}
    assert {"embed_tokens", "lm_head"} <= kept <= {"embed_tokens", "lm_head", *narrow}


class Live(TorchDispatchMode):
    """The most bytes of 16-bit tensors that were alive at once, by their storages."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, QuantizedTensor) and not tensor.is_meta:
                self.known[tensor] = None
        self.most = max(self.most, self.now())
        return result

    def now(self) -> int:
        storages = {
            (storage := tensor.untyped_storage()).data_ptr(): storage.nbytes()
            for tensor in list(self.known.keys())
            if tensor.dtype == torch.bfloat16
        }
        return sum(storages.values())


@pytest.mark.parametrize(
    "fused", [pytest.param(False, marks=pytest.mark.slow), True], ids=["an expert at a time", "fused"]
)
def test_the_model_of_16_bits_is_never_whole_in_memory(fused: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads are seen by no dispatch mode
    wide = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 16}
    made = tiny_model("qwen3_5_moe", layers=8, dtype=torch.bfloat16, **wide)
    made.save_pretrained(tmp_path)
    if fused:
        tensors = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = sum(weight.nbytes for weight in made.parameters())
    chosen = quantizable(made, Encoding("nf4"))
    stays = sum(weight.nbytes for name, weight in made.named_parameters() if name not in chosen)
    module = sum(weight.nbytes for weight in made.model.layers[0].mlp.parameters())
    del made
    gc.collect()
    with Live() as live:
        found = load_checkpoint(section(tmp_path, {"type": "nf4"})).model
    # experts are stacked of what was read, so their module is there twice
    assert live.most <= stays + 2.1 * module < whole / 2
    assert sum(isinstance(weight, QuantizedTensor) for weight in found.parameters()) == len(chosen)


def test_an_expert_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Of another number there are as many, which a stack of them does not show."""
    tiny_model("qwen3_moe", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: [t.update({n.replace("experts.2.", "experts.4."): t.pop(n)}) for n in list(t)])
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts\.2\.down_proj\.weight is missing, of 5 experts"):
        load_checkpoint(section(tmp_path, {"type": "nf4"}))
