"""Activation offloading: the same bits, what leaves and what stays, and every order of forwards and backwards."""

from __future__ import annotations

import copy
import gc
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from deltatune import CompileOptions, Sequences, offload_activations, prepare
from deltatune.compile.offloading import Offloading
from tiny import documents, tiny_model

CPU = torch.device("cpu")
#: as many tokens as in test_graphs.py, for one set of generated kernels
LENGTHS, TOTAL = [17, 5, 30, 1], 96
TRACED = CompileOptions(backend="aot_eager")


def offloaded(model: nn.Module, **bounds: int) -> AbstractContextManager[Offloading]:
    return offload_activations(model, device=CPU, **{"least_bytes": 1, "in_flight_bytes": 1, **bounds})


def batch(seed: int = 0) -> dict[str, Any]:
    tokens = nn.functional.pad(torch.cat(documents(LENGTHS, seed=seed)), (0, TOTAL - sum(LENGTHS)))[None]
    labels = tokens.masked_fill(torch.arange(TOTAL) >= sum(LENGTHS), -100)
    return {"input_ids": tokens, "labels": labels, "sequences": Sequences.from_lengths(LENGTHS, total=TOTAL)}


def prepared(family: str = "qwen3_5", *, adapters: bool = False, **settings: Any) -> Any:
    model = tiny_model(family, layers=4).train()
    if family.endswith("moe"):
        model.config.output_router_logits = True
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    prepare(model, **settings)
    return model


def step(model: Any, context: AbstractContextManager[Any], seed: int = 0) -> list[Tensor]:
    """The loss, and every gradient."""
    model.zero_grad(set_to_none=True)
    with context:
        loss = model(**batch(seed)).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("family", "adapters", "checkpointing", "compile"),
    [
        ("qwen3_5", True, "none", None),
        ("qwen3_5", True, "layer", None),
        ("qwen3_5", True, "none", TRACED),
        ("qwen3", True, 0.5, TRACED),
        ("qwen3_5", False, "none", None),
        ("qwen3_moe", False, "none", None),
        ("qwen3_moe", False, "layer", TRACED),
    ],
)
def test_losses_and_gradients_are_equal_bit_for_bit(
    family: str, adapters: bool, checkpointing: str | float, compile: CompileOptions | None
) -> None:
    model = prepared(family, adapters=adapters, compile=compile, checkpointing=checkpointing)
    expected = step(model, nullcontext())
    assert_equal(step(model, offloaded(model)), expected)


@pytest.mark.slow
def test_layers_compiled_by_inductor_are_no_other_graphs() -> None:
    model = tiny_model("qwen3", layers=2).train()
    done = prepare(model, compile=CompileOptions(), checkpointing="layer")
    first = step(model, offloaded(model), seed=1)  # compiles while the hooks are there
    assert_equal(step(model, nullcontext(), seed=1), first)
    assert_equal(step(model, offloaded(model), seed=2), step(model, nullcontext(), seed=2))
    report = done.compile_report
    assert report is not None
    assert report.graphs == {"full_attention_Qwen3MLP": 1}
    assert report.breaks == report.recompiles == []


@pytest.mark.parametrize("compile", [None, TRACED], ids=["eager", "traced"])
def test_with_layer_checkpointing_the_inputs_of_layers_leave(compile: CompileOptions | None) -> None:
    model = prepared("qwen3", compile=compile, checkpointing="layer")
    call, inputs = batch(), TOTAL * model.config.hidden_size * 4
    with offloaded(model, least_bytes=inputs) as moved:
        loss = model(**call).loss
    # those of four layers and of the final norm, and the gradient that the loss computes ahead
    assert (moved.moved, moved.moved_bytes) == (6, 6 * inputs)
    loss.backward()
    assert all(ref() is None for ref in moved._order)


def test_nothing_leaves_without_gradients() -> None:
    model = prepared("qwen3", checkpointing="layer")
    with offloaded(model) as moved, torch.no_grad():
        model(**batch())
    assert moved.moved == moved.moved_bytes == 0


