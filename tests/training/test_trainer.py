"""The loss over micro-batches and ranks, the evaluation, and what an interrupted run continues with."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from training_cases import TOKENS, Packs, make_trainer, weights

from deltatune import prepare
from deltatune.packing.collate import PackedCollator
from deltatune.parallel.mesh import Mesh
from deltatune.training import trainer as trainer_module
from deltatune.training.batches import PACK_COUNTS, PACK_ORIGINS, CountingCollator
from deltatune.training.trainer import PackedTrainer
from tiny import FAMILIES, VOCAB, tiny_model


def prepared(family: str = "qwen3_5", **options: Any) -> Any:
    model = tiny_model(family)
    prepare(model, **options)
    return model


def small() -> Any:
    """For what does not depend on the family."""
    model = tiny_model("qwen3", layers=1)
    prepare(model)
    return model


def train_once(output_dir: Path, packs: Packs, **training: Any) -> Any:
    trainer = make_trainer(
        output_dir,
        model=prepared(),
        packs=packs,
        max_steps=2,
        logging_steps=1,
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        **training,
    )
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_four_accumulated_packs_equal_one_pack_of_all_their_documents(tmp_path: Path) -> None:
    accumulated = train_once(tmp_path / "a", Packs(4), gradient_accumulation_steps=4)
    together = Packs(4)
    together.packs = [[sample for pack in together.packs for sample in pack]]
    at_once = train_once(tmp_path / "b", together, tokens=4 * TOKENS)
    assert losses(accumulated) == pytest.approx(losses(at_once), rel=1e-6)
    start = weights(prepared())
    for name, value in weights(accumulated.model).items():
        moved, other = value - start[name], weights(at_once.model)[name] - start[name]
        assert torch.linalg.vector_norm(moved - other) <= 1e-5 * torch.linalg.vector_norm(moved) + 1e-9, name
        torch.testing.assert_close(value, weights(at_once.model)[name], rtol=1e-6, atol=1e-7)


def test_the_loss_is_summed_and_divided_once_by_trained_tokens(tmp_path: Path) -> None:
    packs = Packs(3)
    counts = [sum(sample.num_trained for sample in pack) for pack in packs.packs]
    assert max(counts) > 2 * min(counts), "unequal micro-batches are the point"
    trainer = make_trainer(
        tmp_path / "run", model=prepared(), packs=packs, gradient_accumulation_steps=3, max_steps=1, logging_steps=1
    )
    expected = summed_nll(prepared(), packs) / sum(counts)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-6)


def summed_nll(model: Any, packs: Packs) -> float:
    """Every document alone, by the definition."""
    total = 0.0
    with torch.no_grad():
        for sample in (sample for pack in packs.packs for sample in pack):
            ids, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)
            logits = model(input_ids=ids).logits[0]
            total += float(F.cross_entropy(logits[:-1].double(), labels[1:], reduction="sum"))
    return total


def test_evaluation_weighs_tokens_not_batches(tmp_path: Path) -> None:
    model, packs = prepared(), Packs(5, seed=3)
    trainer = make_trainer(tmp_path / "run", model=model, eval_packs=packs)
    metrics = trainer.evaluate()
    expected = summed_nll(model, packs) / packs.num_trained
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_trained_tokens"] == packs.num_trained
    means = []
    for pack in packs.packs:
        one = Packs(0)
        one.packs = [pack]
        means.append(summed_nll(model, one) / one.num_trained)
    assert abs(sum(means) / len(means) - expected) > 1e-3, "the mean of batch means must differ for this to test it"


def test_the_routers_loss_is_the_mean_weighted_by_trained_tokens(tmp_path: Path) -> None:
    """Over accumulated packs and over an evaluation set, each pack's loss being that of a call by itself."""
    model, packs = tiny_model("qwen3_moe", layers=1), Packs(4)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    prepare(model)
    values = {"gradient_accumulation_steps": 4, "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, model=model, packs=packs, eval_packs=packs, **values)
    total, count, routed = 0.0, 0, 0.0
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            trained, _ = batch.pop(PACK_COUNTS).trained, batch.pop(PACK_ORIGINS)
            output = model(**batch)
            total, count = total + trained * output.loss.item(), count + trained
            routed += trained * 0.5 * output.aux_loss.item()
    assert routed > 0.05 * total
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(total / count, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_of_our_own_holds_no_logits(tmp_path: Path) -> None:
    model, packs = small(), Packs(2)
    trainer = make_trainer(tmp_path, model=model, packs=packs, eval_packs=packs, max_steps=1)
    logits = []
    model.register_forward_hook(lambda _module, _inputs, output: logits.append(output.logits))
    trainer.train()
    trainer.evaluate()
    assert logits == [None, None, None]
    model.eval()
    assert model(torch.ones(1, 5).long(), labels=torch.ones(1, 5).long()).logits.shape == (1, 5, VOCAB)


@pytest.mark.parametrize("split", [2, 3])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, split: int) -> None:
    def run(name: str, **training: Any) -> Any:
        # three steps an epoch: the resumed run starts inside an epoch, or at its end
        return make_trainer(
            tmp_path / name,
            model=prepared(),
            packs=Packs(6),
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            lr_scheduler_kwargs=None,
            num_train_epochs=2,
            save_steps=split,
            **{"save_strategy": "steps", **training},
        )

    whole = run("whole", save_strategy="no")
    whole.train()
    interrupted = run("parts")
    interrupted.add_callback(stop_after(split))
    interrupted.train()
    torch.rand(7)
    resumed = run("parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{split}"))
    assert resumed.state.global_step == whole.state.global_step == 6
    assert losses(resumed) == losses(whole)
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name
    assert resumed.train_dataset.seen != whole.train_dataset.seen, "the resumed run skips what it has seen"


