"""The same rows through our packs and through TRL's padded batches: one loss, one gradient, the same figures."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import peft
import pytest
import torch
import trl
from rich.console import Console
from training_cases import byte_tokenizer, make_recipe, save_checkpoint, write_pairs
from transformers import AutoModelForCausalLM

from deltatune.config.rewards import REWARDS
from deltatune.config.schema import PreferenceSection
from deltatune.training.arguments import training_arguments
from deltatune.training.console import RunConsole
from deltatune.training.preference import AnswerLogProbs, preference_losses
from deltatune.training.preference_trainer import PreferenceTrainer
from deltatune.training.run import build

TARGETS = ["q_proj", "in_proj_qkv", "down_proj"]
NUM_PAIRS = 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    datasets.disable_progress_bars()
    yield save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    datasets.enable_progress_bars()


def ours(folder: Path, checkpoint: Path, settings: dict[str, Any], lora: dict[str, Any] | None) -> PreferenceTrainer:
    recipe = make_recipe(
        folder,
        checkpoint,
        data={"train": [{"path": str(write_pairs(folder / "pairs.jsonl", NUM_PAIRS))}]},
        packing={"tokens_per_batch": 128},
        preference=settings,
        lora=lora,
    )
    run = build(recipe, training_arguments(recipe.training), RunConsole(Console(quiet=True)))
    assert recipe.preference is not None
    assert len(run.data.train) > 1
    return PreferenceTrainer(
        run.model, run.arguments, settings=recipe.preference, train_dataset=run.data.train, tokens_per_batch=128,
        pad_token_id=0, console=run.console,
    )  # fmt: skip


def theirs(folder: Path, model: Any, **values: Any) -> Any:
    adapter = values.pop("peft_config", None)
    reference = values.pop("ref_model", None)
    config = trl.DPOConfig(
        str(folder / "trl"), per_device_train_batch_size=NUM_PAIRS, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, disable_tqdm=True, max_length=None, **values,
    )  # fmt: skip
    return trl.DPOTrainer(
        model,
        reference,
        args=config,
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in (folder / "pairs.jsonl").open()]),
        processing_class=byte_tokenizer(),
        peft_config=adapter,
    )


def assert_equal_step(trainer: PreferenceTrainer, other: Any) -> None:
    """Loss, gradients and figures of all pairs at once, there in one batch and here in several packs."""
    loader = trainer.get_train_dataloader()
    batches, number = trainer.get_batch_samples(iter(loader), len(loader), torch.device("cpu"))
    assert int(number) == NUM_PAIRS
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=number)
        loss.backward()
        total += float(loss.detach())
    trainer.log({"loss": total})
    other.model.train()
    expected = other.compute_loss(other.model, next(iter(other.get_train_dataloader())))
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    found = trainer.state.log_history[-1]
    for name in REWARDS:
        assert found[name] == pytest.approx(other._metrics["train"][name][0], rel=1e-5, abs=1e-6), name
    gradients = {name: weight.grad for name, weight in other.model.named_parameters() if weight.grad is not None}
    assert gradients
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            error = torch.linalg.vector_norm(weight.grad - gradients[name])
            assert error <= 1e-5 * torch.linalg.vector_norm(gradients[name]) + 1e-8, name


@pytest.mark.parametrize(("loss", "loss_type"), [("dpo", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo")])
def test_an_adapter_is_trained_as_trl_trains_it(loss: str, loss_type: str, checkpoint: Path, tmp_path: Path) -> None:
    """The adapter is not zero, so policy and reference differ."""
    lora = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False}
    trainer = ours(tmp_path, checkpoint, {"loss": loss, "beta": 0.3}, lora)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    other = theirs(tmp_path, model, loss_type=loss_type, beta=0.3, peft_config=config)
    other.model.load_state_dict(trainer.model.state_dict())
    assert_equal_step(trainer, other)


def test_every_weight_is_trained_as_trl_trains_it(checkpoint: Path, tmp_path: Path) -> None:
    """Against the model at the start, which has moved since."""
    trainer = ours(tmp_path, checkpoint, {"beta": 0.3}, None)
    trainer.compute_reference()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for ours_, theirs_ in zip(trainer.model.parameters(), model.parameters(), strict=True):
            ours_ += 0.02 * torch.randn_like(ours_)
            theirs_.copy_(ours_)
    assert_equal_step(trainer, theirs(tmp_path, model, beta=0.3, ref_model=reference))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_are_trls(loss: str) -> None:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    settings = PreferenceSection(loss=loss, beta=0.4)
    policy = AnswerLogProbs(torch.tensor([-4.0, -9.0, -30.0, -6.0]), torch.tensor([2.0, 3.0, 40.0, 8.0]))
    means = policy.sums / policy.counts
    found = preference_losses(policy, settings)
    values = {"beta": settings.scale, "simpo_gamma": settings.margin, "loss_type": "simpo", "label_smoothing": 0.0}
    other: Any = SimpleNamespace(**values, alpha=0.0, accelerator=SimpleNamespace(device="cpu"))
    if loss == "simpo":
        losses, chosen, rejected = CPOTrainer.cpo_loss(other, means[::2], means[1::2])
    else:
        preferred, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(other, means[::2], means[1::2])
        losses = -means[::2] - preferred
    for value, expected in zip(found, (losses, chosen, rejected), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
