"""``deltatune bench report``: the tables and plots of the documentation, made from the records.

``python -m deltatune.bench.report`` is the same. A plot needs the extra ``bench``; without it those in place stay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deltatune.bench import plots
from deltatune.bench.records import RECORDS, Record, load_records, newest_of_each
from deltatune.bench.report_ops import ops_section
from deltatune.bench.report_train import speed_table, training_section
from deltatune.errors import UserError

__all__ = ["PAGE", "README", "RECORDS", "add_arguments", "main", "render", "run", "with_tables"]

PAGE = Path("docs/performance.md")
README = Path("README.md")


def render(records: Path) -> str:
    """Markdown of the newest record of each kind, subject and device in a folder; older ones are named."""
    found = load_records(records)
    newest = newest_of_each(found)
    training = [record for record in newest if not record.kind.startswith("ops/")]
    sections = [training_section(record, plots.file_of(record)) for record in training]
    sections += [ops_section(record) for record in newest if record.kind.startswith("ops/")]
    earlier = [record for record in found if record not in newest]
    if earlier:
        sections.append("### Earlier records\n\n" + "".join(f"- `{record.path.as_posix()}`\n" for record in earlier))
    return "\n".join(sections)


def with_tables(page: str, tables: str, name: str = "records") -> str:
    """The page with what stands between its two marks replaced.

    Raises:
        ValueError: a page without the marks.
    """
    first, last = _marks(name)
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page needs the marks {first.strip()} and {last}")
    return f"{before}{first}\n{tables}\n{last}{after}"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``deltatune bench report``."""
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR", help=f"{RECORDS} by default")
    parser.add_argument("--no-plots", action="store_true", help="leave the plots as they are")


def run(args: argparse.Namespace) -> int:
    """Rewrites the pages and plots of the working directory; returns the exit status."""
    if not PAGE.is_file():
        raise UserError(f"{PAGE} is not here: run this in a checkout of the repository")
    records = load_records(args.records)
    if not records:
        raise UserError(f"{args.records} holds no records, and the tables of {PAGE} would be empty")
    _rewrite(PAGE, render(args.records), "records")
    speed = speed_table(records)
    if speed and _marks("speed")[0] in README.read_text(encoding="utf-8"):
        _rewrite(README, speed, "speed")
    if not args.no_plots:
        _draw(newest_of_each(records))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """``run`` on a command line."""
    parser = argparse.ArgumentParser(description="Make the tables and plots of the documentation from the records.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _rewrite(path: Path, tables: str, name: str) -> None:
    path.write_text(with_tables(path.read_text(encoding="utf-8"), tables, name), encoding="utf-8")
    sys.stderr.write(f"wrote the tables of {path}\n")


def _draw(records: Sequence[Record]) -> None:
    for record in records:
        path = plots.file_of(record)
        if path is None or plots.is_drawn_from(PAGE.parent / path, record):
            continue
        try:
            plots.draw(record, PAGE.parent / path)
        except ModuleNotFoundError as error:
            sys.stderr.write(f"{path} is not drawn: {error.name} is missing: pip install 'deltatune[bench]'\n")


if __name__ == "__main__":
    sys.exit(main())
