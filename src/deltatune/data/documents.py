"""Tokenised documents: flat arrays that live on disk, cached under what they were made from."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.utils import logging

from deltatune import __version__
from deltatune.data.chat import Renderer
from deltatune.data.formats import Layout
from deltatune.data.sources import Rows
from deltatune.errors import DataError
from deltatune.packing.sample import IGNORE_INDEX, Sample

__all__ = ["Documents", "tokenize"]

_ROWS_PER_TASK = 256


@dataclass(frozen=True, eq=False)
class Documents:
    """All documents of one source."""

    tokens: NDArray[np.int32]  # [N], the documents one after the other
    trained: NDArray[np.bool_]  # [N], whether a token is a target
    offsets: NDArray[np.int64]  # [D + 1], where each document begins
    rows: NDArray[np.int64]  # [D], the row each document came from
    source: Rows  # for their names in errors

    def __len__(self) -> int:
        return self.rows.size

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 ``[D]``."""
        return np.diff(self.offsets)

    def sample(self, start: int, end: int) -> Sample:
        """Tokens ``start`` to ``end`` of the flat arrays as a sample."""
        ids = self.tokens[start:end].astype(np.int64)
        return Sample(ids, np.where(self.trained[start:end], ids, IGNORE_INDEX))

    def where(self, document: int) -> str:
        """The row of a document, in words."""
        return self.source.where(int(self.rows[document]))


def tokenize(
    rows: Rows, layout: Layout, renderer: Renderer, *, num_proc: int = 1, cache_dir: Path | None = None
) -> Documents:
    """Renders and tokenises every row, or takes the result of an earlier run from the cache.

    The cache key covers the rows, the tokenizer, the template and its variables, the layout and this version, and not
    the pack's capacity: over-long documents are dealt with when packs are made.

    Args:
        rows, layout, renderer: what is read, how, and which tokens train.
        num_proc: processes that tokenise.
        cache_dir: where results are kept, each in a folder that appears whole or not at all; ``None`` keeps nothing.

    Raises:
        DataError: the first row that cannot be rendered or trains nothing, named.
    """
    task = _Task(rows, layout, renderer)
    folder = None if cache_dir is None else cache_dir / task.fingerprint()
    if folder is not None and folder.is_dir():
        return _load(folder, rows)
    parts = list(_parts(task, num_proc))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in ("tokens", "trained", "rows")}
    lengths = np.concatenate([part["lengths"] for part in parts])
    arrays["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if folder is None:
        return Documents(**arrays, source=rows)
    _save(folder, arrays)
    return _load(folder, rows)


Part = dict[str, NDArray[Any]]


def _parts(task: _Task, num_proc: int) -> Iterator[Part]:
    starts = range(0, len(task.rows), _ROWS_PER_TASK)
    workers = min(num_proc, len(starts))
    pool = multiprocessing.Pool(workers, _start_worker, (task,)) if workers > 1 else None
    with pool or nullcontext():
        parts = map(task, starts) if pool is None else pool.imap(_work, starts)
        # a bar on terminals alone, which goes when the rows are done
        unit = f" x {_ROWS_PER_TASK} rows"
        yield from logging.tqdm(parts, "tokenising", total=len(starts), unit=unit, leave=False, disable=None)


@dataclass(frozen=True)
class _Task:
    """Tokenises the rows from ``start`` on."""

    rows: Rows
    layout: Layout
    renderer: Renderer

    def __call__(self, start: int) -> Part:
        samples: list[Sample] = []
        row_of: list[int] = []
        for index, row in enumerate(self.rows.read(start, start + _ROWS_PER_TASK), start):
            rendered = self.renderer.render(row, self.layout, self.rows.where(index))
            samples += rendered
            row_of += [index] * len(rendered)
        return {
            "tokens": np.concatenate([sample.input_ids for sample in samples]).astype(np.int32),
            "trained": np.concatenate([sample.labels != IGNORE_INDEX for sample in samples]),
            "lengths": np.array([len(sample) for sample in samples], dtype=np.int64),
            "rows": np.array(row_of, dtype=np.int64),
        }

    def fingerprint(self) -> str:
        """A digest of all that the result is made from."""
        tokenizer = self.renderer.tokenizer
        made_from = {
            "deltatune": __version__,
            "rows": self.rows.identity,
            "layout": asdict(self.layout),
            "train_on": self.renderer.train_on,
            "chat_template": self.renderer.chat_template or tokenizer.chat_template,
            "template_kwargs": dict(self.renderer.template_kwargs),
            "special_tokens": tokenizer.special_tokens_map,
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
        }
        content = json.dumps(made_from, sort_keys=True, default=str)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


_worker_task: list[_Task] = []


def _start_worker(task: _Task) -> None:
    # each worker is one of several: threads inside them would only compete
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_task[:] = [task]


def _work(start: int) -> Part:
    return _worker_task[0](start)


def _save(folder: Path, arrays: Part) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as name:
            for array_name, array in arrays.items():
                np.save(Path(name) / f"{array_name}.npy", array)
            Path(name).rename(folder)
    except OSError as error:
        # another process may have finished the same work first; its result is as good
        if not folder.is_dir():
            raise DataError(f"cannot write the cache of tokenised data: {error}; set data.cache_dir") from error


def _load(folder: Path, rows: Rows) -> Documents:
    # plain arrays over the mapped files: slicing a np.memmap costs several times as much
    names = ("tokens", "trained", "offsets", "rows")
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
    return Documents(**arrays, source=rows)
