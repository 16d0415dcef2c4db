"""Documents to packs, with an account of what was cut, left out and filled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deltatune.data.documents import Documents
from deltatune.data.epochs import Epochs
from deltatune.data.mixture import Mixture, Shares
from deltatune.data.overlong import Limit, Overlong, cut_documents, cut_pairs
from deltatune.data.report import PackingReport, counted, one_source, variance_between
from deltatune.errors import DataError
from deltatune.packing.sample import Sample
from deltatune.phases import phase

__all__ = ["PackedDataset", "ReferencedPack", "pack_documents"]

_MOST: Final = 2**31


class ReferencedPack(list[Sample]):
    """The samples of a pack, and what a reference model says of each, fp32 ``[D]``."""

    def __init__(self, samples: Iterable[Sample], reference: NDArray[np.float32]) -> None:
        super().__init__(samples)
        self.reference = reference


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """A map-style data set whose items are packs: lists of samples that fit in one batch together.

    An index takes a pack of the first epoch, in the order in which packs were made; a sampler shuffles. An array takes
    the members of these numbers, as the packs of ``epochs(number)`` list them: pieces, or pairs of them, which come
    one after the other. Use it with a batch size of 1 and ``PackedCollator(tokens_per_batch=...)``.
    """

    documents: Sequence[Documents]  # of every source
    sources: NDArray[np.int32]  # [D], the number of the source that each piece is of
    starts: NDArray[np.int64]  # [D], where it begins in the source's stream of tokens
    lengths: NDArray[np.int32]  # [D], its tokens
    epochs: Epochs  # the packs of an epoch, whose members are numbers of pieces, or of pairs
    report: PackingReport  # what became of the rows
    per_member: int = 1  # pieces of a member of a pack: 2 where the rows are preferences
    reference: NDArray[np.float32] | None = None  # [D], the log-probability of its answer that a reference gives

    def __len__(self) -> int:
        return self.epochs.num_packs

    def __getitem__(self, pack: int | NDArray[np.int64]) -> list[Sample]:
        pieces = self.pieces(pack if isinstance(pack, np.ndarray) else self.epochs(0)[pack])
        places = (array[pieces].tolist() for array in (self.sources, self.starts, self.lengths))
        samples = [
            self.documents[source].sample(start, start + length, piece)
            for source, start, length, piece in zip(*places, pieces.tolist(), strict=True)
        ]
        return samples if self.reference is None else ReferencedPack(samples, self.reference[pieces])

    @property
    def member_lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, or of each pair."""
        return _of_members(self.lengths, self.per_member)

    def squares(self, epoch: int) -> NDArray[np.int64]:
        """Sums of the squared lengths of documents, to which the work of attention is proportional, by pack ``[P]``."""
        packs = self.epochs(epoch)
        lengths = self.lengths[self.pieces(packs.members)].astype(np.int64)
        return np.add.reduceat(lengths**2, packs.starts[:-1] * self.per_member)

    def pieces(self, members: NDArray[np.integer]) -> NDArray[np.integer]:
        """The pieces of members of a pack, in their order."""
        return (members[:, None] * self.per_member + np.arange(self.per_member)).ravel()

    def where(self, piece: int) -> str:
        """The row that a piece, by its number, comes from, in words."""
        documents = self.documents[int(self.sources[piece])]
        return documents.where(documents.document_at(int(self.starts[piece])))


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
    """Packs the documents of all sources together; those of preferences in pairs, of which none is taken apart.

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
        DataError: an over-long document under ``error``, named; preferences beside other rows; or nothing left to train
            on, of all sources or of one that has a weight; or an epoch of 2^31 documents.
    """
    limit = Limit(tokens_per_batch, max_length)
    per_member = _pieces_per_member(documents)
    cut = cut_documents if per_member == 1 else cut_pairs
    counts: Counter[str] = Counter()
    parts = [
        cut(source, None if keep is None else keep[number], limit, overlong, counts)
        for number, source in enumerate(documents)
    ]
    sizes = [len(part) for part in parts]
    if not any(sizes):
        raise DataError(
            f"no document is left to train on: all are longer than {limit}; raise it, or set data.overlong to split "
            "or truncate"
        )
    if shares is not None and shares.weights is not None and 0 in sizes:
        raise DataError(
            f"{documents[sizes.index(0)].source.name} has a weight, and none of its documents is left to train on: all "
            f"are longer than {limit} or held out; change data.overlong or data.val_size, or leave it out"
        )
    lengths = [_of_members(part.lengths, per_member) for part in parts]
    sources = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    all_lengths = np.concatenate(lengths)
    with phase("packing"):
        mixture = Mixture.of(lengths, shares, seed=seed or 0)
        if (count := sum(mixture.quotas)) >= _MOST:
            raise DataError(
                f"an epoch would take {count:,} documents, repeated ones counted, and can hold {_MOST - 1:,}; lower "
                "repeat of data.train, and train more epochs in its place"
            )
        epochs = Epochs(all_lengths, tokens_per_batch, mixture, seed=seed)
        packs = epochs(0)
    tokens = int(all_lengths[packs.members].sum())
    targets = _of_members(np.concatenate([part.targets for part in parts]), per_member)
    rows_read = sum(len(source.source) for source in documents)
    report = PackingReport(
        rows=rows_read if keep is None else sum(map(_num_rows, documents, keep)),
        rows_read=None if keep is None else rows_read,
        documents=packs.members.size * per_member,
        tokens=tokens,
        trained_tokens=int(targets[packs.members].sum()),
        packs=len(packs),
        tokens_per_batch=tokens_per_batch,
        fill=tokens / (len(packs) * tokens_per_batch),
        longest=max(int(source.lengths.max()) for source in documents),
        variance_between_packs=variance_between(packs, all_lengths),
        one_source_packs=one_source(packs, sources[::per_member]) if np.count_nonzero(sizes) > 1 else None,
        sources=_taken(documents, mixture, all_lengths, packs.members, "pair" if per_member == 2 else "document"),
        remarks=tuple(remarks),
        pairs=packs.members.size if per_member == 2 else None,
        **counts,
    )
    starts, pieces = (np.concatenate([getattr(part, name) for part in parts]) for name in ("starts", "lengths"))
    return PackedDataset(documents, sources, starts, pieces, epochs, report, per_member)


