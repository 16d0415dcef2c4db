"""Calls with a key-value cache: told from packed ones, and run on the stock path whole."""

# B rows, T tokens a row

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltatune.packing.metadata import METADATA
from deltatune.packing.sequences import Sequences
from deltatune.state import State, bound
from deltatune.subclass import Swapped, stock_class

__all__ = ["boundaries", "check_boundaries", "in_stock_path", "is_cached_call", "packed_call", "reached", "stock_path"]


class _Call(NamedTuple):
    """A call of a prepared model: what its layers share, boundaries (None in the stock path), and what it got to."""

    state: State
    sequences: Sequences | None
    seen: set[object]


#: The innermost call in this thread (or task).
_call: ContextVar[_Call | None] = ContextVar("deltatune_call", default=None)


def is_cached_call(model: Swapped, call: Mapping[str, Any], *, with_head: bool = False) -> bool:
    """Whether a call reads or fills a key-value cache, and so keeps the stock path whole.

    ``generate`` passes ``past_key_values``. A caller who asks for ``use_cache=True`` outside training gets the cache
    too, unless the call is packed or has labels: a cache of packed documents would be of no use, a loss needs none, and
    ``use_cache`` changes nothing.

    Raises:
        ValueError: ``past_key_values`` together with boundaries inside a row.
    """
    if in_stock_path(model):
        # a hook inside may call the whole model anew
        return not (with_head and _is_packed(call))
    given = call.get("past_key_values") is not None
    trained = call.get("labels") is not None or call.get("shift_labels") is not None
    if not given and (not call.get("use_cache") or model.training or trained):
        return False
    packed = _is_packed(call)
    if given and packed:
        raise ValueError(
            "past_key_values cannot hold packed documents: the call describes several documents in a row "
            f"({packed}); leave past_key_values out, or pass one document a row"
        )
    return not packed


def _is_packed(call: Mapping[str, Any]) -> str | None:
    """What describes several documents in a row, if anything does."""
    for name in METADATA:
        if call.get(name) is not None:
            return name
    tokens = next((call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None), None)
    if tokens is None or tokens.shape[1] < 2:
        return None
    given, positions = call.get("attention_mask"), call.get("position_ids")
    # a mask in generation also covers the tokens in the cache
    mask = given[:, -tokens.shape[1] :] if isinstance(given, Tensor) and given.ndim == 2 else None
    if mask is not None and bool((mask > 1).any()):
        return "attention_mask"
    if isinstance(positions, Tensor) and _restarts(positions, mask, padding_unknown=given is not None and mask is None):
        return "position_ids"
    return None


def _restarts(positions: Tensor, mask: Tensor | None, *, padding_unknown: bool) -> bool:
    """Whether positions fail to grow by one between real tokens; three-row ones may stand still or jump.

    A cache of fixed size comes with a mask of pairs in place of the one that names the padding. Positions of padding,
    before or after a row's tokens, stand still, so only a break between two stretches that grow is one of documents.
    """
    three_rows = positions.ndim == 3 and positions.shape[0] == 3
    step = (positions[0] if positions.ndim == 3 else positions).diff(dim=-1)
    broken = step < 0 if three_rows else step != 1
    if mask is not None:
        broken = broken & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if padding_unknown:
        grows = step > 0 if three_rows else step == 1
        before = grows.cumsum(-1)
        broken = broken & (before > 0) & (before < before[..., -1:])
    return bool(broken.any())


def stock_path(model: Swapped) -> AbstractContextManager[object]:
    """Every layer of ``model`` runs its stock forward inside the block, in this thread alone."""
    return bound(_call, _Call(model._deltatune, None, set()))


def in_stock_path(module: Swapped) -> bool:
    """Whether a layer is called inside its model's ``stock_path``; never while a graph of ours is traced."""
    call = None if torch.compiler.is_compiling() else _call.get()
    return call is not None and call.sequences is None and call.state is module._deltatune


@contextmanager
def packed_call(state: State, sequences: Sequences, replaced: Mapping[Any, str]) -> Iterator[None]:
    """The block is a packed call of the model whose layers share ``state``, in this thread alone.

    Raises:
        ValueError: a part with another tool's forward that did not call ours; ``replaced`` says which, and by whom.
    """
    if (outer := _call.get()) is not None:
        outer.seen.add(state)
    seen: set[object] = set()
    with bound(_call, _Call(state, sequences, seen)):
        yield
    for part, by in replaced.items():
        if part not in seen:
            raise ValueError(
                f"{by}, which keeps documents together unless it calls what it found, and was not seen to; take it "
                "off, let it call that, prepare without compile (a graph hides it), or call prepare(model) again"
            )


def boundaries() -> Sequences | None:
    """Of the packed call that runs in this thread; None in the stock path and outside of calls."""
    call = _call.get()
    return None if call is None else call.sequences


def check_boundaries(module: nn.Module, sequences: Sequences | None) -> None:
    """Notes that a packed call got to a module with its boundaries.

    Raises:
        ValueError: a call without boundaries that is part of a packed one.
    """
    if sequences is None:
        if _in_packed_call():
            raise ValueError(
                f"{stock_class(module).__name__} (layer_idx {getattr(module, 'layer_idx', None)}) cannot learn where "
                "documents begin: the layers of this model, or hooks or forwards that were put on it since, do not "
                "hand their keyword arguments on"
            )
    else:
        reached(module)


def reached(module: nn.Module) -> None:
    """Notes that a packed call got to a module's forward; in a graph nothing."""
    if not torch.compiler.is_compiling() and (call := _call.get()) is not None:
        call.seen.add(module)


def _in_packed_call() -> bool:
    return boundaries() is not None


# a constant of a graph: what torch.compiler.assume_constant_result sets, which would import the compiler
_in_packed_call._dynamo_marked_constant = True  # type: ignore[attr-defined]
