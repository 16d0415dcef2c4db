"""Calls of one prepared model from several threads and tasks: what one call is does not change another."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deltatune import CompileOptions, Sequences, prepare, verify
from deltatune.compile.graphs import compile_options
from packed_cases import alone, packed_call
from tiny import documents, tiny_model

COMPILED = CompileOptions(backend="aot_eager")


@pytest.fixture
def switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def ready(compile: CompileOptions | None = None, *, family: str = "qwen3_5") -> Any:
    model = tiny_model(family).eval()
    prepare(model, compile=compile)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**packed_call()).logits


def generate(model: Any) -> None:
    model.generate(documents([8])[0][None], max_new_tokens=4, do_sample=False, pad_token_id=0)


def in_thread(target: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        found.append(target())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_moe"])
def test_packed_calls_are_right_while_another_thread_generates(family: str, switches: None) -> None:
    model = ready(family=family)
    expected, stop = logits(model), threading.Event()

    def forever() -> None:
        while not stop.is_set():
            generate(model)

    thread = threading.Thread(target=forever)
    thread.start()
    try:
        found = [logits(model) for _ in range(40)]
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(one, expected) for one in found)
    assert torch.equal(logits(model), expected)


def test_a_packed_call_in_the_middle_of_a_cached_one() -> None:
    model = ready()
    expected, found = logits(model), []
    layer = model.model.layers[0]
    hook = layer.register_forward_hook(lambda *_: found.append(in_thread(lambda: logits_without(hook, model))))
    generate(model)
    assert found
    assert all(torch.equal(one, expected) for one in found)


def logits_without(hook: Any, model: Any) -> torch.Tensor:
    hook.remove()  # the packed call passes the same layer
    return logits(model)


def test_a_cached_call_that_fails_half_way_leaves_nothing() -> None:
    model = ready()
    expected = logits(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("half-way")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        generate(model)
    hook.remove()
    assert torch.equal(logits(model), expected)


def test_a_generator_that_is_left_in_a_cached_call_leaves_nothing() -> None:
    model = ready()
    expected = logits(model)

    def tokens() -> Iterator[torch.Tensor]:
        cache = None
        token = documents([1])[0][None]
        while True:
            out = model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            yield token

    left = tokens()
    next(left)
    assert torch.equal(logits(model), expected)
    next(left)
    assert torch.equal(logits(model), expected)


def test_tasks_that_take_turns() -> None:
    model = ready()
    expected = logits(model)

    async def packed() -> list[torch.Tensor]:
        found = []
        for _ in range(5):
            found.append(await asyncio.to_thread(logits, model))
            await asyncio.sleep(0)
        return found

    async def cached() -> None:
        for _ in range(5):
            await asyncio.to_thread(generate, model)

    async def both() -> list[torch.Tensor]:
        found, _ = await asyncio.gather(packed(), cached())
        return found

    assert all(torch.equal(one, expected) for one in asyncio.run(both()))


def test_a_probe_in_another_thread_leaves_this_one_compiled() -> None:
    model = ready(COMPILED)
    expected = logits(model)
    state, inside = model._deltatune, []
    hook = model.model.layers[0].register_forward_hook(
        lambda *_: inside.append((compile_options(state), in_thread(lambda: compile_options(state))))
    )
    assert in_thread(lambda: verify(model, lengths=(3, 5))).ok
    hook.remove()
    assert (None, COMPILED) in inside
    assert compile_options(state) is COMPILED
    assert torch.equal(logits(model), expected)


def test_two_threads_call_compiled_layers(switches: None) -> None:
    model = tiny_model("qwen3_5").train()
    prepared = prepare(model, compile=COMPILED)
    call = packed_call(labels=packed_call()["input_ids"])
    losses: list[float] = []

    def train() -> None:
        losses.extend(float(model(**call).loss.detach()) for _ in range(5))

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses == [pytest.approx(alone(tiny_model("qwen3_5").train()), rel=1e-5)] * 15
    assert prepared.compile_report is not None
    assert set(prepared.compile_report.graphs.values()) == {1}
    assert prepared.compile_report.breaks == []


def test_another_model_called_in_the_middle_of_a_cached_call_keeps_its_documents_apart() -> None:
    cached, other = (tiny_model("qwen3", seed=seed).eval() for seed in (0, 1))
    prepare(cached)
    prepare(other)
    call = {"input_ids": torch.cat(documents([9, 14]))[None], "sequences": Sequences.from_lengths([9, 14])}
    found = []
    with torch.no_grad():
        expected = other.model(**call).last_hidden_state
        cached.model.layers[0].mlp.register_forward_hook(
            lambda *_: found.append(other.model(**call).last_hidden_state) and None
        )
        cached(documents([8])[0][None], use_cache=True)
    assert len(found) == 1
    assert torch.equal(found[0], expected)
