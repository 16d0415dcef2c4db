"""The whole flow on a tiny model: gates, timing, floor, profile, record."""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatune.bench import child, gates, judge, session
from deltatune.bench.child import COMPILED, in_child
from deltatune.bench.kernels import GROUPS, NARROW, WIDE, group_of, op_of, part_of
from deltatune.bench.race import Laps, race
from deltatune.bench.shapes import SHAPES, build_model
from deltatune.bench.systems import Adapters, Setting, build_system
from deltatune.bench.train import add_arguments, plan_of, run
from deltatune.bench.workload import Workload
from deltatune.errors import UserError

TINY = (
    "--model tiny --tokens 160 --shortest 20 --longest 60 --steps 2 --rounds 2 --warmup 1 --rank 4 --alpha 8 "
    "--device cpu --backend none --seed 3"
)


def arguments(more: str, folder: Path | str = "unused") -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [*TINY.split(), "--records", str(folder), *more.split()]
    return parser.parse_args(words, argparse.Namespace(argv=["deltatune", "bench", "train", *words]))


def test_every_option_says_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for action in parser._actions[1:]:
        default = " ".join(action.default) if isinstance(action.default, list) else action.default
        said = action.help % {"default": default}
        if action.dest == "baselines":
            assert all(name in said for name in action.default)
        elif action.default in (None, False):
            assert "by default" in said, action.dest
        else:
            assert f"{default}" in said, action.dest
            assert "by default" in said, action.dest


