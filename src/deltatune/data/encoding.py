"""Text files are UTF-8; anything else is named."""

from __future__ import annotations

from deltatune.errors import DataError

__all__ = ["check_encoding", "decode"]


def decode(content: bytes, where: str) -> str:
    """Text without a byte order mark.

    Raises:
        DataError: bytes that are not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error.reason} at byte {error.start}; save the file as UTF-8") from None


def check_encoding(head: bytes, name: str) -> None:
    """Refuses UTF-16 and UTF-32 by a file's first bytes, which no single line of it would explain.

    Raises:
        DataError: a byte order mark of theirs, or zero bytes.
    """
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        raise DataError(f"{name} is UTF-16 or UTF-32 text; save the file as UTF-8")
