"""What a compiled layer keeps for backward, read off its graph: the layer is traced and partitioned, nothing runs."""

# K what forward keeps for backward: computed values and the layer's input, not parameters, not what all layers share

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from deltatune.compile.graphs import Graphs
from deltatune.compile.partition import Partitioner, kept_results
from deltatune.ops._opaque import workspace_bytes
from deltatune.options import CompileOptions

__all__ = ["LayerMemory", "Setting", "trace_layer"]

Setting = str | float

# Inductor computes results of these where they are read; whatever has a FLOP formula is a kernel of its own.
_FUSED_NAMESPACES: Final = ("aten", "prims")


class LayerMemory(NamedTuple):
    """Bytes of one decoder layer at one checkpointing setting.

    Attributes:
        kept: K, from forward to backward; the layer's input included, which it shares with no other.
        shared: inputs kept that all layers have in common (rotary tables, boundaries): once a model.
        backward_peak: the most at once in its backward: what is left of K, the gradient that comes in, and what
            backward computes, the gradients of its parameters as they appear.
    """

    kept: int
    shared: int
    backward_peak: int


def trace_layer(
    forward: Callable[..., Any],
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    settings: Iterable[Setting],
    options: CompileOptions | None = None,
) -> dict[Setting, LayerMemory]:
    """Traces ``forward(module, *args, **kwargs)`` once, and partitions its graph for every setting.

    ``kept`` is exact: the tensors that the compiled forward hands to its backward. ``backward_peak`` walks the backward
    graph in order, with the workspaces that ops declare, and leaves out what Inductor fuses. With ``"layer"``
    the whole forward is done again before the first gradient needs it, so its peak is that of ``"none"``; results that
    are never computed again are kept beside the input.

    Args:
        forward: the function that the decoder layer compiles.
        module: the layer; parameters anywhere but on the meta device, their values are not read.
        args: of the call, as ``kwargs``; the hidden states must require a gradient.
        settings: ``"none"``, ``"layer"`` or the share that may stay.

    Raises:
        GraphBreakError: as the compiled layer would.
    """
    wanted = tuple(settings)
    shares = {1.0, *(float(setting) for setting in wanted if not isinstance(setting, str))}
    recorder = _Recorder(shares)
    try:
        _TracedGraphs(options or CompileOptions(), recorder).run("traced layer", forward, module, *args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _TraceEndError):
            raise
    whole = recorder.found[1.0]
    again = LayerMemory(recorder.input_bytes + recorder.result_bytes, whole.shared, whole.backward_peak)
    found = recorder.found | {"none": whole, "layer": again}
    return {setting: found[setting if isinstance(setting, str) else float(setting)] for setting in wanted}


class _TraceEndError(Exception):
    """Ends a trace once its graph has been partitioned."""


class _TracedGraphs(Graphs):
    """Captures as the layers do, and stops where they would be lowered."""

    def __init__(self, options: CompileOptions, recorder: _Recorder) -> None:
        super().__init__(options, "none")
        self._recorder = recorder

    def _backend(self, name: str, code: Any, graph: Any, inputs: Any, **_: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        del name, code  # nothing is compiled that a report could count
        self._recorder.kinds = [_kind(node) for node in graph.graph.find_nodes(op="placeholder")]
        # a hit in the cache of graphs would skip the partitioner
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, config_patches={"custom_partitioner_fn": self._recorder})


class _Recorder(CustomPartitionerFn):
    """In place of Inductor's partitioner: partitions a copy of the joint graph for every share, then stops.

    ``kinds``: of the captured graph's inputs, parameters, the layer's input, or what layers share.
    """

    def __init__(self, shares: Iterable[float]) -> None:
        self.found: dict[Setting, LayerMemory] = {}
        self.input_bytes = self.result_bytes = 0
        self.kinds: list[str] = []
        self._shares = tuple(shares)

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        for share in self._shares:
            joint = fx.GraphModule(gm, copy.deepcopy(gm.graph))
            forward, backward = Partitioner(share)(joint, joint_inputs, **kwargs)
            self.found[share] = self._read(forward, backward, kwargs["num_fwd_outputs"])
        raise _TraceEndError

    def uuid(self) -> None:
        """No result of this is ever cached."""

    def _read(self, forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int) -> LayerMemory:
        inputs = forward.graph.find_nodes(op="placeholder")
        kinds = {_storage(n): kind for n, kind in zip(inputs, self.kinds, strict=False) if _is_tensor(n)}
        outputs = forward.graph.find_nodes(op="output")[0].args[0]
        assert isinstance(outputs, list | tuple)
        saved = {_storage(n): _storage_bytes(n) for n in outputs[num_outputs:] if _is_tensor(n)}
        self.input_bytes = sum(_storage_bytes(n) for n in inputs if _is_tensor(n) and kinds.get(_storage(n)) == "input")
        self.result_bytes = sum(map(_storage_bytes, kept_results(forward.graph)))
        static = {storage for storage, kind in kinds.items() if kind in ("parameter", "shared")}
        return LayerMemory(
            kept=sum(size for storage, size in saved.items() if storage not in static),
            shared=sum(size for storage, size in saved.items() if kinds.get(storage) == "shared"),
            backward_peak=_peak(backward, static),
        )


