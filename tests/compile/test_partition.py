"""What a divided graph draws, builds and calls: random numbers of backward are those that forward drew."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx

from deltatune import CompileOptions, prepare
from deltatune.compile.partition import Partitioner
from lora_cases import FEW, adapted, packed_call, relative
from tiny import randomised


def with_dropout(dropout: float = 0.3) -> Any:
    """A model of family ``any`` whose layer drops what it adds to the residual stream."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi3", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, resid_pdrop=dropout, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return randomised(AutoModelForCausalLM.from_config(config), 0).train()


MODELS = {
    "adapters": lambda: adapted("qwen3", lora_dropout=0.3, target_modules=FEW, layers=1),
    "adapters of a recurrent layer": lambda: adapted(
        "qwen3_5", lora_dropout=0.3, target_modules=["in_proj_qkv", "out_proj", "down_proj"], layers=1
    ),
    "the model's own": with_dropout,
}
TRACED = CompileOptions(backend="aot_eager")


def trained(model: Any, options: CompileOptions, checkpointing: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of two steps from one seed."""
    model = copy.deepcopy(model)
    prepare(model, lora="stock", compile=options, checkpointing=checkpointing)
    torch.manual_seed(7)
    losses = [model(**packed_call(step)).loss for step in range(2)]
    sum(losses).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).detach(), gradients


WHOLE = CompileOptions(scope="model", backend="aot_eager")


@pytest.mark.parametrize(
    ("kind", "options", "settings"),
    [
        ("adapters of a recurrent layer", TRACED, (0.5,)),
        ("adapters", WHOLE, (0.5,)),
        ("the model's own", TRACED, (0.0, 0.5, "layer")),
    ],
    ids=["recurrent", "adapters, whole model", "own"],
)
def test_no_setting_draws_another_mask_in_backward(kind: str, options: CompileOptions, settings: Any) -> None:
    model = MODELS[kind]()
    loss, expected = trained(model, options, "none")
    for setting in settings:
        found_loss, found = trained(model, options, setting)
        torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
        assert found.keys() == expected.keys()
        worst = max(relative(found[name], expected[name]) for name in expected)
        assert worst < 1e-4, (setting, worst)


class Noisy(nn.Module):
    """Random results of several kinds: a mask, noise that is added, a tuple."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(x)
        dropped = torch.dropout((x * noise.exp()) @ weight, 0.5, train=True)
        return (dropped @ weight.mT + torch.bernoulli(torch.sigmoid(x))).sin().square()


class Dropped(nn.Module):
    """Two kernels of generated code, of which backward would rather compute the first again than keep its result."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.dropout(x.sin(), 0.5, train=True).cos() @ weight


def traced_alone(share: float) -> Any:
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import get_nop_func

    divide = functools.partial(Partitioner(share), compiler="inductor")
    return aot_autograd(fw_compiler=get_nop_func(), bw_compiler=get_nop_func(), partition_fn=divide)


def generated(share: float) -> Any:
    """As a layer is: Inductor draws from seeds of its own, which are what must be saved."""
    return functools.partial(compile_fx, config_patches={"custom_partitioner_fn": Partitioner(share)})


@pytest.mark.parametrize(
    ("module", "backend", "budget"),
    [
        *((Noisy, traced_alone, share) for share in (0.0, 0.2, 0.5, 0.9)),
        pytest.param(Dropped, generated, 0.2, marks=pytest.mark.slow),
    ],
)
def test_what_is_drawn_is_saved_at_any_budget(module: Any, backend: Any, budget: float) -> None:
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(32, 48, requires_grad=True)
    found = []
    for share in (1.0, budget):
        torch._dynamo.reset()
        torch.manual_seed(3)
        y = torch.compile(module(), backend=backend(share), fullgraph=True)(x, weight)
        found.append(torch.autograd.grad(y.square().sum(), (x, weight)))
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_divided_graphs_call_kernels_without_autograd_s_own_trip() -> None:
    model = adapted("qwen3", layers=1, target_modules=FEW)
    prepare(model, compile=CompileOptions(backend="aot_eager"), lora="fused")
    model(**packed_call()).loss.backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**packed_call()).loss.backward()
    called = {event.key for event in profile.key_averages() if event.key.startswith("deltatune::lora")}
    assert {"deltatune::lora_accumulate_kernel", "deltatune::lora_up_backward_kernel"} <= called
    assert all(name.endswith("_kernel") for name in called), called
