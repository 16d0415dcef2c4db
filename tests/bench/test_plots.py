"""The picture of the memory frontier."""

from __future__ import annotations

import sys

import pytest
from record_cases import step, training_record, write

from deltatune.bench import plots
from deltatune.bench.records import load_records
from deltatune.cli import main

PAGE = "<!-- records: begin -->\n<!-- records: end -->\n"


def frontier_record(ms=250.0, kind="frontier"):
    results = [
        step("stock", "layer", 540, 7.5),
        step("stock", "none", 420, 45),
        step("deltatune", "none", ms, 32),
        step("deltatune", 0.5, 290, 18),
        step("deltatune", "layer", 330, 7),
        step("deltatune", "layer", 340, 8, targets="all"),
    ]
    record = training_record(results, kind=kind)
    record["configs"][0]["floor"] = {"targets": "qkvo", "total_ms": 200.0, "groups": {}, "parts": []}
    return record


def loaded(folder, record):
    write(folder, "frontier-qwen3.5-2b-h200-2026-01-02.json", record)
    (found,) = load_records(folder)
    return found


def test_a_point_for_each_setting_by_memory(tmp_path) -> None:
    frontier = plots.frontier_of(loaded(tmp_path, frontier_record()))
    assert frontier is not None
    assert [point.label for point in frontier.lines["deltatune"]] == ["layer", "0.5", "none"]
    assert [point.gib for point in frontier.lines["stock"]] == [7.5, 45.0]
    assert frontier.lines["deltatune"][2].tokens_per_second == pytest.approx(65536)
    assert frontier.floor == pytest.approx(16384 / 0.2)


def test_only_a_frontier_has_a_picture(tmp_path) -> None:
    assert plots.file_of(loaded(tmp_path / "a", frontier_record())) == "plots/frontier-qwen3.5-2b-h200.svg"
    assert plots.file_of(loaded(tmp_path / "b", frontier_record(kind="train"))) is None
    one = training_record([step("deltatune", "none", 250, 32)], kind="frontier")
    assert plots.file_of(loaded(tmp_path / "c", one)) is None
    with pytest.raises(ValueError, match="holds no frontier"):
        plots.draw(loaded(tmp_path / "d", one), tmp_path / "x.svg")


def test_a_stale_picture_is_told_by_what_it_carries(tmp_path) -> None:
    record, other = (loaded(tmp_path / str(ms), frontier_record(ms)) for ms in (250.0, 251.0))
    frontier = plots.frontier_of(record)
    assert frontier is not None
    path = tmp_path / "picture.svg"
    assert not plots.is_drawn_from(path, record)
    path.write_text(f"<svg>data {frontier.digest}</svg>", encoding="utf-8")
    assert plots.is_drawn_from(path, record)
    assert not plots.is_drawn_from(path, other)


def test_drawing_twice_gives_the_same_bytes(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    record = loaded(tmp_path, frontier_record())
    first, second = tmp_path / "plots" / "a.svg", tmp_path / "plots" / "b.svg"
    plots.draw(record, first)
    plots.draw(record, second)
    text = first.read_text(encoding="utf-8")
    assert text == second.read_text(encoding="utf-8")
    assert plots.is_drawn_from(first, record)
    assert all(
        label in text for label in ("tokens a second", "peak memory, GiB", ">0.5<", ">layer<", "arithmetic floor")
    )
    assert "dc:date" not in text


def a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text(PAGE, encoding="utf-8")
    (tmp_path / "README.md").write_text("", encoding="utf-8")
    loaded(tmp_path / "bench" / "records", frontier_record())


def test_the_report_draws_and_shows_the_picture(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")
    a_checkout(tmp_path, monkeypatch)
    assert main(["bench", "report"]) == 0
    assert (tmp_path / "docs" / "plots" / "frontier-qwen3.5-2b-h200.svg").is_file()
    assert "](plots/frontier-qwen3.5-2b-h200.svg)" in (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")


def test_without_matplotlib_the_tables_are_made_all_the_same(tmp_path, monkeypatch, capsys) -> None:
    a_checkout(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "report"]) == 0
    assert "pip install 'deltatune[bench]'" in capsys.readouterr().err
    assert "deltatune none qkvo" in (tmp_path / "docs" / "performance.md").read_text(encoding="utf-8")
