"""Learning on weights in few bits beside 16 bits, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning
from benchmarks.records import load_records

WORDS = "the model that learns a text sees its letters one by one and says which comes next; "


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("learning")
    (folder / "text.txt").write_text(WORDS * 20, encoding="utf-8")
    given = ["--model", "tiny", "--text", str(folder / "text.txt"), "--tokens", "128", "--pretraining", "6"]
    given += ["--steps", "11", "--base", "fp8", "fp8-products", "--backend", "none", "--device", "cpu"]
    assert learning.main([*given, "--output", str(folder)]) == 0
    (found,) = load_records(folder)
    return dict(found.data)


def test_a_record_holds_what_was_learnt(record: dict[str, Any]) -> None:
    (config,) = record["configs"]
    before = config["config"]["pretraining_losses"]
    assert len(before) == 6
    assert before[-1] < before[0]
    assert [result["name"] for result in config["results"]] == ["16-bit", "fp8", "fp8-products"]
    assert all(len(result["losses"]) == 11 for result in config["results"])
    # no noise: what the base has learnt is where the adapters begin
    assert config["results"][0]["losses"][0] < before[0]
    json.dumps(record, allow_nan=False)


def test_each_base_is_held_to_16_bits_and_products_to_the_same_weights(record: dict[str, Any]) -> None:
    results = {result["name"]: result for result in record["configs"][0]["results"]}
    assert results["16-bit"]["apart"] == {"16-bit": 0}
    assert results["16-bit"]["cosines"]["16-bit"] == pytest.approx([1.0, 1.0])
    beside = {(name, other) for name, result in results.items() for other in result["apart"]}
    few = {("fp8", "16-bit"), ("fp8-products", "16-bit"), ("fp8-products", "fp8")}
    assert beside == {("16-bit", "16-bit"), *few}
    for name, other in few:
        one, its = results[name], results[other]
        assert one["apart"][other] == abs(one["losses"][9] / its["losses"][9] - 1) > 0
        assert all(0.9 < cosine < 1 - 1e-6 for cosine in one["cosines"][other])


@pytest.mark.parametrize("given", [["--steps", "9"], ["--pretraining", "0"]])
def test_steps_of_which_none_is_compared_are_refused(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 20, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"at least 1, and --steps at least 10: every tenth is compared"):
        learning.main(["--model", "tiny", "--text", str(tmp_path / "text.txt"), "--device", "cpu", *given])


@pytest.mark.parametrize(
    ("text", "said"),
    [("short", "5 bytes are fewer than a document of"), (bytes(range(100)) * 9, "100 different bytes")],
)
def test_a_text_that_does_not_fit_is_refused(text: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match=said):
        learning.main(["--model", "tiny", "--text", str(path), "--tokens", "256", "--device", "cpu"])
