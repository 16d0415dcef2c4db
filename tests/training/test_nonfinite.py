"""Losses and gradient norms that are no numbers: the step and the rows are named, and the run does as it was told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_cases import Packs, make_trainer, weights

from deltatune import prepare
from deltatune.errors import UserError
from deltatune.parallel.mesh import Mesh
from deltatune.training.batches import PackOrigins
from deltatune.training.nonfinite import MOST_SKIPPED, FiniteWatch
from deltatune.training.trainer import PackedTrainer
from tiny import tiny_model

PACKS = 6


def small() -> Any:
    model = tiny_model("qwen3", layers=1)
    prepare(model)
    return model


def trainer_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: dict[int, float], action: str = "stop", **training: Any
) -> PackedTrainer:
    """A trainer whose n-th micro-batches, counted from 0, have these losses."""
    values = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tmp_path / "run", model=small(), packs=Packs(PACKS), **{**values, **training})
    trainer._on_nonfinite = action  # type: ignore[assignment]
    compute, calls = trainer.compute_loss, iter(range(10_000))

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        number = next(calls)
        return loss * bad[number] if number in bad else loss

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    return trainer


def losses(trainer: PackedTrainer) -> list[float | None]:
    return [
        entry.get("loss") for entry in trainer.state.log_history if "grad_norm" in entry or "skipped_steps" in entry
    ]


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_the_step_and_the_rows_of_the_pack_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, word: str
) -> None:
    """Of a log line of three steps and two packs a step, the one pack that it began with."""
    trainer = trainer_with(tmp_path, monkeypatch, {3: value}, logging_steps=3, gradient_accumulation_steps=2)
    message = rf"the loss is {word} at step 2 \(pack 3, row 0; pack 3, row 1; pack 3, row 2( and \d more)?\); nothing"
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert trainer.state.global_step == 3


def test_nothing_is_saved_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that falls between two log lines is one of the places where the figures are read."""
    training = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 100, "max_steps": 8}
    trainer = trainer_with(tmp_path, monkeypatch, {2: float("nan")}, **training)
    with pytest.raises(UserError, match="at step 3"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]


def test_a_run_without_log_lines_finds_it_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, {1: float("nan")}, logging_strategy="no")
    with pytest.raises(UserError, match="the loss is nan at step 2"):
        trainer.train()


def test_a_gradient_that_is_no_number_behind_a_loss_that_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, {}, gradient_accumulation_steps=2)
    weight = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    calls = iter(range(100))
    weight.register_hook(lambda gradient: gradient * float("inf") if next(calls) == 3 else gradient)
    with pytest.raises(UserError, match=r"the gradient norm is (nan|inf) at step 2 \(pack 2, row 0; .*\d+ more\)"):
        trainer.train()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_update_leaves_weights_and_optimizer_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulated: int, value: float
) -> None:
    training = {"gradient_accumulation_steps": accumulated, "weight_decay": 0.1}
    trainer = trainer_with(tmp_path, monkeypatch, {accumulated: value}, "skip", **training)
    seen: list[Any] = []

    def keep(*_: Any, **__: Any) -> Any:
        moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
        steps = [int(state["step"]) for state in trainer.optimizer.state.values()]
        seen.append((weights(trainer.model), moments, steps))
        return trainer.control

    monkeypatch.setattr(trainer.meter, "on_step_end", keep)
    told: list[int] = []
    trainer.on_skip = lambda found: told.append(found.step)
    trainer.train()
    first, second, third = seen[0], seen[1], seen[2]
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    assert all(map(torch.equal, first[1], second[1]))
    assert first[2] == second[2]
    assert set(third[2]) == {2}, "the second update of the third step"
    assert told == [found.step for found in trainer.skipped] == [2]
    assert [loss is None for loss in losses(trainer)] == [False, True, False, False]
    assert all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())


