"""Documents to packs, with an account of what was cut, left out and filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deltatune.data.documents import Documents
from deltatune.data.epochs import Epochs
from deltatune.data.mixture import Mixture, Shares
from deltatune.errors import DataError
from deltatune.packing.sample import Sample
from deltatune.packing.shuffled import Packs

__all__ = ["Overlong", "PackedDataset", "PackingReport", "counted", "pack_documents"]

Overlong = Literal["error", "split", "truncate", "drop"]


@dataclass(frozen=True)
class PackingReport:
    """What became of the rows, and what an epoch holds."""

    rows: int  # read
    documents: int  # in the packs of an epoch, parts of split ones counted singly
    tokens: int  # of these documents
    trained_tokens: int  # those that are targets; a document's first token never is
    packs: int
    tokens_per_batch: int  # a pack has room for
    fill: float  # tokens / (packs * tokens_per_batch)
    longest: int  # tokens of the longest document before anything was cut
    variance_between_packs: (
        float  # share of the variance of document length; shuffled documents give about packs/documents
    )
    one_source_packs: float | None = (
        None  # share of the packs whose documents come from one source, if there are several
    )
    split: int = 0  # documents that were cut into several
    truncated: int = 0  # documents of which only the beginning was kept
    dropped: int = 0  # documents left out for their length
    unlabelled: int = 0  # documents or parts left out because cutting left them without a target
    sources: tuple[str, ...] = ()  # what an epoch takes of each source, where that is not every document once
    remarks: tuple[
        str, ...
    ] = ()  # what is no error and should be known: rows dropped, columns and keys that nothing reads

    def __str__(self) -> str:
        between = f"{self.variance_between_packs:.1%} of the variance of length lies between packs"
        if self.one_source_packs is not None:
            between += f", {self.one_source_packs:.1%} of packs hold one source"
        lines = [
            f"{counted(self.rows, 'row')} -> {counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, "
            f"{self.trained_tokens:,} of them trained; longest document {counted(self.longest, 'token')}",
            f"{counted(self.packs, 'pack')} of {self.tokens_per_batch:,} tokens, {self.fill:.2%} full; {between}",
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
        if cut:
            lines.append("over-long documents: " + ", ".join(cut))
        return "\n".join([*lines, *self.sources, *self.remarks])


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """A map-style data set whose items are packs: lists of samples that fit in one batch together.

    An index takes a pack of the first epoch, in the order in which packs were made; a sampler shuffles. An array takes
    the pieces of these numbers, as the packs of ``epochs(number)`` list them. Use it with a batch size of 1 and
    ``PackedCollator(tokens_per_batch=...)``.
    """

    documents: Sequence[Documents]  # of every source
    pieces: NDArray[np.int64]  # [D, 3]: the number of a source, and [start, end) in its stream of tokens
    epochs: Epochs  # the packs of an epoch, whose members are numbers of pieces
    report: PackingReport  # what became of the rows

    def __len__(self) -> int:
        return self.epochs.num_packs

    def __getitem__(self, pack: int | NDArray[np.int64]) -> list[Sample]:
        members = pack if isinstance(pack, np.ndarray) else self.epochs(0)[pack]
        return [self.documents[source].sample(start, end) for source, start, end in self.pieces[members].tolist()]


def counted(number: int, noun: str) -> str:
    """``"1 row"``, ``"2,000 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def pack_documents(
    documents: Sequence[Documents],
    *,
    tokens_per_batch: int,
    overlong: Overlong = "error",
    max_length: int | None = None,
    seed: int | None = 0,
    shares: Shares | None = None,
    keep: Sequence[NDArray[np.bool_]] | None = None,
    remarks: Sequence[str] = (),
) -> PackedDataset:
    """Packs the documents of all sources together.

    Args:
        documents: one entry per source, from ``tokenize``.
        tokens_per_batch: the capacity of a pack.
        overlong: what to do with a document that is too long: an ``error``, ``split`` it into independent documents,
            ``truncate`` it to its beginning, or ``drop`` it. A part without a target is left out and counted.
        max_length: the most tokens of a document; ``tokens_per_batch`` by default, which is the most it can be.
        seed: of the order in which documents are packed; ``None`` keeps that of the sources.
        shares: what an epoch takes of each source; all of its documents once by default.
        keep: for each source, which of its documents are packed, ``[D]``; all by default.
        remarks: what the report should say besides.

    Raises:
        DataError: an over-long document under ``error``, named; or nothing left to train on.
    """
    limit = _Limit(tokens_per_batch, max_length)
    counts = {"split": 0, "truncated": 0, "dropped": 0, "unlabelled": 0}
    parts, targets = [], []
    for number, source in enumerate(documents):
        chosen = np.arange(len(source)) if keep is None else np.flatnonzero(keep[number])
        cut = _cut(source, chosen, limit, overlong, counts)
        parts.append(np.stack([np.full_like(cut.starts, number), cut.starts, cut.ends], axis=1))
        targets.append(cut.targets)
    pieces = np.concatenate(parts)
    if not len(pieces):
        raise DataError(
            f"no document is left to train on: all are longer than {limit}; raise it, or set data.overlong to split "
            "or truncate"
        )
    lengths = pieces[:, 2] - pieces[:, 1]
    sizes = np.array([len(part) for part in parts])
    mixture = Mixture.of(np.split(lengths, np.cumsum(sizes)[:-1]), shares, seed=seed or 0)
    epochs = Epochs(lengths, tokens_per_batch, mixture, seed=seed)
    packs = epochs(0)
    tokens = int(lengths[packs.members].sum())
    report = PackingReport(
        rows=sum(len(source.source) for source in documents),
        documents=packs.members.size,
        tokens=tokens,
        trained_tokens=int(np.concatenate(targets)[packs.members].sum()),
        packs=len(packs),
        tokens_per_batch=tokens_per_batch,
        fill=tokens / (len(packs) * tokens_per_batch),
        longest=max(int(source.lengths.max()) for source in documents),
        variance_between_packs=_variance_between(packs, lengths),
        one_source_packs=_one_source(packs, pieces[:, 0]) if np.count_nonzero(sizes) > 1 else None,
        sources=_taken(documents, mixture, lengths, packs.members),
        remarks=tuple(remarks),
        **counts,
    )
    return PackedDataset(documents, pieces, epochs, report)


