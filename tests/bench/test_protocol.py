"""Timing, ceilings and immutable records."""

import json

import pytest
import torch

from deltatune.bench.protocol import Timing, copy_rate, gemm_rate, head, measure, write_record

CPU = torch.device("cpu")


def test_quantiles_of_samples() -> None:
    timing = Timing.of([5.0, 1.0, 4.0, 2.0, 3.0, 100.0])
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms) == (3.5, 2.0, 5.0)
    assert timing.to_dict()["samples_ms"] == [5.0, 1.0, 4.0, 2.0, 3.0, 100.0]


def test_a_timing_needs_samples() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Timing.of([])


def test_variants_take_turns_and_inputs_rotate() -> None:
    calls: list[tuple[str, int]] = []
    variants = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    timings = measure(variants, CPU, rounds=2, calls=3, warmup=1)
    assert "".join(name for name, _ in calls) == "ab" + "aaabbb" * 2
    assert [index for _, index in calls] == list(range(14))
    assert {name: len(timing.samples_ms) for name, timing in timings.items()} == {"a": 6, "b": 6}


def test_a_slower_variant_measures_slower() -> None:
    small, large = torch.randn(8, 8), torch.randn(256, 256)
    timings = measure({"small": lambda _: small @ small, "large": lambda _: large @ large}, CPU, rounds=3)
    assert timings["large"].median_ms > timings["small"].median_ms > 0


def test_ceilings_are_rates() -> None:
    assert copy_rate(CPU, 2**20, rounds=1) > 1e7
    assert gemm_rate(CPU, 64, 32, 16, torch.float32, "TN", rounds=1) > 1e5
    with pytest.raises(ValueError, match="layout"):
        gemm_rate(CPU, 8, 8, 8, torch.float32, "TT")


def test_a_record_is_never_overwritten(tmp_path) -> None:
    record = head("train", "tiny", "method", CPU, argv=["bench"], commit="c0ffee") | {"ok": True, "configs": []}
    first, second = write_record(record, tmp_path), write_record(record | {"ok": False}, tmp_path)
    assert first != second
    assert first.name.startswith("train-tiny-cpu-")
    assert json.loads(first.read_text())["ok"] is True
    assert json.loads(second.read_text())["ok"] is False


def test_the_head_says_what_ran() -> None:
    found = head(
        "ops/causal_conv", "causal_conv", "method", CPU, argv=["bench", "--records", "here", "--op"], commit="c0ffee"
    )
    assert found["commit"] == "c0ffee"
    assert len(found["source_sha256"]) == 64
    assert found["versions"]["torch"] == torch.__version__
    assert found["argv"] == ["bench", "--op"]
    assert found["dirty"] is None


def test_a_record_holds_no_figure_that_is_not_finite(tmp_path) -> None:
    record = head("train", "tiny", "method", CPU, argv=["bench"]) | {"figure": float("nan")}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_record(record, tmp_path)
    assert list(tmp_path.iterdir()) == []
