"""Any upstream metadata about documents becomes one ``Sequences``."""

# B rows, T tokens a row, N = B * T

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.packing.sequences import Sequences, text_positions

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
        sequences: the boundaries, on the device of the tokens.
        position_ids: positions as they came, or ``[B, T]`` restarting in every document where none came.
        padding_mask: bool ``[B, T]``, True for real tokens, where the call carried a two-dimensional mask.
        source: the metadata that decided, for messages and reports.
    """

    sequences: Sequences
    position_ids: Tensor
    padding_mask: Tensor | None
    source: str


def resolve_metadata(call: Mapping[str, Any], *, rows: int, tokens: int, device: torch.device) -> Resolved:
    """Reads the boundaries of a call from its keyword arguments.

    Order of precedence: ``sequences``, ``cu_seq_lens_q``, an indexed ``attention_mask`` (0 = padding, 1..N documents),
    ``seq_idx`` (0-based), ``position_ids`` that restart, a 0/1 ``attention_mask``, and else one document a row.

    Raises:
        ValueError: metadata of the wrong shape, boundaries that do not end at the number of tokens, metadata that
            contradicts itself on real tokens, or three-row mRoPE positions without other boundaries.
    """
    batch = _Batch(call, rows, tokens)
    source, sequences = batch.primary()
    if sequences.total != batch.size:
        raise ValueError(f"{source} describes {sequences.total} tokens, but the batch holds {rows} x {tokens}")
    batch.check_rows(source, sequences)
    if source != "sequences" or device.type == "cpu":
        batch.check_agreement(source, sequences)
    sequences = sequences.to(device)
    position_ids = batch.position_ids
    if position_ids is None:
        position_ids = sequences.positions.view(rows, tokens).long()
    elif position_ids.ndim == 1:
        position_ids = position_ids.unsqueeze(0)
    return Resolved(sequences, position_ids, batch.padding_mask, source)


class _Batch:
    """The metadata of one call, each kind brought to the CPU at most once."""

    def __init__(self, call: Mapping[str, Any], rows: int, tokens: int) -> None:
        self.rows, self.tokens, self.size = rows, tokens, rows * tokens
        self.sequences = call.get("sequences")
        self.cu_seqlens, self.cut = _boundaries(call)
        self.seq_idx = self._ids("seq_idx", call.get("seq_idx"))
        self.mask = self._mask(call.get("attention_mask"))
        self.indexed = self.mask is not None and bool((self.mask > 1).any())
        self.padding_mask = None if self.mask is None else self._shaped(call["attention_mask"]) != 0
        positions = call.get("position_ids")
        self.position_ids = None if positions is None else torch.as_tensor(positions)
        self.mrope = self.position_ids is not None and self.position_ids.ndim == 3 and self.position_ids.shape[0] == 3

    def primary(self) -> tuple[str, Sequences]:
        if self.sequences is not None:
            if not isinstance(self.sequences, Sequences):
                raise ValueError(f"sequences must be a deltatune.Sequences, got {type(self.sequences).__name__}")
            return "sequences", self.sequences
        if self.cu_seqlens is not None:
            return "cu_seq_lens_q", Sequences.from_cu_seqlens(self.cu_seqlens, total=self.size)
        if self.indexed:
            assert self.mask is not None
            return "attention_mask", Sequences.from_document_ids(self.mask)
        if self.seq_idx is not None:
            return "seq_idx", Sequences.from_document_ids(self.seq_idx + 1)
        if self.mrope and (self.mask is None or self._time_goes_back()):
            assert self.position_ids is not None
            text_positions(self.position_ids)  # raises: three rows hold no boundaries
        starts = self._position_starts()
        if starts is not None and self._restarts(starts):
            return "position_ids", Sequences._from_starts(starts | self._mask_starts())
        if self.cut:
            raise ValueError(CUT)
        if self.mask is not None:
            return "attention_mask", Sequences._from_starts(self._one_document_a_row())
        return "rows", Sequences.from_lengths([self.tokens] * self.rows)

    def _time_goes_back(self) -> bool:
        """Whether the temporal row of mRoPE positions decreases between real tokens, which no one document does."""
        assert self.position_ids is not None
        assert self.mask is not None
        back = self.position_ids[0].cpu().diff(dim=-1) < 0
        return bool((back & (self.mask[:, 1:] != 0) & (self.mask[:, :-1] != 0)).any())

    def check_rows(self, source: str, sequences: Sequences) -> None:
        """No document may span two rows."""
        if self.rows == 1:
            return
        ends = sequences.cu_seqlens_cpu
        expected = torch.arange(0, self.size + 1, self.tokens, dtype=ends.dtype)
        if not bool(torch.isin(expected, ends).all()):
            raise ValueError(
                f"{source} has a document that spans two of the batch's {self.rows} rows; boundaries are those of the "
                f"flattened [B * T] stream and every row of {self.tokens} tokens begins a document"
            )

    def check_agreement(self, source: str, sequences: Sequences) -> None:
        """Every other description of boundaries must say the same about real tokens."""
        starts = torch.zeros(self.size + 1, dtype=torch.bool)
        starts[sequences.cu_seqlens_cpu.long()] = True
        starts = starts[: self.size].view(self.rows, self.tokens)
        others = {"seq_idx": None if self.seq_idx is None else _changes(self.seq_idx)}
        if self.cu_seqlens is not None and source != "cu_seq_lens_q":
            other = torch.zeros(self.size + 1, dtype=torch.bool)
            other[self.cu_seqlens.cpu().long().clamp(0, self.size)] = True
            others["cu_seq_lens_q"] = other[: self.size].view(self.rows, self.tokens)
        if self.indexed:
            assert self.mask is not None
            others["attention_mask"] = _changes(self.mask)
        position_starts = self._position_starts()
        if position_starts is not None:
            # a row whose positions never restart says nothing: offsets are free under rotary embeddings
            silent = ~position_starts[:, 1:].any(dim=1, keepdim=True)
            others["position_ids"] = torch.where(silent, starts, position_starts)
        for name, theirs in others.items():
            if name != source and theirs is not None:
                self._compare(source, starts, name, theirs)
        if source != "attention_mask" and bool((self._unpadded_starts() & ~starts).any()):
            raise ValueError(f"attention_mask has padding inside a document that {source} describes as one")

    def _compare(self, source: str, ours: Tensor, name: str, theirs: Tensor) -> None:
        wrong = (ours != theirs) & self._real()
        if bool(wrong.any()):
            row, column = (int(i) for i in wrong.nonzero()[0])
            says = "begins" if bool(ours[row, column]) else "continues"
            raise ValueError(
                f"{source} and {name} contradict each other: at row {row}, token {column} a document {says} by "
                f"{source} but not by {name}; pass one of them, or make them agree"
            )

    def _real(self) -> Tensor:
        """True for tokens that are not known to be padding."""
        real = torch.ones(self.rows, self.tokens, dtype=torch.bool)
        if self.mask is not None:
            real &= self.mask != 0
        if self.position_ids is not None and not self.mrope:
            positions = self._positions_checked()
            # collators that pad positions repeat one value to the end of the row
            trailing = (positions == positions[:, -1:]).flip(1).cumprod(1).flip(1).bool()
            real &= ~(trailing & (trailing.sum(1, keepdim=True) > 1))
        return real

    def _position_starts(self) -> Tensor | None:
        if self.position_ids is None or self.mrope:
            return None
        positions = self._positions_checked()
        starts = torch.ones_like(positions, dtype=torch.bool)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        return starts

    def _positions_checked(self) -> Tensor:
        assert self.position_ids is not None
        rows = text_positions(self.position_ids)
        if rows.shape[0] == 1 and self.rows > 1:
            rows = rows.expand(self.rows, -1)
        if tuple(rows.shape) != (self.rows, self.tokens):
            raise ValueError(
                f"position_ids must be [{self.rows}, {self.tokens}] like the tokens, "
                f"got {tuple(self.position_ids.shape)}"
            )
        return rows.cpu()

    def _restarts(self, starts: Tensor) -> bool:
        """Whether positions say more than the padding mask does; padding may carry any positions."""
        inside = starts[:, 1:]
        if self.mask is not None:
            inside = inside & (self.mask[:, 1:] != 0) & (self.mask[:, :-1] != 0)
        return bool(inside.any())

    def _mask_starts(self) -> Tensor:
        if self.mask is None:
            return torch.zeros(self.rows, self.tokens, dtype=torch.bool)
        return _changes(self.mask)

    def _unpadded_starts(self) -> Tensor:
        """Real tokens that follow padding inside their row."""
        after = torch.zeros(self.rows, self.tokens, dtype=torch.bool)
        if self.mask is not None:
            after[:, 1:] = (self.mask[:, 1:] != 0) & (self.mask[:, :-1] == 0)
        return after

    def _one_document_a_row(self) -> Tensor:
        assert self.mask is not None
        starts = _changes(self.mask)
        runs = (starts & (self.mask != 0)).sum(dim=1)
        if bool((runs > 1).any()):
            row = int((runs > 1).nonzero()[0])
            raise ValueError(
                f"attention_mask row {row} has padding between real tokens; a 0/1 mask means one document a row with "
                "padding before or after it, an indexed mask (1..N) several documents"
            )
        return starts

    def _mask(self, mask: Any) -> Tensor | None:
        if mask is None:
            return None
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
        shaped = self._shaped(mask).cpu()
        if bool((shaped < 0).any()) or (shaped.is_floating_point() and shaped.numel() and not bool(shaped.any())):
            raise ValueError(
                "attention_mask [B, T] must be >= 0, 0 for padding and 1 (or 1 to N for documents) for tokens; got "
                f"{shaped.dtype} from {float(shaped.min()):g} to {float(shaped.max()):g}, as in a mask that is added "
                "to scores, where 0 keeps a token: pass attention_mask=(mask == 0).long()"
            )
        if shaped.is_floating_point() and not torch.equal(shaped, shaped.round()):
            raise ValueError(f"attention_mask must hold whole numbers or booleans, got fractions in {shaped.dtype}")
        return shaped.long()

    def _ids(self, name: str, ids: Tensor | None) -> Tensor | None:
        if ids is None:
            return None
        ids = torch.as_tensor(ids)
        if ids.numel() != self.size:
            raise ValueError(f"{name} must be [{self.rows}, {self.tokens}] like the tokens, got {tuple(ids.shape)}")
        return ids.reshape(self.rows, self.tokens).cpu().long()

    def _shaped(self, mask: Tensor) -> Tensor:
        if tuple(mask.shape) != (self.rows, self.tokens):
            raise ValueError(
                f"attention_mask must be [{self.rows}, {self.tokens}] like the tokens, got {tuple(mask.shape)}"
            )
        return mask


def _boundaries(call: Mapping[str, Any]) -> tuple[Tensor | None, bool]:
    """``cu_seq_lens_q`` of the call, once it agrees with the rest of the metadata; and whether a loader cut it.

    A loader that takes batches apart by rows leaves one entry of it, which describes nothing; boundaries are then read
    from what it left whole.
    """
    names = ("cu_seq_lens_q", "cu_seq_lens_k")
    given = [None if call.get(name) is None else torch.as_tensor(call[name]).reshape(-1) for name in names]
    cut = any(cu is not None and cu.numel() == 1 for cu in given)
    cu_q, cu_k = (None if cut else cu for cu in given)
    if cu_q is None or cu_k is None:
        return (cu_k if cu_q is None else cu_q), cut
    same = call[names[0]] is call[names[1]]
    if call.get("sequences") is None and not same and not _same(cu_q, cu_k):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ; documents attend to themselves, so pass the same")
    return cu_q, cut


def _same(cu_q: Tensor, cu_k: Tensor) -> bool:
    """Equal up to empty documents."""
    return torch.equal(torch.unique_consecutive(cu_q), torch.unique_consecutive(cu_k))


def _changes(ids: Tensor) -> Tensor:
    """True where a row begins or an id differs from the one before it."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts
