"""Tables of the documentation from benchmark records: ``python -m deltatune.bench.report`` rewrites them in place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main", "render", "with_tables"]

PAGE = Path("docs/performance.md")
RECORDS = Path("bench/records")
_BEGIN, _END = "<!-- records: begin -->\n", "<!-- records: end -->"


def render(records: Path) -> str:
    """Markdown of every record in a folder, oldest name first."""
    return "\n".join(_record(path) for path in sorted(records.glob("*.json")))


def with_tables(page: str, tables: str) -> str:
    """The page with what stands between its two marks replaced.

    Raises:
        ValueError: a page without the marks.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"the page needs the marks {_BEGIN.strip()} and {_END}")
    return f"{before}{_BEGIN}\n{tables}\n{_END}{after}"


def main() -> int:
    """Rewrites the page; returns the exit status."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), render(RECORDS)), encoding="utf-8")
    return 0


def _record(path: Path) -> str:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"### {record['kind']}: {record['device']}, {record['date']}",
        "",
        f"`{path.as_posix()}`; {versions}. Times are {record['method'].split(';')[0]}: median (p20 to p80), ms.",
    ]
    for config in record["configs"]:
        lines += ["", *_table(config)]
    return "\n".join(lines) + "\n"


def _table(config: dict[str, Any]) -> list[str]:
    shape = ", ".join(f"{name} {value}" for name, value in config["config"].items() if not isinstance(value, list))
    rows: dict[str, dict[str, str]] = {}
    for result in config["results"]:
        times = f"{result['median_ms']:.3f} ({result['p20_ms']:.3f} to {result['p80_ms']:.3f})"
        rows.setdefault(result["impl"], {})[result["what"]] = times
    directions = list(dict.fromkeys(result["what"] for result in config["results"]))
    worst = {name: max(errors.values()) for name, errors in config["errors"].items()}
    lines = [
        f"{shape}. Allowed error: twice {max(config['error_budget'].values()):.1e}.",
        "",
        f"| | {' | '.join(directions)} | worst relative error |",
        "|---" * (len(directions) + 2) + "|",
    ]
    for name, measured in rows.items():
        error = f"{worst[name]:.1e}" if name in worst else "-"
        lines.append(f"| {name} | {' | '.join(measured.get(direction, '-') for direction in directions)} | {error} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
