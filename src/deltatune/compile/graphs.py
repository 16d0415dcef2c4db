"""Compiling decoder layers, or the whole text model, without a graph break; counting what the compiler did."""

from __future__ import annotations

import functools
import itertools
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deltatune.compile.partition import Partitioner, recompute_functions
from deltatune.hf.hooks import hooks_inside
from deltatune.options import CompileOptions
from deltatune.phases import phase
from deltatune.state import State, bound

__all__ = [
    "CompileReport",
    "GraphBreakError",
    "Graphs",
    "compile_options",
    "eager",
    "fresh_code",
    "graphs_of",
    "of_kind",
]

Forward = Callable[..., Any]

#: Ends the names of graphs that take no gradient.
EVALUATION = " (no grad)"
INFERENCE = " (inference mode)"

#: In the names of training's graphs for layers in front of everything that trains: they have no backward.
FROZEN = " (frozen)"


class GraphBreakError(RuntimeError):
    """A layer could not be captured as one graph; the message holds the compiler's reason."""


@dataclass
class CompileReport:
    """What the compiler did so far.

    Attributes:
        graphs: name of a layer type -> graphs compiled for it; calls without gradients (evaluation) have graphs of
            their own, under the name with ``EVALUATION`` or ``INFERENCE`` behind it, and so have layers in front of
            everything that trains (``FROZEN``).
        breaks: reasons of graph breaks; always empty under ``strict``, which stops instead.
        recompiles: reasons for every graph after a layer type's first.
        seconds: time spent compiling.
    """

    graphs: dict[str, int] = field(default_factory=dict)
    breaks: list[str] = field(default_factory=list)
    recompiles: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as saved with a run."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


