"""Adapters: names that match nothing are errors, towers stay out, dtypes are as asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltatune.config.schema import LoraSection
from deltatune.errors import UserError
from deltatune.training.adapters import adapt
from tiny import tiny_conditional, tiny_model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ("q_proj", "qkv_proj")}, r"target_modules: 'qkv_proj' matches no module.*q_proj"),
        ({"target_modules": ("zzz",)}, r"target_modules: 'zzz' matches no module; linear layers here:.*q_proj"),
        ({"target_modules": r".*\.w_pack"}, r"target_modules: .* matches no module"),
        ({"target_modules": "("}, r"target_modules: '\(' is no regular expression"),
        ({"modules_to_save": ("lm_heads",)}, r"modules_to_save: 'lm_heads' matches no module.*lm_head"),
        ({"rank_pattern": {"qproj": 8}}, r"rank_pattern: 'qproj' matches no module.*q_proj"),
        ({"alpha_pattern": {"qproj": 8}}, r"alpha_pattern: 'qproj' matches no module"),
        ({"exclude_modules": ("k_prj",)}, r"exclude_modules: 'k_prj' matches no module"),
        ({"layers_to_transform": (0, 2)}, r"layers_to_transform: 2 is no layer; the model has layers 0 to 1"),
    ],
)
def test_what_matches_nothing_is_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt(tiny_model("qwen3"), LoraSection(**values))


def test_what_matches_is_taken() -> None:
    section = LoraSection(target_modules=("q_proj", "mlp.up_proj"), rank_pattern={"mlp.up_proj": 2}, r=4)
    model = adapt(tiny_model("qwen3"), section)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_A" in name}
    assert {name.split(".lora_A")[0].rpartition(".")[2] for name in shapes} == {"q_proj", "up_proj"}
    assert {shape[0] for name, shape in shapes.items() if "up_proj" in name} == {2}
    assert {shape[0] for name, shape in shapes.items() if "q_proj" in name} == {4}


def test_all_linear_leaves_towers_and_the_head_alone() -> None:
    model = adapt(tiny_conditional(), LoraSection())
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted
    assert not any("visual" in name or "lm_head" in name for name in adapted)


def test_full_training_freezes_what_text_never_reaches() -> None:
    model = tiny_conditional()
    adapt(model, None)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(trains for name, trains in trained.items() if "visual" in name)
    assert all(trains for name, trains in trained.items() if "visual" not in name)


@pytest.mark.parametrize(("adapter_dtype", "expected"), [("float32", torch.float32), ("model", torch.bfloat16)])
def test_adapters_are_kept_in_the_dtype_asked_for(adapter_dtype: Any, expected: torch.dtype) -> None:
    model = adapt(tiny_model("qwen3", dtype=torch.bfloat16), LoraSection(adapter_dtype=adapter_dtype))
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}
