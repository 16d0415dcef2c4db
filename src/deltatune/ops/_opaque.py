"""Ops that are opaque to the compiler: schema, kernel, fake, gradient, cost and first-order refusal in one place.

A decorated kernel becomes ``torch.ops.deltatune.<its name>``, with the schema that its annotations say::

    @opaque(fake=_backward_fake, flops=_backward_flops, gradient_of="my_op")
    def my_op_backward(grad: Tensor, x: Tensor) -> Tensor: ...

    @opaque(fake=_fake, flops=_flops, setup_context=_setup_context, backward=_differentiate)
    def my_op(x: Tensor) -> Tensor: ...

An op without ``backward`` is the end of the line: autograd records it, and differentiating it is a RuntimeError. So a
backward that is an op needs no more than ``gradient_of`` to refuse a second derivative. What is no op of ours, or keeps
nothing that leads back to its inputs, is wrapped in ``first_order``; the backward of a Function of its own in
``first_order_backward``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    "first_order",
    "first_order_backward",
    "is_kept",
    "is_never_kept",
    "kernel_of",
    "opaque",
    "rebuilt_places",
    "workspace_bytes",
]

_library: Any = torch.library.Library
_LIBRARY = _library("deltatune", "FRAGMENT")
_R = TypeVar("_R")
_Backward = Callable[..., tuple[Tensor | None, ...]]
_workspaces: dict[object, Callable[..., int]] = {}
_rebuilt: dict[object, tuple[int, ...]] = {}
_kernels: dict[Any, Any] = {}
_kept: set[object] = set()
_never_kept: set[object] = set()
_KERNEL: Final = "_kernel"


def opaque(
    *,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    raw_flops: bool = False,
    workspace: Callable[..., int] | None = None,
    rebuilt: tuple[int, ...] = (),
    kept: bool = False,
    never_kept: bool = False,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    gradient_of: str | None = None,
    remedy: str = "detach its input",
) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Registers the kernel it decorates; see the top of this file.

    Args:
        fake: shapes and dtypes of the results, for the same arguments.
        flops: of a call, from the shapes of the arguments; None counts none, as torch does for elementwise work.
        raw_flops: hand ``flops`` the tensors themselves.
        workspace: bytes the kernel holds for a while besides its arguments and results, from the arguments.
        rebuilt: places of arguments that a compiled backward builds again where that is cheap, and does not keep.
        kept: no activation checkpointing computes the result again, such as one that other processes take part in.
        never_kept: a compiled backward computes the result again, and keeps none: it is much larger than its arguments.
        setup_context: ``(ctx, inputs, output)``, as ``torch.library.register_autograd`` takes it.
        backward: ``(ctx, *grads)`` to a gradient for every input, of which none is a list; grads are one tuple for an
            op that gives a list.
        gradient_of: the public op whose gradient this is, for messages; its own name by default.
        remedy: what to do for want of its derivative.

    Inside the kernel autocast is off: it would round what accumulates in fp32.

    Raises:
        TypeError: at registration, of an argument that has a default or goes by keyword alone.
    """

    def register(kernel: Callable[..., _R]) -> Callable[..., _R]:
        name = kernel.__name__
        _check_arguments(kernel)
        schema = torch.library.infer_schema(kernel, mutates_args=())
        made: list[Any] = []
        for called in (name, name + _KERNEL):
            _LIBRARY.define(called + schema)
            _LIBRARY.impl(called, _without_autocast(kernel), "CompositeExplicitAutograd")
            torch.library.register_fake(f"deltatune::{called}", fake, lib=_LIBRARY)
            packet: Any = getattr(torch.ops.deltatune, called)
            register_flop_formula(packet, get_raw=raw_flops)(flops or _no_flops)
            if workspace is not None:
                _workspaces[packet.default] = workspace
            made.append(packet.default)
        op, _kernels[op] = made
        refusal = functools.partial(_refuse, _message(gradient_of or name, remedy))
        _record(op, schema, setup_context, backward or refusal)
        if rebuilt:
            _rebuilt[op] = rebuilt
        if kept:
            _kept.update(made)
        if never_kept:
            _never_kept.update(made)
        call: Callable[..., _R] = op
        return call

    return register


def workspace_bytes(op: object, args: Iterable[object]) -> int:
    """What an op of a graph holds besides its arguments and results while it runs; 0 where that is not declared."""
    return _workspaces[op](*args) if op in _workspaces else 0


def kernel_of(op: object) -> Any:
    """The op without what autograd needs, for graphs that are divided already: one trip through Python less."""
    return _kernels.get(op, op)


def is_kept(op: object) -> bool:
    """Whether the result of an op of a graph stays for backward under every activation checkpointing."""
    return op in _kept