class Graphs:
    """The compiled functions of one prepared model at one checkpointing setting, made when first called, by name.

    Each name gets a code object of its own: the compiler keeps its cache and its recompile limit with the code object,
    so two models in one process, or two types of layer, never count against each other. Layers with something hung on
    modules inside them have graphs, and names, of their own.
    """

    def __init__(self, options: CompileOptions, checkpointing: str | float) -> None:
        self.options = options
        self.checkpointing = checkpointing
        self.report = CompileReport()
        self.expected = 0  # graphs of a forward, one for each type of layer, for progress to say
        # under scope="model" the layers checkpoint themselves while they are traced
        self._checkpointed = checkpointing == "layer" and options.scope == "layer"
        # by the identities of the functions that hang inside, whose death takes out what was compiled with them
        self._compiled: dict[tuple[object, ...], tuple[str, list[object], dict[object, Forward]]] = {(): ("", [], {})}
        self._hook_sets, self._numbers = weakref.WeakKeyDictionary[nn.Module, int](), itertools.count(1)
        self._lock, self._compiling = threading.Lock(), threading.RLock()
        self._called: set[tuple[str, Forward]] = set()

    def run(self, name: str, forward: Forward, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``forward(module, *args, **kwargs)``, compiled.

        Raises:
            GraphBreakError: a graph break, or more recompiles than the compiler allows, under ``strict``.
        """
        if torch.is_inference_mode_enabled():
            name += INFERENCE
        elif not torch.is_grad_enabled():
            name += EVALUATION
        name += _kind.get()
        with self._lock:
            name, function = self._function(name, forward, module)
        broken = _num_breaks()
        try:
            with _whole_under_ddp(), self._alone_at_first((name, forward)):
                result = function(module, *args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            last = self.report.recompiles[-1] if self.report.recompiles else str(error)
            raise GraphBreakError(
                f"{name} was compiled {self.report.graphs.get(name, 0)} times, the most the compiler allows (last: "
                f"{last}); keep batches at one shape [B, T], or leave CompileOptions(dynamic=None)"
            ) from error
        except torch._dynamo.exc.Unsupported as error:
            raise GraphBreakError(f"{name} does not compile as one graph: {error}") from error
        if _num_breaks() != broken:
            reasons = torch._dynamo.utils.counters["graph_break"]
            self.report.breaks.extend(f"{name}: {reason}" for reason in list(reasons)[-(_num_breaks() - broken) :])
        return result

    def _function(self, name: str, forward: Forward, module: nn.Module) -> tuple[str, Forward]:
        """What runs a module with the hooks that hang inside it now, and its name.

        Other hooks in one module count under the compiler's recompile limit; hooks of its own in each module do not.
        """
        hung = [
            (where, part)
            for where, hook in hooks_inside(module)
            for part in (getattr(hook, "__self__", hook), getattr(hook, "__func__", hook))
        ]
        key = tuple((where, id(part)) for where, part in hung)
        if key not in self._compiled:
            limit = torch._dynamo.config.recompile_limit
            count = self._hook_sets[module] = self._hook_sets.get(module, 0) + 1
            reason = (
                f"{name}: hooks inside one module were replaced ({count} sets so far), and each set takes a graph, of "
                f"which the compiler allows {limit}; register a hook once, and let it read what changes"
            )
            if count > limit and self.options.strict:
                raise GraphBreakError(reason)
            if 1 < count <= limit + 1:
                (self.report.recompiles if count <= limit else self.report.breaks).append(reason)
            if count > limit:
                return f"{name} (eager)", _traced(forward, checkpointed=self._checkpointed)
            # a dead reference calls it with itself, the default of pop; at any time, so it takes no lock
            drop = functools.partial(self._compiled.pop, key)
            parts = [weakref.ref(part, drop) if type(part).__weakrefoffset__ else part for _, part in hung]
            self._compiled[key] = f" (hooks {next(self._numbers)})", parts, {}
        suffix, _, functions = self._compiled[key]
        name += suffix
        if (name, forward) not in functions:
            functions[name, forward] = self._compile(name, forward)
        return name, functions[name, forward]

    @contextmanager
    def _alone_at_first(self, key: tuple[str, Forward]) -> Iterator[None]:
        """A function's first call compiles it; the compiler would do so again for every thread that comes meanwhile."""
        if key in self._called:
            yield
            return
        name, _ = key
        kind = name.partition(" (")[2]
        number = 1 + sum(called.partition(" (")[2] == kind for called, _ in self._called)
        with self._compiling, phase(f"compiling {name}, graph {number} of {max(number, self.expected)}"):
            yield
            self._called.add(key)

    def _compile(self, name: str, forward: Forward) -> Forward:
        checkpointed = self._checkpointed and FROZEN not in name
        function = fresh_code(_traced(forward, checkpointed=checkpointed), name)
        # the compiler keeps every backend for good, and with it whatever it holds
        backend = functools.partial(type(self)._backend, weakref.proxy(self), name, weakref.ref(function.__code__))
        compiled: Forward = torch.compile(
            function, fullgraph=self.options.strict, dynamic=self.options.dynamic, backend=backend
        )
        return compiled

    def _backend(self, name: str, code: weakref.ref[types.CodeType], graph: Any, inputs: Any, **_: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        started = time.perf_counter()
        budget = self.checkpointing if isinstance(self.checkpointing, float | int) else 1.0
        recompute_functions(graph)
        partitioner = Partitioner(float(budget))
        if self.options.backend == "inductor":
            patches = {**self.options.options, "custom_partitioner_fn": partitioner}
            compiled: Any = compile_fx(graph, inputs, config_patches=patches)
        else:
            compiled = _traced_alone(graph, inputs, partitioner)
        self.report.seconds += time.perf_counter() - started
        count = self.report.graphs.get(name, 0)
        self.report.graphs[name] = count + 1
        if count:
            reasons = torch._dynamo.utils.guard_failures.get(code()) or ["no reason given by the compiler"]
            self.report.recompiles.append(f"{name}: {reasons[-1]}")
        if count + 1 == torch._dynamo.config.recompile_limit and not self.options.strict:
            self.report.breaks.append(f"{name}: compiled {count + 1} times, the limit; what differs again runs eagerly")
        return compiled


def _traced_alone(graph: Any, inputs: Any, partitioner: Partitioner) -> Any:
    """The graph in forward and backward halves that run eagerly, as torch's "aot_eager_decomp_partition" runs them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import get_nop_func
    from torch._inductor.decomposition import select_decomp_table

    nop = get_nop_func()
    return aot_autograd(
        fw_compiler=nop,
        bw_compiler=nop,
        decompositions=select_decomp_table,
        partition_fn=functools.partial(partitioner, compiler="inductor"),
    )(graph, inputs)


def _traced(forward: Forward, *, checkpointed: bool) -> Forward:
    """The function that is traced; the recomputation of a checkpointed layer is part of its graph."""

    def traced(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (checkpointed and module.training and torch.is_grad_enabled()):
            return forward(module, *args, **kwargs)
        return torch.utils.checkpoint.checkpoint(
            functools.partial(forward, module, **kwargs), *args, use_reentrant=False
        )

    return traced


def _whole_under_ddp() -> AbstractContextManager[None]:
    """Keeps the compiler from cutting a graph along the gradient buckets of a DistributedDataParallel around it.

    The cut exists so that gradients travel while backward runs; between layers they do so anyway.
    """
    if DistributedDataParallel._active_ddp_module is None:
        return nullcontext()
    whole: AbstractContextManager[None] = torch._dynamo.config.patch(optimize_ddp=False)
    return whole


_serial = itertools.count(1)


def fresh_code(function: Forward, name: str) -> types.FunctionType:
    """The function with a code object of its own, which the compiler counts apart; ``name`` is what it is called."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{name}_{next(_serial)}")
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def _num_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def graphs_of(state: State) -> Graphs:
    """The compiled functions of the layers that share ``state``, at the checkpointing setting in force."""
    assert state.options.compile is not None
    setting = state.checkpointing
    # two threads at their first calls get the graphs of one of them
    return state.graphs.get(setting) or state.graphs.setdefault(setting, Graphs(state.options.compile, setting))


#: Ends the names of graphs for calls of another kind than the rest, in this thread (or task).
_kind: ContextVar[str] = ContextVar("deltatune_kind_of_graph", default="")


def of_kind(kind: str) -> AbstractContextManager[object]:
    """Layers called inside have graphs of their own, so that no call of one kind recompiles another's."""
    return bound(_kind, f"{_kind.get()} ({kind})")


#: Prepared models whose layers run eagerly in this thread (or task), by what their layers share.
_eager: ContextVar[tuple[State, ...]] = ContextVar("deltatune_eager", default=())


def eager(state: State) -> AbstractContextManager[object]:
    """The layers that share ``state`` run eagerly inside, in this thread alone; their graphs stay."""
    return bound(_eager, (*_eager.get(), state))


def compile_options(state: State) -> CompileOptions | None:
    """How a call of a layer that shares ``state`` is compiled, here and now."""
    if torch.compiler.is_compiling() or state not in _eager.get():
        return state.options.compile
    return None
