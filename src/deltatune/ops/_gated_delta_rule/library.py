"""What the CUDA libraries share: how one is called, on one stream of documents, q and k normalised once.

Documents, and what a library wants to know of them, are worked out once for all layers.
"""

# B batch, T tokens, N = B * T, H key heads, G value heads, K key dim, V value dim
# S documents that hold tokens, n chunks

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._gated_delta_rule.reference import Gradients, Inputs
from deltatune.ops._nvidia import version_of

__all__ = [
    "Boundaries",
    "Call",
    "Library",
    "Results",
    "backward",
    "chunk_states_bytes",
    "documents_of",
    "forward",
    "results_like",
]

CHUNK_SIZE = 64  # of the libraries' kernels


@dataclass(frozen=True, eq=False)
class Boundaries:
    """The documents that hold tokens: libraries reject empty ones, or set memory aside for the state of each."""

    cu_seqlens: Tensor  # int32 [S + 1] on the device, strictly growing
    cu_seqlens_cpu: Tensor  # the same on the CPU
    chunk_indices: Tensor  # int32 [n, 2] on the device: the document of each chunk, and its place in the document
    document_indices: Tensor  # int64 [S] on the device: the place of each document among all, the empty ones counted


def documents_of(cu_seqlens_cpu: Tensor, device: torch.device) -> Boundaries:
    """Those of cumulative lengths on the CPU ``[any + 1]``; the same object for the same boundaries, so for all layers.

    Copies to the device without waiting for it. Known by what the boundaries say: the tensor may be rewritten, and the
    libraries' own caches go by the identity of what is returned here.
    """
    # the repeated tail says nothing, and is most of the tensor
    used = cu_seqlens_cpu[: int(torch.searchsorted(cu_seqlens_cpu, cu_seqlens_cpu[-1])) + 1]
    return _documents(tuple(used.tolist()), device)


@functools.lru_cache(maxsize=16)
def _documents(boundaries: tuple[int, ...], device: torch.device) -> Boundaries:
    cu_seqlens_cpu = torch.tensor(boundaries, device="cpu")
    documents = cu_seqlens_cpu.diff().nonzero().squeeze(1)
    ends = cu_seqlens_cpu[1:][documents]
    compact = torch.cat([ends.new_zeros(1), ends]).int()
    chunks = (compact.diff() + CHUNK_SIZE - 1) // CHUNK_SIZE
    document = torch.arange(chunks.numel(), device="cpu").repeat_interleave(chunks)
    place = torch.arange(document.numel(), device="cpu") - (chunks.cumsum(0) - chunks)[document]
    indices = torch.stack([document, place], dim=1).int()
    on_device, indices, documents = (x.to(device, non_blocking=True) for x in (compact, indices, documents))
    return Boundaries(on_device, compact, indices, documents)


class Call(NamedTuple):
    """How a function is called."""

    takes: tuple[str, ...]  # the names of the arguments that change from call to call
    options: Mapping[str, object]  # the others, as they are unless they are given
    returns: tuple[str, ...]  # the names of its results, empty for those that are not used


@dataclass(frozen=True)
class Library:
    """A library of CUDA kernels whose functions depend on its version.

    Names of arguments and results are the libraries' own: ``g`` as a result is the decay summed inside chunks
    ``[1, N, G]``, which backward takes for ``g``, and ``A`` the inverse of each chunk's system ``[1, N, G, 64]``.
    ``initial_state``, ``final_state`` and their gradients ``dh0`` and ``dht`` are ``[S, G, K, V]`` in fp32.
    """

    name: str  # as messages call it
    distribution: str  # whose version counts
    known: str  # the versions that can be called, in words
    pip: str  # how one of them is installed
    load: Callable[[], Mapping[str, Callable[..., Any]]]  # imports it; its functions, by the keys of calls
    calls: Mapping[str, Call]  # of "forward", "backward" and what else is called
    describe: Callable[[Boundaries], None] | None = None  # called before either, where it wants to know the documents

    def run(self, direction: str, documents: Boundaries, **given: object) -> dict[str, Tensor]:
        """The named results of ``"forward"`` or ``"backward"``, for what ``Call.takes`` and the options name."""
        if self.describe is not None:
            self.describe(documents)
        call = self.calls[direction]
        given |= vars(documents)
        options = {name: given.get(name, value) for name, value in call.options.items()}
        results = self.load()[direction](**{name: given[name] for name in call.takes}, **options)
        if len(results) != len(call.returns):
            raise RuntimeError(
                f"{self.name} {version_of(self.distribution)} returns {len(results)} results from its {direction} "
                f"where {len(call.returns)} are expected: {self.pip}, or use impl='reference'"
            )
        return {name: result for name, result in zip(call.returns, results, strict=True) if name}

    @functools.cached_property
    def problem(self) -> str | None:
        """Why the version that is installed cannot be called, with the remedy; None where it can."""
        found, remedy = f"{self.name} {version_of(self.distribution)}", f"use {self.known}: {self.pip}"
        try:
            functions = self.load()
        except ImportError as error:
            return f"{found} cannot be imported ({error}); {remedy}"
        for key, call in self.calls.items():
            problem = _signature_problem(functions[key], (*call.takes, *call.options))
            if problem is not None:
                return f"{found} is not the one known here: its {problem}; {remedy}"
        return None


