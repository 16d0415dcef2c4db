"""Keeping what libraries tell each other out of the command's output."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord

from huggingface_hub.utils.tqdm import enable_progress_bars
from rich.console import Console
from transformers.utils import logging

from deltatune.phases import shown_by
from deltatune.training.console import RunConsole

__all__ = ["quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """So that an error is the only line: no deprecations and advice; phases and downloads are shown to who watches."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    watched = sys.stderr.isatty()
    if watched:
        enable_progress_bars()  # of downloads; loading is a phase
    kernels = logging.get_logger("transformers.integrations.hub_kernels")
    # the probe's comparison runs stock layers, whatever kernels they would like; a run's own are in its report
    kernels.addFilter(_names_no_fallback)
    with warnings.catch_warnings():
        # PEFT asks transformers for attributes that the latter is renaming
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
        try:
            with shown_by(RunConsole(Console(stderr=True), moving=watched).phase):
                yield
        finally:
            kernels.removeFilter(_names_no_fallback)
            if shown:
                logging.enable_progress_bar()


def _names_no_fallback(record: LogRecord) -> bool:
    return "is falling back to" not in record.getMessage()
