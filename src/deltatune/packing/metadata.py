"""Any upstream metadata about documents becomes one ``Sequences``."""

# B rows, T tokens a row, N = B * T

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltatune.packing.group import SequenceGroup
from deltatune.packing.sequences import Sequences, as_tensor, row_starts, text_positions

__all__ = ["METADATA", "Resolved", "resolve_metadata"]

#: What stock collators, TRL and transformers.Trainer attach to a batch about documents; layers see ``sequences`` alone.
METADATA = ("sequences", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

#: A loader took a batch apart by rows, and no other description of documents is left.
CUT = (
    "cu_seq_lens_q has one entry, so a loader cut it: accelerate's does with the batches of an IterableDataset; pass "
    'accelerator_config={"dispatch_batches": False} to the TrainingArguments'
)


@dataclass(frozen=True)
class Resolved:
    """What packing metadata says of one call: the boundaries, and the metadata a stock model still wants.

    Attributes:
        sequences: the boundaries, on the device of the tokens; in a sequence group those of the whole pack.
        position_ids: positions as they came, or ``[B, T]`` restarting in every document where none came.
        padding_mask: bool ``[B, T]``, True for real tokens, where the call carried a two-dimensional mask.
        source: the metadata that decided, for messages and reports.
        tokens: that the call holds.
        whole: whether every document lies on one rank of a sequence group, so that its layers need no other.
    """

    sequences: Sequences
    position_ids: Tensor
    padding_mask: Tensor | None
    source: str
    tokens: int
    whole: bool = False

    @property
    def of_layers(self) -> Sequences:
        """The boundaries that layers compute with: those of the rank's own tokens where no document lies on two."""
        if not self.whole:
            return self.sequences
        assert self.sequences.part is not None
        return self.sequences.part


def resolve_metadata(
    call: Mapping[str, Any], *, rows: int, tokens: int, device: torch.device, group: SequenceGroup | None = None
) -> Resolved:
    """Reads the boundaries of a call from its keyword arguments.

    Order of precedence: ``sequences``, ``cu_seq_lens_q``, an indexed ``attention_mask`` (0 = padding, 1..N documents),
    ``seq_idx`` (0-based), ``position_ids`` that restart, a 0/1 ``attention_mask``, and else one document a row.

    With ``group`` the call holds this rank's part of a pack, and ``sequences`` alone says where documents of the whole
    pack begin; ``position_ids`` are those of the rank's tokens in their documents, or left out.

    Raises:
        ValueError: metadata of the wrong shape, boundaries that do not end at the number of tokens, metadata that
            contradicts itself on real tokens, or three-row mRoPE positions without other boundaries.
    """
    if group is not None:
        return _resolve_part(call, rows, tokens, device, group)
    batch = _Batch(call, rows, tokens)
    source, sequences = batch.primary()
    if sequences.total != batch.size:
        raise ValueError(f"{source} describes {sequences.total} tokens, but the batch holds {rows} x {tokens}")
    starts = batch.starts_at(sequences.cu_seqlens_cpu)
    if not bool(starts[:, :1].all()):
        raise ValueError(
            f"{source} has a document that spans two of the batch's {rows} rows; boundaries are those of the "
            f"flattened [B * T] stream and every row of {tokens} tokens begins a document"
        )
    if source != "sequences" or device.type == "cpu":
        batch.check_agreement(source, starts)
    sequences = sequences.to(device, non_blocking=True)
    position_ids = batch.position_ids
    if position_ids is None:
        position_ids = sequences.positions.view(rows, tokens).long()
    elif position_ids.ndim == 1:
        position_ids = position_ids.unsqueeze(0)
    return Resolved(sequences, position_ids, batch.padding_mask, source, batch.size)


def _resolve_part(
    call: Mapping[str, Any], rows: int, tokens: int, device: torch.device, group: SequenceGroup
) -> Resolved:
    """Of a call that holds one rank's part of a pack."""
    ranks, sequences = f"a sequence group of {group.size} ranks", call.get("sequences")
    if not isinstance(sequences, Sequences):
        raise ValueError(
            f"a model in {ranks} takes one rank's part of a pack and needs sequences=, the deltatune.Sequences of the "
            f"whole pack; got {type(sequences).__name__}"
        )
    others = [name for name in (*METADATA[1:], "attention_mask") if call.get(name) is not None]
    if others:
        raise ValueError(f"in {ranks} sequences= alone says where documents begin; leave {', '.join(others)} out")
    if rows != 1:
        raise ValueError(f"a call in {ranks} holds a part of one pack, a row [1, T / {group.size}]; got {rows} rows")
    if sequences.total != group.size * tokens:
        raise ValueError(
            f"sequences describes {sequences.total} tokens, but {tokens} tokens on each rank of {ranks} are "
            f"{group.size * tokens}; pass the boundaries of the whole pack and an equal part of it on every rank"
        )
    sequences = sequences.to(device, non_blocking=True)
    whole = group.holds_whole(sequences)
    if whole or group.recurrent == "state":
        sequences = replace(sequences, part=group.part(sequences))
    expected = group.cut(sequences.positions)[None].long()
    given = call.get("position_ids")
    if given is None:
        return Resolved(sequences, expected, None, "sequences", tokens, whole)
    given = as_tensor(given)
    if given.shape[-1] != tokens or given.numel() != tokens:
        raise ValueError(f"position_ids in {ranks} must be [1, {tokens}] like the tokens, got {tuple(given.shape)}")
    given = given.view(1, tokens)
    # learning of it on another device would wait for that
    if device.type == "cpu" and bool((wrong := given != expected).any()):
        column = int(wrong[0].nonzero()[0])
        raise ValueError(
            f"sequences and position_ids contradict each other: token {column} of rank {group.rank} has position "
            f"{int(expected[0, column])} in its document by sequences, {int(given[0, column])} by position_ids; cut "
            "position_ids from those of the whole pack, or leave them out"
        )
    return Resolved(sequences, given, None, "sequences", tokens, whole)


class _Batch:
    """The metadata of one call, each kind brought to the CPU at most once.

    ``mask`` is 1 everywhere where none came; ``inside`` is True for real tokens, a row's first aside, that follow one.
    """

    def __init__(self, call: Mapping[str, Any], rows: int, tokens: int) -> None:
        self.shape, self.size = (rows, tokens), rows * tokens
        self.sequences = call.get("sequences")
        self.cu_seqlens, self.cut = _boundaries(call)
        self.seq_idx = None if call.get("seq_idx") is None else self._ids(as_tensor(call["seq_idx"]))
        given = call.get("attention_mask")
        self.mask = (
            torch.ones(self.shape, dtype=torch.long, device="cpu") if given is None else self._checked_mask(given)
        )
        self.padding_mask = None if given is None else given != 0
        self.indexed = bool((self.mask > 1).any())
        self.inside = (self.mask[:, 1:] != 0) & (self.mask[:, :-1] != 0)
        positions = call.get("position_ids")
        self.position_ids = None if positions is None else as_tensor(positions)

    def primary(self) -> tuple[str, Sequences]:
        """The first description that is there, by name."""
        if self.sequences is not None:
            if not isinstance(self.sequences, Sequences):
                raise ValueError(f"sequences must be a deltatune.Sequences, got {type(self.sequences).__name__}")
            return "sequences", self.sequences
        if self.cu_seqlens is not None:
            return "cu_seq_lens_q", Sequences.from_cu_seqlens(self.cu_seqlens, total=self.size)
        if self.indexed:
            return "attention_mask", Sequences.from_document_ids(self.mask)
        if self.seq_idx is not None:
            return "seq_idx", Sequences.from_document_ids(self.seq_idx + 1)
        starts = self._restarts()
        if starts is not None:
            return "position_ids", Sequences._from_starts(starts | row_starts(self.mask, step=0))
        if self.cut:
            raise ValueError(CUT)
        if self.padding_mask is not None:
            return "attention_mask", Sequences.from_document_ids(self._one_document_a_row())
        rows, tokens = self.shape
        return "rows", Sequences.from_lengths([tokens] * rows)

    def check_agreement(self, source: str, starts: Tensor) -> None:
        """Every other description of boundaries must say the same about real tokens."""
        others = {}
        if self.seq_idx is not None:
            others["seq_idx"] = row_starts(self.seq_idx, step=0)
        if self.cu_seqlens is not None:
            others["cu_seq_lens_q"] = self.starts_at(self.cu_seqlens)
        if self.indexed:
            others["attention_mask"] = row_starts(self.mask, step=0)
        if self.positions is not None:
            restarts = row_starts(self.positions, step=1)
            # a row whose positions never restart says nothing: offsets are free under rotary embeddings
            others["position_ids"] = torch.where(restarts[:, 1:].any(dim=1, keepdim=True), restarts, starts)
        for name, theirs in others.items():
            wrong = (starts != theirs) & self._real()
            if name != source and bool(wrong.any()):
                row, column = (int(i) for i in wrong.nonzero()[0])
                says = "begins" if bool(starts[row, column]) else "continues"
                raise ValueError(
                    f"{source} and {name} contradict each other: at row {row}, token {column} a document {says} by "
                    f"{source} but not by {name}; pass one of them, or make them agree"
                )
        after_padding = (self.mask[:, 1:] != 0) & (self.mask[:, :-1] == 0)
        if source != "attention_mask" and bool((after_padding & ~starts[:, 1:]).any()):
            raise ValueError(f"attention_mask has padding inside a document that {source} describes as one")

    def starts_at(self, cu_seqlens: Tensor) -> Tensor:
        """``[B, T]``: True where cumulative lengths begin a document."""
        starts = torch.zeros(self.size + 1, dtype=torch.bool, device="cpu")
        starts[cu_seqlens.cpu().long().clamp(0, self.size)] = True
        return starts[: self.size].view(self.shape)

    @cached_property
    def positions(self) -> Tensor | None:
        """The text positions ``[B, T]``; None where none came, or three rows, which may stand still in a document."""
        given = self.position_ids
        if given is None or (given.ndim == 3 and given.shape[0] == 3):
            return None
        rows = text_positions(given)
        if rows.shape[0] == 1:
            rows = rows.expand(self.shape[0], -1)
        self._check_shape("position_ids", rows, given=given)
        return rows.cpu()

    def _restarts(self) -> Tensor | None:
        """Where positions begin documents, if they say more than the padding mask does; padding may carry any."""
        if self.positions is not None:
            starts = row_starts(self.positions, step=1)
            return starts if bool((starts[:, 1:] & self.inside).any()) else None
        if self.position_ids is not None:
            # no document goes back in time; without a mask, which says that each row is one, three rows say nothing
            back = self.position_ids[0].cpu().diff(dim=-1) < 0
            if self.padding_mask is None or bool((back & self.inside).any()):
                text_positions(self.position_ids)  # raises
        return None

    def _real(self) -> Tensor:
        """True for tokens that are not known to be padding."""
        real = self.mask != 0
        if self.positions is None:
            return real
        # collators that pad positions repeat one value to the end of the row
        trailing = (self.positions == self.positions[:, -1:]).flip(1).cumprod(1).flip(1).bool()
        return real & ~(trailing & (trailing.sum(1, keepdim=True) > 1))

    def _one_document_a_row(self) -> Tensor:
        runs = (row_starts(self.mask, step=0) & (self.mask != 0)).sum(dim=1)
        if bool((runs > 1).any()):
            row = int((runs > 1).nonzero()[0])
            raise ValueError(
                f"attention_mask row {row} has padding between real tokens; a 0/1 mask means one document a row with "
                "padding before or after it, an indexed mask (1..N) several documents"
            )
        return self.mask

    def _checked_mask(self, mask: Any) -> Tensor:
        if isinstance(mask, dict):
            raise ValueError(
                "the model around the text model built masks of its own, which cannot be honoured with documents; "
                "prepare and call the text model or its *ForCausalLM"
            )
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask must be [B, T] (0/1, or 0 for padding and 1..N for documents), got {got}; a mask of "
                "pairs cannot be honoured by the recurrent layers: describe documents with sequences= or cu_seq_lens_q="
            )
        self._check_shape("attention_mask", mask, given=mask)
        values: Tensor = mask.cpu()
        if bool((values < 0).any()) or (values.is_floating_point() and values.numel() and not bool(values.any())):
            raise ValueError(
                "attention_mask [B, T] must be >= 0, 0 for padding and 1 (or 1 to N for documents) for tokens; got "
                f"{values.dtype} from {float(values.min()):g} to {float(values.max()):g}, as in a mask that is added "
                "to scores, where 0 keeps a token: pass attention_mask=(mask == 0).long()"
            )
        if values.is_floating_point() and not torch.equal(values, values.long().to(values)):
            raise ValueError(
                f"attention_mask must hold whole numbers or booleans, got NaN, infinity or fractions in {values.dtype}"
            )
        return values.long()

    def _ids(self, ids: Tensor) -> Tensor:
        if ids.numel() == self.size:
            ids = ids.reshape(self.shape)
        self._check_shape("seq_idx", ids, given=ids)
        return ids.cpu().long()

    def _check_shape(self, name: str, values: Tensor, *, given: Tensor) -> None:
        if tuple(values.shape) != self.shape:
            raise ValueError(f"{name} must be {list(self.shape)} like the tokens, got {tuple(given.shape)}")


def _boundaries(call: Mapping[str, Any]) -> tuple[Tensor | None, bool]:
    """``cu_seq_lens_q`` of the call, once it agrees with the rest of the metadata; and whether a loader cut it.

    A loader that takes batches apart by rows leaves one entry of it, which describes nothing; boundaries are then read
    from what it left whole.
    """
    names = ("cu_seq_lens_q", "cu_seq_lens_k")
    given = [as_tensor(call[name]).reshape(-1) for name in names if call.get(name) is not None]
    if any(cu.numel() == 1 for cu in given):
        return None, True
    both = len(given) == 2 and call.get("sequences") is None and call[names[0]] is not call[names[1]]
    # equal up to empty documents
    if both and not torch.equal(*map(torch.unique_consecutive, given)):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ; documents attend to themselves, so pass the same")
    return (given[0] if given else None), False
