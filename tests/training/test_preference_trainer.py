"""Pairs over packs, micro-batches, ranks and runs: what is averaged, what is held against what, and what it learns."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_cases import byte_tokenizer, make_recipe, save_checkpoint, weights, write_conversations, write_pairs

from deltatune.config.rewards import REWARDS
from deltatune.errors import UserError
from deltatune.training import planned
from deltatune.training import run as run_module
from deltatune.training.arguments import training_arguments
from deltatune.training.console import RunConsole
from deltatune.training.preference_trainer import PreferenceTrainer
from deltatune.training.run import TrainResult, build, train
from forked import free_port, run_ranks
from tiny import tiny_model

QUIET = Console(quiet=True)
LORA = {"r": 4, "target_modules": ["q_proj", "in_proj_qkv", "down_proj"]}
CONSTANT = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base")


def recipe_of(folder: Path, checkpoint: Path, *, output: str = "output", **sections: Any) -> Any:
    """A run on 24 pairs, some eight to a pack."""
    data = {"train": [{"path": str(write_pairs(folder / "pairs.jsonl", 24))}], **sections.pop("data", {})}
    training = {"output_dir": str(folder / output), **sections.pop("training", {})}
    values: dict[str, Any] = {"lora": LORA, "preference": {}, **sections}
    return make_recipe(folder, checkpoint, data=data, training=training, **values)


def trainer_of(recipe: Any) -> PreferenceTrainer:
    trainer = run_module._trainer(build(recipe, training_arguments(recipe.training), RunConsole(QUIET)))
    assert isinstance(trainer, PreferenceTrainer)
    return trainer


def logged(result: TrainResult | PreferenceTrainer, name: str) -> list[float]:
    history = result.log_history if isinstance(result, TrainResult) else result.state.log_history
    return [entry[name] for entry in history if name in entry]


def test_accumulated_packs_equal_one_pack_of_all_pairs(tmp_path: Path, checkpoint: Path) -> None:
    results = []
    for name, tokens, accumulated in (("many", 160, 5), ("one", 1600, 1)):
        training = {"max_steps": 3, "gradient_accumulation_steps": accumulated, **CONSTANT}
        recipe = recipe_of(tmp_path, checkpoint, output=name, packing={"tokens_per_batch": tokens}, training=training)
        trainer = trainer_of(recipe)
        sizes = {len(pack) // 2 for pack in (trainer.train_dataset[n] for n in range(len(trainer.train_dataset)))}
        assert (len(sizes) > 1) == (accumulated > 1), "unequal packs are the point"
        assert len(trainer.train_dataset) == accumulated
        trainer.train()
        results.append(trainer)
    for name in ("loss", *REWARDS):
        assert logged(results[0], name) == pytest.approx(logged(results[1], name), rel=1e-4, abs=1e-6), name
    for name, value in weights(results[0].model).items():
        torch.testing.assert_close(value, weights(results[1].model)[name], rtol=1e-5, atol=1e-6)


def test_an_evaluation_averages_over_pairs_and_not_packs(tmp_path: Path, checkpoint: Path) -> None:
    lora = {**LORA, "init_lora_weights": False}
    data = {"eval": [{"path": str(write_pairs(tmp_path / "eval.jsonl", 7, first=100))}]}
    trainer = trainer_of(recipe_of(tmp_path, checkpoint, data=data, lora=lora, packing={"tokens_per_batch": 160}))
    found, batches = trainer.evaluate(), list(trainer.get_eval_dataloader())
    sizes = [batch["num_documents"] // 2 for batch in batches]
    with torch.no_grad():
        means = [float(trainer.compute_loss(trainer.model.eval(), batch)) for batch in batches]
    assert found["eval_pairs"] == sum(sizes) == 7
    assert found["eval_loss"] == pytest.approx(np.average(means, weights=sizes), rel=1e-6)
    assert abs(found["eval_loss"] - np.mean(means)) > 1e-4, "packs of one size would not show it"
    assert found["eval_rewards/margins"] == pytest.approx(found["eval_rewards/chosen"] - found["eval_rewards/rejected"])


def test_the_start_is_the_model_without_a_new_adapter(tmp_path: Path, checkpoint: Path) -> None:
    """So one reference is as good as the other, over three steps and an evaluation."""
    data = {"val_size": 5}
    settings = {"data": data, "training": {"max_steps": 3, **CONSTANT}}
    in_step, before = (trainer_of(recipe_of(tmp_path, checkpoint, output=name, **settings)) for name in "ab")
    before.compute_reference()
    assert before.train_dataset.reference.shape == before.train_dataset.lengths.shape
    for trainer in (in_step, before):
        trainer.train()
    assert logged(before, "loss")[0] == pytest.approx(np.log(2), rel=1e-6)
    assert logged(before, "loss") == pytest.approx(logged(in_step, "loss"), rel=1e-5)
    assert before.evaluate()["eval_loss"] == pytest.approx(in_step.evaluate()["eval_loss"], rel=1e-5)


def test_pissas_reference_is_the_model_at_the_start(tmp_path: Path, checkpoint: Path) -> None:
    """Under its adapter lies a base without its largest singular values, which is no model to compare with."""
    recipe = recipe_of(tmp_path, checkpoint, lora={**LORA, "init_lora_weights": "pissa"}, training={"max_steps": 1})
    trainer = trainer_of(recipe)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(np.log(2), rel=1e-5)


def test_the_routers_loss_is_weighed_by_pairs(tmp_path: Path) -> None:
    """It is a figure of a pack, and packs hold unequal numbers of pairs."""
    found = []
    for coefficient in (0.0, 0.5):
        model = tiny_model("qwen3_moe", layers=1, vocab_size=len(byte_tokenizer()))
        model.config.output_router_logits, model.config.router_aux_loss_coef = True, coefficient
        checkpoint = save_checkpoint(tmp_path / f"moe{coefficient}", model)
        data = {"eval": [{"path": str(write_pairs(tmp_path / "eval.jsonl", 7, first=100))}]}
        settings = {"data": data, "preference": {"loss": "simpo"}, "packing": {"tokens_per_batch": 160}}
        trainer = trainer_of(recipe_of(tmp_path, checkpoint, lora={"r": 2, "target_modules": ["q_proj"]}, **settings))
        found.append(trainer.evaluate()["eval_loss"])
    total = 0.0
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            call = {name: batch[name] for name in ("input_ids", "labels", "position_ids", "sequences")}
            total += batch["num_documents"] // 2 * float(trainer.model(**call).aux_loss)
    assert found[1] - found[0] == pytest.approx(0.5 * total / 7, rel=1e-4)
    assert total > 1


@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo"])
def test_it_learns_which_answer_is_preferred(tmp_path: Path, checkpoint: Path, loss: str) -> None:
    data = {"val_size": 6}
    settings = {"max_steps": 15, "learning_rate": 2e-2, "logging_steps": 5}
    recipe = recipe_of(tmp_path, checkpoint, data=data, preference={"loss": loss}, training=settings)
    result = train(recipe, console=QUIET)
    accuracies, found = logged(result, "rewards/accuracies"), result.metrics
    assert accuracies[-1] > max(accuracies[0], 0.95)
    assert logged(result, "loss")[-1] < logged(result, "loss")[0]
    assert found["eval_rewards/accuracies"] >= 5 / 6
    assert found["eval_pairs"] == 6


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "every weight"])
def test_a_resumed_run_equals_one_that_went_through(tmp_path: Path, checkpoint: Path, lora: Any) -> None:
    """Of a reference in every step, and of one from the start, which is not the checkpoint."""
    saved = {"save_strategy": "steps", "save_steps": 2}
    files = []
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for number, last in enumerate(steps):
            training = {"max_steps": last, **saved, **CONSTANT}
            recipe = recipe_of(tmp_path, checkpoint, output=name, lora=lora, training=training)
            result = train(recipe, resume=number > 0, console=QUIET)
        file = "model.safetensors" if lora is None else "adapter_model.safetensors"
        files.append((load_file(tmp_path / name / file), logged(result, "loss")))
    (expected, losses), (found, resumed) = files
    assert losses == resumed
    assert losses[3] != losses[2]
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_compiled_layers_have_graphs_for_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none is compiled twice, with evaluations between the steps."""
    model = tiny_model("qwen3", layers=1, vocab_size=len(byte_tokenizer()))  # one type of layer to trace
    checkpoint = save_checkpoint(tmp_path / "small", model)
    given = planned.compile_options
    monkeypatch.setattr(
        planned,
        "compile_options",
        lambda recipe: recipe.compile and dataclasses.replace(given(recipe), backend="aot_eager"),
    )
    settings: dict[str, Any] = {"data": {"val_size": 5}, "preference": {"beta": 0.3}}
    training = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, **CONSTANT}
    settings |= {"training": training, "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]}}
    eager = train(recipe_of(tmp_path, checkpoint, output="eager", **settings), console=QUIET)
    compiled = train(recipe_of(tmp_path, checkpoint, output="compiled", compile=True, **settings), console=QUIET)
    for name in ("loss", "eval_loss"):
        assert logged(compiled, name) == pytest.approx(logged(eager, name), rel=1e-4), name
    report = compiled.metrics["leg"]["compile"]
    assert (report["breaks"], report["recompiles"]) == ([], [])
    kinds = {name.partition(" ")[2] for name in report["graphs"]}
    assert kinds == {"", "(no grad)", "(no grad) (reference)"}


def test_a_step_that_is_left_out_counts_in_no_reward(tmp_path: Path, checkpoint: Path) -> None:
    training = {"max_steps": 3, "on_nonfinite": "skip", "logging_steps": 3, **CONSTANT}
    trainer = trainer_of(recipe_of(tmp_path, checkpoint, training=training))
    compute, calls = trainer.compute_loss, list[int]()

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = compute(*args, **kwargs)
        if len(calls) == 2:
            trainer._rewards += torch.nan
            return loss * torch.nan
        return loss

    trainer.compute_loss = broken
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["skipped_steps"] == 1
    assert np.isfinite([entry[name] for name in REWARDS]).all()


def test_two_ranks_equal_one_process(tmp_path: Path, checkpoint: Path) -> None:
    """Packs of unequal numbers of pairs, an odd number of packs, and a reference from the start."""
    run_ranks(rank_main, str(tmp_path), str(checkpoint), free_port(), count=2)
    alone = ranked(tmp_path, checkpoint, "alone", gradient_accumulation_steps=2)
    assert len(alone.train_dataset) % 2
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name in ("loss", "rewards/margins", "eval_loss"):
            assert found[name] == pytest.approx(logged(alone, name), rel=1e-4), name
        for name, value in weights(alone.model).items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-6)