class Products(nn.Module):
    """Saves its input, its weight and what is between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))
        self.register_buffer("scale", torch.full((8, 8), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.weight).sin() * self.scale).exp()


def leaf() -> Tensor:
    return torch.linspace(0, 1, 64).view(8, 8).requires_grad_()


def on_device(moved: Offloading) -> list[int]:
    """Which of the storages that left, in order, are there."""
    return [number for number, ref in enumerate(moved._order) if getattr(ref(), "_data", None) is not None]


def gradients(model: nn.Module, x: Tensor, context: AbstractContextManager[Any]) -> list[Tensor]:
    with context:
        out = model(x).sum()
    return [out.detach(), *torch.autograd.grad(out, [x, *model.parameters()])]


def test_weights_buffers_their_views_and_integers_stay() -> None:
    model, x = Products(), leaf()
    with offloaded(model) as moved:
        saved = [x * model.weight.t(), x[1:] * model.scale.flatten()[8:].view(7, 8), x[torch.arange(8)]]
    assert len(saved) == 3
    assert moved.moved == 1  # x


def test_small_storages_and_tensors_elsewhere_stay() -> None:
    model, x = Products(), leaf()
    with offloaded(model, least_bytes=257) as moved:
        x.exp()
        x[:0].exp()
    assert moved.moved == 0
    with offload_activations(model, device="meta", least_bytes=1) as moved:
        x.exp()
    assert moved.moved == 0


def test_a_storage_that_many_tensors_share_is_copied_once_and_whole() -> None:
    base = torch.arange(48.0).view(6, 8).requires_grad_().exp()
    with offloaded(Products()) as moved:
        parts = [base[:, ::2].t(), base[2:5, 1:], base.flatten()[7:]]
        saved = [part.square() for part in parts]
        assert (moved.moved, moved.moved_bytes) == (1, 48 * 4)
        leaf().square()
    assert on_device(moved) == []
    for part, result in zip(parts, saved, strict=True):
        back = result.grad_fn._saved_self
        assert torch.equal(back, part)
        assert (back.shape, back.stride()) == (part.shape, part.stride())
        assert back.untyped_storage().data_ptr() != part.untyped_storage().data_ptr()


def test_the_memory_of_what_left_is_given_back() -> None:
    x = leaf() * 2
    with offloaded(Products(), in_flight_bytes=2 * 64 * 4) as moved:
        for _ in range(5):
            x = x.sin()
    assert on_device(moved) == [3, 4]  # on their way
    x.sum().backward()
    assert [ref() for ref in moved._order] == [None] * 5


def test_backward_brings_back_what_comes_next_within_the_bound() -> None:
    chain = leaf() * 2
    with offloaded(Products(), in_flight_bytes=2 * 64 * 4) as moved:
        nodes = []
        for _ in range(8):
            chain = chain.sin()
            nodes.append(chain.grad_fn)

    assert on_device(moved) == [6, 7]
    _ = nodes[5]._saved_self
    assert on_device(moved) == [3, 4, 5, 6, 7]
    _ = nodes[0]._saved_self
    assert on_device(moved) == [0, 3, 4, 5, 6, 7]


def test_two_forwards_before_a_backward_and_one_that_never_comes() -> None:
    model, x, y = Products(), leaf(), leaf()
    expected = [gradients(model, x, nullcontext()), gradients(model, y * 2, nullcontext())]
    doubled = y * 2
    with offloaded(model) as first:
        one = model(x).sum()
    with offloaded(model):
        two = model(doubled).sum()
    with offloaded(model) as never:
        model(x)
    assert never.moved > 0
    assert all(ref() is None for ref in never._order)
    for out, of, wanted in ((one, x, expected[0]), (two, doubled, expected[1])):
        assert_equal([out.detach(), *torch.autograd.grad(out, [of, *model.parameters()])], wanted)
    assert all(ref() is None for ref in first._order)


def test_nothing_outlives_a_forward_that_fails() -> None:
    model, x = Products(), leaf()
    expected = gradients(model, x, nullcontext())
    left: list[Offloading] = []

    def fails() -> None:
        with offloaded(model) as moved:
            left.append(moved)
            1 / model(x).size(5)

    with pytest.raises(IndexError):
        fails()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    gc.collect()
    assert left[0].moved > 0
    assert on_device(left[0]) == []
    assert_equal(gradients(model, x, offloaded(model)), expected)


def test_a_retained_graph_is_gone_through_again() -> None:
    model, x = Products(), leaf()
    expected = gradients(model, x, nullcontext())
    with offloaded(model):
        out = model(x).sum()
    for _ in range(2):
        found = torch.autograd.grad(out, [x, *model.parameters()], retain_graph=True)
        assert_equal([out.detach(), *found], expected)


def test_second_derivatives() -> None:
    def second(context: AbstractContextManager[Any]) -> list[Tensor]:
        model, x = Products(), leaf()
        with context:
            (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            out = first.square().sum()
        return [out.detach(), *torch.autograd.grad(out, [x, model.weight])]

    assert_equal(second(offloaded(Products())), second(nullcontext()))


def test_backwards_in_threads() -> None:
    model, x = Products(), leaf()
    expected = gradients(model, x, nullcontext())
    with offloaded(model):
        outs = [model(x).sum() for _ in range(8)]
    found: dict[int, list[Tensor]] = {}

    def backward(index: int) -> None:
        grads = torch.autograd.grad(outs[index], [x, *model.parameters()])
        found[index] = [outs[index].detach(), *grads]

    threads = [threading.Thread(target=backward, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(8):
        assert_equal(found[index], expected)


def test_a_copy_of_the_model_between_forward_and_backward() -> None:
    model = prepared("qwen3", checkpointing="layer")
    expected = step(model, nullcontext())
    model.zero_grad(set_to_none=True)
    with offloaded(model):
        loss = model(**batch()).loss
        copied = copy.deepcopy(model)
    loss.backward()
    assert_equal([loss.detach(), *(p.grad for p in model.parameters())], expected)
    assert_equal(step(copied, offloaded(copied)), expected)


@pytest.mark.parametrize("least_bytes", [1, 2**20], ids=["moved", "kept"])
@pytest.mark.parametrize("part", ["whole", "view"])
def test_a_change_in_place_after_saving_is_an_error(least_bytes: int, part: str) -> None:
    x = leaf() * 2
    with offloaded(Products(), least_bytes=least_bytes):
        out = x.sin().sum()
    with torch.no_grad():
        (x if part == "whole" else x[0]).add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place after .* \[8, 8\], version 1, saved at 0"):
        out.backward()


def test_a_storage_that_changed_between_two_saves_leaves_again() -> None:
    x = leaf()
    y = x * 2
    with offloaded(Products()) as moved:
        saved = y.sin()
        y.detach().add_(1)
        again = y.sin()
    assert moved.moved == 2
    again.sum().backward(retain_graph=True)
    assert torch.equal(x.grad, 2 * (2 * x + 1).cos())
    with pytest.raises(RuntimeError, match="changed in place"):
        saved.sum().backward()


def test_checkpointed_functions_of_others_keep_their_inputs_outside() -> None:
    model, x = Products(), leaf()
    with offloaded(model) as moved:
        out = checkpoint(model, x, use_reentrant=False).sum()
    assert (moved.moved, moved.moved_bytes) == (1, 64 * 4)
    found = [out.detach(), *torch.autograd.grad(out, [x, model.weight])]
    assert_equal(found, gradients(model, x, nullcontext()))


def test_a_sharded_model_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(Products())
        with pytest.raises(ValueError, match="activations of a sharded model"):
            offloaded(model).__enter__()
    finally:
        dist.destroy_process_group()


def test_on_the_cpu_a_device_has_to_be_named() -> None:
    with (
        pytest.raises(ValueError, match="moves tensors from a GPU, and the model is on cpu"),
        offload_activations(Products()),
    ):
        pass


def test_storages_that_follow_one_another_at_an_address_are_not_taken_for_one() -> None:
    x = leaf()
    with offloaded(Products()) as moved:
        products = [x * factor for factor in range(40)]
        outs = [product.square().sum() for product in products]
    assert moved.moved == 40
    del products  # all of their memory at once
    known = {address for address, _ in moved._known}
    assert known.isdisjoint([other.untyped_storage()._cdata for other in [torch.empty(1) for _ in range(1000)]])
    for factor, out in enumerate(outs):
        assert torch.equal(torch.autograd.grad(out, x)[0], 2 * (x * factor) * factor)


def test_a_view_with_its_sign_in_a_bit_keeps_it() -> None:
    def gradient(context: AbstractContextManager[Any]) -> Tensor:
        x = leaf()
        with context:
            out = torch.view_as_complex(x.view(8, 4, 2)).conj().imag.square().sum()
        return torch.autograd.grad(out, x)[0]

    assert torch.equal(gradient(offloaded(Products())), gradient(nullcontext()))


def test_a_large_storage_goes_in_pieces_of_powers_of_two() -> None:
    x = torch.arange(11 * 2**20 + 3, dtype=torch.float32).requires_grad_()
    with offloaded(Products()) as moved:
        out = (x * 1).square().sum()
        leaf().square()
    storage = moved._order[0]()
    assert storage is not None
    assert [piece.numel() for piece in storage._host] == [2**25, 12 * 2**20 + 12]
    assert torch.equal(torch.autograd.grad(out, x)[0], 2 * x)
