"""Sizes that implementations are chosen by, and the report that says which one the layers take."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltatune import ops, prepare
from deltatune.models.registry import family_of
from deltatune.ops import GatedDeltaRuleSpec, choose
from deltatune.ops._gated_delta_rule import providers
from deltatune.ops._varlen_attention import torch_varlen
from deltatune.subclass import Swapped
from tiny import FAMILIES, tiny_model

CPU, FP32 = torch.device("cpu"), torch.float32
ALWAYS = {
    ops.VarlenAttentionSpec(CPU, FP32, head_dim=16),
    ops.RmsNormRopeSpec(CPU, FP32),
    ops.LinearCrossEntropySpec(CPU, FP32, width=32),
}
DELTA = {
    ops.GatedDeltaRuleSpec(CPU, FP32, head_dims=(8, 12)),
    ops.CausalConvSpec(CPU, FP32, width=4),
    ops.GatedRmsNormSpec(CPU, FP32),
}
EXPERTS = {ops.GroupedMmSpec(CPU, FP32, weight_shape=torch.Size(shape)) for shape in ([4, 48, 32], [4, 32, 24])}


def specs_of(model) -> set[ops.Spec]:
    """What the layers of a prepared model say."""
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    return {spec for module in swapped for spec in type(module).op_specs(module, CPU, FP32)}


@pytest.mark.parametrize(
    ("family", "specs"),
    [("qwen3", ALWAYS), ("qwen3_moe", ALWAYS | EXPERTS), ("qwen3_5", ALWAYS | DELTA),
     ("qwen3_next", ALWAYS | DELTA | EXPERTS)],
)  # fmt: skip
def test_layers_say_the_sizes_of_their_ops(family, specs) -> None:
    assert specs_of(prepare(tiny_model(family)).model) == specs


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_name_the_ops_that_they_have_specs_of(family) -> None:
    model = prepare(tiny_model(family)).model
    assert {spec.op for spec in specs_of(model)} == set(family_of(model.model).ops)


def test_stock_attention_says_its_sizes_too() -> None:
    config = AutoConfig.for_model("llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                  num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = prepare(AutoModelForCausalLM.from_config(config)).model
    assert ops.VarlenAttentionSpec(CPU, FP32, head_dim=8) in specs_of(model)


def test_adapters_around_modules_change_no_size() -> None:
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], modules_to_save=["linear_attn"])
    assert specs_of(prepare(peft.get_peft_model(tiny_model("qwen3_5"), config)).model) == ALWAYS | DELTA


def test_each_size_has_a_row_where_the_choice_differs(monkeypatch) -> None:
    # as on a GPU: 16 fits, 12 does not
    monkeypatch.setattr(torch_varlen, "refusal", lambda _device, _dtype, dim: None if dim == 16 else "no")
    model = tiny_model("qwen3")
    prepared = prepare(model)
    model.model.layers[0].self_attn.head_dim = 12
    assert [row.impl for row in prepared.report.kernels if row.op == "varlen_attention"] == ["reference", "torch"]


def test_the_report_names_what_the_layers_take_at_their_sizes(monkeypatch) -> None:
    # as on a GPU with both libraries: only their head dims speak against them, and tiny ones fit neither
    monkeypatch.setattr(providers, "_library_refusal", lambda *_: None)
    assert choose(GatedDeltaRuleSpec(torch.device("cpu"), torch.float32)).impl == "flash_qla"
    rows = {row.op: row.impl for row in prepare(tiny_model("qwen3_5")).report.kernels}
    assert rows["gated_delta_rule"] == "reference"
    changes = {"linear_key_head_dim": 32, "linear_value_head_dim": 64}
    rows = {row.op: row.impl for row in prepare(tiny_model("qwen3_5", **changes)).report.kernels}
    assert rows["gated_delta_rule"] == "fla"


def test_a_named_kernel_that_cannot_run_at_these_sizes_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(providers, "_library_refusal", lambda *_: None)
    with pytest.raises(ValueError, match="head dims of 128, got K=8 and V=12"):
        prepare(tiny_model("qwen3_5"), kernels={"gated_delta_rule": "flash_qla"})
