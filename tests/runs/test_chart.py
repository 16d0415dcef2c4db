"""Coordinates of curves: round ticks, gaps, lone points, and long logs that keep their spikes."""

from __future__ import annotations

import json
import math

import pytest

from deltatune.runs.chart import HEIGHT, WIDTH, draw


def positions(path: str) -> list[list[tuple[float, float]]]:
    parts = [part.split("L") for part in path.replace(" ", "").split("M") if part]
    return [[(float(point.split(",")[0]), float(point.split(",")[1])) for point in part] for part in parts]


def test_higher_values_stand_higher_and_later_steps_further_right() -> None:
    chart = draw("Loss", [[(1, 5.0), (2, 3.0), (4, 4.0)]])
    assert chart is not None
    ((first, second, third),) = positions(chart.curves[0].path)
    assert (first[0], third[0]) == (chart.left, chart.right)
    assert first[0] < second[0] < third[0]
    assert first[1] < third[1] < second[1], "y grows downwards"
    assert second[0] - first[0] == pytest.approx((third[0] - first[0]) / 3, abs=0.02)
    assert [label for _, label in chart.y_ticks] == ["3", "3.5", "4", "4.5", "5"]
    assert [label for _, label in chart.x_ticks] == ["1", "2", "3", "4"]


def test_what_is_no_number_is_a_gap_and_a_lone_point_a_dot() -> None:
    chart = draw("Loss", [[(1, 5.0), (2, 4.0), (3, math.nan), (4, 3.0), (5, math.inf), (6, 2.0), (7, 1.0)]])
    assert chart is not None
    (curve,) = chart.curves
    assert [len(part) for part in positions(curve.path)] == [2, 2]
    assert len(curve.dots) == 1
    assert [point[0] for point in json.loads(curve.points)] == [1, 2, 4, 6, 7]


@pytest.mark.parametrize("points", [[(3, 2.0)], [(1, 0.0), (2, 0.0)], [(1, 7e11), (2, 7e11)], [(5, -1e-9), (9, 1e-9)]])
def test_one_value_alone_stands_inside_the_chart(points: list[tuple[int, float]]) -> None:
    chart = draw("Loss", [points])
    assert chart is not None
    for _, _, x, y in json.loads(chart.curves[0].points):
        assert 0 < x < WIDTH
        assert 0 < y < HEIGHT
    assert chart.y_ticks


def test_no_value_is_no_chart() -> None:
    assert draw("Loss", [[], [(1, math.nan)]]) is None


def test_a_long_log_keeps_its_spikes_and_is_drawn_small() -> None:
    points = [(step, float(step * 7919 % 13) / 13) for step in range(1, 100_001)]
    points[54_321] = (54_322, 9.0)
    points[77_777] = (77_778, -9.0)
    chart = draw("Loss", [points])
    assert chart is not None
    (curve,) = chart.curves
    shown = json.loads(curve.points)
    assert {9.0, -9.0} <= {value for _, value, _, _ in shown}
    assert len(shown) < 1000
    assert [step for step, *_ in shown] == sorted(step for step, *_ in shown)
    assert shown[0][0] == 1
    assert shown[-1][0] == 100_000


def test_many_points_are_drawn_faintly_under_their_mean() -> None:
    points = [(step, step % 2 + step / 1000) for step in range(400)]
    chart = draw("Loss", [points])
    assert chart is not None
    (curve,) = chart.curves
    ((*mean,),), ((*raw,),) = positions(curve.path), positions(curve.faint)
    middle = slice(40, None)
    spread = [max(y for _, y in line[middle]) - min(y for _, y in line[middle]) for line in (mean, raw)]
    assert spread[0] < spread[1] / 2
    few = draw("Loss", [points[:30]])
    assert few is not None
    assert few.curves[0].faint == ""


def test_only_marks_between_the_ends_are_drawn() -> None:
    chart = draw("Loss", [[(1, 5.0), (5, 3.0)]], marks=[0, 3, 5])
    assert chart is not None
    assert chart.marks == [(chart.left + chart.right) / 2]
