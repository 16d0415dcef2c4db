"""Compressed files, unpacked once into the cache: JSON lines need random access, which compressed streams lack."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from huggingface_hub.constants import HF_HOME

from deltatune.errors import DataError, one_line
from deltatune.whole import sync_tree

__all__ = ["default_cache", "file_digest", "made_once", "open_data", "unpacked"]

_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}


def default_cache() -> Path:
    """Where things made of data are kept unless a recipe says otherwise: beside those of the ``datasets`` package."""
    return Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets")) / "deltatune"


@contextmanager
def open_data(file: Path) -> Iterator[BufferedReader]:
    """A file's bytes; whatever keeps them from being read is a DataError that names the file."""
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or one_line(error)}") from error


def file_digest(file: Path) -> str:
    """A digest of a whole file."""
    with open_data(file) as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]


def unpacked(file: Path, cache_dir: Path, limit: int | None) -> Path:
    """The file itself, or where its suffix says that it is compressed, what is in it.

    Args:
        file: gzip, zstd, xz or bzip2, by its suffix, or anything else.
        cache_dir: keeps the result, under the digest of the compressed file.
        limit: stop after so many lines that are not blank.

    Raises:
        DataError: broken or cut short, or no room in the cache.
    """
    kind = _COMPRESSED.get(file.suffix.lower())
    if kind is None:
        return file
    content = _decompressed(file, kind, limit)
    return made_once(cache_dir, f"{file_digest(file)}-{limit}", lambda target: target.writelines(content))


def made_once(cache_dir: Path, name: str, write: Callable[[IO[bytes]], None]) -> Path:
    """A file of the cache that appears whole or not at all; ``write`` makes it where it is not there yet."""
    folder = cache_dir / "unpacked" / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
                with (Path(partial) / "rows").open("wb") as target:
                    write(target)
                sync_tree(Path(partial))
                Path(partial).rename(folder)
        except OSError as error:
            # another process may have made the same meanwhile, and reads it
            if not folder.is_dir():
                why = error.strerror or one_line(error)
                where = f"the cache of unpacked data in {folder.parent}"
                raise DataError(f"cannot write {where}: {why}; set data.cache_dir") from error
    return folder / "rows"


def _decompressed(file: Path, kind: str, limit: int | None) -> Iterator[bytes]:
    with open_data(file) as packed:
        try:
            with _reader(packed, kind) as stream:
                if limit is None:
                    yield from iter(lambda: stream.read(1 << 20), b"")
                    return
                for line in stream:
                    yield line
                    limit -= bool(line.strip())
                    if limit == 0:
                        return
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{file} is no whole {kind} file: {one_line(error)}; fetch or pack it again") from error


def _reader(packed: IO[bytes], kind: str) -> Any:
    if kind == "gzip":
        return gzip.open(packed)
    if kind == "bzip2":
        return bz2.open(packed)
    if kind == "xz":
        return lzma.open(packed)
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise DataError("zstd files are read with the pyarrow package; pip install 'deltatune[train]'") from error
    return BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd"))
