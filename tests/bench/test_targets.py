"""Targets against made-up records: met, missed and without a record."""

from __future__ import annotations

import pytest
from record_cases import failed, op_record, op_result, step, training_record, write

from deltatune.bench.records import load_records
from deltatune.bench.targets import TARGETS, evaluate
from deltatune.cli import main

FLOOR = "of the arithmetic floor"
SAME = "no more memory"
FREE = "against the same, memory free"
SHIPPED = "as shipped"
ALL = "LoRA on all linears"


def outcomes(tmp_path, **records):
    for number, (name, record) in enumerate(records.items()):
        write(tmp_path, f"{name}-h200-2026-01-0{number + 1}.json", record)
    return {outcome.target.name: outcome for outcome in evaluate(TARGETS, load_records(tmp_path))}


def outcome_of(found, part, model="qwen3.5-2b"):
    (name,) = (name for name in found if name.startswith(model) and part in name)
    return found[name]


def a_run(**changes):
    """Each training target of the 2B shapes met, but for the changes."""
    ms = {"layer": 330.0, "none": 240.0, "stock": 540.0, "shipped": 700.0, "all": 260.0, "room": 7.5} | changes
    return [
        step("stock as shipped", "layer", ms["shipped"], 7.9),
        step("stock as shipped", "none", ms["shipped"] - 40, 45),
        step("stock", "layer", ms["stock"], ms["room"]),
        step("stock", "none", ms["stock"] - 100, 45),
        step("deltatune", "layer", ms["layer"], 7.0),
        step("deltatune", "none", ms["none"], 32),
        step("deltatune", "none", ms["all"], 40, targets="all"),
    ]


@pytest.mark.parametrize(
    ("part", "changes", "figure", "verdict"),
    [
        (FLOOR, {}, 200 / 240, "met"),
        (FLOOR, {"none": 251.0}, 200 / 251, "missed"),
        (SAME, {}, 540 / 330, "met"),
        (SAME, {"layer": 340.0}, 540 / 340, "missed"),
        (SAME, {"room": 3.0}, 0.0, "missed"),
        (FREE, {}, 540 / 240, "met"),
        (FREE, {"stock": 520.0}, 520 / 240, "missed"),
        (SHIPPED, {}, 700 / 240, "met"),
        (SHIPPED, {"shipped": 620.0}, 620 / 240, "missed"),
        (ALL, {}, 260 / 240, "met"),
        (ALL, {"all": 265.0}, 265 / 240, "missed"),
    ],
)
def test_training_targets(tmp_path, part, changes, figure, verdict) -> None:
    found = outcome_of(outcomes(tmp_path, train=training_record(a_run(**changes))), part)
    assert found.figure is not None
    assert found.figure.value == pytest.approx(figure)
    assert found.verdict == verdict


def test_no_more_memory_leaves_out_what_needs_more(tmp_path) -> None:
    results = [step("stock", "layer", 540, 7.5), step("deltatune", "none", 100, 7.6), step("deltatune", 0.2, 360, 7.5)]
    found = outcome_of(outcomes(tmp_path, train=training_record(results)), SAME)
    assert found.figure is not None
    assert (found.figure.value, found.figure.note) == (1.5, "deltatune 0.2 qkvo")


@pytest.mark.parametrize("config", [{"tokens": 4096}, {"layers": 8}])
def test_other_packs_and_reduced_depth_reach_no_target(tmp_path, config) -> None:
    assert outcome_of(outcomes(tmp_path, train=training_record(a_run(), **config)), FLOOR).verdict == "no record"


@pytest.mark.parametrize("status", ["red gate", "failed", "out_of_memory"])
def test_what_was_not_timed_is_no_figure(tmp_path, status) -> None:
    results = [step("stock", "layer", 540, 7.5), failed("deltatune", "none", status, "why")]
    assert outcome_of(outcomes(tmp_path, train=training_record(results)), FREE).verdict == "no record"


def test_the_newest_record_that_holds_the_figure_is_taken(tmp_path) -> None:
    found = outcomes(
        tmp_path,
        old=training_record(a_run(none=210.0), date="2026-01-01"),
        new=training_record(a_run(none=250.0), date="2026-02-01"),
        newer=training_record(a_run(none=220.0), date="2026-03-01", tokens=4096),
        other=training_record(a_run(none=200.0), date="2026-04-01", model="qwen3.5-9b"),
    )
    floor = outcome_of(found, FLOOR)
    assert floor.record is not None
    assert floor.record.path.name.startswith("new-")
    assert floor.figure is not None
    assert floor.figure.value == 0.8


