"""What changes between a forward and its backward of experts with adapters, as ``test_between`` holds linear layers."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from test_between import CHANGES, REFUSED_BY_PEFT, REFUSED_HERE, TRACED, as_it_was, gradients, written, written_anew
from test_parameters import BOTH, adapted

from deltatune import prepare
from lora_cases import logits, relative


def another_adapter(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_parameters=BOTH, init_lora_weights=False))
    model.set_adapter("other")
    with torch.no_grad():
        logits(model)


def deleted(model: Any) -> None:
    another_adapter(model)
    model.delete_adapter("default")


def stepped(model: Any) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(trained, lr=0.1).step()


EXPERTS = CHANGES | {
    "another adapter": another_adapter,
    "deleted": deleted,
    "experts written": written("experts.base_layer.base_layer"),
    "optimizer step": stepped,
}
#: PEFT's backward keeps the effective weight, whose base may change.
WRITTEN = {*REFUSED_BY_PEFT, *REFUSED_HERE, "experts written", "optimizer step"}


@pytest.fixture(scope="module")
def compiled() -> Any:
    """A model whose graphs every change meets that leaves them of use."""
    model = adapted()
    prepare(model, compile=TRACED)
    return model


@pytest.mark.parametrize("change", EXPERTS)
def test_gradients_are_those_of_what_forward_used(change: str) -> None:
    model = adapted()
    prepare(model)
    assert_those_of_what_forward_used(model, change)


@pytest.mark.parametrize("change", EXPERTS)
def test_gradients_of_graphs_are_those_of_what_forward_used(change: str, compiled: Any) -> None:
    if change == "deleted":
        model = adapted()
        prepare(model, compile=TRACED)
        assert_those_of_what_forward_used(model, change)
        return
    with as_it_was(compiled):
        assert_those_of_what_forward_used(compiled, change)


def assert_those_of_what_forward_used(model: Any, change: str) -> None:
    untouched = adapted()
    prepare(untouched, lora="stock")
    ours = gradients(model, EXPERTS[change])
    if change in WRITTEN:
        assert isinstance(ours, str)
        assert "modified by an inplace operation" in ours
        return
    for found, want in zip(ours, gradients(untouched, lambda _: None), strict=True):
        assert relative(found, want) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["lora_A", "lora_B", "experts.base_layer.base_layer"])
def test_an_eager_backward_reads_the_storage_that_forward_read(what: str) -> None:
    model = adapted()
    untouched = copy.deepcopy(model)
    prepare(model)
    prepare(untouched, lora="stock")
    ours, expected = gradients(model, written_anew(what)), gradients(untouched, lambda _: None)
    for found, want in zip(ours, expected, strict=True):
        assert relative(found, want) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]])
def test_merging_experts_alone_is_refused_too(targets: list[str]) -> None:
    """As is what merged weights computed, when they are no longer merged."""
    model = adapted(target_modules=None, target_parameters=targets)
    prepare(model)
    model.get_input_embeddings().requires_grad_()
    for change in (model.merge_adapter, model.unmerge_adapter):
        found = gradients(model, lambda _, change=change: change())
        assert isinstance(found, str)
        assert "modified by an inplace operation" in found