def _signature_problem(function: Callable[..., Any], arguments: Sequence[str]) -> str | None:
    """How the function differs from one that takes exactly these keyword arguments; None where it takes them."""
    parameters = inspect.signature(function).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [name for name, x in parameters.items() if x.default is x.empty and x.kind not in variadic]
    differences = {
        "lacks": [name for name in arguments if name not in parameters],
        "also wants": [name for name in required if name not in arguments],
    }
    parts = [f"{what} {', '.join(names)}" for what, names in differences.items() if names]
    return f"{function.__name__} {' and '.join(parts)}" if parts else None


# exp of it is 0 but for a denormal; the libraries subtract sums of g, which -inf turns into NaN and -1e4 into noise
_STRONGEST = -100.0


class Results(NamedTuple):
    """The output, and what backward takes in place of running forward again; unused tensors are ``[0]``."""

    o: Tensor  # [B, T, G, V]
    q: Tensor  # [B, T, H, K], normalised
    k: Tensor  # [B, T, H, K], normalised
    q_rstd: Tensor  # [B, T, H] fp32
    k_rstd: Tensor  # [B, T, H] fp32
    decay: Tensor  # [1, N, G] fp32, g summed inside each chunk
    solved: Tensor  # [1, N, G, 64], the inverse of each chunk's triangular system


def results_like(inputs: Inputs, *, saves: bool) -> Results:
    """Uninitialised results of the right shapes and dtypes; with ``saves=False`` the output alone."""
    q, k, v = inputs[:3]
    results = Results(v.new_empty(v.shape), *(v.new_empty(0) for _ in Results._fields[1:]))
    if saves:
        stream = (1, v.shape[0] * v.shape[1], v.shape[2])
        decay, solved = v.new_empty(stream, dtype=torch.float32), k.new_empty((*stream, CHUNK_SIZE))
        results = results._replace(decay=decay, solved=solved)
    if saves and inputs.qk_l2norm:
        q_rstd, k_rstd = (x.new_empty(x.shape[:3], dtype=torch.float32) for x in (q, k))
        results = results._replace(q=q.new_empty(q.shape), k=k.new_empty(k.shape), q_rstd=q_rstd, k_rstd=k_rstd)
    return results


def forward(library: Library, inputs: Inputs, cu_seqlens_cpu: Tensor) -> tuple[Results, Tensor | None]:
    """Runs the library's forward on the flattened stream; also the final state where there is an initial one."""
    q, k, v, g, beta, state = inputs[:6]
    final = None if state is None else state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if v.numel() == 0:
        return results_like(inputs, saves=True), final
    results = results_like(inputs, saves=False)
    with torch.cuda.device(v.get_device()):
        if inputs.qk_l2norm:
            from deltatune.ops._gated_delta_rule.l2_norm import normalise  # Triton, where it runs

            (unit_q, q_rstd), (unit_k, k_rstd) = (normalise(x.flatten(0, 1)) for x in (q, k))
            q, k = unit_q.view(q.shape), unit_k.view(k.shape)
            q_rstd, k_rstd = (x.view(q.shape[:3]) for x in (q_rstd, k_rstd))
            results = results._replace(q=q, k=k, q_rstd=q_rstd, k_rstd=k_rstd)
        stream = _stream(q=q, k=k, v=v, g=g.float().clamp(min=_STRONGEST), beta=_gate(beta, v))
        documents = documents_of(cu_seqlens_cpu, v.device)
        states = {} if final is None else {"initial_state": _states(final, documents), "output_final_state": True}
        found = library.run("forward", documents, **stream, **states, scale=inputs.scale)
        if final is not None:
            final.index_copy_(0, documents.document_indices, found["final_state"])
    return results._replace(o=found["o"].to(v.dtype).view(v.shape), decay=found["g"], solved=found["A"]), final


