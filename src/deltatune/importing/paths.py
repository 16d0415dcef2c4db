"""Which paths are files: a data set of one file has no splits to choose from."""

from __future__ import annotations

import re
from typing import Any

from deltatune.importing.rules import Outcome, Rule, Settings
from deltatune.importing.values import is_off, text

__all__ = ["READERS", "is_data_file", "is_folder_path", "path_of"]

#: What stands for a path where ``data_files`` names the files.
READERS = ("json", "csv", "parquet", "arrow", "text")

_DATA_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|txt|parquet|arrow)(\.(gz|zst|xz|bz2))?$", re.IGNORECASE)


def is_data_file(path: Any) -> bool:
    """Whether a path has the ending of a data file; it need not be there."""
    return isinstance(path, str) and _DATA_FILE.search(path) is not None


def is_folder_path(path: Any) -> bool:
    """Whether a path can only be a folder here, and not a name on the Hub."""
    return isinstance(path, str) and (path.startswith(("/", "./", "../", "~")) or path in (".", ".."))


def path_of(source: str) -> Rule:
    """The path of load_dataset, for a source such as ``data.train.0``: a reader's name is none beside files."""

    def rule(value: Any, settings: Settings) -> Outcome:
        if value in READERS and not is_off(settings.get("data_files")):
            return Outcome("no effect here", why="data_files names the file")
        return Outcome("carried", {f"{source}.path": text(value)})

    return rule
