"""deltatune report: runs as a page of curves and tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deltatune.errors import UserError, user_path
from deltatune.runs.folder import read_run
from deltatune.runs.page import page
from deltatune.whole import whole

__all__ = ["run"]

_PAGE = "report.html"


def run(args: argparse.Namespace) -> int:
    """Writes the page, by default into the folder of the first run."""
    runs = [read_run(user_path(folder)) for folder in args.runs]
    output = runs[0].path / _PAGE if args.output is None else user_path(args.output)
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    html = page(runs)
    try:
        if not _may_be_replaced(output):
            raise UserError(f"--output {output} is there and no page; name a new file, such as {output.parent / _PAGE}")
        with whole(output) as part:
            part.write_text(html, encoding="utf-8", errors="backslashreplace")  # names of files may hold any bytes
    except IsADirectoryError as error:
        raise UserError(f"--output {output} is a folder; name a file, such as {output / _PAGE}") from error
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; choose another file with --output") from error
    for found in runs:
        sys.stdout.writelines(f"{found.path}: {problem}\n" for problem in found.problems)
    sys.stdout.write(f"the report is in {output}\n")
    return 0


def _may_be_replaced(output: Path) -> bool:
    """Whether there is nothing of this name, or a page."""
    if not output.is_file():
        return True
    with output.open("rb") as stream:
        return stream.read(64).lstrip().lower().startswith(b"<!doctype html")