def is_never_kept(op: object) -> bool:
    """Whether a compiled backward computes the result of an op of a graph again rather than keep it."""
    return op in _never_kept


def rebuilt_places(op: object) -> tuple[int, ...]:
    """The arguments of an op of a graph that backward builds again; none of most."""
    return _rebuilt.get(op, ())


def first_order(op: str, result: Tensor, *inputs: Tensor, remedy: str = "detach its input") -> Tensor:
    """``result`` of an op, whose second derivatives to the inputs raise, where its own would be left out in silence.

    ``op``, the public one, and ``remedy``, what to do for want of the derivative, are for the message.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return result  # a compiled graph refuses by itself
    # slices without elements lead back to the inputs and keep nothing of them
    ends = [x[:0].clone() for x in inputs if x.requires_grad]
    linked: Tensor = _link(_message(op, remedy), result, *ends)
    return linked


def first_order_backward(op: str, remedy: str = "detach its input") -> Callable[[_Backward], _Backward]:
    """For the backward of a Function that has no second derivative; torch's ``once_differentiable`` with every refusal.

    That one refuses only where a gradient that comes in can be differentiated. What comes out depends on saved tensors
    too, and behind a plain sum the gradient that comes in is a constant.

    Autocast is off inside, where a backward is called within it: products would get operands of two dtypes.
    """

    def decorate(backward: _Backward) -> _Backward:
        eager = _without_autocast(backward)

        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            if torch.compiler.is_compiling():
                return backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return eager(ctx, *grads)
            with torch.no_grad():
                found = eager(ctx, *grads)
            sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None]
            message = _message(op, remedy)
            return tuple(None if grad is None else _refuse_later(message, grad, *sources) for grad in found)

        return run

    return decorate


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, result: Tensor, *ends: Tensor) -> Tensor:
        ctx.message = message
        ctx.save_for_backward(*ends)
        return result.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            grad = _refuse_later(ctx.message, grad, *ctx.saved_tensors)
        return None, grad, *(None for _ in ctx.saved_tensors)


class _Refused(torch.autograd.Function):
    """A gradient that cannot be differentiated: whoever tries comes through here."""

    @staticmethod
    def forward(ctx: Any, message: str, grad: Tensor, *_: Tensor) -> Tensor:
        ctx.message = message
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(ctx.message)


_link: Callable[..., Tensor] = _FirstOrder.apply
_refuse_later: Callable[..., Tensor] = _Refused.apply


def _message(op: str, remedy: str) -> str:
    return f"{op} has no second derivative; call backward() without create_graph=True, or {remedy}"


def _refuse(message: str, _ctx: Any, *_: object) -> tuple[None, ...]:
    raise RuntimeError(message)


def _record(op: Any, schema: str, setup_context: Callable[..., None] | None, differentiate: Callable[..., Any]) -> None:
    """Makes autograd record the op, by a Function under the Autograd key: cheaper than torch's own registration.

    Where nothing is recorded, as inside a compiled graph, this costs no more than passing on.
    """
    gives_list = schema.endswith("-> Tensor[]")

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            args = inputs[-1]
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            if setup_context is not None:
                setup_context(ctx, args, output)
            return tuple(output) if gives_list else output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            found = differentiate(ctx, grads) if gives_list else differentiate(ctx, *grads)
            found = found if isinstance(found, tuple) else (found,)
            return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))

    recorded: Callable[..., Any] = Recorded.apply

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        # autograd looks for tensors among arguments, not inside them
        output = recorded(*args, *_inside(args), args)
        return list(output) if gives_list else output

    _LIBRARY.impl(op._schema.name.partition("::")[2], run, "Autograd")


def _check_arguments(kernel: Callable[..., Any]) -> None:
    """The dispatcher hands on no argument that equals its default, and autograd's Functions none by keyword."""
    for name, argument in inspect.signature(kernel).parameters.items():
        if argument.kind is inspect.Parameter.KEYWORD_ONLY or argument.default is not inspect.Parameter.empty:
            raise TypeError(
                f"{kernel.__name__}: arguments of an opaque op go by position and have no default; "
                f"change {name!r} to one that does, and give the default in a function that calls the op"
            )


def _inside(args: Iterable[Any]) -> Iterator[Any]:
    """What the lists among arguments hold."""
    return itertools.chain.from_iterable(x for x in args if isinstance(x, list | tuple))


def _is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def _without_autocast(kernel: Callable[..., _R]) -> Callable[..., _R]:
    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> _R:
        # for every call of an op, so the usual case first
        first = args[0] if isinstance(args[0], Tensor) else next(filter(_is_tensor, (*args, *_inside(args))))
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return kernel(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return kernel(*args, **kwargs)

    return run


def _no_flops(*_: object, **__: object) -> int:
    return 0
