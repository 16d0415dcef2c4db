"""Packs of rows that are read as training goes: block by block, and from the middle again exactly as before."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile, ZipFile

import numpy as np

from deltatune.data.bad_rows import bad_rows
from deltatune.data.chat import Renderer
from deltatune.data.documents import NUM_NAMED, OnBadRow
from deltatune.data.formats import Layout, Row
from deltatune.data.notes import Notes
from deltatune.data.overlong import Limit, Overlong, cut_sample
from deltatune.data.report import PackingReport, counted, cut_lines, variance_between
from deltatune.data.rows import BadRowError, read_on
from deltatune.errors import DataError
from deltatune.packing.sample import Sample
from deltatune.packing.shuffled import Packs, pack_ahead

__all__ = ["News", "PackStream", "Place", "RowStream", "StreamSource", "StreamedPack"]

BLOCK_ROWS = 8192
"""Rows that are read, shuffled and packed together."""


class RowStream(Protocol):
    """Rows without an end: after the last comes the first."""

    name: str
    identity: str  # equal for equal rows
    columns: tuple[str, ...]
    columnar: bool

    def read(self, start: int, end: int) -> Iterable[tuple[str, Row]]:
        """Rows ``start`` to ``end``, each with its place in words."""


@dataclass(frozen=True)
class StreamSource:
    """Rows, how they are read, and how many of them a block takes."""

    rows: RowStream
    layout: Layout
    rows_per_block: int


@dataclass(frozen=True, eq=False)
class Place:
    """Where a block begins: all that the stream needs to go on from there.

    Attributes:
        block: its number.
        pack: the number of its first pack.
        left: documents of earlier blocks that are in no pack yet.
    """

    block: int = 0
    pack: int = 0
    left: tuple[Sample, ...] = ()

    def save(self, file: Path) -> None:
        """Writes the place; ``load`` reads it."""
        lengths = np.array([len(sample) for sample in self.left], dtype=np.int64)
        nothing = np.zeros(0, dtype=np.int64)
        np.savez(
            file,
            place=np.array([self.block, self.pack]),
            lengths=lengths,
            input_ids=np.concatenate([nothing, *(sample.input_ids for sample in self.left)]),
            labels=np.concatenate([nothing, *(sample.labels for sample in self.left)]),
            origins=np.array([str(sample.origin) for sample in self.left], dtype=np.str_),
        )

    @classmethod
    def load(cls, file: Path) -> Place:
        """Reads a place.

        Raises:
            DataError: no such file, or one that is broken.
        """
        try:
            # first, since numpy evaluates what stands in a member's header
            with ZipFile(file) as archive:
                if (broken := archive.testzip()) is not None:
                    raise BadZipFile(f"the checksum of {broken} does not fit")
            with np.load(file) as arrays:
                block, pack = arrays["place"].tolist()
                lengths = arrays["lengths"]
                ids, labels = (np.split(arrays[name], np.cumsum(lengths)[:-1]) for name in ("input_ids", "labels"))
                origins = arrays["origins"].tolist()
        # a broken archive: its list, a member's flags or length, a checksum
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, BadZipFile, zlib.error) as error:
            raise DataError(
                f"{file} does not tell where the stream of data was: {error}; take another checkpoint"
            ) from error
        return cls(block, pack, tuple(map(Sample, ids, labels, origins)) if lengths.size else ())


@dataclass(frozen=True, eq=False)
class News:
    """What the first pack of a block tells: where the block begins, and what the rows' reader should know."""

    place: Place | None = None
    remarks: tuple[str, ...] = ()


class StreamedPack(list[Sample]):
    """The samples of a pack of a stream."""

    def __init__(self, samples: Iterable[Sample], news: News) -> None:
        super().__init__(samples)
        self.news = news


