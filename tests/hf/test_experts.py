"""What is read off transformers' experts, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from deltatune import prepare
from deltatune.hf.experts import ExpertsLayout, experts_layout, experts_per_token, other_experts
from packed_cases import alone, assert_same_gradients, packed
from tiny import tiny_model

GATED = ExpertsLayout("gate_up_proj", transposed=False, interleaved=False, biased=False, gated=True)


class Noted(nn.Module):
    """Experts with the notes that transformers' decorator leaves on an instance."""

    def __init__(self, **notes: Any) -> None:
        super().__init__()
        self.has_gate, self.is_transposed, self.is_concatenated, self.has_bias = True, False, True, False
        self.__dict__.update(notes)
        shapes = {"gate_up_proj": (3, 8, 4), "down_proj": (3, 4, 4)}
        for name, shape in shapes.items():
            name = name if self.has_gate else name.replace("gate_", "")
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            if self.has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(shape[:2])))

    def _apply_gate(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def act_fn(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ({}, GATED),
        ({"is_transposed": True}, ExpertsLayout("gate_up_proj", True, False, False, True)),
        ({"is_concatenated": False}, ExpertsLayout("gate_up_proj", False, True, False, True)),
        ({"has_bias": True}, ExpertsLayout("gate_up_proj", False, False, True, True)),
        ({"has_gate": False}, ExpertsLayout("up_proj", False, False, False, False)),
        ({"has_gate": False, "is_concatenated": False}, ExpertsLayout("up_proj", False, False, False, False)),
        ({"has_post_expert_norm": True}, None),
        ({"_is_expert_parallel": True}, None),
        ({"_is_expert_parallel": False, "has_post_expert_norm": False}, GATED),
    ],
)
def test_the_notes_of_an_instance(notes: dict[str, Any], expected: ExpertsLayout | None) -> None:
    assert experts_layout(Noted(**notes)) == expected


def without_note(module: Any) -> None:
    del module.has_gate


def two_dimensional(module: Any) -> None:
    module.down_proj = nn.Parameter(torch.zeros(4, 4))


def whole_numbers(module: Any) -> None:
    module.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 4, dtype=torch.uint8), requires_grad=False)


def no_gate(module: Any) -> None:
    module._apply_gate = None


def missing(module: Any) -> None:
    module.down_proj = None


@pytest.mark.parametrize("change", [without_note, two_dimensional, whole_numbers, no_gate, missing])
def test_what_is_no_layout_of_two_fused_linear_layers(change: Callable[[Any], None]) -> None:
    module = Noted()
    change(module)
    assert experts_layout(module) is None


def test_a_bias_that_is_missing_or_of_another_shape_is_no_layout() -> None:
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        for value in (None, nn.Parameter(torch.zeros(3, 4, 1))):
            module = Noted(has_bias=True)
            setattr(module, name, value)
            assert experts_layout(module) is None


def test_experts_of_another_layout_are_counted_by_class() -> None:
    model = nn.Sequential(
        Noted(), Noted(has_post_expert_norm=True), Noted(_is_expert_parallel=True), nn.Conv1d(4, 4, 3)
    )
    assert other_experts(model) == {"Noted": 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_experts_per_tok": 2}, 2),
        ({"num_experts_per_token": 3}, 3),
        ({"top_k_experts": 4}, 4),
        ({"moe_topk": 5}, 5),
        ({"num_experts_per_tok": None, "moe_k": 6}, 6),
        ({}, 8),
    ],
)
def test_experts_of_a_token(config: dict[str, Any], expected: int) -> None:
    assert experts_per_token(type("Config", (), config)(), 8) == expected


@pytest.mark.parametrize("note", ["has_post_expert_norm", "_is_expert_parallel"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_do_more_or_less_than_two_linear_layers_stay_stock(family: str, note: str) -> None:
    model = tiny_model(family)
    expected = model.model.layers[0].mlp.experts.forward.__func__
    for layer in model.model.layers:
        setattr(layer.mlp.experts, note, True)
        layer.mlp.experts.post_expert_norm = nn.RMSNorm(32)
    theirs = copy.deepcopy(model)
    report = prepare(model).report
    assert report.experts is not None
    assert f"2 {type(model.model.layers[0].mlp.experts).__name__} of another layout" in report.experts
    assert model.model.layers[0].mlp.experts.forward.__func__ is expected
    assert packed(model) == pytest.approx(alone(theirs), rel=1e-5)
    assert_same_gradients(model, theirs)


def test_experts_that_change_after_prepare_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    prepare(model)
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"its experts changed since prepare.*call prepare\(model\) again"):
        packed(model)
