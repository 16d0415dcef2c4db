"""Documents to packs, with an account of what was cut, left out and filled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltatune.data.documents import Documents
from deltatune.data.epochs import Epochs
from deltatune.data.mixture import Mixture, Shares
from deltatune.data.overlong import Limit, Overlong, cut_documents
from deltatune.data.report import PackingReport, counted, one_source, variance_between
from deltatune.errors import DataError
from deltatune.packing.sample import Sample
from deltatune.phases import phase

__all__ = ["PackedDataset", "pack_documents"]


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """A map-style data set whose items are packs: lists of samples that fit in one batch together.

    An index takes a pack of the first epoch, in the order in which packs were made; a sampler shuffles. An array takes
    the pieces of these numbers, as the packs of ``epochs(number)`` list them. Use it with a batch size of 1 and
    ``PackedCollator(tokens_per_batch=...)``.
    """

    documents: Sequence[Documents]  # of every source
    sources: NDArray[np.int32]  # [D], the number of the source that each piece is of
    starts: NDArray[np.int64]  # [D], where it begins in the source's stream of tokens
    lengths: NDArray[np.int32]  # [D], its tokens
    epochs: Epochs  # the packs of an epoch, whose members are numbers of pieces
    report: PackingReport  # what became of the rows

    def __len__(self) -> int:
        return self.epochs.num_packs

    def __getitem__(self, pack: int | NDArray[np.int64]) -> list[Sample]:
        members = pack if isinstance(pack, np.ndarray) else self.epochs(0)[pack]
        places = (array[members].tolist() for array in (self.sources, self.starts, self.lengths))
        return [
            self.documents[source].sample(start, start + length, piece)
            for source, start, length, piece in zip(*places, members.tolist(), strict=True)
        ]

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
        DataError: an over-long document under ``error``, named; or nothing left to train on, of all sources or of one
            that has a weight.
    """
    limit = Limit(tokens_per_batch, max_length)
    counts: Counter[str] = Counter()
    parts = [
        cut_documents(source, None if keep is None else keep[number], limit, overlong, counts)
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
    lengths = np.concatenate([part.lengths for part in parts])
    sources = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    with phase("packing"):
        mixture = Mixture.of([part.lengths for part in parts], shares, seed=seed or 0)
        epochs = Epochs(lengths, tokens_per_batch, mixture, seed=seed)
        packs = epochs(0)
    tokens = int(lengths[packs.members].sum())
    report = PackingReport(
        rows=sum(len(source.source) for source in documents),
        documents=packs.members.size,
        tokens=tokens,
        trained_tokens=int(np.concatenate([part.targets for part in parts])[packs.members].sum()),
        packs=len(packs),
        tokens_per_batch=tokens_per_batch,
        fill=tokens / (len(packs) * tokens_per_batch),
        longest=max(int(source.lengths.max()) for source in documents),
        variance_between_packs=variance_between(packs, lengths),
        one_source_packs=one_source(packs, sources) if np.count_nonzero(sizes) > 1 else None,
        sources=_taken(documents, mixture, lengths, packs.members),
        remarks=tuple(remarks),
        **counts,
    )
    return PackedDataset(documents, sources, np.concatenate([part.starts for part in parts]), lengths, epochs, report)


def _taken(
    documents: Sequence[Documents], mixture: Mixture, lengths: NDArray[np.integer], drawn: NDArray[np.integer]
) -> tuple[str, ...]:
    """What an epoch takes of each source, in words, where that is not every document once."""
    if mixture.quotas == mixture.sizes:
        return ()
    ends = np.cumsum(mixture.sizes)
    of_source = np.searchsorted(ends, drawn, side="right")
    counts = np.bincount(of_source, minlength=ends.size)
    tokens = np.bincount(of_source, weights=lengths[drawn], minlength=ends.size)
    shares = tokens / tokens.sum()
    return tuple(
        f"{source.source.name}: {share:.1%} of the tokens, {count:,} of {counted(size, 'document')} an epoch"
        for source, share, count, size in zip(documents, shares, counts.tolist(), mixture.sizes, strict=True)
    )
