"""Activation offloading on a GPU: less memory, the same gradients, and nobody waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune import CompileOptions, PackedCollator, offload_activations, prepare

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS = 16384
#: Head dims that the GPU's kernels take; the input of a layer is 8 MiB.
SIZES = {
    "hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}  # fmt: skip
INPUT = TOKENS * SIZES["hidden_size"] * 2


def model_of(layers: int, **settings: Any) -> Any:
    from tiny import tiny_model

    model = tiny_model("qwen3", layers=layers, dtype=torch.bfloat16, **SIZES).cuda().train()
    prepare(model, **settings)
    return model


def batch(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    samples = [{"input_ids": torch.randint(1, 96, (n,), generator=generator)} for n in (4000, 5, 4000, 4000, 3000, 300)]
    made = PackedCollator(tokens_per_batch=TOKENS, pad_token_id=0)(samples)
    return {name: made[name].to("cuda") for name in ("input_ids", "labels", "position_ids", "sequences")}


def step(model: nn.Module, call: dict[str, Any], context: AbstractContextManager[Any]) -> Tensor:
    model.zero_grad(set_to_none=True)
    with context:
        loss = model(**call).loss
    loss.backward()
    return torch.cat([loss.detach().float().view(1), *(p.grad.flatten().float() for p in model.parameters())])


def peak(model: nn.Module, call: dict[str, Any], context: AbstractContextManager[Any]) -> int:
    """Bytes of a step beyond what is there before it."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model, call, context)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def sync_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compile", [None, CompileOptions()], ids=["eager", "compiled"])
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_gradients_are_equal(checkpointing: str, compile: CompileOptions | None) -> None:
    model = model_of(4, compile=compile, checkpointing=checkpointing)
    call = batch()
    expected, again = step(model, call, nullcontext()), step(model, call, nullcontext())
    # atomic sums of attention's backward may differ from one step to the next
    limit = 3 * (expected - again).abs().max()
    for bound in (INPUT, 4 * INPUT, 2**29):
        for _ in range(3):
            found = step(model, call, offload_activations(model, in_flight_bytes=bound))
            assert (found - expected).abs().max() <= limit
            assert found[0] == expected[0]


@pytest.mark.parametrize("compile", [None, CompileOptions()], ids=["eager", "compiled"])
def test_peak_memory_falls_by_the_inputs_of_layers(compile: CompileOptions | None) -> None:
    layers, call = 16, batch()
    model = model_of(layers, compile=compile, checkpointing="layer")
    step(model, call, nullcontext())
    without = peak(model, call, nullcontext())
    with_offloading = peak(model, call, offload_activations(model, in_flight_bytes=2 * INPUT))
    # the one in use, two on their way back, and what the loss saved, which left last
    assert with_offloading <= without - (layers - 8) * INPUT


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_a_step_makes_no_host_wait_for_the_device(checkpointing: str) -> None:
    model = model_of(4, compile=CompileOptions(), checkpointing=checkpointing)
    for seed in range(2):
        step(model, batch(seed), offload_activations(model, in_flight_bytes=2 * INPUT))
    call = batch(2)
    with sync_is_an_error():
        step(model, call, offload_activations(model, in_flight_bytes=2 * INPUT))


def test_pinned_memory_of_a_step_serves_the_next() -> None:
    model, call = model_of(4, checkpointing="layer"), batch()
    for _ in range(2):
        step(model, call, offload_activations(model))
        torch.cuda.synchronize()
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    step(model, call, offload_activations(model))
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before


def chain(x: Tensor, length: int) -> Tensor:
    for _ in range(length):
        x = x.sin()
    return x


def test_memory_is_not_used_before_a_copy_is_through() -> None:
    """Copies that are slower than what is computed, and memory that is wanted again at once."""
    weight = nn.Linear(1, 1, device="cuda")

    def gradient(context: AbstractContextManager[Any]) -> Tensor:
        x = torch.linspace(-3, 3, 2**24, device="cuda", requires_grad=True)
        with context:
            out = chain(x * 1, 40).sum()
        out.backward()
        assert x.grad is not None
        return x.grad

    expected = gradient(nullcontext())
    for bound in (1, 2**27, 2**30):
        for _ in range(3):
            assert torch.equal(gradient(offload_activations(weight, in_flight_bytes=bound)), expected)


def test_memory_of_a_copy_that_nobody_takes_is_not_written_again() -> None:
    weight = nn.Linear(1, 1, device="cuda")
    for _ in range(5):
        x = torch.linspace(-3, 3, 2**24, device="cuda", requires_grad=True)
        with offload_activations(weight, in_flight_bytes=2**28):
            nodes = []
            for _ in range(12):
                x = x.sin()
                nodes.append(x.grad_fn)
        _ = nodes[6]._saved_self  # asks for those before it
        del nodes, x, _
        fresh = torch.zeros(12, 2**24, device="cuda")
        torch.cuda.synchronize()
        assert not fresh.any()


def test_a_tensor_of_another_stream_stays() -> None:
    x = torch.zeros(2**20, device="cuda", requires_grad=True)
    with offload_activations(nn.Linear(1, 1, device="cuda")) as moved, torch.cuda.stream(torch.cuda.Stream()):
        x.sin()
    assert moved.moved == 0
