"""Sequence parallel: the ranks of a group hold one pack together, each an equal part of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from torch import nn
from torch.distributed import ProcessGroup

from deltatune.hf import model as hf_model
from deltatune.packing.group import Recurrent, SequenceGroup
from deltatune.parallel.heads import check_sequence_size
from deltatune.preparation import Prepared
from deltatune.state import State

__all__ = ["apart", "sequence_group_of", "shard_sequence"]


def shard_sequence(
    prepared: Prepared | nn.Module, group: ProcessGroup | None, *, recurrent: Recurrent = "heads"
) -> None:
    """Makes every packed call of a prepared model one of all ranks of ``group``, each with its part of one pack.

    Around the layers nothing changes: a rank computes its tokens. Attention and the delta rule get the heads of one
    rank for all tokens, by one all-to-all in and one out (DeepSpeed-Ulysses, arXiv 2309.14509). With
    ``recurrent="state"`` the delta rule keeps the rank's tokens and all heads, and begins with the state that the ranks
    before left of the document that goes on; one all-gather passes it, another the convolution's W - 1 tokens before
    the rank's. Then its heads need not divide, and what is sent does not grow with tokens. The losses of the ranks
    add up to the pack's, and so do their gradients, which are left to sum (or, as data-parallel ranks do, to average
    after the loss was multiplied by the number of ranks). ``deltatune.parallel.slice.cut_batch`` cuts a batch.

    Only this model changes, in this process. ``None``, or a group of one rank, undoes it; so do ``prepare`` on the
    model again and ``revert``. A deepcopy is in the same group, what comes out of a pickle in none. Calls with a
    key-value cache stay each rank's own.

    Args:
        prepared: what ``prepare`` gave, or the model that it was given; sharded or replicated afterwards or before.
        group: a process group that this process is in. All its ranks call the model together, with the same
            ``recurrent``.
        recurrent: ``"heads"`` or ``"state"``, how Gated DeltaNet layers are divided.

    Raises:
        ValueError: a model that is not prepared, or another ``recurrent``.
        UserError: a number of ranks that the model's heads cannot be divided among, or a model that cannot be in a
            group at all; see ``check_sequence_size``.
    """
    model = prepared.model if isinstance(prepared, Prepared) else prepared
    if recurrent not in get_args(Recurrent):
        raise ValueError(f"recurrent must be one of {', '.join(get_args(Recurrent))}, got {recurrent!r}")
    state = _state(model)
    found = None
    if group is not None and group.size() > 1:
        check_sequence_size(hf_model.text_config(model), group.size(), recurrent)
        found = SequenceGroup(group.group_name, group.size(), group.rank(), recurrent)
    _put(state, found)


def sequence_group_of(model: nn.Module) -> SequenceGroup | None:
    """The ranks that hold the packs of a prepared model together with this one; None where it holds them alone."""
    return _state(model).sequence


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Within, calls of a prepared model are of this rank alone, whatever others do; not to be used in two threads."""
    state = _state(model)
    group = state.sequence
    _put(state, None)
    try:
        yield
    finally:
        _put(state, group)


def _state(model: nn.Module) -> State:
    state: State | None = hf_model.text_model(model).__dict__.get("_deltatune")
    if state is None:
        raise ValueError("shard_sequence comes after prepare: the model is not prepared; call prepare(model) first")
    return state


def _put(state: State, group: SequenceGroup | None) -> None:
    if group != state.sequence:
        state.sequence = group
        # graphs hold what they were compiled with
        state.graphs.clear()
