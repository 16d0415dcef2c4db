"""A run from rows in a file to an adapter or a model that stock libraries load; and runs that must not start."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import runpy
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch._inductor.exc import InductorError
from training_cases import make_recipe, save_checkpoint, write_conversations
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import deltatune
from deltatune.config.load import load_recipe
from deltatune.data.stream import Place
from deltatune.errors import DataError, InterruptedRunError, UserError
from deltatune.packing import shuffled
from deltatune.parallel.mesh import Mesh
from deltatune.runs.command import STARTED_BY
from deltatune.runs.folder import read_run
from deltatune.runs.page import page
from deltatune.training import building, interruption, planned, probing
from deltatune.training import packs as packs_module
from deltatune.training import run as run_module
from deltatune.training.batches import place_file
from deltatune.training.beginning import begin
from deltatune.training.console import RunConsole
from deltatune.training.export import merge_adapter
from deltatune.training.lock import locked
from deltatune.training.probing import verify
from deltatune.training.run import train
from deltatune.training.since import place_of
from deltatune.training.trainer import PackedTrainer
from deltatune.training.untouched import final_metrics
from deltatune.training.weights_digest import digest_of

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base")


def unprobed(folder: Path, checkpoint: Path, **sections: Any) -> Any:
    """A run of few adapters without the probe at its start, which is a third of a small one."""
    few = {"lora": {"target_modules": ["q_proj", "in_proj_qkv"]}}
    return make_recipe(folder, checkpoint, verify={"enabled": False, "lengths": None}, **{**few, **sections})


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def loaded_by_the_card(folder: Path) -> Any:
    """What the code in a model card makes."""
    code = folder.parent / "load.py"
    code.write_text((folder / "README.md").read_text().split("```python")[1].split("```")[0])
    return runpy.run_path(str(code))["model"]


def watched_phases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The phases of runs from here on."""
    seen: list[str] = []

    class Watched(RunConsole):
        def phase(self, name: str, total: int | None = None) -> Any:
            seen.append(name)
            return super().phase(name, total)

    monkeypatch.setattr(run_module, "RunConsole", Watched)
    return seen


def losses(result: Any) -> list[float]:
    return [entry["loss"] for entry in result.log_history if "loss" in entry]


def test_an_adapter_is_trained_compiled_and_loads_in_stock_peft(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Inductor's C++, which takes half a minute; compile/test_graphs.py has that."""
    given = planned.compile_options
    monkeypatch.setattr(
        planned, "compile_options", lambda recipe: dataclasses.replace(given(recipe), backend="aot_eager")
    )
    phases = watched_phases(monkeypatch)
    few = {"target_modules": ["q_proj", "in_proj_qkv", "down_proj"]}  # to trace: of both types of layer
    training = {"gradient_accumulation_steps": 2, "disable_tqdm": False}
    recipe = make_recipe(tmp_path, checkpoint, compile=True, lora=few, training=training)
    console = Console(record=True, width=40, file=(tmp_path / "screen.txt").open("w"))
    result = train(recipe, console=console)
    screen = console.export_text()
    assert screen.index("family qwen3_5") < screen.index("OK: every document") < screen.index("step 1/6")
    assert losses(result)[-1] < losses(result)[0]
    assert phases == [
        "loading the tokenizer",
        "describing the model",
        f"reading {tmp_path / 'train.jsonl'}",
        "reading what is tokenised",
        "tokenising",
        "packing",
        "loading the model",
        "adapting the model",
        "moving the model to cpu",
        "preparing the model",
        "choosing the activations to keep",
        "probing the model",
        "computing the digest of the weights",
        "computing the digest of the weights",
        "compiling linear_attention_Qwen3_5MLP, graph 1 of 2",
        "compiling full_attention_Qwen3_5MLP, graph 2 of 2",
        "saving the model",
        "waiting for the disk",
    ]

    output = tmp_path / "output"
    report, metrics = (json.loads((output / name).read_text()) for name in ("report.json", "metrics.json"))
    assert report["prepare"]["compile"]["breaks"] == []
    assert sum(report["prepare"]["compile"]["graphs"].values()) >= 2, "one graph for each type of layer"
    assert report["verify"]["ok"]
    assert metrics == result.metrics
    assert metrics["global_step"] == 6
    assert metrics["leg"]["trained_tokens"] > 0

    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(output)))
    assert torch.equal(adapted, logits(loaded_by_the_card(output)))
    merged_dir = merge_adapter(output, tmp_path / "merged")
    merged = logits(AutoModelForCausalLM.from_pretrained(merged_dir))
    assert (adapted - before).abs().max() > 0.1, "the adapter does something"
    assert torch.linalg.vector_norm(merged - adapted) < 1e-5 * torch.linalg.vector_norm(adapted)
    ids = AutoTokenizer.from_pretrained(merged_dir).apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], tokenize=False
    )
    assert ids.startswith("<|im_start|>user")


