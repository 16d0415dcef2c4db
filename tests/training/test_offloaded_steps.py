"""Training steps with activations in the host's memory: the same weights, and nothing around evaluations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from training_cases import Packs, byte_tokenizer, make_recipe, make_trainer, save_checkpoint, weights, write_pairs

from deltatune import prepare
from deltatune.compile.offloading import Offloading
from deltatune.errors import UserError
from deltatune.training import run as run_module
from deltatune.training.arguments import training_arguments
from deltatune.training.console import RunConsole
from deltatune.training.run import build, train
from tiny import tiny_model

CPU = torch.device("cpu")
WIDTH = 256  # a layer's input of 1024 tokens is 1 MiB
TOKENS = 1024
VOCABULARY = len(byte_tokenizer())


def watched(model: Any) -> list[Offloading | None]:
    """What moves tensors, at each forward of the model."""
    found: list[Offloading | None] = []

    def note(*_: Any) -> None:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        found.append(hooks and hooks[0].__self__)

    model.register_forward_pre_hook(note)
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_accumulated_steps_and_evaluations_are_the_same(tmp_path: Path, family: str, checkpointing: str) -> None:
    trained = {}
    for offloading in (None, CPU):
        model = tiny_model(family, hidden_size=WIDTH, output_router_logits=True)
        prepare(model, checkpointing=checkpointing)
        moved = watched(model)
        trainer = make_trainer(
            tmp_path / str(offloading),
            model=model,
            packs=Packs(4, tokens=TOKENS),
            eval_packs=Packs(1, tokens=TOKENS, seed=1),
            tokens=TOKENS,
            offloading=offloading,
            gradient_accumulation_steps=2,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            logging_steps=1,
        )
        trainer.train()
        losses = [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]
        trained[offloading] = losses, weights(model)
        kinds = [offload is not None for offload in moved]
        assert kinds == [offloading is not None, offloading is not None, False] * 2
        assert all(offload.moved > 0 for offload in moved if offload is not None)
    assert len(trained[CPU][0]) == 4
    assert trained[CPU][0] == trained[None][0]
    for name, weight in trained[None][1].items():
        assert torch.equal(weight, trained[CPU][1][name]), name


def test_preferences_with_a_reference_are_the_same(tmp_path: Path) -> None:
    """The reference, the model without its adapter, runs in every step, without gradients."""
    checkpoint = save_checkpoint(tmp_path / "base", tiny_model("qwen3", vocab_size=VOCABULARY, hidden_size=WIDTH))
    recipe = make_recipe(
        tmp_path,
        checkpoint,
        data={"train": [{"path": str(write_pairs(tmp_path / "pairs.jsonl", 8))}]},
        lora={"r": 4, "target_modules": ["q_proj", "down_proj"]},
        preference={},
        packing={"tokens_per_batch": TOKENS},
        training={"output_dir": str(tmp_path / "output"), "max_steps": 2, "logging_steps": 1},
        checkpointing="layer",
    )
    trained = {}
    for offloading in (None, CPU):
        run = build(recipe, training_arguments(recipe.training), RunConsole(Console(quiet=True)))
        # a run that was built trains where it is
        said = recipe.model_copy(update={"activation_offloading": offloading is not None})
        trainer = run_module._trainer(replace(run, recipe=said))
        moved = watched(run.model)
        trainer.train()
        trained[offloading] = weights(run.model)
        assert all((offload is None) == (offloading is None) for offload in moved)
        assert all(offload.moved > 0 for offload in moved if offload is not None)
        assert moved
    for name, weight in trained[None].items():
        assert torch.equal(weight, trained[CPU][name]), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_on_the_cpu_is_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base")
    recipe = make_recipe(tmp_path, checkpoint, activation_offloading=True, training={"use_cpu": False})
    with pytest.raises(UserError, match=r"activation_offloading: true moves .* would train on cpu; set it to false"):
        train(recipe, console=Console(quiet=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_a_recipe_trains_on_a_gpu_as_without(tmp_path: Path, compile: bool) -> None:
    model = tiny_model("qwen3", vocab_size=len(byte_tokenizer()), hidden_size=256, head_dim=64, dtype=torch.bfloat16)
    checkpoint = save_checkpoint(tmp_path / "base", model)
    losses = {}
    for offloading in (False, True):
        recipe = make_recipe(
            tmp_path,
            checkpoint,
            activation_offloading=offloading,
            checkpointing="layer",
            compile=compile,
            packing={"tokens_per_batch": 4096},
            model={"dtype": "bfloat16"},
            training={"use_cpu": False, "output_dir": str(tmp_path / str(offloading)), "learning_rate": 1e-3},
        )
        result = train(recipe, console=Console(quiet=True))
        losses[offloading] = [entry["loss"] for entry in result.log_history if "loss" in entry]
    assert len(losses[True]) == 6
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
