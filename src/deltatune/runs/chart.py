"""Curves of several runs over their steps, as coordinates that an SVG is written from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from deltatune.runs.words import figure

__all__ = ["HEIGHT", "WIDTH", "Chart", "Curve", "draw"]

Points = Sequence[tuple[int, float]]

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 12, 28
_MOST = 400  # points of a curve that are drawn; more would lie within a pixel of each other
_MANY = 60  # points from which a running mean is easier to read than the points
_MEAN_OF = 20  # parts of the curve that the mean is taken over


@dataclass(frozen=True)
class Curve:
    """A run's line in a chart.

    Attributes:
        run: its number.
        path: of the line; a running mean where there are many points.
        faint: of the points themselves, where the line is their mean.
        dots: positions of values that have no neighbours.
        points: JSON of ``[step, value, x, y]`` for those who point at the chart.
    """

    run: int
    path: str
    faint: str
    dots: list[tuple[float, float]]
    points: str


@dataclass(frozen=True)
class Chart:
    """A titled plot; positions are in the units of a box of ``WIDTH`` and ``HEIGHT``."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]
    marks: list[float]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def draw(title: str, runs: Sequence[Points], marks: Sequence[float] = ()) -> Chart | None:
    """The chart of one figure; None where no run has a value of it. A value that is no finite number is a gap.

    ``marks``: steps that are marked.
    """
    values = [(step, value) for points in runs for step, value in points if math.isfinite(value)]
    if not values:
        return None
    x = _Scale(_range([step for step, _ in values], pad=0.0), (_LEFT, WIDTH - _RIGHT))
    y = _Scale(_range([value for _, value in values], pad=0.06), (HEIGHT - _BOTTOM, _TOP))
    curves = [_curve(number, points, x, y) for number, points in enumerate(runs) if points]
    steps = [(position, label) for position, label in x.ticks(6) if "." not in label]
    first, last = x.values
    return Chart(title, steps, y.ticks(5), curves, [x(mark) for mark in marks if first < mark < last])


@dataclass(frozen=True)
class _Scale:
    """Linear, from values to positions."""

    values: tuple[float, float]
    positions: tuple[float, float]

    def __call__(self, value: float) -> float:
        (low, high), (start, end) = self.values, self.positions
        return round(start + (value - low) / (high - low) * (end - start), 2)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About so many round values, with their positions."""
        low, high = self.values
        rough = (high - low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first, last = math.ceil(low / step), math.floor(high / step)
        return [(self(number * step), figure(number * step)) for number in range(first, last + 1)]


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low - pad * (high - low), high + pad * (high - low)


def _curve(run: int, points: Points, x: _Scale, y: _Scale) -> Curve:
    parts = [list(part) for finite, part in groupby(points, lambda point: math.isfinite(point[1])) if finite]
    many = len(points) > _MANY
    thin = [_thinned(part, len(points)) for part in parts]
    lines = [_thinned(_mean(part, len(points) // _MEAN_OF), len(points)) for part in parts] if many else thin
    shown = [(step, value, x(step), y(value)) for part in thin for step, value in part]
    return Curve(
        run,
        path=_path(lines, x, y),
        faint=_path(thin, x, y) if many else "",
        dots=[(x(part[0][0]), y(part[0][1])) for part in parts if len(part) == 1],
        points=json.dumps(shown),
    )


def _path(parts: Sequence[Points], x: _Scale, y: _Scale) -> str:
    return " ".join(f"M{'L'.join(f'{x(step)},{y(value)}' for step, value in part)}" for part in parts if len(part) > 1)


def _mean(points: Points, width: int) -> Points:
    """Of up to ``width`` values on both sides of each point: of as many on both at first, where curves are steep."""
    values, sums = [value for _, value in points], [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    smooth = []
    for place, (step, _) in enumerate(points):
        before = min(width, place)
        after = min(before, len(values) - 1 - place)
        smooth.append((step, (sums[place + after + 1] - sums[place - before]) / (before + after + 1)))
    return smooth


def _thinned(points: Points, total: int) -> Points:
    """The ends, and the lowest and the highest point of each stretch, so that no spike is lost."""
    size = math.ceil(2 * total / _MOST)
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        order = sorted(range(len(stretch)), key=lambda place: stretch[place][1])
        kept += [stretch[place] for place in sorted({order[0], order[-1]})]
    return [*dict.fromkeys([points[0], *kept, points[-1]])]
