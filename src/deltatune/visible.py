"""Text of models and files as a terminal or a page may show it."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["visible"]

# C0 but for tabs and line breaks, DEL and C1: a terminal takes the latter for escape sequences as well; and embeddings,
# overrides and isolates, which reorder what is shown
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""The text with control characters as escapes that can be read, such as ``\x1b``; tabs and line breaks stay.

    Those that change the direction of a text (U+202A to U+202E, U+2066 to U+2069) are among them.

    >>> visible("\x1b[31mred\r\n")
    '\\x1b[31mred\\r\n'
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
