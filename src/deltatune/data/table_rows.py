"""Rows of tables, read by the ``datasets`` library: Parquet and Arrow files, what it saved, and the Hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltatune.data.rows import BadRowError, Rows, digest
from deltatune.data.unpacked import file_digest, open_data
from deltatune.errors import DataError, near_files, nearest, one_line

__all__ = ["arrow_rows", "hub_rows", "hub_stream", "import_datasets", "parquet_rows", "saved_rows"]

_ROWS_AT_ONCE = 256
# pyarrow's errors are each one of these as well; the last two are also those of a state.json that is none
_UNREADABLE = (OSError, ValueError, NotImplementedError, LookupError, TypeError, RecursionError)


class _TableRows(Rows):
    """Rows of a ``datasets.Dataset``, which lies on disk."""

    columnar = True

    def __init__(self, name: str, table: Any, identity: str) -> None:
        # what a saved data set was last formatted as (tensors, some of its columns) is not what it holds
        self._table = table.with_format(None)
        super().__init__(name, table.column_names, identity, len(table))

    def read(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        end = min(end, len(self))
        for first in range(start, end, _ROWS_AT_ONCE):
            try:
                columns = self._table[first : min(first + _ROWS_AT_ONCE, end)]
            except ImportError as error:  # of what decodes images or sound
                raise DataError(f"{self.where(first)} cannot be decoded: {one_line(error)}") from error
            except UnicodeDecodeError:
                yield from self._one_by_one(first, min(first + _ROWS_AT_ONCE, end))
                continue
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def _one_by_one(self, start: int, end: int) -> Iterator[Mapping[str, Any]]:
        """Rows among which one is broken, up to that one, which is named."""
        for index in range(start, end):
            try:
                row = self._table[index]
            except UnicodeDecodeError as error:
                raise BadRowError(f"{self.where(index)} holds text that is not UTF-8: {one_line(error)}") from None
            yield row


def parquet_rows(file: Path) -> Rows:
    """Rows of a Parquet file, which ``datasets`` turns into Arrow in its cache."""
    library = import_datasets()
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what it would log is in the error below
    try:
        table = library.Dataset.from_parquet(str(file))
    except (OSError, ValueError, library.exceptions.DatasetGenerationError) as error:
        cause = one_line(error.__cause__ or error)
        raise DataError(f"{file} cannot be read as Parquet, or holds no rows: {cause}") from error
    finally:
        log.setLevel(level)
    return _TableRows(str(file), table, file_digest(file))


def arrow_rows(file: Path) -> Rows:
    """Rows of an Arrow file, a stream or with a footer, where it lies."""
    library = import_datasets()
    try:
        table = _checked(file)
        # a stream is opened anew by other processes, and not sent to them
        data = library.Dataset(table) if _has_footer(file) else library.Dataset.from_file(str(file))
    except _UNREADABLE as error:
        raise DataError(f"{file} cannot be read as Arrow: {one_line(error)}") from error
    return _TableRows(str(file), data, file_digest(file))


def saved_rows(folder: Path) -> Rows:
    """Rows of a folder that ``Dataset.save_to_disk`` wrote."""
    library = import_datasets()
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        for file in files:
            _checked(file)
        data = library.load_from_disk(str(folder))
    except _UNREADABLE as error:
        raise DataError(f"{folder} cannot be read as a data set that was saved to disk: {one_line(error)}") from error
    return _TableRows(str(folder), data, digest("".join(map(file_digest, files)).encode()))


def _checked(file: Path) -> Any:
    """The table in an Arrow file, as a map of the file; one that is broken within would crash whoever reads it."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    table = (pyarrow.ipc.open_file(source) if _has_footer(file) else pyarrow.ipc.open_stream(source)).read_all()
    table.validate(full=True)
    return table


def _has_footer(file: Path) -> bool:
    with open_data(file) as stream:
        return stream.read(6) == b"ARROW1"


def hub_rows(path: str, split: str, name: str | None, revision: str | None) -> Rows:
    """Rows of a data set on the Hub, or of what was downloaded of it before."""
    with _loading(path, split, name) as (library, where):
        table = library.load_dataset(path, name, split=split, revision=revision)
    return _TableRows(where, table, str(table._fingerprint))


def hub_stream(path: str, split: str, name: str | None, revision: str | None) -> tuple[str, Any, str]:
    """A data set on the Hub as an iterable one: its name in errors, its rows, and the commit that they are of.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    with _loading(path, split, name) as (library, where):
        builder = library.load_dataset_builder(path, name, revision=revision)
        return where, builder.as_streaming_dataset(split=split), str(builder.hash)


@contextmanager
def _loading(path: str, split: str, name: str | None) -> Iterator[tuple[Any, str]]:
    """The library, and what errors call a data set on the Hub; what goes wrong within is a DataError."""
    library = import_datasets()
    where = f"{path} (split {split})" if name is None else f"{path} ({name}, split {split})"
    try:
        yield library, where
    except (OSError, ValueError, AssertionError, RuntimeError, library.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, library.exceptions.DatasetGenerationError) else None
        missing = isinstance(error, library.exceptions.DatasetNotFoundError)
        what = "is neither a local file nor a data set on the Hub" if missing else "cannot be loaded from the Hub"
        raise DataError(f"{where} {what}: {one_line(cause or error).rstrip('.')}{_remedy(error, path)}") from error


def _remedy(error: Exception, path: str) -> str:
    text = str(error)
    unknown = re.search(r"(?:Unknown split|BuilderConfig) ['\"](.+?)['\"].*\[(.*)\]", text)
    if unknown is not None:
        return nearest(unknown[1], re.findall(r"'(.+?)'", unknown[2]))
    if isinstance(error, ConnectionError):
        return f"; it is no local file or folder either{_near(path)}"
    if "gated" in text:
        return "; accept its terms on its page, then run `hf auth login`"
    if "scripts" in text:
        return "; give the files that it reads, or a revision that holds Parquet, such as refs/convert/parquet"
    if "doesn't exist on the Hub" in text:
        return f"; check the name, or run `hf auth login` if it is private{_near(path)}"
    return ""


def _near(path: str) -> str:
    return near_files(Path(path)) if Path(path).parent.is_dir() else ""


def import_datasets() -> Any:
    """The ``datasets`` library.

    Raises:
        DataError: it is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            "Parquet and Arrow files, slices of splits and the Hub are read with the datasets package; "
            "pip install 'deltatune[train]'"
        ) from error
    return datasets
