"""Timing, checks and processes, on a CPU with tiny shapes."""

import functools
import json
import math
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    checks,
    compare,
    decode_cases,
    op_cases,
    ops,
    session,
    tables,
    timing,
    train,
    tune_grouped,
    worker,
)
from benchmarks.checks import Seen
from benchmarks.shapes import SHAPES, adapters, build_model
from benchmarks.systems import Packs, Setting, System, draw_lengths
from benchmarks.worker import Spec, outcome_of
from deltatune.quantization.tensor import QuantizedTensor
from forked import FORKED

CPU = torch.device("cpu")


def test_a_summary_keeps_the_samples_in_their_order() -> None:
    found = timing.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0, "samples_ms": [5.0, 1.0, 2.0, 4.0, 3.0, 6.0]}
    with pytest.raises(ValueError, match="at least one sample"):
        timing.summary([])


def test_variants_take_turns_and_numbers_rise() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: (lambda i, name=name: seen.append((name, i))) for name in "ab"}
    samples = timing.measure(calls, CPU, rounds=2, calls=2, warmup=1)
    assert "".join(name for name, _ in seen) == "ab" + "aabb" * 2
    assert [number for _, number in seen] == list(range(10))
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4}


def test_input_sets_are_larger_than_a_cache() -> None:
    assert timing.num_sets(2**20) == 16
    assert timing.num_sets(2**27) * 2**27 >= 256 * 2**20
    assert timing.num_sets(2**33) == 2


def test_ceilings_are_rates() -> None:
    found = timing.ceilings(CPU, torch.float32)
    assert found["copy_bytes_per_second"] > 1e6
    assert found["gemm_flops_per_second"] > 1e6


@pytest.mark.parametrize("tokens", [64, 100, 4096, 16384])
def test_lengths_fill_a_pack(tokens) -> None:
    lengths = draw_lengths(tokens)
    assert sum(lengths) == tokens
    assert all(64 <= n <= 2048 for n in lengths) or len(lengths) == 1
    assert draw_lengths(tokens, shortest=tokens, longest=tokens) == [tokens]


def test_the_lengths_are_those_of_the_records() -> None:
    assert draw_lengths(16384)[:8] == [582, 163, 74, 68, 1072, 1514, 524, 802]


def test_packs_hold_the_same_documents_in_another_order() -> None:
    packs = Packs((5, 9, 70), 96)
    first, second = (packs.batch(number)["sequences"].cu_seqlens_cpu.diff().tolist() for number in (0, 3))
    assert first[:3] == [5, 9, 70]
    assert sorted(second[:3]) == [5, 9, 70]
    only = packs.only(1)["labels"][0]
    assert (only != -100).nonzero().flatten().tolist() == list(range(6, 14))
    assert packs.alone(1)["input_ids"].tolist() == packs.batch(0)["input_ids"][:, 5:14].tolist()


def seen(error: float, whole: float = 0.0) -> Seen:
    tokens, gradient = torch.ones(100), torch.ones(10)
    return Seen({2: tokens + error}, {2: 1.0 + error}, {2: {"a": gradient + error}}, {"a": gradient + whole})


@pytest.mark.parametrize(("error", "ok"), [(1.9e-2, True), (2.1e-2, False), (math.nan, False)])
def test_ours_may_be_twice_as_far_from_the_truth_as_stock(error, ok) -> None:
    found = checks.against_truth("x", seen(error), seen(1e-2), seen(0.0))
    assert [check.ok for check in found] == [ok] * 3
    assert all(check.to_dict()["limit"] == pytest.approx(2e-2, rel=1e-3) for check in found)


@pytest.mark.parametrize(("apart", "ok"), [(2.9e-2, True), (3.1e-2, False), (math.nan, False)])
def test_the_whole_pack_is_near_stock(apart, ok) -> None:
    assert checks.against_stock("x", seen(0.0, apart), seen(1e-2), seen(0.0)).ok is ok


