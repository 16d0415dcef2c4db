"""Adapters on routed experts alone, as a recipe asks for them, learn documents by heart in compiled layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltatune import CompileOptions, prepare
from deltatune.config.schema import LoraSection
from deltatune.training.adapters import adapt
from packed_cases import packed_call
from tiny import tiny_model


@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_adapters_on_all_experts_learn(family: str) -> None:
    section = LoraSection(r=8, target_modules=None, target_parameters="all-experts")
    model: Any = adapt(tiny_model(family), section)
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 8, "A and B of two weights in two layers"
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(40):
        call = packed_call()
        loss = model(**call, labels=call["input_ids"]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses
    assert prepared.compile_report is not None
    assert prepared.compile_report.breaks == []
    assert prepared.compile_report.recompiles == []