def test_of_one_day_the_higher_number_is_newer(tmp_path) -> None:
    for suffix, ms in (("", 220.0), ("-2", 250.0), ("-10", 230.0)):
        write(tmp_path, f"train-qwen3.5-2b-h200-2026-01-02{suffix}.json", training_record(a_run(none=ms)))
    floor = outcome_of({o.target.name: o for o in evaluate(TARGETS, load_records(tmp_path))}, FLOOR)
    assert floor.record is not None
    assert floor.record.path.stem.endswith("-10")


@pytest.mark.parametrize(
    ("part", "more", "verdict"),
    [
        ("host syncs", {"host_syncs": 0}, "met"),
        ("host syncs", {"host_syncs": 1}, "missed"),
        ("host syncs", {"host_syncs": None}, "no record"),
        ("graphs of a layer type", {"graphs": {"a": 1, "b": 1}}, "met"),
        ("graphs of a layer type", {"graphs": {"a": 1, "b": 2}}, "missed"),
        ("breaks and recompiles", {"breaks": 0, "recompiles": 1}, "missed"),
        ("first step, library", {"first_step_seconds": 39.0, "caches": "cold"}, "met"),
        ("first step, library", {"first_step_seconds": 41.0, "caches": "cold"}, "missed"),
        ("first step, library", {"first_step_seconds": 39.0}, "no record"),
        ("first step, library", {"first_step_seconds": 14.0, "caches": "warm"}, "no record"),
        ("second run", {"first_step_seconds": 14.0, "caches": "warm"}, "met"),
        ("second run", {"first_step_seconds": 16.0, "caches": "warm"}, "missed"),
        ("second run", {"first_step_seconds": 14.0}, "no record"),
    ],
)
def test_what_else_a_step_shows(tmp_path, part, more, verdict) -> None:
    record = training_record([step("deltatune", "none", 240, 32, **more)])
    assert outcome_of(outcomes(tmp_path, train=record), part).verdict == verdict


def frontier(*, points=6, predicted=1.05, taken="none", none_ms=240.0):
    shares = [step("deltatune", round(1 - i / 10, 1), 250.0 + 10 * i, 30 - i) for i in range(points - 1)]
    auto = step("deltatune", "auto", 241, 32, checkpointing_taken=taken, predicted_bytes=int(32 * predicted * 2**30))
    return training_record([step("deltatune", "none", none_ms, 32), *shares, auto], kind="frontier")


@pytest.mark.parametrize(
    ("part", "changes", "verdict"),
    [
        ("points of the memory frontier", {}, "met"),
        ("points of the memory frontier", {"points": 5}, "missed"),
        ("predicted peak", {}, "met"),
        ("predicted peak", {"predicted": 0.85}, "missed"),
        ("fastest setting that fits", {}, "met"),
        ("fastest setting that fits", {"taken": 0.8}, "missed"),
    ],
)
def test_the_memory_dial(tmp_path, part, changes, verdict) -> None:
    assert outcome_of(outcomes(tmp_path, frontier=frontier(**changes)), part).verdict == verdict


def test_a_training_record_has_no_frontier(tmp_path) -> None:
    found = outcomes(tmp_path, train=training_record(a_run()))
    assert outcome_of(found, "points of the memory frontier").verdict == "no record"


def conv(share, both, **more):
    results = [op_result("triton", "forward", share, **more), op_result("triton", "forward+backward", both, **more)]
    results += [op_result("reference", what, 0.2) for what in ("forward", "forward+backward")]
    return op_record("causal_conv", [({"T": 16384, "D": 6144}, results)])


