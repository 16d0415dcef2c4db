"""Checkpoints in few bits, read as they are: every value by its formula, and never a weight at random."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError
from deltatune.quantization.tensor import QuantizedTensor
from deltatune.training.checkpoint import empty_model, load_checkpoint
from quantized_cases import same
from released_checkpoints import STYLES, edit, make, model_of


def section(folder: Path, **given: Any) -> ModelSection:
    return ModelSection.model_validate({"name_or_path": str(folder), **given})


def values(tensor: Tensor) -> Tensor:
    return tensor.decoded() if isinstance(tensor, QuantizedTensor) else tensor


@pytest.mark.parametrize("name", STYLES)
def test_every_weight_is_what_the_formula_says(name: str, tmp_path: Path) -> None:
    style = STYLES[name]
    few, wide = make(tmp_path, style)
    found, expected = load_checkpoint(section(few)).model, load_checkpoint(section(wide)).model
    assert not hasattr(found.config, "quantization_config")
    theirs = dict(expected.named_parameters())
    assert [n for n, _ in found.named_parameters()] == list(theirs)
    for key, weight in found.named_parameters():
        assert same(values(weight.detach()).contiguous(), theirs[key].detach()), key
    held = {key: weight for key, weight in found.named_parameters() if isinstance(weight, QuantizedTensor)}
    assert {weight.format for weight in held.values()} == style.formats
    experts = {key for key in theirs if re.search(r"experts\.\w+_proj$", key)}
    assert (experts <= held.keys()) == (style.experts is not None or not experts)
    assert any("self_attn" in key for key in held) == (style.linears is not None)
    assert not any(weight.requires_grad for weight in held.values())
    ids = torch.arange(12).view(1, -1)
    logits = [model(ids).logits.float() for model in (found, expected)]
    assert (logits[0] - logits[1]).abs().max() <= 0.02 * logits[1].abs().max()


@pytest.mark.parametrize("name", STYLES)
def test_the_empty_model_has_the_same_weights_in_few_bits(name: str, tmp_path: Path) -> None:
    few, _ = make(tmp_path, STYLES[name])
    found, empty = load_checkpoint(section(few)).model, empty_model(section(few))

    def about(model: torch.nn.Module) -> list[object]:
        parts = []
        for key, weight in model.named_parameters():
            held = weight.stored if isinstance(weight, QuantizedTensor) else (weight,)
            shapes = [(part.shape, part.dtype) if isinstance(part, Tensor) else part for part in held]
            parts.append((key, type(weight), weight.shape, weight.dtype, weight.requires_grad, shapes))
        return parts

    assert about(empty) == about(found)
    assert all(part.is_meta for part in empty.parameters())


def test_values_are_taken_where_few_bits_are_no_use(tmp_path: Path) -> None:
    few, wide = make(tmp_path, STYLES["nvfp4"])
    found = load_checkpoint(section(few), in_few_bits=False).model
    expected = load_checkpoint(section(wide)).model.state_dict()
    assert all(type(weight) is torch.nn.Parameter for weight in found.parameters())
    assert all(torch.equal(weight, expected[key]) for key, weight in found.state_dict().items())


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
LINEAR = "model.layers.1.self_attn.q_proj.weight"

#: style, what is done to its tensors, and what the error says
BROKEN: dict[str, tuple[str, Any, str]] = {
    "codes of an expert": (
        "fp8", lambda t: (t.pop(EXPERT), t.pop(f"{EXPERT}_scale_inv")), f"{EXPERT} is missing, of 4 experts",
    ),
    "scales of an expert": ("fp8", lambda t: t.pop(f"{EXPERT}_scale_inv"), f"{EXPERT}_scale_inv is missing"),
    "global scale of an expert": (
        "modelopt", lambda t: t.pop(f"{EXPERT}_scale_2"), f"{EXPERT}_scale_2 is missing",
    ),
    "a whole expert, and another number": (
        "fp8",
        lambda t: [t.update({n.replace("experts.2.", "experts.7."): t.pop(n)}) for n in list(t) if "experts.2." in n],
        "experts.2.down_proj.weight is missing, of 8 experts",
    ),
    "an expert more": (
        "nvfp4",
        lambda t: [t.update({n.replace("experts.3.", "experts.4."): t[n]}) for n in list(t) if "experts.3." in n],
        "experts.",
    ),
    "an expert in 16 bits": (
        "fp8",
        lambda t: (t.pop(f"{EXPERT}_scale_inv"), t.update({EXPERT: torch.ones(128, 128, dtype=torch.bfloat16)})),
        "model.layers.1.mlp.experts.gate_up_proj is put together of parts in different formats",
    ),
    "codes left over": (
        "mxfp4, fused", lambda t: t.pop("model.layers.1.mlp.experts.gate_up_proj_scale"), "_proj_scale is missing",
    ),
    "scales left over": (
        "mxfp4, fused", lambda t: t.pop("model.layers.1.mlp.experts.gate_up_proj_packed"), "gate_up_proj",
    ),
    "blocks left over": (
        "gpt-oss", lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"), "down_proj_scales is missing",
    ),
    "a name that nobody knows": (
        "nvfp4",
        lambda t: t.update({"model.layers.0.mlp.experts.extra_proj_packed": torch.zeros(4, 8, 8, dtype=torch.uint8)}),
        "extra_proj_scale is missing",
    ),
    "a projection that nobody knows": (
        "nvfp4",
        lambda t: [t.update({n.replace("q_proj", "r_proj"): t[n]}) for n in list(t) if "self_attn.q_proj" in n],
        "model.layers.1.self_attn.r_proj.weight",
    ),
    "experts numbered behind their projections": (
        "modelopt",
        lambda t: [t.update({re.sub(r"experts\.(\d)\.(\w+)", r"experts.\2.\1", n): t.pop(n)}) for n in list(t)],
        "experts.down_proj.0.weight",
    ),
    "an expert's tensor that nobody knows": (
        "fp8", lambda t: t.update({"model.layers.0.mlp.experts.other": torch.ones(2)}), "mlp.experts.other",
    ),
    "other rows": (
        "fp8",
        lambda t: t.update({LINEAR: t[LINEAR][:40], f"{LINEAR}_scale_inv": t[f"{LINEAR}_scale_inv"][:1]}),
        f"{LINEAR} is [40, 128], and the model has [",
    ),
    "other scales": (
        "fp8", lambda t: t.update({f"{LINEAR}_scale_inv": torch.ones(3, 1)}), f"{LINEAR}_scale_inv must be",
    ),
    "scales of another type": (
        "nvfp4", lambda t: t.update({f"{LINEAR}_scale": t[f"{LINEAR}_scale"].float()}), f"{LINEAR}_",
    ),
    "a weight of a linear layer": (
        "nvfp4", lambda t: [t.pop(n) for n in list(t) if n.startswith(LINEAR)], "lacks 1 of the weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_missing_left_over_or_of_another_shape_is_named(what: str, tmp_path: Path) -> None:
    style, change, said = BROKEN[what]
    few, _ = make(tmp_path, STYLES[style])
    edit(few, change)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_checkpoint(section(few))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("width", [192, 200])
def test_blocks_that_do_not_meet_where_gate_and_up_are_joined_are_refused(width: int, tmp_path: Path) -> None:
    """Of 200 rows each, the joined weight has as many blocks as its parts, and they begin elsewhere."""
    style = STYLES["fp8"]
    few, _ = make(tmp_path, style, model_of(style, moe_intermediate_size=width))
    with pytest.raises(UserError, match=r"experts\.(gate_up|down)_proj"):
        load_checkpoint(section(few))


def test_weights_that_a_class_leaves_out_are_left_out(tmp_path: Path) -> None:
    """Of layers that predict further tokens, say."""
    few, _ = make(tmp_path, STYLES["fp8"])
    names = ("mtp.layers.0.mlp.experts.0.up_proj.weight", "mtp.fc.weight")
    ends = ("", "_scale_inv")
    edit(few, lambda t: t.update({f"{name}{end}": t[f"{LINEAR}{end}"] for name in names for end in ends}))
    assert not load_checkpoint(section(few)).unexpected


def test_one_block_a_matrix_is_joined(tmp_path: Path) -> None:
    style = STYLES["fp8"]
    few, wide = make(tmp_path, style, model_of(style, moe_intermediate_size=64))
    expected = load_checkpoint(section(wide)).model.state_dict()
    for key, weight in load_checkpoint(section(few)).model.named_parameters():
        assert same(values(weight.detach()).contiguous(), expected[key]), key


@pytest.mark.parametrize("name", ["fp8, dense", "modelopt, mixed", "gpt-oss", "nvfp4, dense"])
def test_few_bits_of_which_the_config_says_nothing_are_no_weights(name: str, tmp_path: Path) -> None:
    few, wide = make(tmp_path, STYLES[name])
    (few / "config.json").write_text((wide / "config.json").read_text())
    with pytest.raises(UserError) as error:
        load_checkpoint(section(few))
    assert "\n" not in str(error.value)


def test_a_global_scale_for_each_row_is_refused(tmp_path: Path) -> None:
    few, _ = make(tmp_path, STYLES["nvfp4, dense"])
    name = "model.layers.1.self_attn.q_proj.weight_global_scale"
    edit(few, lambda tensors: tensors.update({name: torch.rand(64)}))
    with pytest.raises(UserError, match="more than 1 global scales"):
        load_checkpoint(section(few))
