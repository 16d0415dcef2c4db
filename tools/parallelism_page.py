"""The generated parts of docs/parallelism.md: ``python -m tools.parallelism_page`` rewrites them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from benchmarks.tables import with_table
from tools.capabilities import capabilities
from tools.scale import copies, measured, sequences, steps

__all__ = ["PAGE", "PARTS", "rendered"]

PAGE: Final = Path(__file__).parents[1] / "docs" / "parallelism.md"
PARTS: Final[Mapping[str, Callable[[], list[str]]]] = {
    "capabilities": capabilities,
    "plan-measured": measured,
    "steps": steps,
    "copies": copies,
    "sequences": sequences,
}
"""The name of a part -> what makes its lines."""


def rendered(page: str) -> str:
    """The page with its parts as the code has them."""
    for name, make in PARTS.items():
        page = with_table(page, "\n".join(make()), name)
    return page


def main() -> int:
    """Rewrites the page."""
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
