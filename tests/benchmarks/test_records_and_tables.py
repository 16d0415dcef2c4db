"""The committed records stay readable, and the tables and targets made of them say what they hold."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import figures, roofline, tables, targets
from benchmarks.records import RECORDS, Record, head, load_records, source_of, write_record
from benchmarks.shapes import SHAPES

COMMITTED = load_records()
PREDICTED = {"deltatune_auto_qkvo_auto": {"predicted_bytes": 1}}
FRONTIER = RECORDS / "frontier-qwen3.5-2b-h200-2026-11-21-2.json"


def frontier(**changes) -> Record:
    """The frontier of 2B with other values of its results, by name."""
    data = json.loads(FRONTIER.read_text(encoding="utf-8"))
    for result in data["configs"][0]["results"]:
        result.update(changes.get(result["name"].replace(" ", "_").replace(".", "_"), {}))
    return Record(Path("made-up-2026-11-22.json"), data)


def outcome(name: str, *records: Record) -> targets.Outcome:
    return next(o for o in targets.evaluate(records) if o.target.name == name)


def test_every_committed_record_is_read_and_printed(capsys) -> None:
    assert len(COMMITTED) == len(list(RECORDS.glob("*.json"))) >= 44
    assert tables.main([str(record.path) for record in COMMITTED]) == 0
    printed = capsys.readouterr().out
    assert printed.count("commit ") == len(COMMITTED)
    assert sum(len(list(config["results"])) for record in COMMITTED for config in record.configs) < printed.count("\n")


def test_records_are_sorted_by_age() -> None:
    ages = [record.age for record in COMMITTED]
    assert ages == sorted(ages, reverse=True)
    assert Record(Path("train-x-h200-2026-11-21-10.json"), {"date": "2026-11-21"}).age == ("2026-11-21", 10)


def test_a_file_that_is_no_record_is_named(tmp_path) -> None:
    (tmp_path / "a.json").write_text('{"kind": "train"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is no benchmark record: it lacks configs, date, device"):
        load_records(tmp_path)
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is no JSON"):
        load_records(tmp_path)


def test_a_record_is_never_written_over(tmp_path) -> None:
    record = head("train", "tiny", "how", device="NVIDIA H200", source={"commit": "a"}) | {"configs": []}
    paths = [write_record(record, tmp_path) for _ in range(2)]
    assert paths[1].name == paths[0].name.replace(".json", "-2.json")
    assert paths[0].name == f"train-tiny-h200-{record['date']}.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record({**record, "nan": math.nan}, tmp_path)


def test_a_source_is_known_by_its_files(tmp_path) -> None:
    (tmp_path / "a.py").write_text("1", encoding="utf-8")
    before = source_of(tmp_path, "abc")
    assert before["commit"] == "abc"
    (tmp_path / "a.py").write_text("2", encoding="utf-8")
    assert source_of(tmp_path, "abc")["source_sha256"] != before["source_sha256"]


def test_speed_takes_the_newest_record_with_stock() -> None:
    rows = tables.speed(COMMITTED)
    assert "| qwen3.5-2b | stock, made leak-free | `layer` | 543 | 30,163 | 7.4 | 1.00x |" in rows
    assert "| qwen3.5-2b | **deltatune** | `none` | 233 | 70,441 | 25.0 | 2.34x |" in rows
    newer = frontier(deltatune_none_qkvo_auto={"median_ms": 200.0, "tokens_per_second": 81920.0})
    assert "| qwen3.5-2b | **deltatune** | `none` | 200 | 81,920 | 25.0 | 2.72x |" in tables.speed([newer, *COMMITTED])


def test_a_red_check_leaves_no_row() -> None:
    red = frontier(deltatune_none_qkvo_auto={"status": "red check"})
    assert not any("| `none` |" in row and "2b" in row for row in tables.speed([red, *COMMITTED]))


def test_an_interrupted_record_shows_nothing() -> None:
    record = frontier()
    cut = Record(record.path, {**record.data, "interrupted": True})
    assert list(figures.steps_of([cut])) == []


def mixture(**config) -> Record:
    """A record of a whole mixture, with another configuration."""
    path = RECORDS / "train-qwen3.5-35b-a3b-h200-2026-11-30.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["configs"][0]["config"].update(config)
    return Record(Path("made-up-2026-12-01.json"), data)


def test_sizes_of_packs_are_those_of_the_rows() -> None:
    rows = tables.experts([mixture(), mixture(tokens=32768)])
    assert "| 32,768 |" in rows[3]
    assert rows[-1] == "NVIDIA H200, packs of 16384 or 32768 tokens; `made-up-2026-12-01.json` in `benchmarks/records`."
    assert ", packs of 32768 tokens; " in tables.experts([mixture(tokens=32768)])[-1]


@pytest.mark.parametrize("other", [{"optimizer": "bitsandbytes.optim.AdamW8bit()"}, {"adapter_dtype": "bfloat16"}])
def test_moments_are_narrowed_where_they_are_float32(other) -> None:
    assert len(tables.experts([mixture()])) == len(tables.experts([mixture(**other)])) + 1


def test_tables_stand_between_their_marks() -> None:
    page = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"
    made = tables.with_table(page, "new", "x")
    assert made == "a\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nb\n"
    assert tables.with_table(made, "new", "x") == made
    with pytest.raises(ValueError, match="needs the marks"):
        tables.with_table("no marks", "new", "x")


def test_a_comparison_is_shown() -> None:
    data = copy.deepcopy(dict(frontier().data)) | {"kind": "compare"}
    name = "deltatune none qkvo auto"
    ratio = {"name": name, "ratio": 0.9876, "by_round": [0.98, 0.99], "peak_bytes_more": 0}
    for kernels, shown in ((None, ""), (1.01234, "1.012")):
        data["configs"][0]["ratios"] = [ratio | {"ratio_of_kernels": kernels}]
        lines = tables.changes([Record(Path("compare-2026-11-22.json"), data)])
        assert f"| qwen3.5-2b | 24 | NVIDIA H200 | {name} | 0.988 | 0.980, 0.990 | {shown} |" in lines
    data["configs"][0]["config"]["tokens"] = 8192
    assert ", packs of 8192 tokens; " in tables.changes([Record(Path("compare-2026-11-22.json"), data)])[-1]


def test_products_are_shown_beside_quacks() -> None:
    def record(*names: str) -> Record:
        data = copy.deepcopy(dict(frontier().data)) | {"kind": "products", "device": "NVIDIA H200"}
        results = [{"impl": name, "status": "ok", "median_ms": 1.0 + i} for i, name in enumerate(names)]
        results.append({"impl": "quack, not tuned", "status": "unavailable"})
        data["configs"] = [{"config": {"product": "up forward", "T": 8192}, "results": results}]
        return Record(Path("products.json"), data)

    shown = tables.products([record("default", "torch"), record("quack", "torch", "default")])
    assert shown[2] == "| up forward | 3.000 | 2.000 | 1.000 | - |"
    assert "packs of 8192 tokens; `products.json`" in shown[-1]
    assert tables.products([record("default", "torch")]) == ["No record has quack's products yet."]


def test_targets_of_the_committed_records() -> None:
    outcomes = targets.evaluate(COMMITTED)
    without = [o.target.name for o in outcomes if o.verdict == "no record"]
    assert [name for name in without if "GPUs" not in name] == [
        "qwen3.5-2b: products in fp8 against 16 bits, LoRA on all linears",
        "learning with products in fp8 beside 16 bits, weights in fp8: loss of every tenth of 300 steps on text, apart",
        "learning with products in fp8 beside 16 bits, weights in fp8: cosine of the adapters' gradients",
    ]
    ratio = outcome("qwen3.5-2b: against the same, memory free", *COMMITTED)
    assert ratio.figure[0] == pytest.approx(543.1816 / 232.5928, rel=1e-5)
    assert ratio.record.path == FRONTIER
    missed = [o.target.name for o in outcomes if o.verdict == "missed"]
    assert missed == [f"{model}: LoRA on all linears against q/k/v/o, same checkpointing" for model in tables.MODELS]


@pytest.mark.parametrize(
    ("name", "changes", "verdict"),
    [
        ("against the same, memory free", {"deltatune_none_qkvo_auto": {"median_ms": 500.0}}, "missed"),
        ("host syncs in a step", {"deltatune_layer_qkvo_auto": {"host_syncs": 1}}, "missed"),
        ("graph breaks and recompiles", {"deltatune_layer_qkvo_auto": {"recompiles": 1}}, "missed"),
        ("graphs of a layer type", {"deltatune_layer_qkvo_auto": {"graphs": {"a": 2}}}, "missed"),
        ("points of the memory frontier", {"deltatune_0_2_qkvo_auto": {"status": "out_of_memory"}}, "missed"),
        ("checkpointing auto, error of the predicted peak", PREDICTED, "missed"),
        ("of the roofline", {}, "met"),
        ("against leak-free stock with layer checkpointing, no more memory", {}, "met"),
    ],
)  # fmt: skip
def test_a_target_reads_its_figure(name, changes, verdict) -> None:
    changes = {"deltatune_auto_qkvo_auto": {"median_ms": 500.0}, **changes} if "memory free" in name else changes
    slow = {key: {"median_ms": 500.0} for key in ("deltatune_0_8_qkvo_auto", "deltatune_0_6_qkvo_auto")}
    slow |= {key: {"median_ms": 500.0} for key in ("deltatune_0_4_qkvo_auto", "deltatune_0_2_qkvo_auto")}
    slow |= {"deltatune_layer_qkvo_auto": {"median_ms": 500.0}}
    changes = {**slow, **changes} if "memory free" in name else changes
    assert outcome(f"qwen3.5-2b: {name}", frontier(**changes)).verdict == verdict


def test_more_memory_than_stock_is_missed() -> None:
    name = "qwen3.5-2b: against leak-free stock with layer checkpointing, no more memory"
    found = outcome(name, frontier(stock_layer_qkvo={"peak_bytes": 1}))
    assert found.figure[0] == 0.0
    assert found.verdict == "missed"


def test_targets_exit_with_one_while_one_is_missed(capsys, tmp_path) -> None:
    assert targets.main([]) == 1
    assert "2 missed, 12 no record" in capsys.readouterr().out
    assert targets.main(["--records", str(tmp_path)]) == 1
    assert "0 met, 0 missed" in capsys.readouterr().out


BASES_9B = RECORDS / "train-qwen3.5-9b-h200-2026-12-01.json"


def bases_of_9b(**changes) -> Record:
    """The record of bases in few bits with other values."""
    data = json.loads(BASES_9B.read_text(encoding="utf-8"))
    return Record(Path("made-up-2026-12-02.json"), {**data, **changes})


def test_a_base_in_few_bits_stands_beside_16_bits() -> None:
    found = next(figures.steps_of([bases_of_9b()]))
    plain, eight, four = (found.find(f"deltatune{base}", targets="all")[0] for base in ("", " fp8-products", " nf4"))
    speed, over = plain["median_ms"] / eight["median_ms"], four["median_ms"] / plain["median_ms"]
    shown = tables.bases([bases_of_9b()])
    assert f"| {speed:.2f}x | timed alone |" in shown[2]
    assert f"| {1 / over:.2f}x | timed alone |" in shown[3]
    checked = bases_of_9b(method="timed after its checks")
    assert shown[2].replace("timed alone", "yes") == tables.bases([checked])[2]
    names = (
        "qwen3.5-9b: products in fp8 against 16 bits, LoRA on all linears",
        "qwen3.5-9b: a step on nf4 over one on 16 bits, LoRA on all linears",
    )
    for record, note in ((bases_of_9b(), ", timed alone"), (checked, "")):
        for name, value, result in zip(names, (speed, over), (eight, four), strict=True):
            assert outcome(name, record).figure == (pytest.approx(value), result["name"] + note)


def test_what_all_linears_add_is_read_where_both_were_measured() -> None:
    assert tables.adapters([bases_of_9b(), *COMMITTED]) == tables.adapters(COMMITTED)
    assert any("qwen3.5-9b" in row for row in tables.adapters(COMMITTED))


def learnt(steps: int, apart: float, cosines: list[float]) -> Record:
    results = [{"name": "fp8", "apart": {"16-bit": 0.1}, "cosines": {"16-bit": [0.9, 0.9]}}]
    beside = {"apart": {"16-bit": 0.1, "fp8": apart}, "cosines": {"16-bit": [0.9, 0.9], "fp8": cosines}}
    results.append({"name": "fp8-products", **beside})
    data = {"kind": "learning", "subject": "qwen3.5-0.8b", "device": "NVIDIA H200", "date": "2026-12-02"}
    return Record(Path("learning.json"), {**data, "configs": [{"config": {"steps": steps}, "results": results}]})


@pytest.mark.parametrize(
    ("record", "verdicts"),
    [
        (learnt(300, 0.004, [0.9995, 0.9991]), ["met", "met"]),
        (learnt(300, 0.006, [0.9995, 0.998]), ["missed", "missed"]),
        (learnt(20, 0.004, [0.9995, 0.9991]), ["no record", "no record"]),
    ],
)
def test_learning_is_held_at_its_worst(record: Record, verdicts: list[str]) -> None:
    found = [o.verdict for o in targets.evaluate([record]) if o.target.name.startswith("learning")]
    assert found == verdicts


def step(**changes) -> roofline.Step:
    return replace(roofline.Step(SHAPES["qwen3.5-2b"].values, 24, (16384,)), **changes)


def parts(step: roofline.Step, **rates: float) -> dict[str, roofline.Part]:
    rates = {"flops_per_second": 1e15, "bytes_per_second": 1e18, **rates}
    return {part.name: part for part in roofline.roofline(step, **rates)}


def test_the_head_is_booked_with_the_loss() -> None:
    # logits, and the gradient of the hidden states
    assert parts(step())["head and loss"].flops == 2 * 2 * 16384 * 2048 * 248320


def test_a_part_takes_the_longer_of_operations_and_bytes() -> None:
    fast, slow = parts(step())["base products"], parts(step(), bytes_per_second=1e9)["base products"]
    assert fast.ms == pytest.approx(1e3 * fast.flops / 1e15)
    assert slow.ms == pytest.approx(1e3 * slow.num_bytes / 1e9)


def test_nothing_in_front_of_the_first_adapter_has_a_backward() -> None:
    T, E = 16384, 2048
    # three layers of the delta rule: input of every projection but the first layer's own, and the head's part aside
    layer = 2 * T * (E * (6144 + 2048 + 16 + 16) + 2048 * E + 3 * E * 6144)
    more = parts(step(targets="all"))["base products"].flops - parts(step())["base products"].flops
    attention_inputs = 2 * T * E * (2 * 2048 + 2 * 512)
    own_inputs = 2 * T * E * (6144 + 2048 + 16 + 16)
    assert more == 3 * layer - own_inputs + attention_inputs


def test_no_measured_step_beats_its_roofline() -> None:
    shares = []
    for steps in figures.steps_of(COMMITTED):
        for result in steps.find("deltatune", targets=None):
            found = figures.roofline_of(steps, result["targets"])
            if found is None:
                assert result["targets"] == "experts"
            else:
                shares.append(sum(part.ms for part in found) / result["median_ms"])
    assert len(shares) > 80
    assert max(shares) < 0.85


def test_experts_have_no_roofline() -> None:
    values = SHAPES["qwen3.5-35b-a3b"].values
    assert roofline.roofline(step(values=values), flops_per_second=1.0, bytes_per_second=1.0) is None


def test_the_modules_run_as_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.targets"],
        cwd=RECORDS.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "2 missed" in done.stdout


@pytest.mark.parametrize(
    ("model", "experts", "lengths", "skews", "figures"),
    [
        ("35B-A3B", 256, (8192, 16384), ("", "_skewed"), [0.8, 2.0, 6 / 4.5, 5 / 4, 20 / 5.4, 7 / 5.4]),
        ("gpt-oss-20b", 32, (16384,), ("",), [2.0, 5.4 / 4.5, 20 / 5.4]),
    ],
)
def test_targets_of_experts_are_the_worst_of_their_cases(model, experts, lengths, skews, figures, tmp_path) -> None:
    def result(impl: str, ms: float) -> dict[str, object]:
        return {"impl": impl, "what": "forward+backward", "median_ms": ms, "status": "ok", "by": "library"}

    def write(op: str, ours: float, others: dict[str, float], *, last: float, commit: str = "a") -> None:
        for skew in skews:
            configs = []
            for tokens in lengths:
                ms = last if (skew, tokens) == (skews[-1], lengths[-1]) else ours
                results = [result("triton", ms), *(result(name, other) for name, other in others.items())]
                configs.append({"config": {"T": tokens, "experts": experts}, "auto": "triton", "results": results})
            kind = f"ops/{op}{skew}"
            record = head(kind, op, "how", device="NVIDIA H200", source={"commit": commit}) | {"configs": configs}
            write_record(record, tmp_path)

    stock = {"stock grouped_mm": 9.0, "stock grouped_mm, compiled": 6.0, "moves and grouped products alone": 3.6}
    write("moe_experts", 4.0, stock, last=4.5)
    others = {"stock + PEFT target_parameters": 20.0, "separate grouped products, compiled": 7.0}
    write("moe_experts_lora", 5.0, others, last=5.4)
    # of another commit, which "over frozen" leaves alone
    write("moe_experts", 1.0, {}, last=1.0, commit="b")
    found = [o for o in targets.evaluate(load_records(tmp_path)) if f"experts of {model}" in o.target.name]
    assert [round(o.figure[0], 4) for o in found] == [round(figure, 4) for figure in figures]
    assert {o.verdict for o in found} == {"met"}


def test_an_op_without_a_backward_is_in_the_table(tmp_path) -> None:
    def result(impl: str, by: str, ms: float, **more: float) -> dict[str, object]:
        return {"impl": impl, "by": by, "what": "forward", "median_ms": ms, "status": "ok", **more}

    results = [
        result("triton", "deltatune", 0.5, bound_ms=0.4, of_bound=0.8),
        result("torch.compile(reference)", "compile", 0.7),
        result("bitsandbytes", "library", 0.6),
    ]
    config = {"config": {"T": 16384, "hidden": 8, "inner": 16}, "auto": "triton", "results": results}
    made = head("ops/dequantize_nf4", "dequantize_nf4", "how", device="NVIDIA H200", source={"commit": "a"})
    write_record(made | {"configs": [config]}, tmp_path)
    *_, row = tables.ops(load_records(tmp_path))
    wanted = [
        "`dequantize_nf4`",
        "hidden 8 inner 16",
        "`triton`",
        "0.50 / -",
        "0.70 / -",
        "0.60 / - (bitsandbytes)",
        "80%",
    ]
    assert row == f"| {' | '.join(wanted)} |"