def test_a_resumed_run_logs_and_saves_as_it_is_told_now(tmp_path: Path) -> None:
    """The state of a checkpoint holds the steps of the run before."""
    values = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    first = make_trainer(tmp_path, model=small(), packs=Packs(4), **values)
    first.add_callback(stop_after(2))
    first.train()
    values |= {"save_steps": 5, "logging_steps": 3}
    resumed = make_trainer(tmp_path, model=small(), packs=Packs(4), **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 6, 8]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-5", "checkpoint-8"}


def stop_after(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= step

    return Stop()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_checkpoint_of_every_family_reloads_exactly(tmp_path: Path, family: str) -> None:
    trained = make_trainer(tmp_path / "a", model=prepared(family), packs=Packs(2), max_steps=1, save_strategy="steps")
    trained.train()
    again = make_trainer(tmp_path / "b", model=prepared(family))
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()
    again._load_from_checkpoint(str(tmp_path / "a" / "checkpoint-1"))
    for name, value in weights(trained.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


def test_the_order_of_the_data_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    orders = []
    for disturbance in (0, 5):
        trainer = make_trainer(tmp_path / str(disturbance), model=small(), packs=Packs(6), max_steps=12)
        torch.rand(disturbance)
        trainer.train()
        orders.append(trainer.train_dataset.seen)
    assert orders[0] == orders[1]
    assert sorted(orders[0][:6]) == sorted(orders[0][6:]) == list(range(6))
    assert orders[0][:6] != orders[0][6:], "another order in the second epoch"


def test_log_lines_carry_honest_rates(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", model=small(), packs=Packs(4), max_steps=4, logging_steps=2)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < line["trained_tokens_per_second"] < line["tokens_per_second"]
    assert 0 < line["fill"] <= 1
    assert line["peak_memory_gib"] > 0
    assert not any(name.endswith("samples_per_second") for entry in trainer.state.log_history for name in entry)
    summary, packs = trainer.meter.summary(), trainer.train_dataset
    assert summary["trained_tokens"] == packs.num_trained
    assert summary["tokens"] == sum(len(sample) for pack in packs.packs for sample in pack)
    assert summary["fill"] == pytest.approx(summary["tokens"] / (4 * TOKENS), abs=1e-4)


@pytest.mark.parametrize(("steps", "logged"), [(2, [2]), (4, [3, 4]), (6, [3, 6])])
def test_the_last_step_is_logged(tmp_path: Path, steps: int, logged: list[int]) -> None:
    trainer = make_trainer(tmp_path, model=small(), packs=Packs(2), max_steps=steps, logging_steps=3)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == logged


def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run", model=small(), packs=Packs(3), max_steps=3, logging_strategy="no")
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        count_calls(monkeypatch, torch.Tensor, name, reads)
    # what the collator counts and the model checks is on the CPU by construction: only the loop itself is watched
    for owner, name in ((CountingCollator, "__call__"), (type(trainer), "training_step")):
        forget_inside(monkeypatch, owner, name, reads)
    between: list[int] = []

    def step_ends(*_: Any, **_kwargs: Any) -> None:
        between.append(len(reads))
        reads.clear()

    monkeypatch.setattr(trainer.meter, "on_step_end", step_ends)
    trainer.train()
    assert between[1:] == [0, 0], "the first step also covers what comes before it"
    assert not losses(trainer), "nothing was to be logged"


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: list[str]) -> None:
    original = getattr(owner, name)

    def counting(self: Any, *args: Any) -> Any:
        calls.append(name)
        return original(self, *args)

    monkeypatch.setattr(owner, name, counting)


def forget_inside(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: list[str]) -> None:
    original = getattr(owner, name)

    def forgetting(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(calls)
        result = original(self, *args, **kwargs)
        del calls[before:]
        return result

    monkeypatch.setattr(owner, name, forgetting)


def test_a_batch_equals_the_collators(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", model=small(), packs=Packs(2))
    batch = trainer.data_collator([trainer.train_dataset[1]])
    expected = PackedCollator(tokens_per_batch=TOKENS, pad_token_id=0)(trainer.train_dataset[1])
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["sequences"].lengths == expected["sequences"].lengths


@pytest.mark.parametrize("in_order", [False, True])
def test_a_trainer_lays_packs_out_for_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, in_order: bool
) -> None:
    monkeypatch.setattr(Mesh, "of", lambda *_: Mesh.at(2, 0, sequence=2))
    monkeypatch.setattr(PackedTrainer, "in_order", in_order)
    packs = Packs(12)
    trainer = make_trainer(tmp_path / "run", model=small(), packs=packs)
    plain = PackedCollator(tokens_per_batch=TOKENS, pad_token_id=0)
    moved = 0
    for number in range(12):
        batch, expected = trainer.data_collator([packs[number]]), plain(packs[number])
        assert batch[PACK_COUNTS].documents == len(packs[number])
        assert torch.equal(batch["input_ids"].sort().values, expected["input_ids"].sort().values)
        moved += (
            TOKENS // 2 in batch["sequences"].cu_seqlens_cpu and TOKENS // 2 not in expected["sequences"].cu_seqlens_cpu
        )
    assert bool(moved) is not in_order


def test_the_bar_goes_with_training_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    screen = io.StringIO()
    monkeypatch.setattr(trainer_module, "Screen", lambda: Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr(PackedTrainer, "compute_loss", failing)
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, disable_tqdm=False, max_steps=2).train()
    assert "0/2" in screen.getvalue()
    assert screen.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is back"
    assert threading.active_count() == before
