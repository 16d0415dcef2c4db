"""What became of the rows, and how well the packs are filled and mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltatune.packing.shuffled import Packs

__all__ = ["PackingReport", "counted", "cut_lines", "one_source", "variance_between"]


_CUT = {
    "split": "split",
    "truncated": "truncated",
    "dropped": "dropped for length",
    "unlabelled": "left out because the cut left no trained token",
}


@dataclass(frozen=True)
class PackingReport:
    """What became of the rows, and what an epoch holds."""

    rows: int  # read; of a part of the rows, those of its documents
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
    rows_read: int | None = None  # of all parts, where the rows are divided
    pairs: int | None = None  # of two documents each, where the rows are preferences; cuts are then counted by pair

    def __str__(self) -> str:
        unit = "document" if self.pairs is None else "pair"
        between = f"{self.variance_between_packs:.1%} of the variance of length lies between packs"
        if self.one_source_packs is not None:
            between += f", {self.one_source_packs:.1%} of packs hold one source"
        read = counted(self.rows, "row") if self.rows_read is None else f"{self.rows:,} of {self.rows_read:,} rows"
        lines = [
            f"{read} -> "
            f"{counted(self.documents if self.pairs is None else self.pairs, unit)}, {counted(self.tokens, 'token')}, "
            f"{self.trained_tokens:,} of them trained; longest document {counted(self.longest, 'token')}",
            f"{counted(self.packs, 'pack')} of {self.tokens_per_batch:,} tokens, {self.fill:.2%} full; {between}",
        ]
        counts = {name: getattr(self, name) for name in _CUT}
        return "\n".join([*lines, *cut_lines(counts, unit), *self.sources, *self.remarks])


def cut_lines(counts: Mapping[str, int], unit: str = "document") -> list[str]:
    """What became of over-long documents or pairs, as one line; none where there were none."""
    cut = [f"{counts[name]:,} {what}" for name, what in _CUT.items() if counts.get(name)]
    return [f"over-long {unit}s: " + ", ".join(cut)] if cut else []


def counted(number: int, noun: str) -> str:
    """``"1 row"``, ``"2,000 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def variance_between(packs: Packs, lengths: NDArray[np.integer]) -> float:
    """Share of the variance of document length that lies between packs; 0 where all are equally long."""
    values = lengths[packs.members].astype(np.float64)
    values -= values.mean()
    sums = np.add.reduceat(values, packs.starts[:-1])
    total = float(values @ values)
    return float((sums**2 / np.diff(packs.starts)).sum() / total) if total else 0.0


def one_source(packs: Packs, sources: NDArray[np.integer]) -> float:
    """Share of the packs whose documents come from one source."""
    of = sources[packs.members]
    lowest, highest = (reduce.reduceat(of, packs.starts[:-1]) for reduce in (np.minimum, np.maximum))
    return float(np.mean(lowest == highest))
