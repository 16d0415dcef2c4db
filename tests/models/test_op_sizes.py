"""Sizes that implementations are chosen by, and the report that says which one the layers take."""

from __future__ import annotations

import peft
import pytest
import torch

from deltatune import prepare
from deltatune.models.op_sizes import op_sizes
from deltatune.ops import choose_gated_delta_rule
from deltatune.ops._gated_delta_rule import providers
from tiny import tiny_model

DELTA = {"gated_delta_rule": {"head_dims": (8, 12)}, "causal_conv": {"width": 4}}
ALWAYS = {"varlen_attention": {"head_dim": 16}, "linear_cross_entropy": {"width": 32}}
EXPERTS = {"grouped_mm": {"weight_shape": torch.Size([4, 48, 32])}}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("qwen3", ALWAYS), ("qwen3_moe", ALWAYS | EXPERTS), ("qwen3_5", ALWAYS | DELTA),
     ("qwen3_next", ALWAYS | DELTA | EXPERTS)],
)  # fmt: skip
def test_sizes_are_read_off_the_modules_prepared_or_not(family, sizes) -> None:
    model = tiny_model(family)
    assert op_sizes(model.get_decoder(), model.lm_head) == sizes
    prepare(model)
    assert op_sizes(model.get_decoder(), model.lm_head) == sizes


def test_adapters_around_modules_change_no_size() -> None:
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], modules_to_save=["linear_attn"])
    base = peft.get_peft_model(tiny_model("qwen3_5"), config).get_base_model()
    assert op_sizes(base.get_decoder(), base.get_output_embeddings()) == ALWAYS | DELTA


def test_what_modules_disagree_on_is_left_out() -> None:
    model = tiny_model("qwen3")
    model.model.layers[0].self_attn.head_dim = 8
    assert op_sizes(model.get_decoder(), None) == {}


def test_the_report_names_what_the_layers_take_at_their_sizes(monkeypatch) -> None:
    # as on a GPU with both libraries: only their head dims speak against them, and tiny ones fit neither
    monkeypatch.setattr(providers, "_library_refusal", lambda *_: None)
    assert choose_gated_delta_rule("cpu", torch.float32).impl == "flash_qla"
    rows = {row.op: row.impl for row in prepare(tiny_model("qwen3_5")).report.kernels}
    assert rows["gated_delta_rule"] == "reference"
    changes = {"linear_key_head_dim": 32, "linear_value_head_dim": 64}
    rows = {row.op: row.impl for row in prepare(tiny_model("qwen3_5", **changes)).report.kernels}
    assert rows["gated_delta_rule"] == "fla"


def test_a_named_kernel_that_cannot_run_at_these_sizes_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(providers, "_library_refusal", lambda *_: None)
    with pytest.raises(ValueError, match="head dims of 128, got K=8 and V=12"):
        prepare(tiny_model("qwen3_5"), kernels={"gated_delta_rule": "flash_qla"})