def test_the_step_after_is_what_it_would_be_without_the_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a constant rate a run that skips its second step is one over the other packs."""
    constant = {"lr_scheduler_type": "constant", "max_steps": 4}
    skipping = trainer_with(tmp_path / "a", monkeypatch, {1: float("nan")}, "skip", **constant)
    skipping.train()
    without = trainer_with(tmp_path / "b", monkeypatch, {}, **{**constant, "max_steps": 3})
    del without.train_dataset.packs[1]
    without.train()
    assert [loss for loss in losses(skipping) if loss is not None] == losses(without)
    assert all(torch.equal(value, weights(without.model)[name]) for name, value in weights(skipping.model).items())


def test_the_loss_of_a_line_is_the_mean_of_the_steps_that_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = trainer_with(tmp_path / "a", monkeypatch, {1: float("nan")}, "skip")
    each.train()
    together = trainer_with(tmp_path / "b", monkeypatch, {1: float("nan")}, "skip", logging_steps=4)
    together.train()
    made = [loss for loss in losses(each) if loss is not None]
    assert losses(together) == [pytest.approx(sum(made) / 3, rel=1e-5)]
    assert together.state.log_history[0]["skipped_steps"] == 1


def test_the_loss_of_a_leg_is_the_mean_of_the_steps_that_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, {1: float("nan"), 3: float("nan")}, "skip", logging_steps=3)
    result = trainer.train()
    each = trainer_with(tmp_path / "each", monkeypatch, {1: float("nan"), 3: float("nan")}, "skip")
    each.train()
    made = [loss for loss in losses(each) if loss is not None]
    assert len(made) == 2
    mean = pytest.approx(sum(made) / 2, rel=1e-5)
    assert trainer.state.log_history[-1]["train_loss"] == mean
    assert (result.training_loss, result.metrics["train_loss"]) == (mean, mean)


def test_a_leg_without_a_step_that_was_made_has_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, dict.fromkeys(range(4), float("nan")), "skip")
    result = trainer.train()
    assert "train_loss" not in trainer.state.log_history[-1]
    assert math.isnan(result.training_loss)


def test_too_many_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = dict.fromkeys([0, 1, *range(3, 40)], float("nan"))
    trainer = trainer_with(tmp_path, monkeypatch, bad, "skip", max_steps=40)
    with pytest.raises(UserError, match=rf"at step {MOST_SKIPPED + 3} .*, the {MOST_SKIPPED}th step in a row"):
        trainer.train()


def test_a_dump_holds_what_the_model_was_called_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {3: float("nan")}
    trainer = trainer_with(tmp_path, monkeypatch, bad, "dump", logging_steps=4, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"the loss is nan at step 2 \(pack 3, .*its packs are in .*nonfinite-step-2"):
        trainer.train()
    folder = tmp_path / "run" / "nonfinite-step-2"
    said = json.loads((folder / "step.json").read_text())
    assert (said["step"], said["what"]) == (2, "the loss is nan")
    assert [pack["loss"] == "nan" for pack in said["packs"]] == [False, True]
    for number, pack in zip((2, 3), said["packs"], strict=True):
        samples = trainer.train_dataset.packs[number]
        expected = trainer.data_collator([samples])
        tensors = load_file(folder / pack["file"])
        assert all(torch.equal(tensors[name], expected[name]) for name in ("input_ids", "labels", "position_ids"))
        assert tensors["cu_seqlens"].tolist()[: len(samples) + 1] == [
            0, *torch.tensor([len(sample) for sample in samples]).cumsum(0).tolist()
        ]  # fmt: skip
        assert pack["documents"] == [f"pack {number}, row {row}" for row in range(len(samples))]


def test_a_run_that_stops_waits_no_more_than_one_that_does_not_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between log lines nothing is read; ``skip`` and ``dump`` read once a step."""
    read, counts = FiniteWatch.read, {}
    for action in ("stop", "skip", "dump"):
        reads: list[int] = []
        monkeypatch.setattr(FiniteWatch, "read", lambda self, reads=reads: (reads.append(1), read(self))[1])
        trainer_with(tmp_path / action, monkeypatch, {}, action, max_steps=8, logging_steps=4).train()
        counts[action] = len(reads)
    assert counts["stop"] <= 3
    assert counts["skip"] >= 8
    assert counts["dump"] >= 8


def test_ranks_stop_at_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one whose loss is a number hears of the other's, and names no rows of its own."""
    told = []

    def summed(self: Mesh, value: torch.Tensor) -> torch.Tensor:
        told.append(value.tolist())
        return torch.tensor([0, 5])

    monkeypatch.setattr(Mesh, "sum_over_ranks", summed)
    found = {}
    for rank, loss in ((0, 1.0), (1, float("nan"))):
        watch = FiniteWatch(Mesh(2, rank), str)
        for step, value in ((4, 1.0), (5, loss)):
            watch.begin(step, [PackOrigins((rank,))])
            watch.add_loss(torch.tensor(value))
        found[rank] = str(watch.read())
    assert told == [[0, 0], [0, 5]], "what is summed over the ranks"
    assert found == {0: "the loss of another rank is not finite at step 5", 1: "the loss is nan at step 5 (1)"}
