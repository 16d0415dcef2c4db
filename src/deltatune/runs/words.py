"""Figures, sizes and times as people read them; a dash for what is not known."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from deltatune.runs.folder import number

__all__ = ["count", "duration", "figure", "memory", "moment", "seconds_between", "share", "text"]

UNKNOWN = "-"


def text(value: Any) -> str:
    """Any value in words."""
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    return figure(value) if isinstance(value, float) else str(value)


def figure(value: Any) -> str:
    """A number with four digits that count.

    >>> figure(12345.0), figure(0.00012), figure(2.0)
    ('12,345', '0.00012', '2')
    """
    found = number(value)
    if found is None:
        return UNKNOWN if value is None else str(value)
    if abs(found) >= 1000:
        return f"{found:,.0f}"
    return f"{found:.4g}" if abs(found) >= 1e-4 or found == 0 else f"{found:.3g}"


def count(value: Any) -> str:
    """A whole number."""
    found = number(value)
    return UNKNOWN if found is None else f"{found:,.0f}"


def share(value: Any) -> str:
    """Of one, as a percentage."""
    found = number(value)
    return UNKNOWN if found is None else f"{found:.1%}"


def memory(value: Any) -> str:
    """Bytes in GiB, MiB or KiB."""
    found = number(value)
    if found is None:
        return UNKNOWN
    unit, size = next((u for u in (("GiB", 2**30), ("MiB", 2**20)) if found >= u[1] / 2), ("KiB", 2**10))
    return f"{found / size:,.2f} {unit}"


def duration(seconds: Any) -> str:
    """Seconds in the units that matter.

    >>> duration(59), duration(3725), duration(90000)
    ('59 s', '1 h 02 min', '25 h 00 min')
    """
    found = number(seconds)
    if found is None:
        return UNKNOWN
    if found < 60:
        return f"{found:.3g} s"
    minutes, rest = divmod(round(found), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def moment(value: Any) -> str:
    """A time of a record, to the minute."""
    found = _time(value)
    return UNKNOWN if found is None else found.strftime("%Y-%m-%d %H:%M UTC")


def seconds_between(started: Any, ended: Any) -> float | None:
    """From one time of a record to another."""
    first, last = _time(started), _time(ended)
    return None if first is None or last is None else (last - first).total_seconds()


def _time(value: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else None
