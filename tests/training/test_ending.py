"""Early stopping, and the best checkpoint: what ends a run, what it saves, and what it says of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_cases import byte_tokenizer, make_recipe, save_checkpoint, write_conversations, write_pairs
from transformers import TrainerCallback

from deltatune.config.schema import Recipe
from deltatune.errors import InterruptedRunError, UserError
from deltatune.training import run as run_module
from deltatune.training.run import train
from deltatune.training.trainer import PackedTrainer
from tiny import tiny_model

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    model = tiny_model("qwen3", layers=1, vocab_size=len(byte_tokenizer()))
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base", model)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives evaluations the losses of a list, one after the other."""

    loop = PackedTrainer.evaluation_loop

    def of(losses: list[float]) -> None:
        left = iter(losses)

        def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = loop(self, *args, **kwargs)
            output.metrics["eval_loss"] = next(left)
            return output

        monkeypatch.setattr(PackedTrainer, "evaluation_loop", evaluation_loop)

    return of


def recipe(folder: Path, checkpoint: Path, **training: Any) -> Any:
    data = {"eval": [{"path": str(write_conversations(folder / "eval.jsonl", 6, first=40))}]}
    values = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    few = {"r": 2, "target_modules": ["q_proj"]}
    return make_recipe(
        folder,
        checkpoint,
        data=data,
        lora=few,
        training={**values, **training},
        verify={"enabled": False, "lengths": None},
    )


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return weights


def same(first: Path, second: Path) -> bool:
    found = adapter(second)
    return all(torch.equal(weight, found[name]) for name, weight in adapter(first).items())


def test_a_run_that_gets_no_better_ends_with_its_best_weights(
    tmp_path: Path, checkpoint: Path, evaluations: Any
) -> None:
    evaluations([3.0, 2.0, 1.95, 2.5])  # 1.95 is no better by 0.1
    console = Console(record=True, width=200, file=(tmp_path / "screen.txt").open("w"))
    stopping = {"early_stopping_patience": 2, "early_stopping_threshold": 0.1, "load_best_model_at_end": True}
    result = train(recipe(tmp_path, checkpoint, **stopping), console=console)
    screen = console.export_text()
    assert "stopped early, after step 4 of 8: the last 2 evaluations were no better" in screen
    assert "best evaluation: loss 1.9500 at step 3, checkpoint-3" in screen
    assert "the weights that are saved are those of step 3, the best" in screen
    output = tmp_path / "output"
    assert same(output, output / "checkpoint-3")
    assert not same(output, output / "checkpoint-4")
    ending = {
        "saved_step": 3,
        "best_step": 3,
        "best_eval_loss": 1.95,
        "best_checkpoint": "checkpoint-3",
        "stopped_early": True,
    }
    (leg,) = json.loads((output / "run.json").read_text())["legs"]
    assert {name: leg[name] for name in ending} == ending
    assert {name: result.metrics[name] for name in ending} == ending
    assert (result.metrics["global_step"], result.metrics["eval_loss"]) == (4, 1.95), "of the weights that are saved"

    evaluations([])  # a run that stopped early is a finished one
    again = train(recipe(tmp_path, checkpoint, **stopping), resume=True, console=QUIET)
    assert again.metrics["leg"]["steps"] == 0
    assert again.metrics["saved_step"] == 3
    assert same(output, output / "checkpoint-3")
    evaluations([1.0, 1.0, 1.0, 1.0])  # more patience acts, and the count goes on
    more = train(recipe(tmp_path, checkpoint, **{**stopping, "early_stopping_patience": 3}), resume=True, console=QUIET)
    assert more.metrics["global_step"] == 8


def test_patience_is_counted_across_a_resume(tmp_path: Path, checkpoint: Path, evaluations: Any) -> None:
    evaluations([1.0, 2.0, 2.0, 2.0])
    train(recipe(tmp_path, checkpoint, max_steps=2, early_stopping_patience=3), console=QUIET)
    result = train(recipe(tmp_path, checkpoint, early_stopping_patience=3), resume=True, console=QUIET)
    assert result.metrics["global_step"] == 4
    assert result.metrics["saved_step"] == 4, "the last weights, where the best are not asked for"


def test_the_best_evaluation_is_kept_between_saves(tmp_path: Path, checkpoint: Path, evaluations: Any) -> None:
    evaluations([3.0, 1.0, 2.0, 2.0])
    steps = {"save_steps": 4, "max_steps": 4, "load_best_model_at_end": True, "save_total_limit": 1}
    result = train(recipe(tmp_path, checkpoint, **steps), console=QUIET)
    assert result.metrics["saved_step"] == 2
    assert same(tmp_path / "output", tmp_path / "output" / "checkpoint-2")