@dataclass(frozen=True)
class _Limit:
    """The most tokens of a document, and the setting that says so."""

    capacity: int
    max_length: int | None

    @property
    def tokens(self) -> int:
        return self.capacity if self.max_length is None else min(self.capacity, self.max_length)

    def __str__(self) -> str:
        lower = self.max_length is not None and self.max_length < self.capacity
        return f"data.max_length={self.tokens}" if lower else f"packing.tokens_per_batch={self.tokens}"


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Documents, or parts of them, in the order of their source."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    targets: NDArray[np.int64]  # tokens that train

    def __getitem__(self, which: NDArray[Any]) -> _Pieces:
        return _Pieces(self.starts[which], self.ends[which], self.targets[which])


def _cut(
    documents: Documents, chosen: NDArray[np.int64], limit: _Limit, overlong: Overlong, counts: dict[str, int]
) -> _Pieces:
    """The pieces of one source, none longer than the limit."""
    starts, ends = documents.offsets[:-1][chosen], documents.offsets[1:][chosen]
    whole = _Pieces(starts, ends, documents.targets[chosen].astype(np.int64))
    fits = whole.ends - whole.starts <= limit.tokens
    too_long = np.flatnonzero(~fits)
    if not too_long.size:
        return whole
    if overlong == "error":
        first = int(chosen[too_long[0]])
        raise DataError(
            f"{documents.where(first)} has {documents.lengths[first]} tokens, more than {limit} "
            f"({counted(too_long.size, 'such document')} in {documents.source.name}); raise it, or set data.overlong "
            "to split, truncate or drop"
        )
    counts[{"split": "split", "truncate": "truncated", "drop": "dropped"}[overlong]] += too_long.size
    if overlong == "drop":
        return whole[fits]
    parts = []
    for start, end in zip(whole.starts[too_long].tolist(), whole.ends[too_long].tolist(), strict=True):
        for at in range(start, start + 1 if overlong == "truncate" else end, limit.tokens):
            to = min(at + limit.tokens, end)
            parts.append((at, to, documents.num_trained(at, to)))
    cut = _Pieces(*np.array(parts, dtype=np.int64).T)
    counts["unlabelled"] += int(np.count_nonzero(cut.targets == 0))
    cut = cut[cut.targets > 0]
    kept = (whole[fits], cut)
    both = _Pieces(*(np.concatenate([getattr(part, name) for part in kept]) for name in ("starts", "ends", "targets")))
    return both[np.argsort(both.starts)]


def _variance_between(packs: Packs, lengths: NDArray[np.int64]) -> float:
    """Share of the variance of document length that lies between packs; 0 where all are equally long."""
    values = lengths[packs.members].astype(np.float64)
    values -= values.mean()
    sums = np.add.reduceat(values, packs.starts[:-1])
    total = float(values @ values)
    return float((sums**2 / np.diff(packs.starts)).sum() / total) if total else 0.0


def _one_source(packs: Packs, sources: NDArray[np.int64]) -> float:
    """Share of the packs whose documents come from one source."""
    of = sources[packs.members]
    lowest, highest = (reduce.reduceat(of, packs.starts[:-1]) for reduce in (np.minimum, np.maximum))
    return float(np.mean(lowest == highest))


def _taken(
    documents: Sequence[Documents], mixture: Mixture, lengths: NDArray[np.int64], drawn: NDArray[np.int64]
) -> tuple[str, ...]:
    """What an epoch takes of each source, in words, where that is not every document once."""
    if mixture.quotas == mixture.sizes:
        return ()
    ends = np.cumsum(mixture.sizes)
    tokens = np.bincount(np.searchsorted(ends, drawn, side="right"), weights=lengths[drawn], minlength=ends.size)
    shares = tokens / tokens.sum()
    return tuple(
        f"{source.source.name}: {share:.1%} of the tokens, {quota:,} of {counted(size, 'document')} an epoch"
        for source, share, quota, size in zip(documents, shares, mixture.quotas, mixture.sizes, strict=True)
    )
