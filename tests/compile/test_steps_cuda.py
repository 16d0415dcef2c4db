"""Whole training steps on a GPU, compiled: what a benchmark may take for granted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltatune import CompileOptions, PackedCollator, prepare

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
peft = pytest.importorskip("peft")

LENGTHS = (70, 5, 129, 52)
#: Head dims that the GPU's kernels take.
SIZES = {
    "hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}  # fmt: skip


def model_with_adapters(targets: Any = "all-linear") -> Any:
    from tiny import tiny_model

    model = tiny_model("qwen3_5", layers=4, dtype=torch.bfloat16, **SIZES).cuda()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=targets)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted.train()


def batch(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    samples = [{"input_ids": torch.randint(1, 96, (n,), generator=generator)} for n in LENGTHS]
    made = PackedCollator(tokens_per_batch=sum(LENGTHS), pad_token_id=0)(samples)
    return {name: made[name].to("cuda") for name in ("input_ids", "labels", "position_ids", "sequences")}


def gradients(model: Any, call: dict[str, Any]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    model(**call).loss.backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rounding(targets: Any, call: dict[str, Any], eager: torch.Tensor) -> float:
    """Two right paths in bfloat16 are three times as far apart, at most, as one of them is from float32."""
    true = model_with_adapters(targets).float()
    prepare(true)
    return 3 * apart(eager, gradients(true, call))


@pytest.mark.parametrize("checkpointing", ["none", "layer", 0.5])
def test_a_step_makes_no_host_wait_for_the_device(checkpointing: str | float) -> None:
    model = model_with_adapters()
    prepare(model, compile=CompileOptions(), checkpointing=checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    calls = [batch(seed) for seed in range(3)]
    for call in calls[:2]:
        model(**call).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**calls[2]).loss.backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]])
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_compiled_gradients_are_those_of_the_same_layers_uncompiled(targets: Any, checkpointing: str) -> None:
    eager, compiled = model_with_adapters(targets), model_with_adapters(targets)
    prepare(eager)
    prepare(compiled, compile=CompileOptions(), checkpointing=checkpointing)
    call = batch()
    expected = gradients(eager, call)
    assert apart(gradients(compiled, call), expected) < rounding(targets, call, expected) < 0.2


def test_graphs_see_adapters_that_were_written_in_place() -> None:
    model, same = model_with_adapters(), model_with_adapters()
    prepare(model, compile=CompileOptions())
    prepare(same)
    call = batch()
    before = gradients(model, call)
    for each in (model, same):
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if ".lora_A." in name:
                    parameter.neg_()
    after, expected = gradients(model, call), gradients(same, call)
    assert apart(after, expected) < 0.2
    assert apart(before, expected) > 0.5
