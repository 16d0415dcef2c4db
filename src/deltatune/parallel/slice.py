"""A packed batch cut for the ranks that hold it together."""

# P ranks, T tokens of the pack, T' the next multiple of P, t = T' / P

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.packing.sample import IGNORE_INDEX
from deltatune.packing.sequences import Sequences
from deltatune.parallel.mesh import Mesh

__all__ = ["batch_of_rank", "cut_batch", "padded_total"]


def padded_total(tokens: int, size: int) -> int:
    """T': the tokens of a pack, up to a multiple of P."""
    return -(-tokens // size) * size


def batch_of_rank(batch: Mapping[str, Any], mesh: Mesh) -> Mapping[str, Any]:
    """What of its data rank's batch a rank calls the model with: all of it, or its part where several share it."""
    if mesh.sequence_size == 1:
        return batch
    return cut_batch(batch, rank=mesh.sequence_rank, size=mesh.sequence_size)


def cut_batch(batch: Mapping[str, Any], *, rank: int, size: int, pad_token_id: int = 0) -> dict[str, Any]:
    """One rank's part of a batch, as a model in a sequence group takes it.

    Every rank cuts the same batch, such as ``PackedCollator`` makes, without a word to the others.

    Args:
        batch: with ``input_ids`` ``[1, T]``, ``sequences``, and where the model trains ``labels`` ``[1, T]``.
        rank: of this process in the group.
        size: P, the ranks of the group.
        pad_token_id: the token of what is added up to T', which is a document of its own and never trains.

    Returns:
        - ``input_ids``, ``position_ids`` ``[1, t]``: tokens ``rank * t`` up to ``(rank + 1) * t``, their positions in
          their documents
        - ``labels``, ``shift_labels`` ``[1, t]``: labels, and the target of each token: the label of the next one of
          the whole pack, ``IGNORE_INDEX`` where that begins a document. Both count the same targets over all ranks
        - ``sequences``: the documents of the whole pack, padding too

        Whatever else the batch holds about documents is left out, and the rest handed on.

    Raises:
        ValueError: more rows than one, no ``Sequences``, or one of another number of tokens; a tensor ``[1, T, ...]``
            of another name.
    """
    sequences, tokens = batch.get("sequences"), batch["input_ids"]
    if not isinstance(sequences, Sequences):
        raise ValueError(f"a batch is cut by its sequences, a deltatune.Sequences; got {type(sequences).__name__}")
    if tokens.shape != (1, sequences.total):
        raise ValueError(
            f"a batch to cut is one pack, input_ids [1, {sequences.total}] by its sequences; got {list(tokens.shape)}"
        )
    if not 0 <= rank < size:
        raise ValueError(f"rank must be from 0 to {size - 1} in a group of {size} ranks, got {rank}")
    for name, value in batch.items():
        if size > 1 and name not in _REPLACED and isinstance(value, Tensor) and value.shape[:2] == tokens.shape:
            raise ValueError(
                f"{name} {list(value.shape)} has an entry for each token of the pack, and a rank gets a part of "
                f"{', '.join(_CUT)} alone; leave {name} out of the batch"
            )
    whole = _padded(sequences, padded_total(sequences.total, size))
    part = slice(rank * whole.total // size, (rank + 1) * whole.total // size)
    found = {name: value for name, value in batch.items() if name not in _REPLACED}
    found["input_ids"] = _row(tokens, whole.total, pad_token_id)[:, part]
    found["position_ids"] = whole.positions[None, part].long()
    found["sequences"] = whole
    if batch.get("labels") is not None:
        first = whole.to(batch["labels"].device, non_blocking=True).positions == 0
        labels = _row(batch["labels"], whole.total, IGNORE_INDEX).masked_fill(first, IGNORE_INDEX)
        found["labels"] = labels[:, part]
        found["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)[:, part]
    return found


#: What a rank gets its part of.
_CUT = ("input_ids", "labels", "shift_labels", "position_ids")

#: What a batch may say of documents besides ``sequences``, and what is cut.
_REPLACED = frozenset(
    {
        *_CUT, "sequences", "attention_mask", "seq_idx",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    }
)  # fmt: skip


def _padded(sequences: Sequences, total: int) -> Sequences:
    if total == sequences.total:
        return sequences
    ends = sequences.cu_seqlens_cpu[: sequences.num_sequences + 1]
    whole = Sequences.from_cu_seqlens(torch.cat([ends, ends.new_tensor([total])]))
    return whole.to(sequences.cu_seqlens.device, non_blocking=True)


def _row(values: Tensor, total: int, padding: int) -> Tensor:
    return F.pad(values, (0, total - values.shape[1]), value=padding)