def test_a_best_evaluation_without_a_checkpoint_is_named_so(tmp_path: Path, checkpoint: Path, evaluations: Any) -> None:
    evaluations([1.0, 2.0])
    result = train(recipe(tmp_path, checkpoint, save_steps=2, max_steps=2), console=QUIET)
    found = {name: result.metrics[name] for name in ("saved_step", "best_step", "best_checkpoint")}
    assert found == {"saved_step": 2, "best_step": 1, "best_checkpoint": None}


def test_the_best_checkpoint_is_found_by_another_path(
    tmp_path: Path, checkpoint: Path, evaluations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was saved: relative; in its folder, absolute; and the folder moved."""
    monkeypatch.chdir(tmp_path)
    steps = {"load_best_model_at_end": True, "save_total_limit": 1}
    evaluations([1.0, 2.0])
    train(recipe(tmp_path, checkpoint, **steps, max_steps=2, output_dir="output"), console=QUIET)
    evaluations([2.0, 2.0])
    absolute = recipe(tmp_path, checkpoint, **steps, max_steps=3, output_dir=str(tmp_path / "output"))
    assert train(absolute, resume=True, console=QUIET).metrics["saved_step"] == 1
    (tmp_path / "output").rename(tmp_path / "moved")
    evaluations([2.0, 2.0])
    moved = recipe(tmp_path, checkpoint, **steps, max_steps=3, output_dir=str(tmp_path / "moved"))
    assert train(moved, resume=True, console=QUIET).metrics["best_checkpoint"] == "checkpoint-1"
    assert same(tmp_path / "moved", tmp_path / "moved" / "checkpoint-1")


def test_a_checkpoint_may_go_by_a_link_or_another_name(tmp_path: Path, checkpoint: Path, evaluations: Any) -> None:
    evaluations([3.0, 2.0])
    train(recipe(tmp_path, checkpoint, max_steps=2), console=QUIET)
    (tmp_path / "latest").symlink_to(tmp_path / "output" / "checkpoint-2")
    (tmp_path / "output" / "checkpoint-1").rename(tmp_path / "kept")
    for name, step in (("latest", 2), ("kept", 1)):
        evaluations([1.0, 1.0])
        train(recipe(tmp_path, checkpoint, max_steps=3), resume=str(tmp_path / name), console=QUIET)
        legs = json.loads((tmp_path / "output" / "run.json").read_text())["legs"]
        assert legs[-1]["from_step"] == step


def test_the_best_is_named_by_the_figure_that_was_compared(tmp_path: Path, checkpoint: Path) -> None:
    values = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    compared = {"metric_for_best_model": "rewards/margins", "greater_is_better": True}
    data = {"train": [{"path": str(write_pairs(tmp_path / "pairs.jsonl", 6))}]}
    data["eval"] = [{"path": str(write_pairs(tmp_path / "held.jsonl", 4, first=20))}]
    pairs = make_recipe(
        tmp_path,
        checkpoint,
        data=data,
        preference={},
        lora={"r": 2, "target_modules": ["q_proj"]},
        training={**values, **compared},
        verify={"enabled": False, "lengths": None},
    )
    console = Console(record=True, width=200, file=(tmp_path / "screen.txt").open("w"))
    result = train(pairs, console=console)
    assert "best_eval_loss" not in result.metrics
    best = max(entry["eval_rewards/margins"] for entry in result.log_history if "eval_loss" in entry)
    assert result.metrics["best_eval_rewards/margins"] == best
    assert f"best evaluation: rewards/margins {best:.4f} at step" in console.export_text()


def test_a_finished_run_that_takes_preferences_now_is_evaluated_anew(tmp_path: Path, checkpoint: Path) -> None:
    """Its log holds a loss of that step, and no rewards."""
    train(recipe(tmp_path, checkpoint, max_steps=1), console=QUIET)
    pairs = str(write_pairs(tmp_path / "pairs.jsonl", 6))
    supervised = recipe(tmp_path, checkpoint, max_steps=1).model_dump(mode="json", exclude_unset=True)
    supervised["data"] |= {"train": [{"path": pairs}], "eval": [{"path": pairs}]}
    now = Recipe.model_validate({**supervised, "preference": {}})
    result = train(now, resume=True, allow_change=True, console=QUIET)
    assert result.metrics["leg"]["steps"] == 0
    assert result.metrics["eval_pairs"] == 6


def test_evaluations_and_saves_by_epoch(tmp_path: Path, checkpoint: Path) -> None:
    by_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_steps": None, "save_steps": 500}
    result = train(recipe(tmp_path, checkpoint, **by_epoch, num_train_epochs=2.0, max_steps=-1), console=QUIET)
    evaluated = [entry["step"] for entry in result.log_history if "eval_loss" in entry]
    saved = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "output").glob("checkpoint-*"))
    last = result.metrics["global_step"]
    assert evaluated == saved == [last // 2, last]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"eval_strategy": "no", "eval_steps": None, "early_stopping_patience": 1}, "early_stopping_patience needs"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold cannot act without early_stopping_patience"),
        ({"load_best_model_at_end": True, "save_strategy": "epoch", "save_steps": 500}, "set both to the same"),
    ],
)
def test_what_cannot_be_compared_is_said_first(
    tmp_path: Path, checkpoint: Path, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(recipe(tmp_path, checkpoint, **training), console=QUIET)
    assert not (tmp_path / "output").exists()


def test_a_finished_run_is_evaluated_anew_on_other_held_out_data(tmp_path: Path, checkpoint: Path) -> None:
    once = {"eval_steps": 2, "save_steps": 4, "max_steps": 4}
    first = train(recipe(tmp_path, checkpoint, **once), console=QUIET).metrics
    other = recipe(tmp_path, checkpoint, **once).model_dump(exclude_none=True)
    other["data"]["eval"] = [{"path": str(write_conversations(tmp_path / "other.jsonl", 3, first=70))}]
    screen = Console(record=True, width=300, file=(tmp_path / "screen.txt").open("w"))
    again = train(Recipe.model_validate(other), resume=True, console=screen).metrics
    assert again["leg"]["steps"] == 0
    assert again["eval_loss"] != first["eval_loss"]
    assert again["eval_trained_tokens"] != first["eval_trained_tokens"]
    assert again.get("best_eval_loss") in (None, again["eval_loss"]), "none of the data before"
    assert "data.eval.0.path" in screen.export_text()
    kept = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert {**kept, "leg": None} == {**again, "leg": None}
    assert kept["leg"] == first["leg"], "of the training, which was not done again"
    assert json.loads((tmp_path / "output" / "run.json").read_text())["legs"][-1]["eval_loss"] == again["eval_loss"]


def test_a_finished_run_that_is_resumed_as_it_was_keeps_its_figures(tmp_path: Path, checkpoint: Path) -> None:
    once = {"eval_steps": 2, "save_steps": 4, "max_steps": 4}
    train(recipe(tmp_path, checkpoint, **once), console=QUIET)
    figures = (tmp_path / "output" / "metrics.json").read_text()
    train(recipe(tmp_path, checkpoint, **once), resume=True, console=QUIET)
    assert (tmp_path / "output" / "metrics.json").read_text() == figures
    (tmp_path / "output" / "adapter_model.safetensors").unlink()  # which is saved again
    train(recipe(tmp_path, checkpoint, **once), resume=True, console=QUIET)
    assert (tmp_path / "output" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "output" / "metrics.json").read_text())["leg"] == json.loads(figures)["leg"]


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_best_checkpoint_is_not_returned_to(
    tmp_path: Path, checkpoint: Path, evaluations: Any, damage: str
) -> None:
    keep = {"load_best_model_at_end": True}
    evaluations([1.0, 2.0])
    train(recipe(tmp_path, checkpoint, **keep, max_steps=2), console=QUIET)
    weights = tmp_path / "output" / "checkpoint-1" / "adapter_model.safetensors"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:99])
    evaluations([3.0])
    found = train(recipe(tmp_path, checkpoint, **keep, max_steps=3), resume=True, console=QUIET).metrics
    assert (found["saved_step"], found["best_step"], found["best_checkpoint"]) == (3, 1, None)
    assert same(tmp_path / "output", tmp_path / "output" / "checkpoint-3")


def test_where_a_run_stops_early_a_checkpoint_is_saved(tmp_path: Path, checkpoint: Path, evaluations: Any) -> None:
    """None is due there, and without one a resumed run would train the steps since the last again."""
    stopping = recipe(tmp_path, checkpoint, early_stopping_patience=2, save_steps=8)
    evaluations([1.0, 2.0, 3.0])
    train(stopping, console=QUIET)
    assert [path.name for path in (tmp_path / "output").glob("checkpoint-*")] == ["checkpoint-3"]
    assert train(stopping, resume=True, console=QUIET).metrics["leg"]["steps"] == 0


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_evaluations_that_are_no_numbers_leave_json_and_are_never_the_best(
    tmp_path: Path, checkpoint: Path, evaluations: Any
) -> None:
    keep = {"load_best_model_at_end": True}
    evaluations([float("nan"), float("nan")])
    train(recipe(tmp_path, checkpoint, **keep, max_steps=2), console=QUIET)
    files = [path for path in (tmp_path / "output").rglob("*.json") if path.name != "tokenizer.json"]
    assert {"trainer_state.json", "metrics.json", "run.json", "manifest.json"} <= {path.name for path in files}
    assert [strict(path.read_text()) for path in files]
    evaluations([3.0, 2.0])
    train(recipe(tmp_path, checkpoint, **keep, max_steps=4), resume=True, console=QUIET)
    metrics = strict((tmp_path / "output" / "metrics.json").read_text())
    assert (metrics["best_step"], metrics["best_eval_loss"]) == (4, 2.0)


def steps_evaluated(run: Path) -> list[int]:
    entries = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    return [entry["step"] for entry in entries if "eval_loss" in entry]


class Signalled(TrainerCallback):  # type: ignore[misc]
    """Sends this process a SIGTERM in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("before", "saves"), [(1, "epoch"), (0, "epoch"), (0, "steps")])
