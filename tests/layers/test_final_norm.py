"""The norm behind the last layer: our kernel where one runs, the stock norm elsewhere, the same numbers from both."""

import inspect
from typing import Any

import peft
import pytest
import torch

from deltatune import CompileOptions, ops, prepare
from deltatune.layers import final_norm
from deltatune.layers.final_norm import FinalNorm
from deltatune.ops import Choice
from packed_cases import packed_call
from tiny import FAMILIES, tiny_model

#: gpt-oss multiplies by the weight in fp32, and keeps its own
NORMED = [family for family in FAMILIES if family != "gpt_oss"]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes the op be chosen where no kernel runs: its reference then stands in for the kernel."""
    calls: list[dict[str, Any]] = []

    class Ops:
        RmsNormRopeSpec = ops.RmsNormRopeSpec

        @staticmethod
        def choose(*_: Any) -> Choice:
            return Choice("triton", "for this test")

        @staticmethod
        def rms_norm_rope(*args: Any, impl: str, **options: Any) -> torch.Tensor:
            assert impl == "triton"
            calls.append(options)
            return ops.rms_norm_rope(*args, **options, impl="reference")

    monkeypatch.setattr(final_norm, "ops", Ops)
    return calls


@pytest.mark.parametrize("family", NORMED)
def test_the_op_computes_what_the_stock_norm_does(family: str, kernel_calls: list[dict[str, Any]]) -> None:
    model = tiny_model(family)
    norm = model.get_decoder().norm
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 0.5)
    x = torch.randn(2, 7, norm.weight.numel())
    expected = norm(x)
    (argument,) = inspect.signature(norm.forward).parameters
    prepare(model)
    assert isinstance(norm, FinalNorm)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(**{argument: x}), expected)
    assert len(kernel_calls) == 2


@pytest.mark.parametrize("family", NORMED)
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


def test_where_no_kernel_runs_the_stock_norm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_5")
    norm = model.get_decoder().norm
    x = torch.randn(1, 5, norm.weight.numel())
    expected = norm(x)
    prepare(model)
    monkeypatch.setattr(ops, "rms_norm_rope", None)
    assert torch.equal(norm(x), expected)


def test_other_shapes_are_left_to_the_stock_norm(kernel_calls: list[dict[str, Any]]) -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    norm = model.get_decoder().norm
    assert norm(torch.randn(5, norm.weight.numel())).shape == (5, norm.weight.numel())
    assert not kernel_calls


def test_a_graph_of_the_whole_model_takes_the_stock_norm(kernel_calls: list[dict[str, Any]]) -> None:
    model = tiny_model("qwen3", layers=1)
    prepare(model, compile=CompileOptions(scope="model", backend="aot_eager"))
    call = packed_call()
    with torch.no_grad():
        model(**call, labels=call["input_ids"])
    assert not kernel_calls


ADAPTERS = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])


@pytest.mark.parametrize("adapters_first", [True, False])
def test_a_trained_copy_runs_as_the_original_would(adapters_first: bool, kernel_calls: list[dict[str, Any]]) -> None:
    model = tiny_model("qwen3")
    if adapters_first:
        model = peft.get_peft_model(model, ADAPTERS)
        prepare(model)
    else:
        prepare(model)
        model = peft.get_peft_model(model, ADAPTERS)
    norm = model.get_base_model().get_decoder().norm
    assert sum(isinstance(module, FinalNorm) for module in norm.modules()) == 2
    tokens = torch.arange(6)[None]
    model(tokens)
    assert len(kernel_calls) == 1
    model.eval()
    with torch.no_grad():
        model(tokens, use_cache=True)
    assert len(kernel_calls) == 1, "a call with a cache keeps the stock path whole"


def test_a_norm_of_another_tool_is_left_alone() -> None:
    model = tiny_model("qwen3")
    decoder = model.get_decoder()
    decoder.norm = torch.nn.LayerNorm(decoder.norm.weight.numel())
    rows = prepare(model).report.swaps
    assert type(decoder.norm) is torch.nn.LayerNorm
    assert all(row.layer != "FinalNorm" for row in rows)


def test_revert_gives_the_stock_norm_back() -> None:
    model = tiny_model("qwen3_5")
    norm = model.get_decoder().norm
    before, x = type(norm), torch.randn(1, 5, norm.weight.numel())
    prepared = prepare(model)
    kept = norm.forward  # as a wrapper keeps it
    prepared.revert()
    assert type(norm) is before
    assert torch.equal(kept(x), norm(x))
