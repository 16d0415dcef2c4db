"""Rows to tokenised documents, shard by shard: each is kept when it is done, and none that is there is made again."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deltatune.data.bad_rows import bad_rows, rows_read
from deltatune.data.chat import Renderer
from deltatune.data.formats import Layout, Row, unused_columns
from deltatune.data.notes import Notes
from deltatune.data.rows import BadRowError, read_on
from deltatune.data.shards import Shard, read_shard, write_shard
from deltatune.data.sources import Rows
from deltatune.errors import DataError, UserError
from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.phases import phase

__all__ = ["Documents", "OnBadRow", "tokenize"]

OnBadRow = Literal["error", "drop"]

NUM_NAMED = 20  # dropped rows whose errors are kept; the others are counted


@dataclass(frozen=True, eq=False)
class Documents:
    """All documents of one source, numbered in the order of its rows, their tokens in one numbered stream."""

    shards: Sequence[Shard]
    source: Rows  # for their names in errors
    layout: Layout

    def __len__(self) -> int:
        return self.offsets.size - 1

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each document begins in the stream of tokens, ``[D + 1]``."""
        return np.concatenate([[0], np.cumsum(self._all("lengths"), dtype=np.int64)])

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row each document came from, ``[D]``."""
        return self._all("rows")

    @property
    def contents(self) -> NDArray[np.uint64]:
        """A digest of the row each document came from, ``[D]``: equal for rows that say the same."""
        return self._all("contents")

    @property
    def targets(self) -> NDArray[np.int32]:
        """Tokens of each document that train, ``[D]``; its first token never does."""
        return self._all("targets")

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, ``[D]``."""
        return self._all("lengths")

    @cached_property
    def notes(self) -> Notes:
        """What the rows' reader should know."""
        found = Notes()
        for shard in self.shards:
            found.update(Notes(shard.remarks.get("notes")))
        return found

    @property
    def dropped(self) -> tuple[int, list[str]]:
        """How many rows could not be trained on, and the errors of the first 20."""
        remarks = [shard.remarks for shard in self.shards]
        count = sum(remark.get("num_dropped", 0) for remark in remarks)
        return count, [error for remark in remarks for _, error in remark.get("dropped", [])][:NUM_NAMED]

    @property
    def largest_token(self) -> int:
        """The largest id of all tokens."""
        return max(int(shard.tokens.max(initial=0)) for shard in self.shards)

    def sample(self, start: int, end: int, origin: int | None = None) -> Sample:
        """Tokens ``start`` to ``end`` of the stream, which lie in one document, as a sample."""
        shard, tokens = self._slice(start, end)
        ids = shard.tokens[tokens].astype(np.int64)
        return Sample(ids, np.where(shard.trained[tokens], ids, IGNORE_INDEX), origin)

    def num_trained(self, start: int, end: int) -> int:
        """Tokens ``start`` to ``end`` of the stream, which lie in one document, that are targets."""
        shard, tokens = self._slice(start, end)
        return int(np.count_nonzero(shard.trained[tokens][1:]))

    def where(self, document: int) -> str:
        """The row of a document, in words."""
        return self.source.where(int(self.rows[document]))

    def document_at(self, start: int) -> int:
        """The document in which a token of the stream lies."""
        return int(np.searchsorted(self.offsets, start, side="right")) - 1

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(shard.tokens.size for shard in self.shards)], dtype=np.int64)

    def _slice(self, start: int, end: int) -> tuple[Shard, slice]:
        number = int(np.searchsorted(self._begins, start, side="right")) - 1
        begin = int(self._begins[number])
        return self.shards[number], slice(start - begin, end - begin)

    def _all(self, name: str) -> NDArray[Any]:
        return np.concatenate([getattr(shard, name) for shard in self.shards])