def test_a_stock_path_that_is_no_rounding_away_is_red() -> None:
    assert all(check.ok for check in checks.stock_checks("x", seen(0.1), seen(0.0)))
    assert not any(check.ok for check in checks.stock_checks("x", seen(0.3), seen(0.0)))


def test_gradients_of_other_names_are_infinitely_far() -> None:
    assert checks.relative({"a": torch.ones(1)}, {"b": torch.ones(1)}) == math.inf


def test_sampled_documents_are_spread() -> None:
    assert checks.sample_documents([100, 2000, 64, 500, 90]) == [1, 2, 4]
    assert checks.sample_documents([5000]) == [0]


def test_a_failure_says_what_kind_it_is() -> None:
    assert outcome_of(torch.OutOfMemoryError("no\nroom")) == ("out_of_memory", "no")
    assert outcome_of(ImportError("fla")) == ("unavailable", "ImportError: fla")
    assert outcome_of(RuntimeError("a\n b")) == ("failed", "RuntimeError: a b")
    assert outcome_of(RuntimeError(f'File "{worker.__file__}"')) == (
        "failed",
        'RuntimeError: File "benchmarks/worker.py"',
    )


def test_a_spec_survives_its_file() -> None:
    spec = Spec("tiny", None, (3, 4), (Setting("deltatune", 0.5, "all", "auto"),), known="x", profile=True)
    assert Spec.of_json(spec.to_json()) == spec


def test_settings_are_named_as_in_records() -> None:
    assert Setting("deltatune", "none", "qkvo", "auto").name == "deltatune none qkvo auto"
    assert Setting("stock as shipped", "layer").name == "stock as shipped layer qkvo"


def test_a_base_in_few_bits_is_another_system_of_the_same_truth() -> None:
    setting = Setting("deltatune", "none", "all", "auto", "fp8-products")
    assert setting.name == "deltatune fp8-products none all auto"
    assert setting.to_dict()["system"] == "deltatune fp8-products"
    assert setting.truth == Setting("stock", "layer", "all", base="fp8").truth != Setting("stock", targets="all").truth


@pytest.mark.parametrize(("shape", "base"), [("tiny", "nf4"), ("tiny-moe", "fp8"), ("tiny", "fp8-products")])
def test_bases_in_few_bits_are_held_to_their_values(shape: str, base: str) -> None:
    packs, found = Packs((40, 20), 96), []
    for setting in (Setting("deltatune", "none", "all", "auto", base), Setting("stock", "none", "all", base=base)):
        model = build_model(SHAPES[shape], CPU, dtype=torch.float32)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        scope = vars(__import__(type(model).__module__, fromlist=["x"]))
        functions = dict(scope)  # which the stock path replaces
        system = System(setting, model, backend="none")
        weights = {name.replace(".base_layer", ""): w for name, w in system.model.named_parameters()}
        narrow = {n for n, w in weights.items() if isinstance(w, QuantizedTensor)}
        changed = {n for n, w in before.items() if not torch.equal(w, weights[f"base_model.model.{n}"])}
        found.append((checks.observe(system, packs), narrow, changed))
        scope.update(functions)
    (ours, narrow, changed), (stock, none, same) = found
    assert changed == same == {name.removeprefix("base_model.model.") for name in narrow}
    assert not none
    assert any("experts.down_proj" in name for name in narrow) == (shape == "tiny-moe")
    assert not any(
        "in_proj_a" in name or "embed" in name or "conv" in name or name.endswith("gate.weight") for name in narrow
    )
    held = {check.name: check for check in checks.near_stock("x", ours, stock)}
    apart = held["1 - cosine of the pack's gradients to 16 bits"]
    assert held["document losses against 16 bits"].ok
    assert 1e-4 < apart.figure < 1e-2 if base == "fp8-products" else apart.ok and apart.figure < 1e-6