def ranked(folder: Path, checkpoint: Path, output: str, **training: Any) -> PreferenceTrainer:
    training |= {"num_train_epochs": 2, "max_steps": -1, **CONSTANT}
    data = {"val_size": 5, "num_proc": 1}
    packing = {"tokens_per_batch": 200}
    recipe = recipe_of(folder, checkpoint, output=output, lora=None, data=data, training=training, packing=packing)
    trainer = trainer_of(recipe)
    trainer.train()
    trainer.evaluate()
    return trainer


def rank_main(rank: int, folder: str, checkpoint: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    trainer = ranked(Path(folder), Path(checkpoint), "ranks")
    state: dict[str, Any] = {name: logged(trainer, name) for name in ("loss", "rewards/margins", "eval_loss")}
    torch.save({**state, "weights": weights(trainer.model)}, Path(folder) / f"rank{rank}.pt")


@pytest.mark.parametrize(
    ("preference", "write", "message"),
    [
        ({}, write_conversations, "needs pairs of answers, and .* has no columns chosen and rejected"),
        (None, write_pairs, r"holds pairs of answers .*: add preference: \{\} to train on them by DPO"),
    ],
)
def test_rows_and_section_must_agree(
    tmp_path: Path, checkpoint: Path, preference: Any, write: Any, message: str
) -> None:
    data = {"train": [{"path": str(write(tmp_path / "rows.jsonl", 8))}]}
    recipe = recipe_of(tmp_path, checkpoint, data=data, preference=preference)
    with pytest.raises(UserError, match=message):
        train(recipe, console=QUIET)