def backward(
    library: Library,
    grad: Tensor,
    inputs: Inputs,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
    cu_seqlens_cpu: Tensor,
    final_grad: Tensor | None = None,
) -> Gradients:
    """The gradients of the inputs, of which q and k are the normalised ones; ``kept`` are the last of ``Results``.

    ``grad`` is that of ``o``, ``final_grad`` that of a final state, zeros if None.
    """
    q, k, v, _, beta, state = inputs[:6]
    q_rstd, k_rstd, decay, solved = kept
    dstate = None if state is None else _state_gradient(state, final_grad)
    if v.numel() == 0:
        return _gradients(inputs, [x.new_zeros(x.shape) for x in inputs[:5]], dstate)
    with torch.cuda.device(v.get_device()):
        stream = _stream(q=q, k=k, v=v, beta=_gate(beta, v), do=grad.to(v.dtype))
        documents = documents_of(cu_seqlens_cpu, v.device)
        states = {} if state is None else {"initial_state": _states(state, documents)}
        if dstate is not None and final_grad is not None:
            states["dht"] = _states(dstate, documents)
        found = library.run("backward", documents, **stream, **states, g=decay, A=solved, scale=inputs.scale)
        if dstate is not None:
            dstate.index_copy_(0, documents.document_indices, found["dh0"])
        if inputs.qk_l2norm:
            from deltatune.ops._gated_delta_rule.l2_norm import normalise_backward

            for name, rstd in (("q", q_rstd), ("k", k_rstd)):
                dy = found[f"d{name}"][0].contiguous()
                found[f"d{name}"] = normalise_backward(dy, stream[name][0], rstd.flatten(0, 1))
    return _gradients(inputs, [found[f"d{name}"] for name in Inputs._fields[:5]], dstate)


def chunk_states_bytes(q: Tensor, v: Tensor) -> int:
    """The states in front of all chunks, ``[N / 64, G, K, V]``, as if no chunk were cut short."""
    return v.numel() * q.shape[-1] * v.itemsize // CHUNK_SIZE


def _states(states: Tensor, documents: Boundaries) -> Tensor:
    """Those of the documents that hold tokens, contiguous and in fp32."""
    return states.float().index_select(0, documents.document_indices)


def _state_gradient(state: Tensor, final_grad: Tensor | None) -> Tensor:
    """The gradient of the initial state as if no document held tokens: that of the final one."""
    if final_grad is None:
        return torch.zeros(state.shape, dtype=torch.float32, device=state.device)
    return final_grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _gradients(inputs: Inputs, grads: list[Tensor], dstate: Tensor | None) -> Gradients:
    """Each in the shape and dtype of its input."""
    pairs = zip(inputs[:5], grads, strict=True)
    found = Gradients(*(dx.to(x.dtype).reshape(x.shape).contiguous() for x, dx in pairs))
    if dstate is None or inputs.initial_state is None:
        return found
    return found._replace(initial_state=dstate.to(inputs.initial_state.dtype))


def _stream(**tensors: Tensor) -> dict[str, Tensor]:
    """``[B, T, ...]`` to contiguous ``[1, N, ...]``."""
    return {name: x.reshape(1, -1, *x.shape[2:]).contiguous() for name, x in tensors.items()}


def _gate(beta: Tensor, v: Tensor) -> Tensor:
    """The libraries compile for the dtype of beta: its own where that is usual, otherwise fp32."""
    return beta if beta.dtype in (v.dtype, torch.float32) else beta.float()