@dataclass(eq=False)
class PackStream:
    """A map-style data set of the packs of a stream, which has no end: each rank's packs by number.

    Rows are read in blocks, each block's documents are shuffled and packed, and what fills no pack goes before the next
    block's. Ranks take turns at blocks. A source that ends begins again. A block is a function of the rows, the seed
    and what was left before it, so a run that goes on from ``Place`` sees the packs that it would have seen.

    Packs are meant to be asked for in order. To go forward costs the blocks between; to go back starts again.
    """

    sources: Sequence[StreamSource]
    renderer: Renderer
    tokens_per_batch: int
    num_packs: int  # of all ranks together
    overlong: Overlong = "error"
    max_length: int | None = None
    on_bad_row: OnBadRow = "error"
    seed: int | None = 0  # None keeps the order of the rows
    rank: int = 0
    num_ranks: int = 1
    remarks: Sequence[str] = ()  # what the report should say besides
    start: Place = field(
        default_factory=Place
    )  # where packs are made from; earlier ones cost a start from the beginning

    def __post_init__(self) -> None:
        self._packs: Iterator[StreamedPack] = iter(())
        self._next = -1  # the number of the pack that _packs gives next; none yet

    def __len__(self) -> int:
        return self.num_packs

    def epochs(self, _: int) -> range:
        """The packs of an epoch, by number; there is one."""
        return range(self.num_packs)

    def __getitem__(self, pack: int) -> StreamedPack:
        """The pack of this number, one of this rank's: ``pack % num_ranks == rank``."""
        if not 0 <= pack < self.num_packs:
            raise IndexError(f"pack {pack} of a stream of {self.num_packs}")
        number = pack // self.num_ranks
        if number < self._next or self._next < 0:
            start = self.start if number >= self.start.pack else Place()
            self._packs, self._next = self._from(start), start.pack
        passed = News()
        while True:
            found = next(self._packs)
            # what a pack that is passed over tells holds for those after it
            passed = News(found.news.place or passed.place, passed.remarks + found.news.remarks)
            self._next += 1
            if self._next > number:
                return StreamedPack(found, passed)

    def where(self, origin: str) -> str:
        """The row that a sample comes from, in words, which is its origin here."""
        return origin

    def __getstate__(self) -> dict[str, object]:
        """Without the generator, which another process starts again from ``start``."""
        return {**self.__dict__, "_packs": iter(()), "_next": -1}

    @cached_property
    def report(self) -> PackingReport:
        """What became of the first block's rows, for people; it is read and packed for this."""
        place = Place()
        while not len((block := self._block(place)).packs):
            place = block.next(place)
        lengths = np.array([len(sample) for sample in block.documents])
        packed = lengths[block.packs.members]
        return PackingReport(
            rows=sum(source.rows_per_block for source in self.sources) * (place.block + 1),
            documents=packed.size,
            tokens=int(packed.sum()),
            trained_tokens=sum(block.documents[index].num_trained for index in block.packs.members),
            packs=len(block.packs),
            tokens_per_batch=self.tokens_per_batch,
            fill=float(packed.sum()) / (len(block.packs) * self.tokens_per_batch),
            longest=int(lengths.max()),
            variance_between_packs=variance_between(block.packs, lengths),
            sources=(),
            remarks=("rows are streamed; this is the first block of them", *self.remarks, *block.remarks),
            **block.cut,
        )

    def _from(self, place: Place) -> Iterator[StreamedPack]:
        remarks: tuple[str, ...] = ()  # of blocks that filled no pack
        while True:
            block = self._block(place)
            remarks = (*remarks, *cut_lines(block.cut), *block.remarks)
            news = News(place, remarks)
            for members in block.packs:
                yield StreamedPack((block.documents[index] for index in members), news)
                news, remarks = News(), ()
            place = block.next(place)

    def _block(self, place: Place) -> _Block:
        number = place.block * self.num_ranks + self.rank
        new, cut, remarks = self._read(number)
        if self.seed is not None:
            new = [new[index] for index in np.random.default_rng((self.seed, number)).permutation(len(new))]
        documents = [*place.left, *new]
        packs, left = pack_ahead(np.array([len(sample) for sample in documents], dtype=np.int64), self.tokens_per_batch)
        return _Block(documents, packs, tuple(documents[index] for index in left), cut, remarks)

    def _read(self, number: int) -> tuple[list[Sample], Counter[str], tuple[str, ...]]:
        """The documents of a block, in the order of the rows, how many were cut, and what is no error."""
        documents: list[Sample] = []
        notes, dropped, limit = Notes(), [], Limit(self.tokens_per_batch, self.max_length)
        cut: Counter[str] = Counter()
        for source in self.sources:
            start = number * source.rows_per_block
            bad: list[tuple[str, str]] = []  # of this source: the place, the error
            for _, found in read_on(source.rows.read, start, start + source.rows_per_block):
                where = "" if isinstance(found, BadRowError) else found[0]
                try:
                    if isinstance(found, BadRowError):
                        raise found
                    samples = self.renderer.render(found[1], source.layout, where, notes)
                except DataError as error:
                    bad.append((where, str(error)))
                    continue
                for sample in samples:
                    documents += cut_sample(replace(sample, origin=where), limit, self.overlong, where, cut)
            if bad and self.on_bad_row == "error":
                # a source that begins again within a block brings its bad rows again
                different = [*dict.fromkeys(bad)]
                read = f"a block of {counted(source.rows_per_block, 'row')}"
                raise bad_rows(source.rows.name, different, len(different), read)
            dropped += [error for _, error in bad]
        if not documents:
            # a source begins again at its end, so this might go on for ever
            names = ", ".join(source.rows.name for source in self.sources)
            rows = f"{names}: {counted(sum(source.rows_per_block for source in self.sources), 'row')} one after another"
            if dropped:
                raise DataError(f"{rows} were dropped; the first error: {dropped[0]}")
            raise DataError(f"{rows} leave no document of at most {limit}; raise it, or set data.overlong")
        lines = [*notes]
        if dropped:
            lines += [
                f"{counted(len(dropped), 'row')} dropped, among them:",
                # a source that begins again within a block brings its bad rows again
                *(f"  {error}" for error in [*dict.fromkeys(dropped)][:NUM_NAMED]),
            ]
        return documents, cut, tuple(lines)


@dataclass(frozen=True, eq=False)
class _Block:
    """Documents and their packs."""

    documents: list[Sample]
    packs: Packs  # whose members are numbers of documents
    left: tuple[Sample, ...]  # documents in no pack
    cut: Counter[str]  # what was done to over-long documents
    remarks: tuple[str, ...]

    def next(self, place: Place) -> Place:
        """Where the block after this one, which began at ``place``, begins."""
        return Place(place.block + 1, place.pack + len(self.packs), self.left)