def test_every_weight_trains_without_a_lora_section(tmp_path: Path, checkpoint: Path) -> None:
    held_out = write_conversations(tmp_path / "eval.jsonl", 12, first=40)
    data, training = {"eval": [{"path": str(held_out)}]}, {"eval_strategy": "epoch"}
    result = train(make_recipe(tmp_path, checkpoint, lora=None, data=data, training=training), console=QUIET)
    assert losses(result)[-1] < losses(result)[0]
    assert result.metrics["eval_loss"] < losses(result)[0]
    stock = load_file(checkpoint / "model.safetensors")
    trained = load_file(tmp_path / "output" / "model.safetensors")
    assert trained.keys() == stock.keys()
    assert {name for name, value in trained.items() if torch.equal(value, stock[name])} == set()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert reloaded.config.use_cache, "the Trainer's own setting is not the model's"
    assert type(reloaded).__name__ == type(AutoModelForCausalLM.from_pretrained(checkpoint)).__name__
    assert logits(reloaded).isfinite().all()
    assert torch.equal(logits(reloaded), logits(loaded_by_the_card(tmp_path / "output")))


@pytest.mark.parametrize("lora", [{"r": 4, "lora_dropout": 0.2}, None], ids=["adapter", "full"])
def test_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, checkpoint: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    whole = make_recipe(tmp_path, checkpoint, lora=lora, training=saved)
    uninterrupted = train(whole, console=QUIET)
    parts = make_recipe(tmp_path, checkpoint, lora=lora, training={**saved, "output_dir": str(tmp_path / "parts")})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_trainer", stopping_after(3, run_module._trainer))
        train(parts, console=QUIET)
    # an interrupted save leaves a folder beside its place
    (tmp_path / "parts" / ".saving-5" / "checkpoint-5").mkdir(parents=True)
    resumed = train(parts, resume=True, console=QUIET)
    assert losses(resumed) == losses(uninterrupted)
    assert len(losses(resumed)) == 6
    name = "model.safetensors" if lora is None else "adapter_model.safetensors"
    expected, found = load_file(tmp_path / "output" / name), load_file(tmp_path / "parts" / name)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    again = train(parts, resume=True, console=QUIET)
    assert again.metrics["leg"]["steps"] == 0
    assert json.loads((tmp_path / "parts" / "metrics.json").read_text()) == resumed.metrics, "a finished run's figures"


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return weights


FIVE_STEPS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "constant"}
FINISHED = "the run is finished under these settings, so its files stay as they are"


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["adapter", "full"])
def test_a_finished_run_that_is_resumed_as_it_was_writes_nothing(tmp_path: Path, checkpoint: Path, lora: Any) -> None:
    data = {"eval": [{"path": str(write_conversations(tmp_path / "eval.jsonl", 4, first=50))}]}
    recipe = unprobed(tmp_path, checkpoint, training=FIVE_STEPS, lora=lora, data=data)
    first = train(recipe, console=QUIET)
    before = files_of(tmp_path / "output")
    console = Console(record=True, width=200, file=(tmp_path / "screen.txt").open("w"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load", None)  # no weight is read for it
        again = train(recipe, resume=True, console=console)
    assert files_of(tmp_path / "output") == before
    assert losses(again) == losses(first)
    assert again.metrics["leg"]["steps"] == 0
    assert {**again.metrics, "leg": first.metrics["leg"]} == first.metrics
    said = console.export_text()
    assert FINISHED in said
    assert "nothing was left to train" in said
    figures = f"loss {first.metrics['loss']:.4f}, eval_loss {first.metrics['eval_loss']:.4f}"
    assert f"the weights of step 5 are in {tmp_path / 'output'}, {figures}\n" in said


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("adapter_model.safetensors", Path.unlink),
        ("adapter_model.safetensors", cut_off),
        ("adapter_config.json", Path.unlink),
        ("metrics.json", cut_off),
        ("report.json", Path.unlink),
        ("README.md", Path.unlink),
        ("tokenizer_config.json", Path.unlink),
    ],
    ids=lambda given: given if isinstance(given, str) else given.__name__,
)
def test_only_whole_final_files_stay_as_they_are(tmp_path: Path, finished: Path, name: str, spoil: Any) -> None:
    shutil.copytree(finished, tmp_path / "output")
    recipe = load_recipe(finished / "config.yaml").recipe
    given: dict[str, Any] = {"recipe": recipe, "step": 5}
    assert final_metrics(tmp_path / "output", **given) == json.loads((finished / "metrics.json").read_text())
    for other in ({"recipe": recipe.model_copy(update={"lora": None})}, {"step": 4}):
        assert final_metrics(tmp_path / "output", **{**given, **other}) is None
    spoil(tmp_path / "output" / name)
    assert final_metrics(tmp_path / "output", **given) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(unprobed(folder, checkpoint, training=FIVE_STEPS), console=QUIET)
    return folder / "output"


class LoadedError(Exception):
    """A model would have been loaded."""


def loaded(_: Any) -> None:
    raise LoadedError


def more_rows(folder: Path) -> None:
    with (folder.parent / "train.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}) + "\n")


def running(folder: Path) -> None:
    record = folder / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))


@pytest.mark.parametrize(
    ("spoil", "training", "asked"),
    [
        (None, {"max_steps": 6}, {}),
        (None, {"learning_rate": 0.5}, {}),
        (None, {"seed": 5}, {"allow_change": True}),
        (more_rows, {}, {"allow_change": True}),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), {}, {}),
        (lambda folder: cut_off(folder / "metrics.json"), {}, {}),
        (running, {}, {}),
    ],
    ids=["more steps", "other rate", "other seed", "other rows", "lost weights", "broken figures", "killed"],
)
def test_a_run_that_lacks_something_is_no_finished_one(
    finished: Path, tmp_path: Path, checkpoint: Path, spoil: Any, training: Any, asked: Any
) -> None:
    kept = shutil.copytree(finished.parent, tmp_path / "kept")
    try:
        recipe = unprobed(finished.parent, checkpoint, training=FIVE_STEPS | training)  # which writes its rows
        if spoil is not None:
            spoil(finished)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "load", loaded)
            with pytest.raises(LoadedError):
                train(recipe, resume=True, console=QUIET, **asked)
    finally:
        shutil.rmtree(finished.parent)
        shutil.copytree(kept, finished.parent)


