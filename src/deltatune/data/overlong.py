"""Documents that are longer than they may be: refused, cut or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deltatune.data.documents import Documents
from deltatune.data.report import counted
from deltatune.errors import DataError
from deltatune.packing.sample import Sample

__all__ = ["Limit", "Overlong", "Pieces", "cut_documents", "cut_pairs", "cut_sample"]

Overlong = Literal["error", "split", "truncate", "drop"]

# what is counted under each choice; "unlabelled" counts the parts that cutting left without a target
_COUNTED = {"split": "split", "truncate": "truncated", "drop": "dropped"}


@dataclass(frozen=True)
class Limit:
    """The most tokens of a document, and the setting that says so."""

    capacity: int
    max_length: int | None

    @property
    def tokens(self) -> int:
        """The most tokens of a document."""
        return self.capacity if self.max_length is None else min(self.capacity, self.max_length)

    def __str__(self) -> str:
        lower = self.max_length is not None and self.max_length < self.capacity
        return f"data.max_length={self.tokens}" if lower else f"packing.tokens_per_batch={self.tokens}"


@dataclass(frozen=True, eq=False)
class Pieces:
    """Documents, or parts of them, in the order of their source."""

    starts: NDArray[np.int64]  # in the source's stream of tokens
    lengths: NDArray[np.int32]
    targets: NDArray[np.int32]  # tokens that train

    def __len__(self) -> int:
        return self.starts.size

    def __getitem__(self, which: NDArray[Any]) -> Pieces:
        return Pieces(self.starts[which], self.lengths[which], self.targets[which])


def cut_documents(
    documents: Documents, keep: NDArray[np.bool_] | None, limit: Limit, overlong: Overlong, counts: Counter[str]
) -> Pieces:
    """The pieces of those documents of a source that are kept, none longer than the limit.

    ``counts`` takes what was done to how many of them.

    Raises:
        DataError: a document that is too long under ``error``, named.
    """
    whole = Pieces(documents.offsets[:-1], documents.lengths, documents.targets)
    if keep is not None:
        whole = whole[keep]
    fits = whole.lengths <= limit.tokens
    too_long = np.flatnonzero(~fits)
    if not too_long.size:
        return whole
    if overlong == "error":
        first = documents.document_at(int(whole.starts[too_long[0]]))
        raise DataError(
            f"{documents.where(first)} has {documents.lengths[first]} tokens, more than {limit} "
            f"({counted(too_long.size, 'such document')} in {documents.source.name}); raise it, or set data.overlong "
            "to split, truncate or drop"
        )
    counts[_COUNTED[overlong]] += too_long.size
    if overlong == "drop":
        return whole[fits]
    parts = []
    for start, length in zip(whole.starts[too_long].tolist(), whole.lengths[too_long].tolist(), strict=True):
        for at in range(start, start + (1 if overlong == "truncate" else length), limit.tokens):
            to = min(at + limit.tokens, start + length)
            parts.append((at, to - at, documents.num_trained(at, to)))
    starts, lengths, targets = np.array(parts, dtype=np.int64).T
    cut = Pieces(starts, lengths.astype(np.int32), targets.astype(np.int32))
    counts["unlabelled"] += int(np.count_nonzero(cut.targets == 0))
    both = _joined([whole[fits], cut[cut.targets > 0]])
    return both[np.argsort(both.starts)]


def cut_pairs(
    documents: Documents, keep: NDArray[np.bool_] | None, limit: Limit, overlong: Overlong, counts: Counter[str]
) -> Pieces:
    """As ``cut_documents``, of documents that are pairs: two after each other, which stay or go together.

    A pair is too long where one of its documents is, or where both together do not fit a pack. Under ``truncate`` each
    of its documents keeps half a pack at most; a pair of which one has no target left is left out.

    Raises:
        DataError: a pair that is too long under ``error``, named.
    """
    assert overlong != "split", "a pair has no parts"
    whole = Pieces(documents.offsets[:-1], documents.lengths, documents.targets)
    if keep is not None:
        whole = whole[keep]
    lengths = whole.lengths.reshape(-1, 2)
    fits = (lengths.max(1) <= limit.tokens) & (lengths.sum(1) <= limit.capacity)
    too_long = np.flatnonzero(~fits)
    if not too_long.size:
        return whole
    if overlong == "error":
        first = int(np.searchsorted(documents.offsets, whole.starts[2 * too_long[0]], side="right")) - 1
        chosen, rejected = lengths[too_long[0]].tolist()
        raise DataError(
            f"{documents.where(first)} is a pair of {chosen} and {rejected} tokens, and takes at most {limit} "
            f"({counted(too_long.size, 'such pair')} in {documents.source.name}); raise it, or set data.overlong to "
            "truncate or drop"
        )
    counts[_COUNTED[overlong]] += too_long.size
    if overlong == "drop":
        return whole[np.repeat(fits, 2)]
    most = np.where(np.repeat(fits, 2), whole.lengths, min(limit.tokens, limit.capacity // 2))
    kept = np.minimum(whole.lengths, most).astype(np.int32)
    targets = whole.targets.copy()
    for piece in np.flatnonzero(kept < whole.lengths).tolist():
        start = int(whole.starts[piece])
        targets[piece] = documents.num_trained(start, start + int(kept[piece]))
    trained = targets.reshape(-1, 2).min(1) > 0
    counts["unlabelled"] += int(np.count_nonzero(~trained))
    return Pieces(whole.starts, kept, targets)[np.repeat(trained, 2)]


def _joined(pieces: Sequence[Pieces]) -> Pieces:
    starts, lengths, targets = (
        np.concatenate([getattr(part, name) for part in pieces]) for name in ("starts", "lengths", "targets")
    )
    return Pieces(starts, lengths, targets)


def cut_sample(sample: Sample, limit: Limit, overlong: Overlong, where: str, counts: Counter[str]) -> list[Sample]:
    """The parts of a document that train, none longer than the limit; ``where`` names it.

    ``counts`` takes what was done to it.

    Raises:
        DataError: it is too long, under ``error``.
    """
    if len(sample) <= limit.tokens:
        return [sample]
    if overlong == "error":
        raise DataError(
            f"{where} has {len(sample)} tokens, more than {limit}; raise it, or set data.overlong to split, truncate "
            "or drop"
        )
    counts[_COUNTED[overlong]] += 1
    last = {"drop": 0, "truncate": 1, "split": len(sample)}[overlong]
    slices = (slice(at, at + limit.tokens) for at in range(0, last, limit.tokens))
    parts = [Sample(sample.input_ids[part], sample.labels[part], sample.origin) for part in slices]
    trained = [part for part in parts if part.num_trained]
    counts["unlabelled"] += len(parts) - len(trained)
    return trained
