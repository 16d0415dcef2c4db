"""Folders of runs that are whole, broken, going on, or none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from run_cases import entry, leg, write_run

from deltatune.errors import UserError
from deltatune.runs.folder import labels, read_run
from deltatune.runs.page import page


def test_what_a_later_leg_did_over_is_left_out(tmp_path: Path) -> None:
    first = [entry(1, 5.0), entry(2, 4.0), entry(3, 9.0)]
    second = [entry(3, 3.0, leg=2), entry(4, 8.0, leg=2), entry(5, 7.0, leg=2)]
    legs = (leg("killed"), leg("killed", from_step=2), leg("running", from_step=3))
    run = read_run(write_run(tmp_path, *legs, entries=[*first, *second, entry(4, 2.0, leg=3)]))
    # the third leg has not come to step 5 yet
    assert run.series("loss") == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]
    assert run.status == "running"


def test_the_middle_of_a_last_line_is_passed_over_and_a_broken_line_before_it_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path, tail='{"leg": 1, "st')
    assert [step for step, _ in read_run(folder).series("loss")] == [1, 2, 3, 4, 5, 6]
    assert read_run(folder).problems == ()
    with (folder / "run.jsonl").open("a") as stream:
        stream.write('\n{"leg": 1, "step": 9, "loss": 1.0}\n')
    run = read_run(folder)
    assert run.problems == ("run.jsonl: line 7 is no JSON",)
    assert run.series("loss")[-1] == (9, 1.0)


def test_a_completion_may_hold_what_python_takes_for_the_end_of_a_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    text = "one\u2028two\u0085three"
    line = json.dumps({"step": 1, "prompt": "?", "completion": text}, ensure_ascii=False)
    (folder / "samples.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    run = read_run(folder)
    assert [sample["completion"] for sample in run.samples] == [text, text]
    assert run.problems == ()


def test_what_is_no_number_is_a_gap(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, entries=[entry(1, 2.0), entry(2, "nan"), entry(3, None)]))
    (_, second, third) = run.series("loss")
    assert math.isnan(second[1])
    assert math.isnan(third[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", '{"legs": [1, null, "x"], "model": 3, "status": null}'),
        ("run.json", "[]"),
        ("run.jsonl", "\x00\xff"),
        ("run.jsonl", "3\n[]\nnull\n"),
        ("config.yaml", "a: [1"),
        ("config.yaml", "3"),
        ("report.json", ""),
    ],
)
def test_files_that_hold_something_else_are_read_as_far_as_they_go(tmp_path: Path, name: str, content: str) -> None:
    folder = write_run(tmp_path)
    (folder / name).write_text(content, encoding="latin-1")
    run = read_run(folder)
    assert isinstance(run.legs, list)
    assert run.series("loss") == [] or name != "run.jsonl"


def test_a_folder_that_is_no_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run: none of run\.json"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"nowhere is no folder"):
        read_run(tmp_path / "nowhere")


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "output", tmp_path / "b" / "output", tmp_path / "c"]
    assert labels([read_run(write_run(path)) for path in paths]) == ["a/output", "b/output", "c"]


@pytest.mark.parametrize("levels", [100, 900, 100_000])
@pytest.mark.parametrize(
    "name", ["run.json", "run.jsonl", "report.json", "metrics.json", "samples.jsonl", "config.yaml"]
)
def test_what_is_nested_too_deeply_is_said(tmp_path: Path, name: str, levels: int) -> None:
    folder = write_run(tmp_path)
    levels = min(levels, 5000) if name == "config.yaml" else levels  # YAML is slow to fail
    nested = f'{{"legs": {"[" * levels}{"]" * levels}}}\n'
    (folder / name).write_text(nested * 2)
    run = read_run(folder)
    assert len(run.problems) == 1
    assert run.problems[0].startswith(name)
    assert page([run])


@pytest.mark.parametrize(
    "values",
    [
        [1e308, -1e308, 1e308],
        [1.7e308] * 3,
        [5e-324, 0.0, -5e-324],
        [1e149, -1e149, 1e149],
        [10**400, 2.0, 1.0],
        [1e-160, 2e-160, 3e-160],
    ],
    ids=["both ends", "one end", "smallest", "large", "integer", "small"],
)
def test_figures_of_any_size_are_drawn(tmp_path: Path, values: list[float]) -> None:
    entries = [entry(step, value) for step, value in enumerate(values * 40, start=1)]
    folder = write_run(tmp_path, leg(seconds=values[0], tokens=values[0], packs=values[0]), entries=entries)
    assert page([read_run(folder)])