def test_every_model_has_a_config() -> None:
    for shape in SHAPES.values():
        assert shape.config(4).num_hidden_layers == 4
    with pytest.raises(ValueError, match="at least 4 layers"):
        SHAPES["qwen3.5-2b"].config(3)


def test_adapters_on_experts_are_fused_in_ours() -> None:
    model = build_model(SHAPES["tiny-moe"], CPU, dtype=torch.float32)
    system = System(Setting("deltatune", "none", "experts", "auto"), model, backend="none")
    assert system.prepared is not None
    rows = {row.reason: row.layers for row in system.prepared.report.lora_rows if row.mode == "fused"}
    assert rows == {"adapters of all experts in the grouped products": 4}


def test_adapters_have_the_same_values_in_every_system() -> None:
    values = []
    for lora in ("stock", "auto"):
        model = build_model(SHAPES["tiny"], CPU, dtype=torch.float32)
        system = System(Setting("deltatune", "none", "qkvo", lora), model, backend="none")
        values.append(dict(adapters(system.model)))
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def test_a_step_leaves_adapters_as_they_are() -> None:
    system = System(Setting("deltatune", "none", "qkvo", "auto"), build_model(SHAPES["tiny"], CPU), backend="none")
    before = {name: p.detach().clone() for name, p in adapters(system.model)}
    system.step(Packs((5, 20), 96).batch(0))
    assert system.first_step_seconds > 0
    assert all(torch.equal(p, before[name]) for name, p in adapters(system.model))


def test_documents_that_leak_are_found(tmp_path) -> None:
    """The checks are no formality: stock as shipped does not pass them."""
    packs, found = Packs((70, 5, 90), 96), {}
    for name in ("reference", "stock", "stock as shipped"):
        model = build_model(SHAPES["tiny"], CPU, dtype=torch.float32)
        scope = vars(__import__(type(model).__module__, fromlist=["x"]))
        before = dict(scope)
        found[name] = checks.observe(System(Setting(name), model), packs)
        scope.update(before)
    assert all(check.ok for check in checks.against_truth("x", found["stock"], found["stock"], found["reference"]))
    leaks = checks.against_truth("x", found["stock as shipped"], found["stock"], found["reference"])
    assert not any(check.ok for check in leaks)


def only_record(folder) -> dict:
    paths = list(folder.iterdir())
    assert len(paths) == 1, paths
    return json.loads(paths[0].read_text(encoding="utf-8"))


def small(*more: str, output) -> list[str]:
    fixed = ["--model", "tiny", "--device", "cpu", "--tokens", "192", "--dtype", "float32", "--backend", "none"]
    return [*fixed, "--warmup", "1", "--steps", "2", "--output", str(output), *more]


class Forked:
    """``subprocess.Popen`` of a worker that has its imports; ``test_two_trees_take_turns`` starts one as it is."""

    def __init__(self, command, *, stdout, stderr, env) -> None:
        assert command[:3] == [sys.executable, "-m", "benchmarks.worker"]
        self.process = FORKED.Process(target=run_worker, args=(command[3:], stdout.name, env))
        self.process.start()

    def poll(self) -> int | None:
        return self.returncode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> None:
        self.process.join()


