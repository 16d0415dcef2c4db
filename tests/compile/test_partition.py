"""Random numbers under activation checkpointing: backward uses those that forward drew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from deltatune import CompileOptions, prepare
from deltatune.compile.partition import Partitioner
from lora_cases import adapted, packed_call, relative
from tiny import randomised


def with_dropout(dropout: float = 0.3) -> Any:
    """A model of family ``any`` whose layers drop what they add to the residual stream."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi3", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, resid_pdrop=dropout, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return randomised(AutoModelForCausalLM.from_config(config), 0).train()


MODELS = {
    "adapters": lambda: adapted("qwen3", lora_dropout=0.3),
    "adapters of a hybrid": lambda: adapted("qwen3_5", lora_dropout=0.3),
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
        ("adapters", TRACED, (0.0, 0.5, "layer")),
        ("adapters of a hybrid", TRACED, (0.5,)),
        ("adapters", WHOLE, (0.5,)),
        ("the model's own", TRACED, (0.0, 0.5, "layer")),
        ("the model's own", WHOLE, (0.0,)),
        ("the model's own", CompileOptions(), (0.5,)),
    ],
    ids=["adapters", "hybrid", "adapters, whole model", "own", "own, whole model", "own, generated"],
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


@pytest.mark.parametrize("budget", [0.0, 0.2, 0.5, 0.9])
def test_what_is_drawn_is_saved_at_any_budget(budget: float) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import get_nop_func

    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(32, 48, requires_grad=True)
    found = []
    for share in (1.0, budget):

        def divide(graph: Any, inputs: Any, share: float = share, **kwargs: Any) -> Any:
            return Partitioner(share)(graph, inputs, compiler="inductor", **kwargs)

        backend = aot_autograd(fw_compiler=get_nop_func(), bw_compiler=get_nop_func(), partition_fn=divide)
        torch._dynamo.reset()
        torch.manual_seed(3)
        y = torch.compile(Noisy(), backend=backend, fullgraph=True)(x, weight)
        found.append(torch.autograd.grad(y.square().sum(), (x, weight)))
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