@pytest.mark.parametrize(
    ("data", "training"),
    [({}, {}), ({"num_proc": 2}, {"dataloader_num_workers": 1}), ({"cache_dir": "cache"}, {"disable_tqdm": False})],
    ids=["moved", "other processes", "other cache"],
)
def test_a_finished_run_in_another_place_is_the_same_run(
    finished: Path, tmp_path: Path, checkpoint: Path, data: dict[str, Any], training: dict[str, Any]
) -> None:
    moved = shutil.copytree(finished, tmp_path / "moved")
    if "cache_dir" in data:
        data = {"cache_dir": str(tmp_path / data["cache_dir"])}
    settings = {**FIVE_STEPS, **training, "output_dir": str(moved)}
    recipe, before = unprobed(finished.parent, checkpoint, training=settings, data=data), files_of(moved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load", loaded)
        assert train(recipe, resume=True, console=QUIET).metrics["leg"] == {"steps": 0}
    assert files_of(moved) == before


def test_a_finished_run_has_one_leg_for_a_change(finished: Path, tmp_path: Path, checkpoint: Path) -> None:
    moved = shutil.copytree(finished, tmp_path / "moved")
    settings = {**FIVE_STEPS, "learning_rate": 0.5, "output_dir": str(moved)}
    recipe = unprobed(finished.parent, checkpoint, training=settings)
    for _ in range(2):
        train(recipe, resume=True, console=QUIET)
        assert len(json.loads((moved / "run.json").read_text())["legs"]) == 2


def test_a_finished_run_whose_last_checkpoint_is_broken_says_so(
    finished: Path, tmp_path: Path, checkpoint: Path
) -> None:
    kept = shutil.copytree(finished.parent, tmp_path / "kept")
    try:
        cut_off(finished / "checkpoint-5" / "adapter_model.safetensors")
        with pytest.raises(UserError, match="checkpoint-5"):
            train(unprobed(finished.parent, checkpoint, training=FIVE_STEPS), resume=True, console=QUIET)
    finally:
        shutil.rmtree(finished.parent)
        shutil.copytree(kept, finished.parent)


@pytest.mark.parametrize("killed", [False, True], ids=["lost a file", "killed in the final save"])
def test_a_run_whose_steps_are_done_trains_no_more(tmp_path: Path, checkpoint: Path, killed: bool) -> None:
    """Its last step lies within an epoch, where the Trainer would go one further."""
    recipe = unprobed(tmp_path, checkpoint, training=FIVE_STEPS)
    first = train(recipe, console=QUIET)
    expected = adapter(tmp_path / "output")
    record = tmp_path / "output" / "run.json"
    names = ("adapter_model.safetensors", "adapter_config.json", "metrics.json")
    for name in names if killed else names[:1]:
        (tmp_path / "output" / name).unlink()
    if killed:
        record.write_text(record.read_text().replace('"finished"', '"running"'))
    console = Console(record=True, width=200, file=(tmp_path / "screen.txt").open("w"))
    again = train(recipe, resume=True, console=console)
    found = adapter(tmp_path / "output")
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert losses(again) == losses(first)
    assert again.metrics["global_step"] == 5
    assert again.metrics["leg"]["steps"] == 0
    metrics = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert metrics["leg"]["steps"] == (0 if killed else 5)
    said = console.export_text()
    assert "nothing was left to train" in said
    assert FINISHED not in said
    # this leg has saved the model
    legs = [leg["status"] for leg in json.loads(record.read_text())["legs"]]
    assert legs == ["killed" if killed else "finished", "finished"]


def test_a_finished_run_that_was_changed_tells_it_in_a_leg(tmp_path: Path, checkpoint: Path) -> None:
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for limit in (None, 1):
        given = unprobed(tmp_path, checkpoint, training={**training, "save_total_limit": limit})
        train(given, resume=limit is not None, console=QUIET)
    legs = json.loads((tmp_path / "output" / "run.json").read_text())["legs"]
    assert [leg["changes"] for leg in legs] == [[], ["training.save_total_limit: null -> 1"]]


def test_settings_that_are_changed_act_from_there_on(tmp_path: Path, checkpoint: Path) -> None:
    training = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    train(unprobed(tmp_path, checkpoint, training=training), console=QUIET)
    before = adapter(tmp_path / "output")
    console = Console(record=True, width=120, file=(tmp_path / "screen.txt").open("w"))
    changed = {**training, "max_steps": 5, "learning_rate": 0.0}
    result = train(unprobed(tmp_path, checkpoint, training=changed), resume=True, console=console)
    assert "changed since checkpoint-3: training.learning_rate: 0.01 -> 0.0" in console.export_text()
    assert [entry["learning_rate"] for entry in result.log_history if "loss" in entry][3:] == [0.0, 0.0]
    after = adapter(tmp_path / "output")
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_a_run_that_goes_on_logs_and_saves_as_its_recipe_says_now(tmp_path: Path, checkpoint: Path) -> None:
    """The Trainer's state would bring back when the run before did."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(unprobed(tmp_path, checkpoint, training={"max_steps": 2, **saving}), console=QUIET)
    now = {"max_steps": 6, **saving, "logging_steps": 2, "save_steps": 3}
    result = train(unprobed(tmp_path, checkpoint, training=now), resume=True, console=QUIET)
    assert [entry["step"] for entry in result.log_history if "loss" in entry] == [1, 2, 4, 6]
    assert {path.name for path in (tmp_path / "output").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (1, 2, 3, 6)
    }


def test_a_finished_run_removes_what_it_was_killed_before_it_removed(tmp_path: Path, checkpoint: Path) -> None:
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(unprobed(tmp_path, checkpoint, training=saving), console=QUIET)
    train(unprobed(tmp_path, checkpoint, training={**saving, "save_total_limit": 1}), resume=True, console=QUIET)
    assert [path.name for path in (tmp_path / "output").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"r": 8}}, r"lora\.r: \d+ -> 8 cannot act"),
        ({"packing": {"tokens_per_batch": 128}}, r"packing\.tokens_per_batch: .* say --allow-change"),
    ],
)
def test_settings_that_cannot_act_stop_a_run_that_goes_on(
    tmp_path: Path, checkpoint: Path, sections: dict[str, Any], message: str
) -> None:
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    train(unprobed(tmp_path, checkpoint, training=training), console=QUIET)
    longer = {**training, "max_steps": 4}
    other = unprobed(tmp_path, checkpoint, training=longer, **sections)
    with pytest.raises(UserError, match=message):
        train(other, resume=True, console=QUIET)
    if "packing" in sections:
        assert train(other, resume=True, allow_change=True, console=QUIET).metrics["global_step"] == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_other_rows_need_a_word(
    tmp_path: Path, checkpoint: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs_module, "BLOCK_ROWS", 24)
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    rows = write_conversations(tmp_path / "rows.jsonl", 24)
    data = {"train": [{"path": str(rows), "format": "chat"}], "streaming": streaming}
    train(unprobed(tmp_path, checkpoint, data=data, training=training), console=QUIET)
    before = json.loads((tmp_path / "output" / "run.json").read_text())["legs"][0]["data"]
    assert re.fullmatch(r"[0-9a-f]{32}", before[str(rows)])
    assert stat.S_IMODE((tmp_path / "output" / "adapter_model.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "output" / "config.yaml").stat().st_mode
    )
    with rows.open("a") as stream:
        stream.write(rows.read_text().splitlines()[0] + "\n")
    recipe = unprobed(tmp_path, checkpoint, data=data, training={**training, "max_steps": 4})
    with pytest.raises(UserError, match=r"rows of .*rows\.jsonl: .* --allow-change"):
        train(recipe, resume=True, console=QUIET)
    console = Console(record=True, width=200, file=(tmp_path / "screen.txt").open("w"))
    train(recipe, resume=True, allow_change=True, console=console)
    said = console.export_text(clear=False).replace("\n", "")
    assert f"going on from {tmp_path / 'output' / 'checkpoint-2'}" in said
    assert f"changed since checkpoint-2: rows of {rows}" in said
    leg = json.loads((tmp_path / "output" / "run.json").read_text())["legs"][1]
    assert leg["changes"][-1] == f'rows of {rows}: "{before[str(rows)]}" -> "{leg["data"][str(rows)]}"'


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_folder_in_the_place_of_any_file_of_a_run_is_found_before_it(
    tmp_path: Path, checkpoint: Path, kind: str
) -> None:
    training = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    sections: dict[str, Any] = {} if kind == "adapter" else {"lora": None}
    recipe = unprobed(tmp_path, checkpoint, training=training, **sections)
    output_dir = train(recipe, console=QUIET).output_dir
    files = [path for path in output_dir.iterdir() if path.is_file()]
    assert len(files) > 10
    for path in files:
        path.rename(tmp_path / "kept")
        path.mkdir()
        with pytest.raises(UserError, match=rf"{path.name} is a folder, and the run writes a file of that name"):
            begin(recipe, True, clears=False)
        path.rmdir()
        (tmp_path / "kept").rename(path)
    begin(recipe, True, clears=False)


def test_a_finished_model_is_not_replaced(tmp_path: Path, checkpoint: Path) -> None:
    recipe = unprobed(tmp_path, checkpoint, training={"max_steps": 1})
    train(recipe, console=QUIET)
    files = {path: path.read_bytes() for path in (tmp_path / "output").iterdir() if path.is_file()}
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=r"holds the model of an earlier run, and no checkpoint .* another folder"):
            train(recipe, resume=resume, console=QUIET)
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        train(recipe, resume=True, console=QUIET)
    assert {path: path.read_bytes() for path in (tmp_path / "output").iterdir() if path.is_file()} == files


def test_the_best_checkpoint_is_named_by_its_place(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = watched_phases(monkeypatch)
    held_out = write_conversations(tmp_path / "eval.jsonl", 12, first=40)
    training = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        "metric_for_best_model": "eval_loss",
        "save_total_limit": 1,
        "max_steps": 4,
    }
    train(unprobed(tmp_path, checkpoint, data={"eval": [{"path": str(held_out)}]}, training=training), console=QUIET)
    (place,) = (tmp_path / "output").glob("checkpoint-*")
    state = json.loads((place / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(place)
    saved = ["evaluating", "saving checkpoint-2", "evaluating", "saving checkpoint-4", "saving the model"]
    assert phases[-6:] == [*saved, "waiting for the disk"]
    assert not list((tmp_path / "output").glob(".*"))


@pytest.mark.parametrize("signalled", [True, False])
def test_a_signal_that_a_compiler_gets_too_is_no_fault(
    tmp_path: Path, checkpoint: Path, signalled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> Any:
        if signalled:
            os.kill(os.getpid(), signal.SIGINT)
        raise InductorError(RuntimeError("C++ compile error"), None)

    monkeypatch.setattr(PackedTrainer, "training_step", step)
    expected = InterruptedRunError if signalled else InductorError
    with pytest.raises(expected, match="stopped within step 1 of 6, as it compiled" if signalled else "C") as caught:
        train(unprobed(tmp_path, checkpoint), console=QUIET)
    assert getattr(caught.value, "status", None) == (130 if signalled else None)
    found = json.loads((tmp_path / "output" / "run.json").read_text())["status"]
    assert found == ("interrupted" if signalled else "failed")


def test_a_signal_in_the_last_step_ends_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Signalled(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    build = run_module._trainer

    def building(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(Signalled())
        return trainer

    monkeypatch.setattr(run_module, "_trainer", building)
    assert len(losses(train(unprobed(tmp_path, checkpoint, training={"max_steps": 2}), console=QUIET))) == 2
    assert json.loads((tmp_path / "output" / "run.json").read_text())["status"] == "finished"


#: Of weights alone, from which nothing goes on.
WEIGHTS = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}


@pytest.mark.parametrize(
    ("number", "status", "training"),
    [(signal.SIGTERM, 143, {}), (signal.SIGINT, 130, {}), (signal.SIGINT, 130, WEIGHTS)],
)
def test_a_signal_ends_a_run_with_a_checkpoint_to_go_on_from(
    tmp_path: Path,
    checkpoint: Path,
    number: int,
    status: int,
    training: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train(unprobed(tmp_path, checkpoint), console=QUIET)
    recipe = unprobed(tmp_path, checkpoint, training={"output_dir": str(tmp_path / "parts"), **training})

    class Signalled(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    build = run_module._trainer

    def building(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(Signalled())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_trainer", building)
        with pytest.raises(InterruptedRunError, match=r"stopped after step 3 of 6, with a checkpoint; go on") as caught:
            train(recipe, console=QUIET)
    assert caught.value.status == status
    left = {path.name for path in (tmp_path / "parts").iterdir()}
    assert not left & {"adapter_model.safetensors", "metrics.json", ".lock"}, "it does not look finished"
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "interrupted"
    assert f"interrupted: {signal.Signals(number).name}: stopped after step 3" in page([read_run(tmp_path / "parts")])
    resumed = train(recipe, resume="auto", console=QUIET)
    assert losses(resumed) == losses(whole)


def interrupted_twice(recipe: Any, after: int, resume: Any = None, then: Any = None) -> str:
    """What is said where two Ctrl-C come in the step after ``after``, and ``then`` was called before them."""
    step = PackedTrainer.training_step

    def stepping(self: Any, *args: Any) -> Any:
        if self.state.global_step == after:
            if then is not None:
                then()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedTrainer, "training_step", stepping)
        patch.setenv(STARTED_BY, "deltatune train mine.yaml")
        try:
            with pytest.raises(KeyboardInterrupt) as caught:
                train(recipe, resume=resume, console=QUIET)
        finally:
            signal.signal(signal.SIGINT, before)
    said, kept = str(caught.value).removeprefix("SIGINT: ").split(": ", 1)
    assert said == f"interrupted after step {after}"
    record = json.loads((Path(recipe.training.output_dir) / "run.json").read_text())
    assert record["legs"][-1]["reason"] == str(caught.value)
    return kept


GO_ON = "go on with deltatune train mine.yaml --resume"


def test_the_second_ctrl_c_says_what_is_kept(tmp_path: Path, checkpoint: Path) -> None:
    recipe = unprobed(tmp_path, checkpoint, training={"save_strategy": "steps", "save_steps": 2})
    # as a disk that lost it would leave it
    loses = (tmp_path / "output" / "checkpoint-4" / "optimizer.pt").unlink
    place = tmp_path / "output" / "checkpoint-2"
    assert interrupted_twice(recipe, 5, then=loses) == f"the last whole checkpoint is {place}; {GO_ON}"


@pytest.mark.parametrize(
    ("training", "setting"),
    [
        ({}, "training.save_strategy: no"),
        ({"save_strategy": "epoch"}, "training.save_strategy: epoch"),
        ({"save_strategy": "steps", "save_steps": 5}, "training.save_steps"),
        ({"save_strategy": "steps", "save_steps": 1, "save_only_model": True}, "training.save_only_model"),
    ],
)
def test_the_second_ctrl_c_says_which_setting_left_nothing(
    tmp_path: Path, checkpoint: Path, training: dict[str, Any], setting: str
) -> None:
    kept = interrupted_twice(unprobed(tmp_path, checkpoint, training=training), 1)
    assert kept == f"no whole checkpoint is there to go on from ({setting})"


def test_the_second_ctrl_c_names_what_the_run_began_from_until_it_has_saved(tmp_path: Path, checkpoint: Path) -> None:
    """Neither a folder of its own that is empty, nor later checkpoints of the run before, say where it was."""
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    train(unprobed(tmp_path, checkpoint, training=training), console=QUIET)
    first = tmp_path / "output" / "checkpoint-1"
    said = f"the last whole checkpoint is {first}; {GO_ON} {first}"
    elsewhere = unprobed(tmp_path, checkpoint, training={**training, "output_dir": str(tmp_path / "elsewhere")})
    assert interrupted_twice(elsewhere, 1, first) == said
    same = unprobed(tmp_path, checkpoint, training=training)
    assert interrupted_twice(same, 1, first) == said
    own = tmp_path / "output" / "checkpoint-2"
    assert interrupted_twice(same, 2, first) == f"the last whole checkpoint is {own}; {GO_ON}"
    assert interrupted_twice(same, 2, own) == f"the last whole checkpoint is {own}; {GO_ON}"


def test_a_checkpoint_that_goes_as_it_is_looked_at_does_not_replace_an_interrupt(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: Path) -> Any:
        raise FileNotFoundError("rotated")

    monkeypatch.setattr(interruption, "latest", gone)
    recipe = unprobed(tmp_path, checkpoint, training={"save_strategy": "steps", "save_steps": 1})
    assert interrupted_twice(recipe, 2) == "no whole checkpoint is there to go on from (training.save_steps)"


def test_the_folder_tells_what_happened(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "notes").write_text("mine")
    who = ("-c", "user.name=me", "-c", "user.email=me@here")
    for command in (("init", "--quiet"), ("add", "notes"), (*who, "commit", "--quiet", "--message", "notes")):
        subprocess.run(["git", *command], check=True)
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    train(make_recipe(tmp_path, checkpoint, training=training), console=QUIET)
    longer = {**training, "max_steps": 4, "weight_decay": 0.1}
    train(make_recipe(tmp_path, checkpoint, training=longer), resume=True, console=QUIET)
    record = json.loads((tmp_path / "output" / "run.json").read_text())
    first, second = record["legs"]
    assert record["status"] == first["status"] == second["status"] == "finished"
    assert [(leg["from_step"], leg["to_step"]) for leg in (first, second)] == [(0, 2), (2, 4)]
    assert first["changes"] == []
    assert second["changes"] == ["training.max_steps: 2 -> 4", "training.weight_decay: 0.0 -> 0.1"]
    assert first["started"] <= first["ended"] <= second["started"]
    assert list(first["data"].values()) == list(second["data"].values())
    assert len(next(iter(first["data"].values()))) >= 32, "a digest of the rows"
    assert first["versions"]["torch"] == torch.__version__
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for leg in (first, second):
        assert (leg["host"], leg["folder"], leg["git"]) == (platform.node(), str(work), commit)
    lines = [json.loads(line) for line in (tmp_path / "output" / "run.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [(line["leg"], line["step"]) for line in logged] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert [(leg["first_loss"], leg["last_loss"]) for leg in (first, second)] == [
        (logged[0]["loss"], logged[1]["loss"]),
        (logged[2]["loss"], logged[3]["loss"]),
    ]
    assert record["model"] == {
        "name_or_path": str(checkpoint), "revision": None, "commit": None, "class": "Qwen3_5ForCausalLM",
        "digest": digest_of(str(checkpoint)),
    }  # fmt: skip
    assert first["deltatune"]["version"] == deltatune.__version__
    metrics = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert (metrics["global_step"], metrics["leg"]["steps"]) == (4, 2), "of the model, and of what the last leg did"
    for name in ("tokens", "trained_tokens", "packs"):
        assert second[name] == metrics["leg"][name]
    assert first["packs"] == second["packs"] == 2
    assert not list((tmp_path / "output").glob("checkpoint-*/README.md")), "PEFT's empty card"
    text = (tmp_path / "output" / "train.log").read_text()
    assert [text.count(said) for said in ("\ntrain: 40 rows", "OK: every document", "\nsaved to ")] == [2, 2, 2]
    steps = [line.split(" ·")[0] for line in text.splitlines() if line.startswith("step ")]
    assert "training.weight_decay: 0.0 -&gt; 0.1" in page([read_run(tmp_path / "output")])
    assert steps == ["step 1/2", "step 2/2", "step 3/4", "step 4/4"]


def test_a_loss_that_is_no_number_ends_the_run_and_saves_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = PackedTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 else loss

    monkeypatch.setattr(PackedTrainer, "compute_loss", poisoned)
    with pytest.raises(UserError, match=r"the loss is nan at step 2 \(.*train\.jsonl, line \d+; .*\); nothing after"):
        train(unprobed(tmp_path, checkpoint), console=QUIET)
    assert not (tmp_path / "output" / "adapter_model.safetensors").exists()
    record = json.loads((tmp_path / "output" / "run.json").read_text())
    assert record["legs"][0]["status"] == "failed"
    assert "the loss is nan" in record["legs"][0]["reason"]
    assert (tmp_path / "output" / "train.log").read_text().splitlines()[-1].startswith("failed: the loss is nan at")
    lines = [json.loads(line) for line in (tmp_path / "output" / "run.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] == "nan"


def test_a_skipped_update_is_kept_in_the_record(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = PackedTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("inf") if self.state.global_step == 2 else loss

    monkeypatch.setattr(PackedTrainer, "compute_loss", poisoned)
    console = Console(record=True, width=400, file=(tmp_path / "screen.txt").open("w"))
    result = train(unprobed(tmp_path, checkpoint, training={"on_nonfinite": "skip"}), console=console)
    assert result.metrics["leg"]["skipped_steps"] == 1
    assert len(losses(result)) == 5
    screen = console.export_text()
    assert re.search(r"the loss is inf at step 3 \(.*train\.jsonl, line \d+.*\); its update is left out", screen)
    assert "updates that were left out, since a loss or gradient norm was no number: steps 3\n" in screen
    lines = [json.loads(line) for line in (tmp_path / "output" / "run.jsonl").read_text().splitlines()]
    (skipped,) = [line for line in lines if "skipped" in line]
    assert skipped["step"] == 3
    assert skipped["rows"][0].startswith(f"{tmp_path / 'train.jsonl'}, line ")
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [1]


def test_weights_that_are_no_numbers_are_not_saved(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = run_module.evaluation_of_weights

    def poisoned(trainer: Any, **how: Any) -> Any:
        with torch.no_grad():
            next(weight for weight in trainer.model.parameters() if weight.requires_grad).fill_(float("inf"))
        return evaluate(trainer, **how)

    monkeypatch.setattr(run_module, "evaluation_of_weights", poisoned)
    with pytest.raises(UserError, match="some trained weights are not finite, so they are not saved"):
        train(unprobed(tmp_path, checkpoint), console=QUIET)
    assert not (tmp_path / "output" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("training", "kept"),
    [
        (
            {"save_strategy": "steps", "save_steps": 2},
            "the last whole checkpoint is {output}/checkpoint-2; go on with --resume",
        ),
        ({}, "no whole checkpoint is there to go on from (training.save_strategy: no)"),
        (
            {"save_strategy": "steps", "save_steps": 2, "save_only_model": True},
            "no whole checkpoint is there to go on from (training.save_only_model)",
        ),
    ],
)
def test_out_of_memory_says_what_to_change_and_what_is_kept(
    tmp_path: Path, checkpoint: Path, training: dict[str, Any], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = PackedTrainer.compute_loss

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "compute_loss", full)
    with pytest.raises(UserError) as told:
        train(unprobed(tmp_path, checkpoint, training=training), console=QUIET)
    start = "out of memory at step 4: CUDA out of memory. Tried to allocate 2.00 GiB.; lower packing.tokens_per_batch"
    assert str(told.value).startswith(start)
    assert str(told.value).endswith(f"; {kept.format(output=tmp_path / 'output')}")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        torch.AcceleratorError("CUDA error: out of memory\nmore", 2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 4 bytes"
        ),
        MemoryError("Unable to allocate 1 PiB for an array"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["_verify", "_trainer"])
def test_out_of_memory_before_the_first_step_says_what_to_change(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    def full(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(run_module, where, full)
    said = rf"out of memory before the first step: {re.escape(str(error).splitlines()[0])}; see .*parallel\.shard$"
    with pytest.raises(UserError, match=said):
        train(unprobed(tmp_path, checkpoint), console=QUIET)


def test_other_errors_of_libraries_are_not_of_memory(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("_verify", "_run_steps"):
        monkeypatch.setattr(run_module, name, broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            train(unprobed(tmp_path, checkpoint), console=QUIET)


def test_two_runs_do_not_share_a_folder(tmp_path: Path, checkpoint: Path) -> None:
    saving = tmp_path / "output" / ".saving-5"
    saving.mkdir(parents=True)
    with locked(tmp_path / "output"), pytest.raises(UserError, match=r"output is in use by process \d+"):
        train(make_recipe(tmp_path, checkpoint), console=QUIET)
    assert [*(tmp_path / "output").iterdir()] == [saving], "what the other run is writing stays"


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("training", [{}, {"save_strategy": "steps", "save_steps": 1}])
def test_a_run_that_another_one_was_faster_than_leaves_its_folder(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, resume: str | None, training: dict[str, Any]
) -> None:
    """Both have found the folder free."""
    recipe = unprobed(tmp_path, checkpoint, training={"max_steps": 1, **training})
    verify = run_module._verify

    def overtaken(run: Any) -> Any:
        monkeypatch.setattr(run_module, "_verify", verify)
        train(recipe, resume=resume, console=QUIET)
        return verify(run)

    monkeypatch.setattr(run_module, "_verify", overtaken)
    with pytest.raises(UserError, match=r"another run has saved in .*output since this one began; go on .* --resume"):
        train(recipe, resume=resume, console=QUIET)
    assert len(json.loads((tmp_path / "output" / "run.json").read_text())["legs"]) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_goes_on_in_its_middle_bit_for_bit(
    tmp_path: Path, checkpoint: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs_module, "BLOCK_ROWS", 24)
    monkeypatch.setattr(shuffled, "_WINDOW", 8)
    training = {
        "save_strategy": "steps",
        "save_steps": 7,
        "max_steps": 12,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": workers,
    }
    data = {"streaming": True}
    uninterrupted = train(unprobed(tmp_path, checkpoint, data=data, training=training), console=QUIET)
    parts = unprobed(tmp_path, checkpoint, data=data, training={**training, "output_dir": str(tmp_path / "parts")})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_trainer", stopping_after(7, run_module._trainer))
        train(parts, console=QUIET)
    place = Place.load(tmp_path / "parts" / "checkpoint-7" / "stream-00000-of-00001.npz")
    assert 0 < place.pack < 14, "the block of the last pack is not the first, and that pack is not its first"
    resumed = train(parts, resume=True, console=QUIET)
    assert losses(resumed) == losses(uninterrupted)
    assert len(losses(resumed)) == 12
    expected, found = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("output", "parts"))
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_a_stream_of_other_ranks_cannot_go_on(tmp_path: Path) -> None:
    for rank in range(2):
        Place().save(place_file(tmp_path, Mesh(data_size=2, data_rank=rank)))
    assert place_of(tmp_path, Mesh(data_size=2, data_rank=1)).left == ()
    with pytest.raises(UserError, match="keeps the places of 2 ranks in the stream of data, and this run has 3"):
        place_of(tmp_path, Mesh(data_size=3, data_rank=1))


def stopping_after(step: int, build: Any) -> Any:
    """Builds trainers that stop at this step, as a killed process would after its last checkpoint."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= step

    def building(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(Stop())
        return trainer

    return building


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name_or_path": "/no/such/folder"}}, r"/no/such/folder is no folder.*checkpoint folder"),
        ({"data": {"train": [{"path": "/no/such/rows.jsonl"}]}}, r"/no/such/rows.jsonl does not exist"),
        ({"lora": {"target_modules": ["qkv_prj"]}}, r"lora.target_modules: 'qkv_prj' matches no module"),
        ({"packing": {"tokens_per_batch": 24}}, r"more than packing.tokens_per_batch=24"),
        ({"kernels": {"gated_delta_rule": "fla"}}, r"fla"),
        ({"checkpointing": 0.5}, r"checkpointing: 0.5 .* compile: true"),
        ({"training": {"learning_rat": 0.1}}, r"training.learning_rat: unknown \(did you mean learning_rate\?\)"),
        ({"training": {"optim": "adam"}}, r"training\.optim: adam is unknown \(did you mean adamw_torch\?\)"),
        ({"training": {"optim": "galore_adamw_8bit"}}, r"needs the package galore-torch; pip install galore-torch"),
        ({"training": {"optim": "schedule_free_adamw"}}, r"needs the package schedulefree; pip install schedulefree"),
        ({"training": {"report_to": "wandb"}}, r"report_to: the package of wandb is not installed; pip install wandb"),
        ({"training": {"report_to": "wand"}}, r"report_to: wand is unknown \(did you mean wandb\?\)"),
        (
            {"training": {"lr_scheduler_type": "cosine_with_min_lr"}},
            r"cosine_with_min_lr needs one of min_lr, min_lr_rate",
        ),
        ({"training": {"lr_scheduler_kwargs": {"foo": 1}}}, r"lr_scheduler_kwargs: .*linear takes no foo"),
    ],
)
def test_a_run_that_cannot_start_writes_nothing(
    tmp_path: Path, checkpoint: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises((UserError, DataError), match=message):
        train(make_recipe(tmp_path, checkpoint, **sections), console=QUIET)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2, 258]}, r"line 1 holds token 258, and the model has 200 embeddings; take the token"),
        ({"text": "a b"}, r"the data holds token 2\d\d \(.*\), and the model has 200 embeddings; take the token"),
    ],
)
def test_tokens_beyond_the_embeddings_stop_the_run(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], message: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    data = {"train": [{"path": str(rows)}]}
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["vocab_size"] == 259
    small = shutil.copytree(checkpoint, tmp_path / "small")
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    weights = load_file(small / "model.safetensors")
    cut = {name: weight[:200].clone() if weight.shape[0] == 259 else weight for name, weight in weights.items()}
    save_file(cut, small / "model.safetensors")
    monkeypatch.setattr(building, "load_by_recipe", None)  # no weights are read before
    with pytest.raises(UserError, match=message):
        train(make_recipe(tmp_path, small, data=data), console=QUIET)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["over an adapter", "over a model"])
