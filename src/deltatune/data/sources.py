"""A path or a name to its rows: files, folders, patterns, what ``datasets`` saved, and data sets on the Hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from deltatune.data.delimited_rows import delimited_rows
from deltatune.data.files import SUFFIXES, data_suffix, files_matching
from deltatune.data.json_rows import json_file, json_lines, text_lines
from deltatune.data.rows import BadRowError, Part, Rows, RowsOf, read_on
from deltatune.data.splits import Splits, folder_splits, saved_splits
from deltatune.data.table_rows import arrow_rows, hub_rows, import_datasets, parquet_rows, saved_rows
from deltatune.data.unpacked import default_cache, open_data, unpacked
from deltatune.errors import DataError, UserError, near_files, nearest, one_line, user_path

__all__ = ["Rows", "check_source", "is_local", "load_rows"]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LINES = (".jsonl", ".ndjson", ".txt")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}

_LFS_POINTER = b"version https://git-lfs.github.com/spec"

logger = logging.getLogger(__name__)


def load_rows(
    path: str,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    needed: Iterable[str] = (),
    cache_dir: Path | None = None,
) -> Rows:
    """Opens a file, a pattern of files, a folder of files, or a data set on the Hub.

    JSON and text files stay as they are: an index of their rows is made here, and no common schema is forced on them.
    What is compressed or delimited is unpacked into the cache once. Parquet and Arrow files, data sets that were saved
    to disk, and the Hub are read through the ``datasets`` library.

    Args:
        path: a file with one of ``SUFFIXES``, a folder, a pattern, or a name on the Hub.
        split: a split, a sum of splits, or slices of them, such as ``train[:10%]+test``; ``train`` by default. A file
            or pattern is one split, ``train``, and a name alone cannot choose among one.
        name: a configuration, of the Hub or of a folder's README.md.
        revision: branch, tag or commit of a data set on the Hub.
        limit: use the first so many rows; of JSON lines no more is read.
        needed: columns that are looked for beyond the first rows of JSON files.
        cache_dir: where files are unpacked; a folder in the cache of the ``datasets`` package by default.

    Raises:
        DataError: nothing there (near names are given), a setting that cannot act, a file that is empty or broken, no
            row.
    """
    splits = _local_splits(path, name)
    if splits is None:
        rows = hub_rows(path, split or "train", name, revision)
    elif revision is not None:
        raise DataError(f"revision: {revision} cannot act on {path}, which is not on the Hub; leave it out")
    else:
        rows = _split_rows(path, splits, split, limit, cache_dir or default_cache())
    if limit is not None and limit < len(rows):
        rows = RowsOf(rows.name, [Part(rows, 0, limit)])
    if len(rows) == 0:
        raise DataError(f"{path} holds no rows; expected at least one")
    _look_for(set(needed), rows)
    return rows


def check_source(path: str, name: str | None) -> None:
    """Looks whether there is something to read, without reading it; of the Hub nothing is asked.

    Raises:
        DataError: neither a file, a folder or a pattern here, nor what may be a name on the Hub.
    """
    _local_splits(path, name)


def is_local(path: str) -> bool:
    """Whether a path stands for files here, and not for a data set on the Hub.

    Raises:
        DataError: it stands for neither.
    """
    return _local_splits(path, None) is not None


def _local_splits(path: str, name: str | None) -> Splits | None:
    """The files that a path stands for, by split, the split of what has none being ``""``; ``None`` for the Hub."""
    try:
        return _found_splits(path, name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error


def _found_splits(path: str, name: str | None) -> Splits | None:
    if "://" in path:
        raise DataError(f"{path} is a URL; expected a local path, or the name of a data set on the Hub (owner/name)")
    try:
        local = user_path(path)
    except UserError as error:
        raise DataError(str(error)) from error
    if local.is_dir():
        return saved_splits(local, name) or folder_splits(local, name)
    if local.is_file():
        if data_suffix(local) is None:
            raise DataError(
                f"{path} is no data file: expected {', '.join(SUFFIXES)}, got {local.suffix or 'no suffix'}"
            )
        files = [local]
    elif any(character in path for character in "*?["):
        anchor = Path(local.anchor) if local.is_absolute() else Path()
        files = files_matching(anchor, str(local.relative_to(anchor)))
        if not files:
            raise DataError(f"{path} matches no data file; expected {', '.join(SUFFIXES)}")
    elif data_suffix(local) or path.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(path):
        if local.exists():
            raise DataError(f"{path} is neither a file nor a folder; expected one that can be read more than once")
        if local.is_symlink():
            raise DataError(f"{path} is a link to {local.readlink()}, which does not exist")
        raise DataError(f"{path} does not exist{near_files(local)}")
    else:
        return None
    if name is not None:
        raise DataError(f"name: {name} cannot act on {path}: files have no configurations; leave it out")
    return {"": files}


def _split_rows(path: str, splits: Splits, split: str | None, limit: int | None, cache_dir: Path) -> Rows:
    if "" in splits:
        if split is not None and "[" not in split:
            raise DataError(
                f"split: {split} cannot act on {path}, which is not divided into splits; leave it out, or take a slice "
                "such as train[:90%]"
            )
        splits = {"train": splits[""]}
    split = _default_split(path, splits) if split is None else "+".join(splits) if split == "all" else split
    names = [re.split(r"[\[(]", piece)[0].strip() for piece in split.split("+")]
    for name in names:
        if name not in splits:
            raise DataError(f"{path} has no split {name}{nearest(name, splits)}; it has {', '.join(splits)}")
    if "[" not in split:
        return _file_rows(path, [file for name in names for file in splits[name]], limit, cache_dir)
    rows = {name: _file_rows(path, splits[name], None, cache_dir) for name in dict.fromkeys(names)}
    return RowsOf(f"{path} (split {split})", _slices(split, rows))


def _default_split(path: str, splits: Splits) -> str:
    if len(splits) > 1 and "train" not in splits:
        raise DataError(f"{path} has the splits {', '.join(splits)}; choose one with split")
    chosen = "train" if "train" in splits else next(iter(splits))
    others = [name for name in splits if name != chosen]
    if others:
        logger.warning("%s: split %s is read, and not %s; set split to choose", path, chosen, ", ".join(others))
    return chosen


def _slices(split: str, rows: dict[str, Rows]) -> list[Part]:
    library = import_datasets()
    try:
        instruction = library.ReadInstruction.from_spec(split)
        slices = instruction.to_absolute({name: len(found) for name, found in rows.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(f"split: {split} is no slice: {one_line(error)}; expected such as train[:10%]") from error
    return [Part(rows[part.splitname], part.from_, part.to) for part in slices]


def _file_rows(name: str, files: Sequence[Path], limit: int | None, cache_dir: Path) -> Rows:
    """The first rows of files, one after the other; files after them are not opened."""
    parts: list[Part] = []
    left = limit
    for file in files:
        rows = _rows_of(file, left, cache_dir)
        parts.append(Part(rows, 0, len(rows) if left is None else min(left, len(rows))))
        if left is not None:
            left -= parts[-1].end
            if left == 0:
                break
    whole = len(parts) == 1 and parts[0].end == len(parts[0].rows)
    return parts[0].rows if whole else RowsOf(name, parts)


def _rows_of(file: Path, limit: int | None, cache_dir: Path) -> Rows:
    suffix, name = data_suffix(file), str(file)
    if file.is_dir():
        return saved_rows(file)
    with open_data(file) as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise DataError(f"{file} is a pointer of Git LFS, not the data; run `git lfs pull` where it was cloned")
    if suffix == ".parquet":
        return parquet_rows(file)
    if suffix == ".arrow":
        return arrow_rows(file)
    content = unpacked(file, cache_dir, limit if suffix in _LINES else None)
    if content.stat().st_size == 0:
        raise DataError(f"{file} is empty; expected at least one row")
    if suffix in _DELIMITERS:
        return delimited_rows(content, name, _DELIMITERS[suffix], cache_dir, limit=limit)
    read = {".json": json_file, ".txt": text_lines}.get(suffix or "", json_lines)
    return read(content, name, limit=limit)


def _look_for(names: set[str], rows: Rows) -> None:
    """Adds columns that no row among the first of a JSON file has, where a later one has them."""
    missing = names.difference(rows.columns)
    if missing and not rows.columnar:
        for _, row in read_on(rows.read, 0, len(rows)):
            if isinstance(row, BadRowError):
                continue  # which is told where rows are tokenised
            found = missing.intersection(row)
            rows.columns += tuple(sorted(found))
            missing -= found
            if not missing:
                break
