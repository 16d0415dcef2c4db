"""Adapters of Parameters while other calls run: in threads, in the middle of one, between forward and backward."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from test_parameters import SEVERAL, adapted, tokens_of, wrappers
from torch import Tensor

from deltatune import prepare
from lora_cases import packed_call, relative
from tiny import documents


@pytest.fixture
def switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def ready(family: str = "qwen3_moe", **changes: Any) -> Any:
    model = adapted(family, **changes)
    prepare(model)
    return model


def generate(model: Any) -> Tensor:
    """Logits of the tokens that come."""
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(input_ids=torch.stack(documents([8, 8])), **settings).logits)


def train(model: Any, trained: list[torch.nn.Parameter]) -> Tensor:
    """Every gradient of a packed step, in a row."""
    grads = torch.autograd.grad(model(**packed_call()).loss, trained, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def steps(model: Any) -> Callable[[], Tensor]:
    # found once: what a call puts in a Parameter's place is none of them
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return lambda: train(model, trained)


def in_the_middle(wrapper: Any, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Starts ``run`` in a thread while the next call's experts compute, which go on after half a second; its result."""
    pool, started = ThreadPoolExecutor(1), []

    def hook(*_: Any) -> None:
        handle.remove()
        started.append(pool.submit(run))
        wait(started, timeout=0.5)

    handle = wrapper.get_base_layer().act_fn.register_forward_hook(hook)

    def result() -> Tensor:
        with pool:
            return started[0].result()

    return result


@pytest.mark.parametrize("family", SEVERAL)
def test_cached_calls_have_peft_s_values(family: str) -> None:
    model = adapted(family).eval()
    stock = copy.deepcopy(model)
    prepare(model)
    assert relative(generate(model), generate(stock)) < 1e-5


@pytest.mark.parametrize("names", [["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.gate.weight"]])
@pytest.mark.parametrize("call", ["generate", "train", "evaluate"])
def test_packed_steps_beside_other_calls(names: list[str], call: str, switches: None) -> None:
    model = ready(target_parameters=names)
    step = steps(model)
    others = {"generate": lambda: generate(model), "train": step, "evaluate": lambda: model(**packed_call()).loss}
    other = torch.no_grad()(others[call]) if call == "evaluate" else others[call]
    expected, theirs, stop = step(), other(), threading.Event()

    def until_stopped() -> list[Tensor]:
        results = [other()]
        while not stop.is_set():
            results.append(other())
        return results

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(until_stopped)
        try:
            found = [step() for _ in range(20)]
        finally:
            stop.set()
        results = beside.result()
    assert max(relative(one, expected) for one in found) < 1e-5
    assert max(relative(one, theirs) for one in results) < 1e-5
    assert relative(step(), expected) < 1e-5


def test_a_packed_step_in_the_middle_of_a_cached_call() -> None:
    model = ready().eval()
    step = steps(model)
    expected, theirs = step(), generate(model)
    inside = in_the_middle(wrappers(model)[0], step)
    assert relative(generate(model), theirs) < 1e-5
    assert relative(inside(), expected) < 1e-5


def test_a_call_in_the_middle_of_one_that_adds_factors_to_the_parameters() -> None:
    model = ready()
    wrapper = wrappers(model)[0]
    x, index, weights = tokens_of(model)

    def by_name() -> Tensor:
        y: Tensor = wrapper(x, top_k_index=index, top_k_weights=weights)
        return y

    expected, experts = by_name(), wrapper.get_base_layer()
    before = dict(experts.named_parameters())
    inside = in_the_middle(wrapper, by_name)
    assert torch.equal(by_name(), expected)
    assert torch.equal(inside(), expected)
    assert all(before[name] is parameter for name, parameter in experts.named_parameters())


def test_peft_s_own_forwards_run_one_at_a_time() -> None:
    """Of two models too: torch keeps one cache of parametrized weights."""
    models = [ready() for _ in range(2)]
    for model in models:
        wrappers(model)[0].lora_A["default"].register_forward_pre_hook(lambda *_: None)
    one, other = (wrappers(model)[0] for model in models)
    call = tokens_of(models[0])

    def changed() -> Tensor:
        """A call after the adapters became others, with one before it."""
        before: Tensor = other(*call).detach()
        other.lora_B["default"].weight.data.mul_(2)
        after: Tensor = other(*call).detach()
        other.lora_B["default"].weight.data.div_(2)
        return torch.stack([before, after])

    expected, alone = changed(), one(*call)
    assert relative(expected[0], expected[1]) > 1e-2
    for run, want in ((changed, expected), (lambda: one(*call), alone)):
        inside = in_the_middle(one, run)
        assert relative(one(*call), alone) < 1e-6
        assert relative(inside(), want) < 1e-6


def test_generation_between_a_forward_and_its_backward() -> None:
    model = ready().eval()
    step = steps(model)
    expected = step()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(**packed_call()).loss
    generate(model)
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    assert relative(torch.cat([grad.flatten() for grad in grads if grad is not None]), expected) < 1e-6