def test_a_folder_holds_one_kind_of_model(tmp_path: Path, checkpoint: Path, lora: Any) -> None:
    (tmp_path / "output").mkdir()
    other = "config.json" if lora else "adapter_config.json"
    (tmp_path / "output" / other).write_text("{}")
    with pytest.raises(UserError, match=rf"output holds an? \w+ \({other}\), and this run saves .*; choose another"):
        train(make_recipe(tmp_path, checkpoint, lora=lora), console=QUIET)


def test_a_leak_stops_the_run(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unprepared(_model: Any, **options: Any) -> Any:
        return verify(AutoModelForCausalLM.from_pretrained(checkpoint), **options)

    monkeypatch.setattr(probing, "verify", unprepared)
    with pytest.raises(UserError, match=r"verify: .*linear_attention.*; nothing was trained"):
        train(make_recipe(tmp_path, checkpoint), console=QUIET)
    assert not (tmp_path / "output").exists()


def test_an_earlier_runs_checkpoints_are_not_mixed_with_new_ones(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "output" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run; continue it with --resume"):
        train(make_recipe(tmp_path, checkpoint), console=QUIET)
    with pytest.raises(UserError, match=r"holds no whole checkpoint"):
        train(make_recipe(tmp_path, checkpoint), resume=True, console=QUIET)
    with pytest.raises(UserError, match=r"nowhere is no whole checkpoint: there is no such folder"):
        train(make_recipe(tmp_path, checkpoint), resume=tmp_path / "nowhere", console=QUIET)
