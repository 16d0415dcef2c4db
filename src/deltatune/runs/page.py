"""Runs as one HTML page that stands for itself: no file beside it, nothing from a network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib import resources

from jinja2 import DictLoader, Environment, StrictUndefined, Template

from deltatune import __version__
from deltatune.runs.chart import HEIGHT, WIDTH, Chart, draw
from deltatune.runs.compare import differences, status, summary
from deltatune.runs.folder import RunFolder, labels, number
from deltatune.runs.sections import sections
from deltatune.visible import visible

__all__ = ["page"]

_CHARTS = {
    "loss": "Loss",
    "eval_loss": "Held-out loss",
    "rewards/accuracies": "Share of pairs in the right order",
    "rewards/margins": "Reward of the chosen answer over the rejected one",
    "logps/chosen": "Log-probability of the chosen answer",
    "logps/rejected": "Log-probability of the rejected answer",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "fill": "Fill of the packs",
    "mfu": "Model FLOPs utilization",
    "peak_memory_gib": "Peak memory, GiB",
}


def page(runs: Sequence[RunFolder]) -> str:
    """The page of one run, or of several laid over each other. Text from files is escaped, whatever it holds.

    Control characters are shown as escapes that can be read.
    """
    names = labels(runs)
    return _template().render(
        names=names,
        statuses=[status(run) for run in runs],
        summary=summary(runs),
        charts=_charts(runs),
        differences=differences([run.recipe for run in runs]),
        details=[list(sections(run)) for run in runs],
        paths=[str(run.path) for run in runs],
        version=__version__,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        width=WIDTH,
        height=HEIGHT,
    )


def _charts(runs: Sequence[RunFolder]) -> list[Chart]:
    # of one run alone, where each later leg begins
    begins = [number(leg.get("from_step")) for leg in runs[0].legs[1:]] if len(runs) == 1 else []
    marks = [step for step in begins if step is not None]
    drawn = (draw(title, [run.series(name) for run in runs], marks) for name, title in _CHARTS.items())
    return [chart for chart in drawn if chart is not None]


def _template() -> Template:
    files = {name: (resources.files(__package__) / name).read_text("utf-8") for name in _FILES}
    environment = Environment(loader=DictLoader(files), autoescape=True, undefined=StrictUndefined, finalize=_shown)
    return environment.get_template(_FILES[0])


def _shown(value: object) -> object:
    return visible(value) if type(value) is str else value  # what is markup already is no text from a file


_FILES = ("page.html", "page.css", "page.js")