def record_of(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_a_run_writes_one_record(tmp_path, capsys) -> None:
    assert run(arguments("--kernels --baselines stock --targets qkvo all", tmp_path)) == 0
    record = record_of(tmp_path)
    (config,) = record["configs"]
    results = {result["name"]: result for result in config["results"]}
    assert record["ok"] is True
    assert list(results) == [
        "stock layer qkvo",
        "stock none qkvo",
        "deltatune none qkvo auto",
        "deltatune layer qkvo auto",
        "deltatune none all auto",
        "deltatune layer all auto",
    ]
    assert all(result["status"] == "ok" and len(result["samples_ms"]) == 2 for result in results.values())
    best = results["deltatune none qkvo auto"]
    assert best["tokens_per_second"] == pytest.approx(160 / best["median_ms"] * 1e3)
    assert best["of_floor"] == pytest.approx(config["floor"]["total_ms"] / best["median_ms"])
    assert results["deltatune none all auto"]["of_floor"] is None
    assert best["peak_bytes"] is None
    assert best["kernels"]["gated_delta_rule"] == "reference"
    assert {gate["subject"] for gate in config["gates"]} >= {"stock layer qkvo", "deltatune layer all auto"}
    assert [table["targets"] for table in config["kernels"]] == ["qkvo", "all"]
    for table in config["kernels"]:
        ours = [r for r in results.values() if r["system"] == "deltatune" and r["targets"] == table["targets"]]
        fastest = min(ours, key=lambda result: result["median_ms"])
        assert (table["name"], table["step_ms"]) == (fastest["name"], fastest["median_ms"])
        assert any(group["floor_ms"] for group in table["groups"]) == (table["targets"] == "qkvo")
    assert capsys.readouterr().out.strip().endswith(".json")


def test_a_red_gate_is_not_timed_and_fails_the_run(tmp_path, monkeypatch, capsys) -> None:
    real = judge.observe

    def corrupted(system, batch, documents):
        found = real(system, batch, documents)
        if system.prepared is None:
            return found
        wrong = {name: -grad for name, grad in found.whole.items()}
        return gates.Observation(found.token_losses, found.losses, found.gradients, wrong)

    monkeypatch.setattr(judge, "observe", corrupted)
    assert run(arguments("--no-floor --baselines stock --checkpointing none", tmp_path)) == 1
    record = record_of(tmp_path)
    results = {result["name"]: result for result in record["configs"][0]["results"]}
    assert record["ok"] is False
    assert results["stock none qkvo"]["status"] == "ok"
    assert results["deltatune none qkvo auto"]["status"] == "red gate"
    assert "samples_ms" not in results["deltatune none qkvo auto"]
    assert "RED deltatune none qkvo auto" in capsys.readouterr().out


def test_a_leak_closes_every_setting_of_the_same_modules(tmp_path, monkeypatch) -> None:
    real = judge.leak_gate

    def ours_leaks(system):
        return real(system) if system.prepared is None else gates.Gate("verify", system.setting.name, False, 1.0, 0.0)

    monkeypatch.setattr(judge, "leak_gate", ours_leaks)
    assert run(arguments("--no-floor --baselines stock --checkpointing none layer", tmp_path)) == 1
    results = {result["name"]: result["status"] for result in record_of(tmp_path)["configs"][0]["results"]}
    assert results["deltatune none qkvo auto"] == results["deltatune layer qkvo auto"] == "red gate"


def test_graphs_that_keep_old_adapters_are_not_timed(tmp_path, monkeypatch) -> None:
    from deltatune.lora.group import LoraGroup

    monkeypatch.setattr(LoraGroup, "sync", _once(LoraGroup.sync))
    options = "--no-floor --baselines stock --checkpointing none --lora fused --backend aot_eager --dtype bfloat16"
    assert run(arguments(options, tmp_path)) == 1
    record = record_of(tmp_path)
    red = {gate["name"] for gate in record["configs"][0]["gates"] if not gate["ok"]}
    assert any("adapters turned" in name for name in red)


def test_graphs_that_keep_an_old_b_are_not_timed(tmp_path, monkeypatch) -> None:
    from deltatune.lora.group import LoraGroup

    sync, kept = LoraGroup.sync, {}

    def keep_b(group):
        sync(group)
        if group.operands is None or group.layers[0]._deltatune.compile is None:
            return
        with torch.no_grad():
            for place, old in zip(group.operands.up, kept.setdefault(id(group), _copies(group)), strict=True):
                place.data.copy_(old)

    monkeypatch.setattr(LoraGroup, "sync", keep_b)
    options = "--no-floor --baselines stock --checkpointing none --lora fused --backend aot_eager --dtype bfloat16"
    assert run(arguments(options, tmp_path)) == 1
    red = {gate["name"] for gate in record_of(tmp_path)["configs"][0]["gates"] if not gate["ok"]}
    assert red
    assert all("adapters turned" in name for name in red)


def _copies(group):
    return [place.detach().clone() for place in group.operands.up]


def test_a_floor_that_does_not_fit_leaves_the_times(tmp_path, monkeypatch) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(session, "arithmetic_floor", too_large)
    assert run(arguments("--baselines stock --checkpointing none --backend none", tmp_path)) == 0
    config = record_of(tmp_path)["configs"][0]
    assert config["floor"] is None
    assert config["floor_failure"] == "out_of_memory: no room"
    assert {result["status"] for result in config["results"]} == {"ok"}


def test_a_profile_that_does_not_fit_leaves_the_times(tmp_path, monkeypatch) -> None:
    profiled = []

    def too_large_at_first(step: Any, *_: object, **__: object) -> dict[str, Any]:
        profiled.append(step)
        if len(profiled) == 1:
            raise torch.OutOfMemoryError("no room")
        return {"busy_ms": 1.0, "groups": [], "rows": []}

    monkeypatch.setattr(session, "kernel_table", too_large_at_first)
    assert run(arguments("--no-floor --kernels all --baselines stock --checkpointing none layer", tmp_path)) == 0
    config = record_of(tmp_path)["configs"][0]
    assert [table["name"] for table in config["kernels"]] == ["deltatune layer qkvo auto"]
    assert config["kernels_failure"] == {"deltatune none qkvo auto": "out_of_memory: no room"}
    assert {result["status"] for result in config["results"]} == {"ok"}


def test_graphs_made_again_are_a_red_gate_with_the_reason(tmp_path, monkeypatch) -> None:
    from deltatune.compile.graphs import Graphs

    once = Graphs._backend

    def again(self, name, code, *args, **kwargs):
        compiled = once(self, name, code, *args, **kwargs)
        self.report.recompiles.append(f"{name}: another stride")
        return compiled

    monkeypatch.setattr(Graphs, "_backend", again)
    options = "--no-floor --baselines stock --checkpointing none --backend aot_eager"
    assert run(arguments(options, tmp_path)) == 1
    config = record_of(tmp_path)["configs"][0]
    (red,) = (gate for gate in config["gates"] if not gate["ok"])
    assert red["name"] == session.WHOLE_GATE
    assert "another stride" in red["detail"]
    assert config["results"][-1]["status"] == "ok"


def _once(sync):
    """Brings operands in step the first time, and eager layers always: what a hook that went missing would do."""
    seen = set()

    def run_once(group):
        if id(group) not in seen or group.layers[0]._deltatune.compile is None:
            seen.add(id(group))
            sync(group)

    return run_once


def test_a_stock_path_that_fails_its_gates_stops_everything(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(judge, "leak_gate", lambda system: gates.Gate("verify", "stock", False, 1.0, 0.0))
    assert run(arguments("--no-floor --baselines stock", tmp_path)) == 1
    assert {result["status"] for result in record_of(tmp_path)["configs"][0]["results"]} == {"red gate"}


def test_a_truth_that_does_not_fit_leaves_a_record_that_says_so(tmp_path, monkeypatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("needs more than there is")

    monkeypatch.setattr(judge, "truth", too_large)
    assert run(arguments("--no-floor --baselines stock --cold-start", tmp_path)) == 1
    config = record_of(tmp_path)["configs"][0]
    assert {result["status"] for result in config["results"]} == {"red gate"}
    assert [gate["detail"] for gate in config["gates"]] == ["out_of_memory: needs more than there is"]


def test_a_system_whose_gates_break_down_loses_only_its_own(tmp_path, monkeypatch) -> None:
    real = judge.observe

    def breaks(system, batch, documents):
        if system.setting.checkpointing == "layer" and system.prepared is not None:
            raise KeyError("no such kernel")
        return real(system, batch, documents)

    monkeypatch.setattr(judge, "observe", breaks)
    args = arguments("--no-floor --checkpointing none layer", tmp_path)
    args.baselines = []
    assert run(args) == 0
    status = {result["name"]: result["status"] for result in record_of(tmp_path)["configs"][0]["results"]}
    assert status == {"deltatune layer qkvo auto": "failed", "deltatune none qkvo auto": "ok"}


def test_shipped_stock_is_timed_and_marked_as_leaking(tmp_path) -> None:
    args = arguments("--no-floor --checkpointing none", tmp_path)
    args.baselines = ["stock as shipped"]
    assert run(args) == 0
    results = {result["name"]: result for result in record_of(tmp_path)["configs"][0]["results"]}
    assert results["stock as shipped none qkvo"]["leak_free"] is False
    assert results["stock as shipped none qkvo"]["status"] == "ok"
    assert results["deltatune none qkvo auto"]["leak_free"] is True


def test_what_cannot_be_built_is_recorded_with_its_reason(tmp_path) -> None:
    args = arguments("--no-floor --checkpointing 0.5", tmp_path)
    args.baselines = ["stock"]
    assert run(args) == 0
    result = record_of(tmp_path)["configs"][0]["results"][0]
    assert result["name"] == "deltatune 0.5 qkvo auto"
    assert result["status"] == "unavailable"
    assert "needs compile" in result["reason"]


def test_the_frontier_sweeps_checkpointing() -> None:
    plan = plan_of(arguments("--frontier --backend aot_eager"))
    taken = [setting.checkpointing for setting in plan.settings if setting.system == "deltatune"]
    assert len(taken) == len(set(taken)) >= 7
    assert {"none", "layer", "auto"} < set(taken)


def test_the_frontier_sweeps_the_first_targets_alone() -> None:
    plan = plan_of(arguments("--frontier --targets qkvo all --checkpointing layer --backend aot_eager"))
    assert [s.checkpointing for s in plan.settings if s.targets == "all"] == ["layer"]


def test_settings_that_cannot_act_are_refused() -> None:
    with pytest.raises(UserError, match="half"):
        plan_of(arguments("--checkpointing half"))
    with pytest.raises(UserError, match="a share from 0 to 1, got '2'"):
        plan_of(arguments("--checkpointing 2"))
    with pytest.raises(UserError, match="--device banana cannot be used here"):
        plan_of(arguments("--device banana"))
    with pytest.raises(UserError, match="at least 1"):
        plan_of(arguments("--rounds 0"))


def test_one_document_fills_the_batch() -> None:
    assert plan_of(arguments("--one-document")).lengths == (160,)


def test_systems_take_turns_and_a_failure_loses_only_its_own() -> None:
    base = build_model(SHAPES["tiny"], torch.device("cpu"), dtype=torch.float32)
    systems = {name: build_system(Setting("stock"), base, Adapters(rank=4), seed=0) for name in ("good", "bad")}

    def fails(batch: object) -> None:
        raise RuntimeError("no such kernel")

    systems["bad"].step = fails  # type: ignore[method-assign]
    laps = race(systems, Workload((30, 18), base.config.vocab_size), warmup=1, steps=4, rounds=2)
    assert len(laps["good"].samples_ms) == 4
    assert laps["bad"] == Laps([], 0, ("failed", "RuntimeError: no such kernel"))


def test_an_interrupt_keeps_the_samples_that_there_are(tmp_path, monkeypatch) -> None:
    def stopped(systems, workload, laps, **_):
        race({name: systems[name] for name in list(systems)[:1]}, workload, laps, warmup=1, steps=2, rounds=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "race", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(arguments("--no-floor --baselines stock --checkpointing none --backend none", tmp_path))
    assert record_of(tmp_path)["interrupted"] is True
    first, *others = record_of(tmp_path)["configs"][0]["results"]
    assert (first["status"], len(first["samples_ms"])) == ("ok", 2)
    assert {(r["status"], r["reason"]) for r in others} == {("interrupted", "before its first timed step")}


def test_a_step_trains_nothing_away_and_leaves_no_gradient() -> None:
    base = build_model(SHAPES["tiny"], torch.device("cpu"), dtype=torch.float32)
    system = build_system(Setting("stock"), base, Adapters(rank=4))
    before = {name: p.detach().clone() for name, p in system.model.named_parameters()}
    system.step(Workload((30, 18), base.config.vocab_size).batch(0))
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in system.model.named_parameters())
    assert system.static_bytes() > 0


SPEC = {
    "model": "tiny", "layers": 4, "lengths": [30, 18], "seed": 0, "dtype": "float32", "device": "cpu", "rank": 4,
    "alpha": 8, "adapter_dtype": "float32", "backend": "none", "bound": 1e-3, "warmup": 1, "steps": 2,
}  # fmt: skip


def test_a_compilation_that_takes_too_long_is_recorded_as_such() -> None:
    found = in_child(Setting(COMPILED), SPEC, limit_seconds=0.1)
    assert found == {"status": "timeout", "reason": "no first step after 0 s"}


def test_a_child_says_why_it_could_not_run() -> None:
    found = in_child(Setting(COMPILED), SPEC | {"model": "no-such-model"}, limit_seconds=120)
    assert found["status"] == "unavailable"
    assert "no-such-model" in found["reason"]


def test_a_child_that_dies_leaves_its_exit_status(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    found = in_child(Setting(COMPILED), SPEC, limit_seconds=120)
    assert found == {"status": "failed", "reason": "exit status 1"}


def test_a_child_times_its_system(tmp_path) -> None:
    found = in_child(Setting("deltatune"), SPEC, limit_seconds=120, graph_cache=tmp_path)
    assert found["status"] == "ok"
    assert len(found["samples_ms"]) == 2
    assert found["first_step_seconds"] > 0
    assert found["gradient_distance"] == 0


def test_a_child_whose_gradients_are_off_is_not_timed() -> None:
    found = in_child(Setting("deltatune"), SPEC | {"bound": -1.0}, limit_seconds=120)
    assert found["status"] == "red gate"
    assert "samples_ms" not in found


# the first call is that of the uncompiled layers, the second that of the graphs
@pytest.mark.parametrize(("wrong", "status"), [((), "ok"), ((2,), "red gate"), ((1, 2), "red gate")])
def test_a_child_without_a_bound_measures_one(tmp_path, monkeypatch, wrong: tuple[int, ...], status: str) -> None:
    right, calls = child.loss_and_gradients, []

    def gradients(system, batch):
        loss, found = right(system, batch)
        calls.append(system.setting.system)
        return loss, {name: value * (1.5 if len(calls) in wrong else 1.0) for name, value in found.items()}

    monkeypatch.setattr(child, "loss_and_gradients", gradients)
    spec = SPEC | {"bound": None, "setting": asdict(Setting("deltatune"))}
    (tmp_path / "spec").write_text(json.dumps(spec))
    assert child.main([str(tmp_path / "spec"), str(tmp_path / "result")]) == 0
    found = json.loads((tmp_path / "result").read_text())
    assert calls == ["deltatune", "deltatune", "stock"]
    assert (0 < found["gradient_bound"] < 0.1) == (1 not in wrong)
    assert found["status"] == status


def test_a_cold_start_is_two_more_results(tmp_path) -> None:
    args = arguments("--no-floor --cold-start --checkpointing none", tmp_path)
    args.baselines = []
    assert run(args) == 0
    results = record_of(tmp_path)["configs"][0]["results"]
    name = "deltatune none qkvo auto"
    assert [result["name"] for result in results] == [name, f"{name}, caches cold", f"{name}, caches warm"]
    assert [result.get("caches") for result in results] == [None, "cold", "warm"]
    assert {result["status"] for result in results} == {"ok"}


def test_a_cold_start_of_another_depth_is_a_configuration_of_its_own(tmp_path) -> None:
    args = arguments("--no-floor --cold-start 8 --checkpointing none", tmp_path)
    args.baselines = []
    assert run(args) == 0
    first, second = record_of(tmp_path)["configs"]
    assert [len(config["results"]) for config in (first, second)] == [1, 2]
    assert (first["config"]["layers"], second["config"]["layers"]) == (4, 8)
    assert all(result["first_step_seconds"] > 0 for result in second["results"])


def test_adapters_inside_the_base_products_pass_the_same_gates(tmp_path) -> None:
    args = arguments("--no-floor --checkpointing none layer --lora fused stock --targets qkvo all", tmp_path)
    args.baselines = []
    assert run(args) == 0
    results = {result["name"]: result for result in record_of(tmp_path)["configs"][0]["results"]}
    assert len(results) == 8
    assert {result["status"] for result in results.values()} == {"ok"}
    assert results["deltatune none qkvo fused"]["lora_layers"] == {"fused": 4}
    assert results["deltatune none all stock"]["lora_layers"] == {"stock": 31}


def test_long_documents_are_held_to_the_truth_on_shorter_ones(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(judge, "_LONGEST_TRUTH", 100)
    args = arguments("--one-document --no-floor --checkpointing none", tmp_path)
    args.baselines = ["stock"]
    assert run(args) == 0
    config = record_of(tmp_path)["configs"][0]
    assert config["config"]["lengths"] == [160]
    assert all(result["status"] == "ok" for result in config["results"])
    against = [gate["detail"] for gate in config["gates"] if gate["name"] == "token losses against the stock path"]
    assert against == ["document 0 of 1"]


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NTT", "GEMM"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel", "attention"),
        ("causal_conv1d_fwd_kernel", "convolution"),
        ("triton_poi_fused_mul_silu_3", "norm and elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4>", "norm and elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("liger_cross_entropy_kernel", "cross-entropy"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_poi_fused__to_copy_add_constant_pad_nd_ge_mul_select_silu_1", "convolution"),
        ("void pytorch_flash::flash_bwd_convert_dq_kernel", "attention"),
        ("tilelang_fused_chunk_gdr_bwd_kernel_kernel", "delta rule"),
        ("_powers", "cross-entropy"),
        ("who knows", "other"),
    ],
)
def test_kernels_find_their_group(kernel: str, group: str) -> None:
    assert group_of(kernel) == group
    assert group in GROUPS


@pytest.mark.parametrize(
    ("kernel", "op", "group"),
    [
        ("_forward", "deltatune::causal_conv", "convolution"),
        ("_forward", "deltatune::rms_norm_rope", "norm and elementwise"),
        ("_backward", "deltatune::gated_delta_rule_backward", "delta rule"),
        ("nvjet_tst_256x128", "deltatune::linear_cross_entropy", "GEMM"),
        ("_powers", "deltatune::linear_cross_entropy", "cross-entropy"),
        ("_parts_kernel", "deltatune::lora_up_backward", "GEMM"),
        ("_write_extended", "deltatune::lora_gated_act", "norm and elementwise"),
    ],
)
def test_kernels_of_our_ops_go_by_the_op(kernel: str, op: str, group: str) -> None:
    assert group_of(kernel, op) == group


@pytest.mark.parametrize(
    ("kernel", "op", "part"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "", WIDE),
        ("nvjet_sm90_tst_64x128_64x8_1x2_h_bz_NNN", "", NARROW),
        ("nvjet_sm90_tss_192x64_64x6_2x1_v_bz_splitK_NTT", "", NARROW),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "", NARROW),
        ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN", "deltatune::lora_accumulate", WIDE),
        ("_parts", "deltatune::lora_up_backward", NARROW),
        ("_write_extended", "deltatune::lora_gated_act", "norm and elementwise"),
        ("tilelang_fused_chunk_gdr_bwd_kernel_kernel", "", "delta rule"),
    ],
)
def test_products_are_wide_or_narrow_by_their_tiles(kernel: str, op: str, part: str) -> None:
    assert part_of(kernel, op) == part


@pytest.mark.parametrize(
    ("event", "op"),
    [
        ("deltatune::rms_norm_rope", "deltatune::rms_norm_rope"),
        ("GeneratedBackwardFor_deltatune_rms_norm_rope_default", "deltatune::rms_norm_rope"),
        ("aten::mm", ""),
    ],
)
def test_events_of_our_ops(event: str, op: str) -> None:
    assert op_of(event) == op


def test_the_profiler_names_a_differentiated_op_as_is_looked_for() -> None:
    function = torch.library.custom_op(
        "deltatune::doubled_for_a_test", lambda x: 2 * x, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    function.register_autograd(lambda _, grad: 2 * grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function(torch.ones(2, requires_grad=True))
    names = {event.name for event in profiler.events() if "doubled_for_a_test" in event.name}
    assert len(names) == 2
    assert {op_of(name) for name in names} == {"deltatune::doubled_for_a_test"}
