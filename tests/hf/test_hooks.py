"""What counts as hung on a module, and which head may be read."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from deltatune.hf.hooks import hooks_inside, hooks_of, is_hooked, plain_linear


def _own_forward(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x: x, module)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward with kwargs": lambda m: m.register_forward_hook(lambda *_: None, with_kwargs=True),
    "always called": lambda m: m.register_forward_hook(lambda *_: None, always_call=True),
    "pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "pre with kwargs": lambda m: m.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "full backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "old backward": lambda m: m.register_backward_hook(lambda *_: None),
    "own forward": _own_forward,
    "accelerate": lambda m: accelerate.hooks.add_hook_to_module(m, accelerate.hooks.ModelHook()),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
    "spectral norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("way", WAYS)
def test_everything_that_can_be_hung_on_a_module_is_seen(way: str) -> None:
    linear = nn.Linear(3, 3, bias=False)
    assert hooks_of(linear) == ()
    assert plain_linear(linear)
    WAYS[way](linear)
    assert is_hooked(linear)
    assert not plain_linear(linear)


def test_hooks_of_the_process_count_for_every_module() -> None:
    linear = nn.Linear(3, 3, bias=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert is_hooked(linear)
    finally:
        handle.remove()
    assert not is_hooked(linear)


def test_a_hook_that_was_taken_off_is_gone_and_those_of_children_are_theirs() -> None:
    linear = nn.Linear(3, 3, bias=False)
    linear.register_forward_hook(lambda *_: None).remove()
    assert not is_hooked(linear)
    outer = nn.Sequential(linear)
    linear.register_forward_hook(lambda *_: None)
    assert not is_hooked(outer)


def test_a_head_with_a_bias_or_of_another_class_is_not_plain() -> None:
    assert not plain_linear(nn.Linear(3, 3))
    assert not plain_linear(nn.LazyLinear(3, bias=False))
    assert not plain_linear(nn.Identity())


def test_it_can_be_asked_in_a_graph() -> None:
    linear = nn.Linear(3, 3, bias=False)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x: torch.Tensor) -> torch.Tensor:
        return linear(x) if is_hooked(linear) else torch.nn.functional.linear(x, linear.weight)

    x = torch.randn(2, 3)
    torch.testing.assert_close(run(x), linear(x))


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("accelerate", "parametrization", "spectral norm")])
def test_what_hangs_inside_tells_which_graph_a_module_needs(way: str) -> None:
    root = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU())
    assert hooks_inside(root) == []
    WAYS[way](root[1])
    ((where, function),) = hooks_inside(root)
    assert where.startswith("1")
    assert callable(function)
    WAYS[way](root)
    assert len(hooks_inside(root)) == 1  # its own run around the graph


def test_one_function_called_with_and_without_keyword_arguments_is_two_kinds_of_hook() -> None:
    def hook(*_: Any) -> None:
        pass

    places = set()
    for with_kwargs in (True, False):
        root = nn.Sequential(nn.Linear(3, 3))
        root[0].register_forward_hook(hook, with_kwargs=with_kwargs)
        ((where, function),) = hooks_inside(root)
        assert function is hook
        places.add(where)
    assert len(places) == 2