def _num_rows(source: Documents, keep: NDArray[np.bool_]) -> int:
    """Rows that documents which are kept come from."""
    return np.unique(source.rows[keep]).size


def _of_members(values: NDArray[np.int32], per_member: int) -> NDArray[np.int32]:
    """Sums over the pieces of each member."""
    return np.asarray(values.reshape(-1, per_member).sum(1, dtype=np.int32))


def _pieces_per_member(documents: Sequence[Documents]) -> int:
    """What a pack is made of: documents, or pairs of them."""
    paired = {source.layout.format == "preference": source.source for source in documents}
    if len(paired) > 1:
        raise DataError(
            f"{paired[True].name} holds preferences and {paired[False].name} other rows, and a run trains on one of "
            "these kinds; leave the other out"
        )
    return 2 if True in paired else 1


def _taken(
    documents: Sequence[Documents],
    mixture: Mixture,
    lengths: NDArray[np.integer],
    drawn: NDArray[np.integer],
    unit: str,
) -> tuple[str, ...]:
    """What an epoch takes of each source, in words, where that is not every document (or pair) once."""
    if mixture.quotas == mixture.sizes:
        return ()
    ends = np.cumsum(mixture.sizes)
    of_source = np.searchsorted(ends, drawn, side="right")
    counts = np.bincount(of_source, minlength=ends.size)
    tokens = np.bincount(of_source, weights=lengths[drawn], minlength=ends.size)
    shares = tokens / tokens.sum()
    return tuple(
        f"{source.source.name}: {share:.1%} of the tokens, {count:,} of {counted(size, unit)} an epoch"
        for source, share, count, size in zip(documents, shares, counts.tolist(), mixture.sizes, strict=True)
    )