def test_a_signal_adds_no_evaluation_and_takes_none(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, before: int, saves: str
) -> None:
    epochs = {
        "eval_strategy": "epoch",
        "eval_steps": None,
        "save_strategy": saves,
        "save_steps": 500,
        "max_steps": -1,
        "num_train_epochs": 2,
        "load_best_model_at_end": saves == "epoch",
        "early_stopping_patience": 5,
    }
    whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
    train(recipe(tmp_path, checkpoint, **epochs, output_dir=str(whole)), console=QUIET)
    ends = steps_evaluated(whole)
    assert len(ends) == 2
    build = run_module.trainer_for

    def signalled(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.add_callback(Signalled(ends[0] - before))
        return trainer

    settings = recipe(tmp_path, checkpoint, **epochs, output_dir=str(stopped))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "trainer_for", signalled)
        with pytest.raises(InterruptedRunError):
            train(settings, console=QUIET)
    assert steps_evaluated(stopped) == ([] if before else ends[:1])
    left = json.loads((stopped / f"checkpoint-{ends[0] - before}" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in left if "eval_loss" in entry] == ([] if before else ends[:1])
    train(settings, resume=True, console=QUIET)
    assert steps_evaluated(stopped) == ends
    assert same(whole, stopped)
    state, expected = (
        json.loads((folder / f"checkpoint-{ends[1]}" / "trainer_state.json").read_text()) for folder in (stopped, whole)
    )
    assert [state[key] for key in ("best_metric", "best_global_step")] == [
        expected[key] for key in ("best_metric", "best_global_step")
    ]
    counted = [found["stateful_callbacks"]["EarlyStopping"] for found in (state, expected)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("cut", [0, 1], ids=["whole epochs", "the second one cut short"])
def test_the_checkpoint_of_an_epochs_last_step_knows_its_evaluation(
    tmp_path: Path, checkpoint: Path, evaluations: Any, cut: int
) -> None:
    first = recipe(tmp_path, checkpoint, max_steps=1, eval_strategy="no", eval_steps=None)
    train(first, console=QUIET)
    state = json.loads((tmp_path / "output" / "checkpoint-1" / "trainer_state.json").read_text())
    steps = round(1 / state["epoch"])  # of an epoch
    assert steps > 2
    by_epochs = {"eval_strategy": "epoch", "eval_steps": None, "metric_for_best_model": "eval_loss"}
    evaluations([3.0, 2.0])
    (tmp_path / "epochs").mkdir()
    settings = recipe(tmp_path / "epochs", checkpoint, **by_epochs, max_steps=2 * steps - cut)
    result = train(settings, console=QUIET)
    output = tmp_path / "epochs" / "output"

    def evaluated(step: int) -> dict[int, float]:
        state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
        return {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}

    last = 2 * steps - cut
    assert evaluated(steps - 1) == {}
    assert evaluated(steps) == evaluated(last - 1) == {steps: 3.0}
    assert evaluated(last) == {steps: 3.0, last: 2.0}
    assert result.metrics["best_checkpoint"] == f"checkpoint-{last}"
