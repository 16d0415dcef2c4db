"""What the demo prints: headings, the answers before and after, and the figures of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltatune.demo.scoring import Answer, exact_match, exact_match_by_kind
from deltatune.demo.speed import Timing

__all__ = ["heading", "make_console", "show_answers", "show_run", "show_scores", "show_speed"]


def make_console() -> Console:
    """The standard output; where that is no terminal, plain text at a width that tables fit in."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120, color_system=None)


def heading(console: Console, text: str, detail: str = "") -> None:
    """A step of the demo, and what it is about."""
    console.print()
    console.print(Text(text, style="bold cyan"))
    if detail:
        console.print(detail, markup=False)


def show_answers(console: Console, before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """What was asked, and both answers next to the right one."""
    for old, new in zip(before, after, strict=True):
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for message in old.conversation.messages[:-1]:
            table.add_row(message["role"], Text(message["content"]))
        table.add_row("before", Text(_printable(old.text), style=_style(old)))
        table.add_row("after", Text(_printable(new.text), style=_style(new)))
        if not new.right:
            table.add_row("right", Text(new.expected))
        console.print(table)
        console.print()


def show_scores(console: Console, before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """Exact match on all held-out questions, by kind and in all."""
    table = _table(console, "held-out questions", "asked", "right before", "right after")
    old, new = exact_match_by_kind(before), exact_match_by_kind(after)
    for kind in new:
        asked = sum(answer.conversation.kind == kind for answer in after)
        table.add_row(kind, str(asked), f"{old[kind]:.1%}", f"{new[kind]:.1%}")
    table.add_section()
    table.add_row("all", str(len(after)), f"{exact_match(before):.1%}", f"{exact_match(after):.1%}", style="bold")
    console.print(table)


def show_run(console: Console, metrics: dict[str, Any]) -> None:
    """Fill, graphs and rates of the training run."""
    rows = {
        "packs": f"{metrics['packs']:,} trained on, {metrics['fill']:.1%} full",
        "training": f"{metrics['seconds']:.0f} s in all, compiling included",
    }
    if "steady_tokens_per_second" in metrics:
        rows["rate"] = (
            f"{metrics['steady_tokens_per_second']:,.0f} tokens/s, "
            f"{metrics['steady_trained_tokens_per_second']:,.0f} of them trained (after the first steps)"
        )
    compiled = metrics["compile"]
    if compiled is not None:
        rows["graphs"] = ", ".join(f"{name} {count}" for name, count in compiled["graphs"].items())
        rows["graph breaks"] = str(len(compiled["breaks"]))
        rows["recompiles"] = str(len(compiled["recompiles"]))
        rows["compiling"] = f"{compiled['seconds']:.0f} s"
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)


def show_speed(console: Console, packed: Timing, padded: Timing) -> None:
    """Both systems next to each other, the faster one's factor below."""
    table = _table(console, "the same documents", "fill", "median step", "trained tokens/s", "tokens/s", "slots/s")
    for name, timing in (("packed, compiled (deltatune)", packed), ("padded, eager (stock)", padded)):
        table.add_row(
            name,
            f"{timing.fill:.1%}",
            f"{timing.median_ms:.0f} ms",
            f"{timing.trained_per_second:,.0f}",
            f"{timing.tokens_per_second:,.0f}",
            f"{timing.slots_per_second:,.0f}",
        )
    console.print(table)
    factor = packed.trained_per_second / padded.trained_per_second
    console.print(Text(f"{factor:.2f} times the stock model's trained tokens per second", style="bold"))
    slots = packed.slots_per_second / padded.slots_per_second
    console.print(
        f"Packing fills {packed.fill / padded.fill:.2f} times as many of its slots with tokens; slot for slot, padding "
        f"counted,\nit runs at {slots:.2f} times the stock model's rate on this CPU.",
        markup=False,
    )


def _printable(text: str) -> str:
    """An untrained model writes any bytes, those that drive a terminal included."""
    return "".join(character if character.isprintable() else "·" for character in text.strip()) or "(nothing)"


def _style(answer: Answer) -> str:
    return "green" if answer.right else "red"


def _table(console: Console, first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
