"""Keeping what libraries tell each other out of the command's output."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

__all__ = ["quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """So that an error is the only line: no loading bars unless someone watches, no deprecations among libraries."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with warnings.catch_warnings():
        # PEFT asks transformers for attributes that the latter is renaming
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()
