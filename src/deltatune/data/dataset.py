"""Documents to packs, with an account of what was cut, left out and filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deltatune.data.documents import Documents
from deltatune.errors import DataError
from deltatune.packing.bins import pack
from deltatune.packing.sample import Sample

__all__ = ["Overlong", "PackedDataset", "PackingReport", "counted", "pack_documents"]

Overlong = Literal["error", "split", "truncate", "drop"]


@dataclass(frozen=True)
class PackingReport:
    """What became of the rows."""

    rows: int  # read
    documents: int  # in the packs, parts of split ones counted singly
    tokens: int  # of the documents
    trained_tokens: int  # those that are targets; a document's first token never is
    packs: int
    tokens_per_batch: int  # a pack has room for
    fill: float  # tokens / (packs * tokens_per_batch)
    longest: int  # tokens of the longest document before anything was cut
    split: int = 0  # documents that were cut into several
    truncated: int = 0  # documents of which only the beginning was kept
    dropped: int = 0  # documents left out for their length
    unlabelled: int = 0  # documents or parts left out because cutting left them without a target

    def __str__(self) -> str:
        lines = [
            f"{counted(self.rows, 'row')} -> {counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, "
            f"{self.trained_tokens:,} of them trained; longest document {counted(self.longest, 'token')}",
            f"{counted(self.packs, 'pack')} of {self.tokens_per_batch:,} tokens, {self.fill:.2%} full",
        ]
        cut = [
            f"{count:,} {what}"
            for count, what in (
                (self.split, "split"),
                (self.truncated, "truncated"),
                (self.dropped, "dropped for length"),
                (self.unlabelled, "left out because the cut left no trained token"),
            )
            if count
        ]
        return "\n".join([*lines, *(["over-long documents: " + ", ".join(cut)] if cut else [])])


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """A map-style data set whose items are packs: lists of samples that fit in one batch together.

    Its order is that of the packs and never changes; a sampler shuffles. Use it with a batch size of 1 and
    ``PackedCollator(tokens_per_batch=...)``.
    """

    documents: Sequence[Documents]  # of every source
    pieces: NDArray[np.int64]  # [P, 3]: the number of a source, and [start, end) in its flat arrays
    packs: list[NDArray[np.int64]]  # the pieces of each pack, by number
    report: PackingReport  # what became of the rows

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Sample]:
        pieces = self.pieces[self.packs[index]].tolist()
        return [self.documents[source].sample(start, end) for source, start, end in pieces]


def counted(number: int, noun: str) -> str:
    """``"1 row"``, ``"2,000 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def pack_documents(
    documents: Sequence[Documents], *, tokens_per_batch: int, overlong: Overlong = "error", seed: int = 0
) -> PackedDataset:
    """Packs the documents of all sources together.

    Args:
        documents: one entry per source, from ``tokenize``.
        tokens_per_batch: the capacity of a pack.
        overlong: what to do with a document longer than that: an ``error``, ``split`` it into independent documents,
            ``truncate`` it to its beginning, or ``drop`` it. A part without a target is left out and counted.
        seed: decides which of several documents of one length share a pack.

    Raises:
        DataError: an over-long document under ``error``, named; or nothing left to train on.
    """
    counts = {"split": 0, "truncated": 0, "dropped": 0, "unlabelled": 0}
    parts, trained_tokens = [], 0
    for number, source in enumerate(documents):
        starts, ends = _cut(source, tokens_per_batch, overlong, counts)
        parts.append(np.stack([np.full_like(starts, number), starts, ends], axis=1))
        trained_tokens += int(_num_trained(source, starts, ends).sum())
    pieces = np.concatenate(parts)
    if not len(pieces):
        raise DataError(
            f"no document is left to train on: all are longer than packing.tokens_per_batch={tokens_per_batch}; raise "
            "it, or set data.overlong to split or truncate"
        )
    # equal lengths lie together after packing: mixing first keeps neighbours in the file from sharing every pack
    order = np.random.default_rng(seed).permutation(len(pieces))
    lengths = pieces[:, 2] - pieces[:, 1]
    packs = [order[members] for members in pack(lengths[order], tokens_per_batch)]
    tokens = int(lengths.sum())
    report = PackingReport(
        rows=sum(len(source.source) for source in documents),
        documents=len(pieces),
        tokens=tokens,
        trained_tokens=trained_tokens,
        packs=len(packs),
        tokens_per_batch=tokens_per_batch,
        fill=tokens / (len(packs) * tokens_per_batch),
        longest=max(int(source.lengths.max()) for source in documents),
        **counts,
    )
    return PackedDataset(documents, pieces, packs, report)


def _cut(
    documents: Documents, capacity: int, overlong: Overlong, counts: dict[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the pieces of one source begin and end, none longer than the capacity."""
    starts, ends = np.asarray(documents.offsets[:-1]), np.asarray(documents.offsets[1:])
    too_long = np.flatnonzero(ends - starts > capacity)
    if not too_long.size:
        return starts, ends
    if overlong == "error":
        first = int(too_long[0])
        raise DataError(
            f"{documents.where(first)} has {documents.lengths[first]} tokens, more than "
            f"packing.tokens_per_batch={capacity} ({counted(too_long.size, 'such document')} in "
            f"{documents.source.name}); raise it, or set data.overlong to split, truncate or drop"
        )
    fitting = ends - starts <= capacity
    counts[{"split": "split", "truncate": "truncated", "drop": "dropped"}[overlong]] += too_long.size
    if overlong == "drop":
        return starts[fitting], ends[fitting]
    last = starts + 1 if overlong == "truncate" else ends
    cuts = [np.arange(starts[i], last[i], capacity) for i in too_long]
    cut_starts = np.concatenate(cuts)
    cut_ends = np.minimum(cut_starts + capacity, np.repeat(ends[too_long], [cut.size for cut in cuts]))
    trained = _num_trained(documents, cut_starts, cut_ends) > 0
    counts["unlabelled"] += int((~trained).sum())
    return np.concatenate([starts[fitting], cut_starts[trained]]), np.concatenate([ends[fitting], cut_ends[trained]])


def _num_trained(documents: Documents, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Targets of each piece: trained tokens after its first."""
    spans = zip((starts + 1).tolist(), ends.tolist(), strict=True)
    return np.array([np.count_nonzero(documents.trained[start:end]) for start, end in spans], dtype=np.int64)
