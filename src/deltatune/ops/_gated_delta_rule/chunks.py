"""How a packed stream is cut into chunks that never straddle two documents."""

# N tokens of the stream, n chunks, C slots a chunk, X any head dim

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHUNK_SIZES", "Chunks", "cut_into_chunks"]

# Slots of a chunk, by the length of its document: at most four slots for each token, whatever the mix of lengths.
CHUNK_SIZES = (4, 16, 64)


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of one size, ordered by their place in the document, then by document, longest document first.

    So the chunks that one step of a sequential scan handles are neighbours, and the documents that go on are the
    first ones of the step before.
    """

    tokens: Tensor  # int64 [n, C], the stream index each slot holds; in empty slots some index of the same document
    empty: Tensor  # bool [n, C], the slots past the end of the document
    filled: Tensor  # int64, the slots that hold a token, among n * C
    firsts: int  # the number of documents, hence of chunks that are their document's first: chunks 0..firsts
    links: list[tuple[slice, slice]]  # for each step of the scan, chunks that go on and those that follow, in one order
    before: Tensor  # int64 [n - firsts], the chunk before each chunk that is not its document's first
    documents: Tensor  # int64 [firsts], the document of each first chunk, as its number among all boundaries
    lasts: Tensor  # int64 [firsts], the last chunk of each of these documents, in the same order

    def gather(self, x: Tensor) -> Tensor:
        """``[B, T, heads, X]`` to ``[n, heads, C, X]``, or the same without X; zeros in empty slots."""
        stream = x.reshape(-1, *x.shape[2:])
        chunked = stream.index_select(0, self.tokens.reshape(-1)).reshape(*self.tokens.shape, *stream.shape[1:])
        empty = self.empty.reshape(*self.empty.shape, *([1] * (chunked.ndim - 2)))
        return chunked.masked_fill(empty, 0.0).transpose(1, 2).contiguous()

    def scatter(self, chunked: Tensor, out: Tensor) -> None:
        """Writes ``[n, heads, C, X]`` to the tokens of a contiguous ``[B, T, heads, X]``; empty slots are dropped."""
        slots = chunked.transpose(1, 2).flatten(0, 1).index_select(0, self.filled)
        tokens = self.tokens.reshape(-1).index_select(0, self.filled)
        out.view(-1, *out.shape[2:]).index_copy_(0, tokens, slots.to(out.dtype))


def cut_into_chunks(cu_seqlens_cpu: Tensor, device: torch.device) -> list[Chunks]:
    """Cuts each document into chunks of its own: one ``Chunks`` for each size of ``CHUNK_SIZES`` that is needed.

    Args:
        cu_seqlens_cpu: integers ``[any + 1]`` on the CPU, not decreasing; empty documents are legal.
        device: where the index tensors are wanted.
    """
    boundaries = cu_seqlens_cpu.long()
    starts, lengths = boundaries[:-1], boundaries.diff()
    parts, shortest = [], 1
    for size in CHUNK_SIZES:
        belongs = lengths >= shortest
        if size != CHUNK_SIZES[-1]:
            belongs &= lengths <= size
        if bool(belongs.any()):
            numbers = belongs.nonzero().squeeze(1)
            parts.append(_cut(starts[belongs], lengths[belongs], numbers, size, device))
        shortest = size + 1
    return parts


def _cut(starts: Tensor, lengths: Tensor, numbers: Tensor, size: int, device: torch.device) -> Chunks:
    lengths, order = lengths.sort(descending=True, stable=True)
    starts = starts[order]
    num_steps = -(-int(lengths[0]) // size)
    # running[j]: documents that have a j-th chunk
    running = (lengths.unsqueeze(0) > size * torch.arange(num_steps, device="cpu").unsqueeze(1)).sum(1)
    begins = running.cumsum(0) - running
    step = torch.arange(num_steps, device="cpu").repeat_interleave(running)
    document = torch.arange(step.numel(), device="cpu") - begins[step]

    offsets = step.unsqueeze(1) * size + torch.arange(size, device="cpu")
    empty = offsets >= lengths[document].unsqueeze(1)
    tokens = starts[document].unsqueeze(1) + offsets.masked_fill(empty, 0)
    counts, bounds = running.tolist(), begins.tolist()
    links = [
        (slice(bounds[j - 1], bounds[j - 1] + counts[j]), slice(bounds[j], bounds[j] + counts[j]))
        for j in range(1, num_steps)
    ]
    firsts = counts[0]
    before = (begins[step - 1] + document)[firsts:]
    filled = (~empty).reshape(-1).nonzero().squeeze(1)
    # documents that go on are the first ones of a step, so each keeps its place among the chunks of every step
    lasts = begins[-(-lengths // size) - 1] + torch.arange(firsts, device="cpu")
    tokens, empty, filled, before, documents, lasts = (
        x.to(device) for x in (tokens, empty, filled, before, numbers[order], lasts)
    )
    return Chunks(tokens, empty, filled, firsts, links, before, documents, lasts)
