"""deltatune import: another project's recipe as one of ours, and what became of each of its keys."""

from __future__ import annotations

import argparse
import shutil
import sys

from deltatune.errors import UserError, user_path
from deltatune.importing.read import read_foreign
from deltatune.importing.recipe import convert
from deltatune.importing.table import table_lines
from deltatune.whole import whole

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Writes the recipe to the output, or to a new file; the table goes where the recipe does not."""
    foreign = read_foreign(args.file, args.kind)
    imported = convert(foreign)
    lost = [row for row in imported.rows if row.given and row.outcome.verdict in ("not supported", "unknown")]
    head = f"# From {foreign.path.name} ({foreign.table.name}), by deltatune import.\n"
    head += "".join(f"# left out: {row.key}: {row.outcome.why}\n" for row in lost)
    stream = sys.stderr if args.output is None else sys.stdout
    width = shutil.get_terminal_size().columns if stream.isatty() else None
    lines = [*table_lines(imported.rows, width), *(f"warning: {warning}" for warning in imported.warnings)]
    table = "".join(f"{line}\n" for line in lines)
    if args.output is None:
        sys.stdout.write(head + imported.text)
        stream.write(table)
        return 0
    output = user_path(args.output)
    if output.exists():
        raise UserError(f"{output} exists: --output expects a new file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    with whole(output) as part:
        part.write_text(head + imported.text, encoding="utf-8")
    stream.write(f"{table}\nthe recipe is in {output}\n")
    return 0