def _kind(node: fx.Node) -> str:
    value = node.meta.get("example_value")
    if isinstance(value, nn.Parameter) or "parameters" in node.name or "buffers" in node.name:
        return "parameter"
    return "input" if isinstance(value, torch.Tensor) and value.requires_grad else "shared"


def _peak(graph: fx.GraphModule, static: set[int]) -> int:
    """The most bytes alive in a graph whose inputs die with their last reader.

    A value has memory of its own if it is a graph's input or output, if an op that is not fused computes it, or if one
    reads it; others are computed where they are read, and what they read lives as long as they do.
    """
    nodes = list(graph.graph.nodes)
    output = graph.graph.find_nodes(op="output")[0]
    real = {node for node in nodes if _is_tensor(node) and _has_memory(node)}
    order = {node: index for index, node in enumerate(nodes)}
    last = _last_reads(nodes, order, real)
    last |= {_storage(node): len(nodes) for node in output.all_input_nodes if _is_tensor(node)}
    inputs = {_storage(n): _storage_bytes(n) for n in nodes if n.op == "placeholder" and _is_tensor(n)}
    alive = {storage: size for storage, size in inputs.items() if storage not in static}
    peak = sum(alive.values())
    for node in nodes:
        made = _made(node, real)
        if made.keys() - static:
            alive |= {storage: size for storage, size in made.items() if storage not in static}
            workspace = workspace_bytes(node.target, fx.map_arg(node.args, lambda read: read.meta["val"]))
            over = _written_over(node, alive, last, order[node])
            peak = max(peak, sum(alive.values()) + workspace - over)
        alive = {storage: size for storage, size in alive.items() if last.get(storage, -1) > order[node]}
    return peak


def _made(node: fx.Node, real: set[fx.Node]) -> dict[int, int]:
    """Storages that exist once the node has run, and their bytes; an op makes all its results at once."""
    value = node.meta.get("val")
    if node.op != "call_function":
        return {}
    if isinstance(value, list | tuple) and not _is_fused(node):
        storages = (x.untyped_storage() for x in value if isinstance(x, torch.Tensor))
        return {int(storage._cdata): int(storage.nbytes()) for storage in storages}
    return {_storage(node): _storage_bytes(node)} if node in real else {}


def _last_reads(nodes: list[fx.Node], order: dict[fx.Node, int], real: set[fx.Node]) -> dict[int, int]:
    """For every storage the place of its last reader; a value without memory reads where its own readers do."""
    last: dict[int, int] = {}
    ends: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        readers = (ends[user] if _is_tensor(user) and user not in real else order[user] for user in node.users)
        ends[node] = max(readers, default=order[node])
        if _is_tensor(node):
            last[_storage(node)] = max(last.get(_storage(node), 0), ends[node])
    return last


def _has_memory(node: fx.Node) -> bool:
    if node.op == "placeholder" or not _is_fused(node):
        return True
    return any(user.op == "output" or not _is_fused(user) for user in node.users)


def _is_fused(node: fx.Node) -> bool:
    from torch.utils.flop_counter import flop_registry

    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace in _FUSED_NAMESPACES and target.overloadpacket not in flop_registry


def _written_over(node: fx.Node, alive: dict[int, int], last: dict[int, int], now: int) -> int:
    """A fused kernel writes its result over an input of the same size that nobody reads again."""
    if not _is_fused(node):
        return 0
    size = _storage_bytes(node)
    dying = (_storage(n) for n in node.all_input_nodes if _is_tensor(n))
    return size if any(s != _storage(node) and alive.get(s) == size and last.get(s, -1) <= now for s in dying) else 0


def _is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def _storage(node: fx.Node) -> int:
    return int(node.meta["val"].untyped_storage()._cdata)


def _storage_bytes(node: fx.Node) -> int:
    return int(node.meta["val"].untyped_storage().nbytes())
