"""Work that may take long has a name where it happens; whoever shows progress around it shows the name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeAlias

from deltatune.signals import told

__all__ = ["Advance", "Display", "phase", "shown_by"]

#: Takes the number of parts that are done.
Advance: TypeAlias = Callable[[int], None]

#: Shows a phase of this name and number of parts, where that is known, while it lasts.
Display: TypeAlias = Callable[[str, int | None], AbstractContextManager[Advance]]

_display: ContextVar[Display | None] = ContextVar("deltatune_phases", default=None)


@contextmanager
def phase(name: str, total: int | None = None) -> Iterator[Advance]:
    """Around work that may take longer than two seconds; shown only inside ``shown_by``, in the same thread or task.

    An ``Interruption`` that leaves the block has the name of the innermost phase.
    """
    naming = told(lambda error: setattr(error, "phase", error.phase or name))
    with naming, (_display.get() or _nobody)(name, total) as advance:
        yield advance


@contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Phases inside are shown by this."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


def _nobody(_name: str, _total: int | None) -> AbstractContextManager[Advance]:
    """Where nobody watches."""
    return nullcontext(lambda _done: None)