@pytest.mark.parametrize(
    ("record", "verdicts"),
    [
        (conv(0.81, 0.71), ["met", "met"]),
        (conv(0.79, 0.71), ["missed", "met"]),
        (conv(0.90, 0.71, status="red gate"), ["missed", "missed"]),
        (conv(0.90, 0.71, by="library"), ["missed", "missed"]),
        (conv(0.81, 0.71, by="compile"), ["met", "met"]),
    ],
)
def test_the_convolution_against_copy_bandwidth(tmp_path, record, verdicts) -> None:
    found = outcomes(tmp_path, conv=record)
    assert [o.verdict for name, o in found.items() if "causal_conv [1, 16384, 6144]" in name] == verdicts
    assert {o.verdict for name, o in found.items() if "causal_conv [1, 16384, 8192]" in name} == {"no record"}


def rope(*tokens, share=0.9):
    sizes = {"N": 16, "M": 4, "D": 256}
    rows = [(sizes | {"T": t}, [op_result("triton", "forward", share - t / 1e6)]) for t in tokens]
    return op_record("rms_norm_rope", rows)


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        (rope(8192, 16384, 32768), "met"),
        (rope(8192, 16384, 32768, share=0.87), "missed"),
        (rope(8192, 16384), "no record"),
    ],
)
def test_the_norm_holds_at_every_length(tmp_path, record, verdict) -> None:
    found = outcomes(tmp_path, rope=record)
    (name,) = (name for name in found if "16/4 x 256, 8k to 32k, forward, of" in name)
    assert found[name].verdict == verdict


def loss(*, input_bytes=0, **changes):
    """Peak in units, time in ms of each implementation."""
    known = {"triton": (100, 80.0), "reference": (104, 90.0), "Liger": (200, 60.0)} | changes
    results = [
        op_result(name, "forward+backward", 1.0, peak_bytes=peak, median_ms=ms) for name, (peak, ms) in known.items()
    ]
    record = op_record("linear_cross_entropy", [({"T": 16384, "E": 2048, "V": 248320}, results)])
    record["configs"][0]["input_bytes"] = input_bytes
    return record


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, ["met", "met"]),
        ({"Liger": (90, 60.0)}, ["missed", "missed"]),
        ({"reference": (104, 79.0)}, ["met", "missed"]),
        ({"reference": (106, 79.0)}, ["met", "met"]),
        ({"reference": (106, 79.0), "input_bytes": 900}, ["met", "missed"]),
        ({"Liger": (90, 90.0), "input_bytes": 900}, ["met", "met"]),
    ],
)
def test_the_default_loss_is_the_fastest_of_the_small_ones(tmp_path, changes, verdicts) -> None:
    found = outcomes(tmp_path, loss=loss(**changes))
    assert [o.verdict for name, o in found.items() if "16384 x 2048" in name] == verdicts


def test_the_exit_status_is_0_only_when_all_are_met(tmp_path, capsys, monkeypatch) -> None:
    command = ["bench", "targets", "--records", str(tmp_path)]
    assert main(command) == 1
    assert "0 met, 0 missed" in capsys.readouterr().out
    record = training_record(a_run())
    write(tmp_path, "train-h200-2026-01-02.json", record)
    assert main(command) == 1
    page = capsys.readouterr().out
    assert "train-h200-2026-01-02.json" in page
    assert "83.33% (deltatune none qkvo)" in page
    some = [t for t in TARGETS if t.name.startswith("qwen3.5-2b") and any(x in t.name for x in (FLOOR, SAME, FREE))]
    monkeypatch.setattr("deltatune.bench.targets.TARGETS", some)
    assert main(command) == 0
    write(tmp_path, "train-h200-2026-01-03.json", training_record(a_run(none=300.0), date="2026-01-03"))
    assert main(command) == 1
    assert "missed" in capsys.readouterr().out


def test_records_of_another_device_do_not_count(tmp_path, capsys) -> None:
    write(tmp_path, "train-h100-2026-01-02.json", {**training_record(a_run()), "device": "NVIDIA H100 80GB HBM3"})
    main(["bench", "targets", "--records", str(tmp_path)])
    assert "0 met" in capsys.readouterr().out
    main(["bench", "targets", "--records", str(tmp_path), "--device", "H100"])
    assert "0 met" not in capsys.readouterr().out


@pytest.mark.parametrize(("text", "named"), [("{", "no JSON"), ("[]", "lacks"), ('{"kind": "train"}', "lacks configs")])
def test_a_file_that_is_no_record_is_one_line(tmp_path, capsys, text, named) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert main(["bench", "targets", "--records", str(tmp_path)]) == 2
    assert named in capsys.readouterr().err
