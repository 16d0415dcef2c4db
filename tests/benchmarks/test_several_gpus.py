"""Steps on several ranks: every system on two of a CPU up to its record, ranks that fail, and figures of records."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tables, targets
from benchmarks.parallel import __main__ as several
from benchmarks.parallel import checks, launch, measuring, systems, worker
from benchmarks.parallel.meeting import Meeting
from benchmarks.parallel.spec import CHECK, Item, Spec
from benchmarks.records import Record
from forked import FORKED, settle

CPU = torch.device("cpu")
SYSTEMS = ("ddp-lora", "fsdp-full", "fsdp-lora", "sequence", "sequence-state", "sequence-cut", "sequence-whole")
OF_EXPERTS = ("fsdp-experts", "expert", "expert-shard", "sequence-expert")


class Forked:
    """``subprocess.Popen`` of a rank that has its imports, and the fault that a test wants of it."""

    fault = ""

    def __init__(self, command: list[str], *, stdout: Any, stderr: Any, env: dict[str, str], **_: Any) -> None:
        assert command[1:5] == ["-X", "faulthandler", "-m", "benchmarks.parallel.worker"]
        self._process = FORKED.Process(target=run_rank, args=(command[5:], stdout.name, env, self.fault))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self) -> None:
        self._process.kill()
        self._process.join()


def run_rank(arguments: list[str], log: str, environment: dict[str, str], fault: str) -> None:
    os.setsid()
    os.environ.update(environment)
    with Path(log).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    settle()
    if fault == "hangs":
        time.sleep(600)
    if fault == "divides nothing":
        alone = systems.SYSTEMS["ddp-lora"]
        object.__setattr__(alone, "divide", alone.alone)
    if fault in ("raises", "dies"):
        worker.measured = failing(worker.measured, fault)
    if fault == "little room":
        divided_with = systems.parallelize
        systems.parallelize = lambda *args, **kwargs: divided_with(*args, **kwargs, expert_capacity=1.0)
    sys.exit(worker.main(arguments))


def failing(measured: Any, fault: str) -> Any:
    """Rank 1 fails in the first system on two ranks, where rank 0 waits for it."""

    def fails(spec: Spec, item: Item, device: torch.device, meeting: Meeting, say: Any) -> Any:
        if item.system == "ddp-lora" and item.gpus > 1 and meeting.rank == 1:
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no luck")
        return measured(spec, item, device, meeting, say)

    return fails


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> type[Forked]:
    monkeypatch.setattr(launch, "subprocess", types.SimpleNamespace(Popen=Forked))
    monkeypatch.setattr(Forked, "fault", "")
    return Forked


def small(output: Path, *more: str) -> list[str]:
    fixed = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--backend", "none", "--warmup", "1"]
    sizes = ["--tokens", "128", "--documents", "512", "--check-tokens", "128", "--steps", "2"]
    return [*fixed, *sizes, "--output", str(output), *more]


def record_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def results_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {" ".join(filter(None, (r["name"], r.get("label")))): r for r in record["configs"][0]["results"]}


@pytest.mark.slow
def test_every_system_on_two_ranks_makes_a_record(forked: type[Forked], tmp_path: Path, capsys: Any) -> None:
    assert several.main(small(tmp_path, "--gpus", "1", "2")) == 0
    record = record_in(tmp_path)
    results = results_of(record)
    sizes = {name: 512 if name.startswith("sequence") else 128 for name in SYSTEMS}
    assert list(results) == [f"{name} {sizes[name]} on {gpus}" for name in SYSTEMS for gpus in (1, 2)]
    config = record["configs"][0]
    names = [check["name"] for check in config["checks"]]
    assert record["ok"]
    assert names.count("gradient of each weight") == names.count("gradient norm of the timed step") == len(SYSTEMS)
    for name, r in results.items():
        assert len(r["samples_ms"]) == 2, name
        assert r["first_step_seconds"] > 0
    # what each divides is divided: no system passes because it quietly replicates
    told = {name: results[f"{name} {sizes[name]} on 2"]["communication_ms_by_rank"][0].keys() for name in SYSTEMS}
    assert "all-reduce" in told["ddp-lora"]
    assert "all-gather" not in told["ddp-lora"]
    assert {"all-gather", "reduce-scatter"} <= told["fsdp-full"] & told["fsdp-lora"]
    assert {"all-to-all", "all-reduce"} <= told["sequence"] & told["sequence-state"] & told["sequence-cut"]
    assert "all-to-all" not in told["sequence-whole"]
    assert "all-reduce" in told["sequence-whole"]
    assert "all-gather" in told["sequence-state"]
    assert "all-gather" not in told["sequence"]
    # what moves a pack is the exchange, what gathers weights is not
    moves = dict.fromkeys(("sequence", "sequence-cut"), ("all-to-all",))
    moves["sequence-state"] = ("all-to-all", "all-gather")
    for name in SYSTEMS:
        r = results[f"{name} {sizes[name]} on 2"]
        by_rank = [sum(ms[kind] for kind in moves.get(name, ())) for ms in r["communication_ms_by_rank"]]
        assert r["exchange_ms"] == sum(by_rank) / 2, name
    assert results["sequence 512 on 2"]["tokens_per_step"] == 512
    assert results["ddp-lora 128 on 2"]["tokens_per_step"] == 256
    assert "sequence 512 on 2" in capsys.readouterr().out


@pytest.mark.slow
def test_experts_in_shards_and_on_ranks_of_their_own(forked: type[Forked], tmp_path: Path) -> None:
    sizes = ["--model", "tiny-moe", "--tokens", "64", "--documents", "128"]
    assert several.main(small(tmp_path, *sizes, "--gpus", "1", "2", "--systems", *OF_EXPERTS)) == 0
    results = results_of(record_in(tmp_path))
    on_two = {name: results[f"{name} {128 if name == 'sequence-expert' else 64} on 2"] for name in OF_EXPERTS}
    told = {name: found["communication_ms_by_rank"][0].keys() for name, found in on_two.items()}
    assert "all-gather" in told["fsdp-experts"]
    assert "all-to-all" not in told["fsdp-experts"]
    assert {"all-to-all", "all-reduce"} <= told["expert"] & told["sequence-expert"]
    assert {"all-to-all", "all-gather", "reduce-scatter"} <= told["expert-shard"]
    assert not {"all-gather", "reduce-scatter"} & (told["expert"] | told["sequence-expert"])
    assert on_two["fsdp-experts"]["expert_capacity_needed"] == 1.0
    for name in OF_EXPERTS[1:]:
        assert 1.0 < on_two[name]["expert_capacity_needed"] <= 1.5, name
    assert len({result["trainable_parameters"] for result in results.values()}) == 1


def test_systems_are_those_that_a_model_has_layers_for() -> None:
    assert several._systems_of("tiny") == list(SYSTEMS)
    assert several._systems_of("qwen3-8b") == [name for name in SYSTEMS if name != "sequence-state"]
    assert several._systems_of("tiny-moe") == [*SYSTEMS, *OF_EXPERTS]
    assert several._systems_of("gpt-oss-20b")[-4:] == [*OF_EXPERTS]


@pytest.mark.slow
@pytest.mark.parametrize("checks", [True, False])
def test_visits_to_experts_without_room_are_what_is_named(
    forked: type[Forked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checks: bool
) -> None:
    monkeypatch.setattr(forked, "fault", "little room")
    options = ["--model", "tiny-moe", "--tokens", "64", "--check-tokens", "64", "--systems", "expert", "--gpus", "2"]
    assert several.main(small(tmp_path, *options, *(() if checks else ("--no-checks",)))) == 1
    record = record_in(tmp_path)
    (result,) = record["configs"][0]["results"]
    assert "median_ms" not in result
    if checks:
        room = next(check for check in record["configs"][0]["checks"] if check["name"].startswith("room"))
        assert not room["ok"]
        assert "visits were left out" in room["detail"]
    else:
        assert result["status"] == "failed"
        assert "visits were left out" in result["reason"]


@pytest.mark.parametrize(
    ("fault", "reason"), [("raises", "rank 1: RuntimeError: no luck"), ("dies", "rank 1: exit status -9")]
)
def test_a_rank_that_fails_costs_its_setting_alone(
    forked: type[Forked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, reason: str
) -> None:
    monkeypatch.setattr(forked, "fault", fault)
    options = ["--systems", "ddp-lora", "sequence", "--no-checks", "--gpus", "2"]
    assert several.main(small(tmp_path, *options)) == 1
    results = results_of(record_in(tmp_path))
    status = {name: r["status"] for name, r in results.items()}
    assert status.pop("ddp-lora 128 on 2") == "failed"
    assert status == {"sequence 512 on 2": "ok"}
    assert results["ddp-lora 128 on 2"]["reason"].startswith(reason)
    assert len(list(tmp_path.glob("failed-ddp-lora-128-on-2-rank-*.log"))) == 2


def test_ranks_that_hang_are_ended(forked: type[Forked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(forked, "fault", "hangs")
    assert several.main(small(tmp_path, "--systems", "ddp-lora", "--timeout-s", "1", "--gpus", "2")) == 1
    record = record_in(tmp_path)
    (result,) = record["configs"][0]["results"]
    assert (result["status"], result["reason"]) == ("failed", "no line for 1 s")
    assert [check["ok"] for check in record["configs"][0]["checks"]] == [False]


def test_nothing_is_timed_behind_a_red_check(
    forked: type[Forked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(forked, "fault", "divides nothing")
    assert several.main(small(tmp_path, "--systems", "ddp-lora")) == 1
    record = record_in(tmp_path)
    assert not record["ok"]
    assert {r["status"] for r in record["configs"][0]["results"]} == {"red check"}
    assert not any("median_ms" in r for r in record["configs"][0]["results"])


def test_first_steps_with_empty_caches(forked: type[Forked], tmp_path: Path) -> None:
    options = ["--systems", "ddp-lora", "--cold-start", "--no-checks", "--gpus", "1"]
    assert several.main(small(tmp_path, *options)) == 0
    results = results_of(record_in(tmp_path))
    assert list(results) == ["ddp-lora 128 on 1 cold", "ddp-lora 128 on 1"]
    assert "median_ms" not in results["ddp-lora 128 on 1 cold"]
    assert results["ddp-lora 128 on 1 cold"]["since_start_seconds"] > 0


def test_when_time_is_up_a_record_says_so(tmp_path: Path) -> None:
    assert several.main(small(tmp_path, "--limit-s", "0", "--systems", "sequence")) == 1
    assert {r["reason"] for r in record_in(tmp_path)["configs"][0]["results"]} == {"time was up"}


def test_a_document_that_does_not_fit_one_gpu_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measured(_: Spec, item: Item, *__: Any) -> dict[str, Any]:
        tried.append(item.tokens)
        if item.tokens > 4096:
            raise torch.OutOfMemoryError("full")
        return {"median_ms": 1.0}

    monkeypatch.setattr(worker, "measured", measured)
    meeting: Any = None
    found = worker._on_one(Spec("tiny", None), Item("sequence", 16384, 1), CPU, meeting, lambda _: None)
    assert tried == [16384, 8192, 4096]
    assert found == {"median_ms": 1.0, "one_gpu_tokens": 4096}
    found = worker._on_one(Spec("tiny", None), Item("fsdp-full", 16384, 1), CPU, meeting, lambda _: None)
    assert found == {"status": "out_of_memory", "reason": "full"}


def line(gpus: int, **changes: Any) -> dict[str, Any]:
    item = Item("ddp-lora", 16384, gpus)
    timed = {
        "median_ms": 100.0 + gpus,
        "p20_ms": 99.0,
        "p80_ms": 110.0,
        "tokens_per_second_per_gpu": 1e6 / (100 + gpus),
    }
    first = {"first_losses": [1.0, 2.0], "first_norms": [3.0, 4.0], "peak_bytes": 2**30, "first_step_seconds": 9.0}
    more = {"host_syncs": 0, "breaks": 0, "recompiles": 0, "exchange_ms": 0.0, "profiled_step_ms": 100.0}
    return item.to_dict() | {"status": "ok", "reason": None, **timed, **first, **more, **changes}


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, [True, True]),
        ({"first_losses": [2.01]}, [False, True]),
        ({"first_norms": [8.0]}, [True, False]),
        ({"first_norms": [float("nan")]}, [True, False]),
    ],
)
def test_the_timed_step_is_held_to_one_gpu(changes: dict[str, Any], held: list[bool]) -> None:
    ours = line(2) | {"first_losses": [2.0], "first_norms": [4.0]} | changes
    assert [check.ok for check in checks.whole_step(line(1), ours)] == held


def test_kernels_are_sorted_by_kind() -> None:
    rows = {
        "ncclDevKernel_SendRecv(x)": 1.0,
        "ncclDevKernel_AllReduce_Sum_f32": 2.0,
        "gemm": 3.0,
        "gloo:all_to_all": 4.0,
    }
    assert measuring.kinds_of(rows) == {"all-to-all": 5.0, "all-reduce": 2.0}


def test_a_spec_survives_its_file() -> None:
    spec = Spec("tiny", None, (Item("sequence", 5, CHECK), Item("sequence", 5, 2)), checkpointing=0.5)
    assert Spec.of_json(spec.to_json()) == spec


def made_up(*lines: dict[str, Any], model: str = "qwen3.5-2b", layers: int = 24) -> Record:
    about = {"model": model, "layers": layers, "full_layers": 24}
    config = {"config": about, "checks": [], "results": copy.deepcopy(list(lines))}
    data = {"kind": "parallel", "device": "NVIDIA H200", "date": "2026-11-22", "subject": model, "configs": [config]}
    return Record(Path("parallel-made-up-2026-11-22.json"), data)


def verdict(name: str, record: Record) -> str:
    return next(o.verdict for o in targets.evaluate([record]) if o.target.name == name)


def test_scaling_is_the_rate_of_a_gpu_against_one() -> None:
    name = "qwen3.5-2b: ddp-lora on 2 GPUs, tokens/s of a GPU against one"
    assert verdict(name, made_up(line(1), line(2))) == "met"
    assert verdict(name, made_up(line(1), line(2, tokens_per_second_per_gpu=9e3))) == "missed"
    for without in (made_up(line(2)), made_up(line(1), line(2, status="red check")), made_up(line(1), line(4))):
        assert verdict(name, without) == "no record"


def test_cold_starts_and_host_syncs_are_targets() -> None:
    cold = [line(gpus, label="cold", median_ms=None, since_start_seconds=30.0 + gpus) for gpus in (1, 2)]
    record = made_up(line(1), line(2, host_syncs=1), *cold)
    assert verdict("qwen3.5-2b: first step on 2 GPUs against one, every cache empty", record) == "missed"
    assert verdict("qwen3.5-2b: several GPUs, host syncs in a step", record) == "missed"
    assert verdict("qwen3.5-2b: several GPUs, graph breaks, recompiles", record) == "met"


def test_the_table_of_several_gpus() -> None:
    assert tables.several([]) == ["No record of several GPUs yet."]
    rows = tables.several([made_up(line(1), line(2)), made_up(line(1), line(2, median_ms=500.0))])
    assert len(rows) == 5
    assert rows[2] == "| qwen3.5-2b | `ddp-lora` | 16,384 | 2 | 101 | 102 | 9,804 | 99.0% | 1.0 | - |"
    shallow = tables.several([made_up(line(1), line(2), layers=8)])
    assert "99.0% (8 of 24 layers)" in shallow[2]
