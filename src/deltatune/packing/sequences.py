"""Where documents begin and end: one description, built once, read by every layer and op."""

# B rows, T tokens a row, N = B * T tokens of the flattened stream, S documents

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Sequences", "as_tensor"]


def as_tensor(values: Any) -> Tensor:
    """A tensor as it is; other numbers as one on the CPU, whatever torch's default device is."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


@dataclass(frozen=True, eq=False)
class Sequences:
    """Document boundaries of a flattened ``[B * T]`` token stream, padding described as documents too.

    Shapes depend on the number of tokens alone, so a compiled layer sees the same ones whatever the batch holds:
    ``cu_seqlens`` has room for more documents than there are tokens, and the entries past the last document repeat the
    total (empty documents). Traced code reads the tensors only; the two integers are for hosts and opaque ops, since
    an integer read while tracing would be a new graph for every batch.

    Attributes:
        cu_seqlens: int32 ``[capacity + 1]``, cumulative lengths, first entry 0, tail repeats the token total.
        cu_seqlens_cpu: the same values on the CPU, whatever the device of the other tensors.
        positions: int32 ``[N]``, the offset of each token inside its document; 0 marks a document's first token.
        max_length: an upper bound on a document's length, in tokens.
        num_sequences: documents before the repeated tail, a padding document included.
        part: where ranks hold a pack together, and pass states on or need no exchange, the documents as this one's
            tokens hold them.
    """

    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    positions: Tensor
    max_length: int
    num_sequences: int
    part: Sequences | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths: Iterable[int] | Tensor,
        *,
        total: int | None = None,
        device: torch.device | str | None = None,
        capacity: int | None = None,
    ) -> Sequences:
        """Documents of these lengths, one after the other.

        Args:
            lengths: tokens of each document, >= 0; an empty document is legal.
            total: tokens of the stream; those after ``sum(lengths)`` are padding, a document of their own.
            device: where ``cu_seqlens`` and ``positions`` live; the CPU by default.
            capacity: the number of documents to leave room for; ``total + 1`` by default.

        Raises:
            ValueError: a negative length, lengths longer than ``total``, or more documents than ``capacity``.
        """
        given = as_tensor(lengths if isinstance(lengths, Tensor) else list(lengths)).cpu()
        counts = given.long()
        if not torch.equal(counts.to(given.dtype), given):
            raise ValueError(f"document lengths must be whole numbers, got {given.tolist()}")
        if counts.ndim != 1:
            raise ValueError(f"lengths must be one-dimensional, got shape {tuple(counts.shape)}")
        if counts.numel() and int(counts.min()) < 0:
            raise ValueError(f"document lengths must be >= 0, got {int(counts.min())}")
        used = int(counts.sum())
        if total is None:
            total = used
        if used > total:
            raise ValueError(f"documents hold {used} tokens, more than total={total}; pack fewer or raise total")
        if used < total:
            counts = torch.cat([counts, counts.new_tensor([total - used])])
        boundaries = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls._from_boundaries(boundaries, device=torch.device(device or "cpu"), capacity=capacity)

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> Sequences:
        """Documents that begin wherever the position does not grow by one, and at the start of every row.

        Args:
            position_ids: ``[T]``, ``[B, T]`` or ``[4, B, T]`` (row 0 holds the text positions of an mRoPE model).

        Raises:
            ValueError: ``[3, B, T]``: three-row mRoPE positions stand still inside an image and restart nowhere, so
                boundaries cannot be read from them.
        """
        return cls._from_starts(row_starts(text_positions(position_ids), step=1))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, total: int | None = None) -> Sequences:
        """Documents from cumulative lengths ``[S + 1]``, first entry 0; repeated entries are empty documents.

        Raises:
            ValueError: not one-dimensional integers, not starting at 0, decreasing, or not ending at ``total``.
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                "cu_seqlens must be a one-dimensional integer tensor of at least two entries, "
                f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            )
        boundaries = cu_seqlens.detach().cpu().long()
        if int(boundaries[0]) != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {int(boundaries[0])}")
        if bool((boundaries[1:] < boundaries[:-1]).any()):
            raise ValueError("cu_seqlens must not decrease")
        if total is not None and int(boundaries[-1]) != total:
            raise ValueError(
                f"cu_seqlens must end at the number of tokens: expected {total}, got {int(boundaries[-1])}; "
                "describe padding as a document of its own"
            )
        # the repeated tail holds no documents, and rebuilding it gives the capacity that the total asks for
        last = int((boundaries < boundaries[-1]).sum())
        return cls._from_boundaries(boundaries[: last + 1], device=cu_seqlens.device)

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> Sequences:
        """Documents from ids ``[B, T]``: 0 is padding, 1..N documents.

        A document is a run of equal ids inside one row: ids may restart in every row and are never merged across rows.
        A run of padding is a document of its own.

        Raises:
            ValueError: not ``[B, T]``, not integers, or a negative id.
        """
        if document_ids.ndim != 2 or document_ids.is_floating_point():
            raise ValueError(
                f"document_ids must be integers [B, T], got {document_ids.dtype} of shape {tuple(document_ids.shape)}"
            )
        ids = document_ids.detach().cpu()
        if ids.dtype != torch.bool and ids.numel() and int(ids.min()) < 0:
            raise ValueError(f"document_ids must be >= 0 (0 is padding), got {int(ids.min())}")
        return cls._from_starts(row_starts(ids, step=0), device=document_ids.device)

    @classmethod
    def _from_starts(cls, starts: Tensor, device: torch.device | None = None) -> Sequences:
        device = starts.device if device is None else device
        flat = starts.reshape(-1).cpu()
        boundaries = torch.cat([flat.nonzero().squeeze(1), torch.tensor([flat.numel()], device="cpu")])
        return cls._from_boundaries(boundaries, device=device)

    @classmethod
    def _from_boundaries(cls, boundaries: Tensor, *, device: torch.device, capacity: int | None = None) -> Sequences:
        """``boundaries``: int64 ``[S + 1]`` on the CPU, checked by the caller."""
        num_sequences, total = boundaries.numel() - 1, int(boundaries[-1])
        room = total + 1 if capacity is None else capacity
        if num_sequences > room and capacity is None:
            # more documents than tokens: what the shape has no room for are empty ones
            boundaries = torch.cat([boundaries[:1], boundaries[1:][boundaries.diff() > 0]])
            num_sequences = boundaries.numel() - 1
        if num_sequences > room:
            raise ValueError(f"{num_sequences} documents exceed the capacity of {room}; pass capacity={num_sequences}")
        lengths = boundaries.diff()
        cu_seqlens = torch.full((room + 1,), total, dtype=torch.int32, device="cpu")
        cu_seqlens[: num_sequences + 1] = boundaries
        positions = torch.arange(total, device="cpu") - boundaries[:-1].repeat_interleave(lengths)
        return cls(
            cu_seqlens=_moved(cu_seqlens, device),
            cu_seqlens_cpu=cu_seqlens,
            positions=_moved(positions.int(), device),
            max_length=int(lengths.max()) if num_sequences else 0,
            num_sequences=num_sequences,
        )

    @property
    def total(self) -> int:
        """Tokens of the flattened stream."""
        return self.positions.numel()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document before the repeated tail, from the CPU copy."""
        return [int(n) for n in self.cu_seqlens_cpu[: self.num_sequences + 1].diff()]

    def static(self) -> Sequences:
        """The same boundaries with integers that depend on the token total alone, as layers take them.

        ``max_length`` becomes the total and the repeated tail counts as empty documents, so that a tracer which guards
        on the integers of its inputs still sees one value for every batch of a shape.
        """
        part = None if self.part is None else self.part.static()
        return replace(self, max_length=self.total, num_sequences=self.cu_seqlens.numel() - 1, part=part)

    def to(
        self,
        device: torch.device | str | int | torch.dtype | Tensor | None = None,
        *_: object,
        non_blocking: bool = False,
        **__: object,
    ) -> Sequences:
        """Moves to a device; ``cu_seqlens_cpu`` stays, and a dtype is ignored: boundaries are integers.

        Takes what ``Tensor.to`` takes, so loaders that move batches move it too. With ``non_blocking`` nothing waits
        for the device, whether the tensors are pinned or not.
        """
        if isinstance(device, Tensor):
            device = device.device
        if device is None or isinstance(device, torch.dtype) or torch.device(device) == self.cu_seqlens.device:
            return self
        return replace(
            self,
            cu_seqlens=_moved(self.cu_seqlens, device, non_blocking),
            positions=_moved(self.positions, device, non_blocking),
            part=None if self.part is None else self.part.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Sequences:
        """Pins the CPU tensors that a later ``.to()`` will copy; called by ``DataLoader(pin_memory=True)``.

        Without an accelerator there is nothing to pin for.
        """
        if self.cu_seqlens.device.type != "cpu" or not torch.accelerator.is_available():
            return self
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory(), positions=self.positions.pin_memory())

    def __repr__(self) -> str:
        return (
            f"Sequences(num_sequences={self.num_sequences}, total={self.total}, max_length={self.max_length}, "
            f"device={self.cu_seqlens.device})"
        )


def _moved(values: Tensor, device: torch.device | str | int, non_blocking: bool = True) -> Tensor:
    """A copy on a device; from memory that is not pinned one waits for the device, whatever ``non_blocking`` says."""
    away = torch.device(device).type
    # on the CPU nobody asks for accelerators, which a forked process must not
    if non_blocking and values.device.type == "cpu" != away and torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type == away:
            values = values.pin_memory()
    return values.to(device, non_blocking=non_blocking)


def row_starts(values: Tensor, *, step: int) -> Tensor:
    """``[B, T]``: True where a row begins, or a value is not the one before it plus ``step``."""
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[:, 1:] = values[:, 1:] != values[:, :-1] + step
    return starts


def text_positions(position_ids: Tensor) -> Tensor:
    """The text rows ``[B, T]`` of positions in any accepted form; see ``Sequences.from_position_ids``."""
    if position_ids.ndim == 1:
        return position_ids.unsqueeze(0)
    if position_ids.ndim == 2:
        return position_ids
    if position_ids.ndim == 3 and position_ids.shape[0] == 4:
        return position_ids[0]
    if position_ids.ndim == 3 and position_ids.shape[0] == 3:
        raise ValueError(
            "position_ids [3, B, T] hold no document boundaries (mRoPE positions of an image repeat); pass "
            "sequences=, cu_seq_lens_q=, or [4, B, T] with the text positions in row 0"
        )
    raise ValueError(f"position_ids must be [T], [B, T] or [4, B, T], got shape {tuple(position_ids.shape)}")
