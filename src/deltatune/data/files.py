"""Data files on disk: which of a folder's or pattern's files hold rows, and what kind each of them is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from deltatune.errors import DataError

__all__ = ["SUFFIXES", "data_suffix", "files_below", "files_matching"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt")
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_TABLES = (".parquet", ".arrow")  # they compress their columns themselves
# what lies beside data and describes it
_METADATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def data_suffix(file: Path) -> str | None:
    """The suffix that says what a file holds, without that of its compression; ``None`` for what is no data file."""
    name = file.name.lower()
    packed = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(packed)).suffix
    return suffix if suffix in SUFFIXES and not (packed and suffix in _TABLES) else None


def files_below(folder: Path) -> list[Path]:
    """All data files in a folder and the folders in it, sorted; links are followed.

    Names that begin with a dot or two underscores are passed over, and files that describe data. Text files count
    only where nothing else does: beside other data they are notes and licences.

    Raises:
        DataError: a folder that may not be read.
    """
    found: list[Path] = []
    visited = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        visited.add(os.path.realpath(parent))
        # a link may lead back to where the walk has been
        folders[:] = sorted(
            name for name in folders if not _is_hidden(name) and os.path.realpath(Path(parent) / name) not in visited
        )
        found += [Path(parent) / name for name in names if not _is_hidden(name)]
    return _data_files(found)


def files_matching(folder: Path, pattern: str) -> list[Path]:
    """All data files that a pattern matches from a folder on, sorted; hidden ones only where the pattern names them.

    Raises:
        DataError: ``**`` within a name.
    """
    num_hidden = _num_hidden(Path(pattern))
    try:
        # pathlib's last ** is folders alone
        matches = list(folder.glob(f"{pattern}/*" if pattern.endswith("**") else pattern))
    except ValueError as error:
        raise DataError(f"{pattern} is no pattern: {error}; expected such as data/**/*.jsonl") from error
    return _data_files(file for file in matches if _num_hidden(file.relative_to(folder)) == num_hidden)


def _data_files(found: Iterable[Path]) -> list[Path]:
    files = sorted(file for file in found if data_suffix(file) and file.name not in _METADATA and file.is_file())
    return [file for file in files if data_suffix(file) != ".txt"] or files


def _num_hidden(path: Path) -> int:
    return sum(map(_is_hidden, path.parts))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__")) and name != ".."


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