def run_worker(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with Path(log).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(worker.main(arguments))


@pytest.fixture
def forked(monkeypatch) -> None:
    """Workers that have their imports, and rates that are measured here."""
    monkeypatch.setattr(session, "subprocess", types.SimpleNamespace(Popen=Forked))
    monkeypatch.setattr(session.Session, "_ceilings", lambda self: timing.ceilings(CPU, torch.float32))


@pytest.mark.slow
def test_training_steps_make_a_record(forked, tmp_path, capsys) -> None:
    options = ["--baselines", "stock", "stock liger", "--checkpointing", "layer", "0.5"]
    # Liger is missing or has nothing to run on, and a share needs compile: both say so, and the rest is timed
    assert train.main(small(*options, output=tmp_path)) == 1
    record = only_record(tmp_path)
    results = {r["name"]: r for r in record["configs"][0]["results"]}
    assert list(results) == [
        "stock layer qkvo", "stock liger layer qkvo", "deltatune layer qkvo auto", "deltatune 0.5 qkvo auto"
    ]  # fmt: skip
    ours = results["deltatune layer qkvo auto"]
    assert ours["status"] == results["stock layer qkvo"]["status"] == "ok"
    assert len(ours["samples_ms"]) == 2
    assert results["deltatune 0.5 qkvo auto"]["status"] == "unavailable"
    config = record["configs"][0]
    assert all(check["ok"] for check in config["checks"])
    assert {"verify", "adapter gradients against float32"} <= {check["name"] for check in config["checks"]}
    assert config["roofline"]["qkvo"]["total_ms"] > 0
    assert str(tmp_path) not in json.dumps(record)
    assert "deltatune layer qkvo auto" in capsys.readouterr().out


def test_when_time_is_up_what_was_measured_is_kept(forked, tmp_path) -> None:
    assert train.main(small("--no-checks", "--limit-s", "0", output=tmp_path)) == 1
    results = only_record(tmp_path)["configs"][0]["results"]
    assert {(r["status"], r["reason"]) for r in results} == {("not run", "time was up")}


@pytest.mark.slow
def test_two_trees_take_turns(tmp_path, capsys, monkeypatch) -> None:
    """The first worker and what measures rates are started as they are."""
    src = str(compare.Path(compare.__file__).parents[1] / "src")
    first_on_path = []

    def start(*args, env, **options):
        first_on_path.append(env["PYTHONPATH"].split(os.pathsep)[0])
        return (subprocess.Popen if len(first_on_path) == 1 else Forked)(*args, env=env, **options)

    monkeypatch.setattr(session, "subprocess", types.SimpleNamespace(Popen=start, run=subprocess.run))
    options = ["--before", src, "--after", src, "--no-checks", "--checkpointing", "none", "--rounds", "1", "--profile"]
    assert compare.main(small(*options, output=tmp_path)) == 0
    record = only_record(tmp_path)
    config = record["configs"][0]
    assert first_on_path == [src, src]
    assert record["method"].endswith(session.UNCHECKED)
    assert [r["label"] for r in config["results"]] == ["before", "after"]
    assert [len(r["samples_ms"]) for r in config["results"]] == [2, 2]
    (ratio,) = config["ratios"]
    medians = [r["median_ms"] for r in config["results"]]
    assert ratio["ratio"] == pytest.approx(medians[1] / medians[0])
    assert ratio["by_round"] == [pytest.approx(ratio["ratio"])]
    before, after = (sum(kernel["ms"] for kernel in r["kernels_of_a_step"]) for r in config["results"])
    assert ratio["ratio_of_kernels"] == pytest.approx(after / before)
    assert config["sources"]["before"] == config["sources"]["after"]
    assert config["roofline"]["qkvo"]["total_ms"] > 0
    assert "after / before" in capsys.readouterr().out


def test_a_folder_without_deltatune_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--before", str(tmp_path)])
    assert "expected a folder that holds deltatune/" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "named"), [(["--model", "qwen9"], "qwen9"), (["--model", "tiny:3"], "at least 4")])
