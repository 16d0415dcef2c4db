"""The norm behind the last layer: our kernel where one runs, the stock norm elsewhere, the same numbers from both."""

from typing import Any

import peft
import pytest
import torch

from deltatune import ops, prepare
from deltatune.layers import final_norm
from deltatune.layers.final_norm import FinalNorm
from deltatune.ops._choice import Choice
from tiny import FAMILIES, tiny_model


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes the op be chosen where no kernel runs: its reference then stands in for the kernel."""
    calls: list[dict[str, Any]] = []

    class Ops:
        @staticmethod
        def choose_rms_norm_rope(*_: Any, **__: Any) -> Choice:
            return Choice("triton", "for this test")

        @staticmethod
        def rms_norm_rope(*args: Any, impl: str, **options: Any) -> torch.Tensor:
            assert impl == "triton"
            calls.append(options)
            return ops.rms_norm_rope(*args, **options, impl="reference")

    monkeypatch.setattr(final_norm, "ops", Ops)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_the_op_computes_what_the_stock_norm_does(family: str, kernel_calls: list[dict[str, Any]]) -> None:
    model = tiny_model(family)
    norm = model.get_decoder().norm
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 0.5)
    inputs = [torch.randn(2, 7, norm.weight.numel(), requires_grad=True) for _ in range(2)]
    expected = norm(inputs[0])
    prepare(model)
    assert isinstance(norm, FinalNorm)
    got = norm(inputs[1].detach().copy_(inputs[0]).requires_grad_())
    torch.testing.assert_close(got, expected)
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_stock_ones(family: str, kernel_calls: list[dict[str, Any]]) -> None:
    model = tiny_model(family)
    norm = model.get_decoder().norm
    x = torch.randn(1, 5, norm.weight.numel(), requires_grad=True)
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    prepare(model)
    for ours, stock in zip(torch.autograd.grad(norm(x), (x, norm.weight), grad), expected, strict=True):
        torch.testing.assert_close(ours, stock)
    assert len(kernel_calls) == 1


def test_where_no_kernel_runs_the_stock_norm_does() -> None:
    model = tiny_model("qwen3_5")
    norm = model.get_decoder().norm
    x = torch.randn(1, 5, norm.weight.numel())
    expected = norm(x)
    prepare(model)
    assert torch.equal(norm(x), expected)


def test_a_trained_copy_is_swapped_with_the_original(kernel_calls: list[dict[str, Any]]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    model = peft.get_peft_model(tiny_model("qwen3"), config)
    prepare(model)
    decoder = model.get_base_model().get_decoder()
    tokens = torch.arange(6)[None]
    model(tokens)
    assert len(kernel_calls) == 1
    assert sum(isinstance(module, FinalNorm) for module in decoder.norm.modules()) == 2


def test_a_norm_of_another_tool_is_left_alone() -> None:
    model = tiny_model("qwen3")
    decoder = model.get_decoder()
    decoder.norm = torch.nn.LayerNorm(decoder.norm.weight.numel())
    rows = prepare(model).report.swaps
    assert type(decoder.norm) is torch.nn.LayerNorm
    assert all(row.layer != "FinalNorm" for row in rows)


def test_revert_gives_the_stock_norm_back() -> None:
    model = tiny_model("qwen3_5")
    before = type(model.get_decoder().norm)
    prepare(model).revert()
    assert type(model.get_decoder().norm) is before