def tokenize(
    rows: Rows,
    layout: Layout,
    renderer: Renderer,
    *,
    num_proc: int | None = None,
    cache_dir: Path | None = None,
    on_bad_row: OnBadRow = "error",
) -> Documents:
    """Renders and tokenises every row; what an earlier run has done is taken from the cache.

    Rows are done in shards. A shard is written when its rows are done, so a run that was stopped goes on where it was,
    and a shard that is missing or broken is made again. The cache key covers the rows, the tokenizer, the template and
    its variables, the layout, the code that reads and renders rows and the versions of the libraries under it, and not
    the pack's capacity: over-long documents are dealt with when packs are made.

    Args:
        rows, layout, renderer: what is read, how, and which tokens train.
        num_proc: processes that tokenise; by default as many as this process may use cores.
        cache_dir: where results are kept; ``None`` keeps nothing.
        on_bad_row: what becomes of a row that is broken, cannot be rendered or trains nothing: an ``error``, or
            ``drop`` it, and ``Documents.dropped`` tells of it.

    Raises:
        DataError: the first such rows, named; every row was dropped; or the cache cannot be written.
        UserError: a process that tokenised died.
    """
    folder = None if cache_dir is None else cache_dir / _key(rows, layout, renderer, on_bad_row)
    task = _Task(rows, layout, renderer, on_bad_row, folder)
    with phase("reading what is tokenised", task.num_shards) as advance:
        shards = []
        for number in range(task.num_shards):
            advance(number)
            shards.append(task.kept(number))
    missing = [number for number, shard in enumerate(shards) if shard is None]
    for number, shard in zip(missing, _made(task, missing, num_proc or num_cores()), strict=True):
        task.check(number, shard)
        shards[number] = shard
    documents = Documents([shard for shard in shards if shard is not None], rows, layout)
    if not len(documents):
        count, errors = documents.dropped
        raise DataError(f"{rows.name}: all {count:,} rows were dropped; the first error: {errors[0]}")
    return documents


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _made(task: _Task, missing: Sequence[int], num_proc: int) -> Iterator[Shard]:
    """The shards of these numbers, made."""
    workers = min(num_proc, len(missing))
    if workers <= 1:
        with phase("tokenising", len(missing)) as advance:
            for done, number in enumerate(missing):
                advance(done)
                yield task(number)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (task,))
    try:
        # all processes are there before a phase may start a thread, which they would inherit
        made = pool.map(_work, missing)
        with phase("tokenising", len(missing)) as advance:
            for done, (shard, number) in enumerate(zip(made, missing, strict=True), start=1):
                advance(done)
                # what is on disk is mapped again here rather than sent
                yield shard or task.kept(number) or task(number)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenised was killed, most likely for lack of memory; set data.num_proc to a smaller "
            "number (what is done is kept)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Task:
    """Tokenises the rows of a shard."""

    rows: Rows
    layout: Layout
    renderer: Renderer
    on_bad_row: OnBadRow
    folder: Path | None

    @property
    def num_shards(self) -> int:
        return -(-len(self.rows) // self._rows_per_shard)

    @property
    def _rows_per_shard(self) -> int:
        # of the rows alone, so that a run with other processes finds the same shards
        return min(4096, max(256, len(self.rows) // 64))

    def kept(self, number: int) -> Shard | None:
        """The shard of this number, if it is in the cache."""
        return None if self.folder is None else read_shard(self._file(number))

    def is_refused(self, shard: Shard) -> bool:
        """Whether a shard has bad rows, and they are errors; such a one is not written."""
        return self.on_bad_row == "error" and "num_dropped" in shard.remarks

    def check(self, number: int, shard: Shard) -> None:
        """Refuses a shard for its bad rows; those before it had none."""
        if self.is_refused(shard):
            end = min(len(self.rows), (number + 1) * self._rows_per_shard)
            found = [(self.rows.where(index), error) for index, error in shard.remarks["dropped"]]
            read = rows_read(end, whole=end == len(self.rows))
            raise bad_rows(self.rows.name, found, shard.remarks["num_dropped"], read)

    def __call__(self, number: int) -> Shard:
        shard = self._make(number)
        if self.folder is None or self.is_refused(shard):
            return shard
        write_shard(self._file(number), shard)
        return self.kept(number) or shard

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:05}-of-{self.num_shards:05}.safetensors"

    def _make(self, number: int) -> Shard:
        start = number * self._rows_per_shard
        notes, dropped, num_dropped = Notes(), [], 0
        parts: list[tuple[int, int, Sample]] = []  # (row, its digest, a document)
        for index, row in read_on(self.rows.read, start, start + self._rows_per_shard):
            try:
                if isinstance(row, BadRowError):
                    raise row
                samples = self.renderer.render(row, self.layout, self.rows.where(index), notes)
            except DataError as error:
                num_dropped += 1
                if num_dropped <= NUM_NAMED:
                    dropped.append((index, str(error)))
                continue
            content = _content(row, self.layout)
            parts += [(index, content, sample) for sample in samples]
        remarks = {"notes": notes.to_dict(), "num_dropped": num_dropped, "dropped": dropped}
        return _shard(parts, {name: value for name, value in remarks.items() if value})


def _shard(parts: Sequence[tuple[int, int, Sample]], remarks: Mapping[str, Any]) -> Shard:
    nothing = np.zeros(0, dtype=np.int64)
    return Shard(
        tokens=np.concatenate([nothing, *(sample.input_ids for _, _, sample in parts)]).astype(np.int32),
        trained=np.concatenate([nothing, *(sample.labels for _, _, sample in parts)]) != IGNORE_INDEX,
        lengths=np.array([len(sample) for _, _, sample in parts], dtype=np.int32),
        targets=np.array([sample.num_trained for _, _, sample in parts], dtype=np.int32),
        rows=np.array([row for row, _, _ in parts], dtype=np.int64),
        contents=np.array([content for _, content, _ in parts], dtype=np.uint64),
        remarks=remarks,
    )


def _content(row: Row, layout: Layout) -> int:
    """A digest of what a row says, in the columns that its format reads."""
    unused = unused_columns(layout, row)
    said = {name: value for name, value in row.items() if name not in unused} if unused else row
    text = json.dumps(said, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _key(rows: Rows, layout: Layout, renderer: Renderer, on_bad_row: OnBadRow) -> str:
    """A digest of all that the documents are made from."""
    tokenizer = renderer.tokenizer
    settings = {item.name: getattr(renderer, item.name) for item in dataclasses.fields(renderer)}
    made_from = {
        "rows": rows.identity,
        "layout": dataclasses.asdict(layout),
        "on_bad_row": on_bad_row,
        **settings,
        "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template],
        "versions": [version(package) for package in ("transformers", "tokenizers", "jinja2")],
        "code": _code(),
    }
    content = json.dumps(made_from, sort_keys=True, default=str)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _code() -> str:
    """A digest of the code that reads and renders rows."""
    digest = hashlib.blake2b(digest_size=16)
    for module in sorted(files("deltatune.data").iterdir(), key=lambda entry: entry.name):
        if module.name.endswith(".py"):
            digest.update(module.read_bytes())
    return digest.hexdigest()


_worker_task: list[_Task] = []


def _start_worker(task: _Task) -> None:
    # each worker is one of several: threads inside them would only compete
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was imported is not searched for garbage again, nor copied by that
    _worker_task[:] = [task]


def _work(number: int) -> Shard | None:
    """Makes a shard; one that is on disk is not sent."""
    task = _worker_task[0]
    shard = task(number)
    return shard if task.folder is None or task.is_refused(shard) else None