def test_what_cannot_be_measured_ends_at_once(more, named, tmp_path) -> None:
    with pytest.raises(SystemExit, match=named):
        train.main([*more, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


RUN = op_cases.Run(CPU)


@pytest.fixture
def traced(monkeypatch) -> None:
    """What is compiled is traced and differentiated, without C++."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("op", ["gated_delta_rule", "linear_cross_entropy"])
def test_an_op_makes_a_record(op, traced, tmp_path) -> None:
    options = ["--op", op, "--shape", "tiny", "--tokens", "130", "--seconds", "0.01", "--device", "cpu"]
    assert ops.main([*options, "--output", str(tmp_path)]) == 0
    record = only_record(tmp_path)
    config = record["configs"][0]
    assert config["auto"] == "reference"
    timed = [r for r in config["results"] if r.get("median_ms")]
    assert {"reference"} <= {r["impl"] for r in timed}
    assert all(r["bound_ms"] > 0 and r["of_bound"] > 0 for r in timed)
    assert next(r for r in config["results"] if r["by"] == "library")["status"] == "unavailable"


def test_a_wrong_answer_of_ours_is_not_timed(monkeypatch) -> None:
    case = op_cases.causal_conv(SHAPES["tiny"], 130, RUN)
    right = case.variants["reference"].build()
    wrong = {"wrong": op_cases.Variant("deltatune", lambda: lambda t: 1.05 * right(t))}
    case = op_cases.Case(**{**vars(case), "variants": {"reference": case.variants["reference"], **wrong}})
    results = ops.measure_case(case, RUN, seconds=0.01)["results"]
    assert {r["status"] for r in results if r["impl"] == "wrong"} == {"red check"}
    assert not any("median_ms" in r for r in results if r["impl"] == "wrong")


def test_the_delta_rule_may_round_its_operands() -> None:
    """Matrix units take 16 bits: the budget is that of products with rounded operands, through the opaque op."""
    case = op_cases.gated_delta_rule(SHAPES["tiny"], 130, RUN)
    found = ops.measure_case(case, RUN, seconds=0.01)
    assert found["error_budget"]["dg"] > 100 * found["errors"]["reference"]["dg"]


def test_a_round_that_time_did_not_reach_loses_no_other() -> None:
    first = {"name": "a", "status": "ok", "reason": None, "median_ms": 2.0, "samples_ms": [2.0], "peak_bytes": 5}
    late = {"name": "a", "status": "not run", "reason": "time was up"}
    found = session.merged("before", [first, late], tokens=4)
    assert (found["status"], found["median_ms"], found["rounds"], found["label"]) == ("ok", 2.0, 1, "before")
    assert session.merged("", [late], tokens=4)["status"] == "not run"
    assert session.merged("", [first, late | {"status": "failed"}], tokens=4)["status"] == "failed"


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "gpt_oss"])
def test_experts_of_a_mixture_are_measured_beside_the_stock_ones(model_type, traced) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 8}
    values = {**SHAPES["tiny"].values, **experts, "shared_expert_intermediate_size": 8, "intermediate_size": 32}
    if model_type == "gpt_oss":
        del values["rope_parameters"]
    shape = replace(SHAPES["tiny"], model_type=model_type, values=values, hybrid=model_type != "gpt_oss")
    case = op_cases.moe_experts(shape, 50, RUN, rank=8, busiest=2)
    inputs = case.draw(1)
    assert int(inputs["index"].flatten().bincount(minlength=8).argmax()) == 0
    found = ops.measure_case(case, RUN, seconds=0.01)
    status = {r["impl"]: r["status"] for r in found["results"]}
    assert {status.pop(name) for name in ("torch", "triton", "quack", "quack's products")} == {"unavailable"}
    assert set(status.values()) == {"ok"}, found["results"]
    assert {"reference", "stock + PEFT target_parameters", "separate grouped products, compiled"} == set(status)
    assert "stock grouped_mm, compiled" in op_cases.moe_experts(shape, 50, RUN).variants


def test_products_of_experts_make_a_record(monkeypatch, tmp_path, capsys) -> None:
    """Of tiles the fastest is kept; what is not installed is said, and a wrong answer is red."""
    one = torch.ones(8, 8)

    def absent(_: int) -> torch.Tensor:
        raise ImportError("No module named 'quack'")

    calls = {"torch": lambda _: one, "quack": absent, "default": lambda _: one, "(64, 64)": lambda _: one.clone()}
    calls["(64, 128)"] = lambda _: (time.sleep(0.01), one)[1]
    shown: list[bool] = []

    def problems(sizes, tokens, run, *, busiest, tiled):
        shown.append(tiled)
        yield "up forward", 1e6, calls, one

    monkeypatch.setattr(tune_grouped, "problems", problems)
    options = ["--model", "qwen3.5-35b-a3b", "--tokens", "64", "--device", "cpu", "--output", str(tmp_path)]
    assert tune_grouped.main([*options, "--commit", "abc"]) == 0
    (path,) = tmp_path.glob("products-qwen3.5-35b-a3b-cpu-*.json")
    (config,) = json.loads(path.read_text(encoding="utf-8"))["configs"]
    assert config["config"]["product"] == "up forward"
    found = {result["impl"]: result for result in config["results"]}
    assert set(found) == {"torch", "quack", "default", "(64, 64)"}
    assert (found["quack"]["status"], found["quack"]["reason"]) == (
        "unavailable",
        "ImportError: No module named 'quack'",
    )
    assert found["default"]["error"] == 0
    assert found["default"]["tflops"] == pytest.approx(1e6 / found["default"]["median_ms"] / 1e9)
    assert "unavailable: ImportError" in capsys.readouterr().out
    assert tables.main([str(path)]) == 0
    assert "up forward" in capsys.readouterr().out
    calls["default"] = lambda _: one * 2
    assert tune_grouped.main([*options, "--no-tiles"]) == 1
    assert shown == [True, False]


def test_the_gate_of_an_mlp_with_adapters_is_measured_beside_pefts(traced) -> None:
    case = op_cases.gated_activation_lora(SHAPES["tiny"], 50, RUN, rank=8)
    found = ops.measure_case(case, RUN, seconds=0.01)
    status = {r["impl"]: r["status"] for r in found["results"]}
    assert status.pop("triton") == "unavailable"
    assert set(status.values()) == {"ok"}, found["results"]
    assert {"PEFT's layers, compiled", "separate products, compiled", "torch.compile(reference)"} < set(status)
    assert found["auto"] == "reference"


def test_decodes_are_of_the_matrices_of_an_mlp() -> None:
    entry = op_cases.CASES["dequantize_nf4"]
    assert {name: decode_cases.matrices(SHAPES[name]) for name in entry.shapes} == {
        "qwen3.5-35b-a3b": {"up": (256, 1024, 2048), "down": (256, 2048, 512)},
        "gpt-oss-20b": {"up": (32, 5760, 2880), "down": (32, 2880, 2880)},
        "qwen3.5-9b": {"up": (24576, 4096), "down": (4096, 12288)},
    }


@pytest.mark.parametrize(
    ("format", "name"),
    [("nf4", "tiny"), ("nf4", "tiny-moe"), ("fp8", "tiny"), ("mxfp4", "tiny-moe"), ("nvfp4", "tiny")],
)
def test_decodes_are_measured_without_a_backward(format, name, traced) -> None:
    torch.compiler.reset()
    case = op_cases.dequantize(SHAPES[name], 50, RUN, format=format)
    found = ops.measure_case(case, RUN, seconds=0.01)
    status = {r["impl"]: r["status"] for r in found["results"]}
    assert status.pop("triton") == "unavailable"
    assert status.pop("bitsandbytes", "unavailable") == "unavailable"
    assert status == {"reference": "ok", "torch.compile(reference)": "ok"}, found["results"]
    assert {r["what"] for r in found["results"]} == {"forward"}
    values = 3 * 64 * 96 if name == "tiny" else 8 * 3 * 64 * 32
    read = sum(x.nbytes for x in case.draw(1).values())
    assert values * (1 if format == "fp8" else 0.5) < read
    assert {r["bound_bytes"] for r in found["results"] if "median_ms" in r} == {read + 2 * values}
    assert (found["error_budget"]["up"] == 0) == (format == "mxfp4")  # exact in bf16
