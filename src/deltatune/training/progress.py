"""One progress bar for a run, in the terminal; one line per log entry where there is none."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from deltatune.phases import Advance
from deltatune.training.console import RunConsole

__all__ = ["ProgressBar", "format_metrics"]

# metric -> (label, format); what is not here stays in the logs and out of the terminal
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "eval_loss": ("eval loss", "{:.4f}"),
    "learning_rate": ("lr", "{:.1e}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
    "fill": ("fill", "{:.1%}"),
    "mfu": ("mfu", "{:.1%}"),
    "waiting_share": ("waiting", "{:.1%}"),
    "peak_memory_gib": ("peak GiB", "{:.2f}"),
}


def format_metrics(logs: dict[str, Any]) -> str:
    """A log entry on one line: loss, rates and memory.

    >>> format_metrics({"loss": 1.25, "fill": 0.5, "epoch": 1})
    'loss 1.2500 · fill 50.0%'
    """
    return " · ".join(f"{label} {shown.format(logs[name])}" for name, (label, shown) in _SHOWN.items() if name in logs)


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Steps done and to go, and the time left, at any width; log entries are lines above, cut to the terminal's width.

    Args:
        console: where to draw. Where that is no terminal, there are lines alone.
    """

    def __init__(self, console: RunConsole) -> None:
        self._console = console
        self._shown = ExitStack()
        self._advance: Advance | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Draws the bar, at the step a run resumes from."""
        if state.is_world_process_zero:
            bar = self._console.moving_phase("training", state.max_steps, state.global_step)
            self._advance = self._shown.enter_context(bar)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """One step further."""
        if self._advance is not None:
            self._advance(state.global_step)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any], **_: Any) -> None:
        """A line for the entry."""
        line = format_metrics(logs)
        if not line or not state.is_world_process_zero:
            return
        entry = f"step {state.global_step}/{state.max_steps} · {line}"
        self._console.keep(entry)
        screen = self._console.screen
        while screen.is_terminal and len(entry) > screen.width and " · " in entry:
            entry = entry.rpartition(" · ")[0]
        screen.out(entry, highlight=False)

    def close(self) -> None:
        """Takes the bar away, however training ended."""
        self._advance = None
        self._shown.close()
