"""Several processes train what one does."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from training_cases import Packs, make_trainer, weights
from transformers import TrainerCallback

from deltatune import prepare
from deltatune.training.signals import StopAfterStep, caught_signals
from forked import free_port, run_ranks
from tiny import tiny_model


@pytest.mark.parametrize(("ranks", "adapters"), [(2, False), (4, False), (4, True)])
def test_ranks_equal_one_process_on_an_uneven_epoch(ranks: int, adapters: bool, tmp_path: Path) -> None:
    run_ranks(rank_main, ranks, str(tmp_path), free_port(), adapters, count=ranks)
    alone = trained(tmp_path / "alone", adapters, gradient_accumulation_steps=ranks)
    seen = []
    for rank in range(ranks):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx(losses(alone), rel=1e-5)
        assert found["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)
        for name, value in weights(alone.model).items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-6)
        seen += found["seen"]
    assert sorted(seen) == [0, 1, 2, 3, 4], "every pack once, none twice"


def test_a_signal_to_one_rank_ends_all_after_the_same_step(tmp_path: Path) -> None:
    run_ranks(signalled_main, 2, str(tmp_path), free_port(), count=2)
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert found == [{"received": signal.SIGTERM, "step": 1}] * 2
    assert (tmp_path / "ranks" / "checkpoint-1" / "trainer_state.json").is_file()


def trained(output_dir: Path, adapters: bool = False, **training: Any) -> Any:
    trainer = small_trainer(output_dir, adapters, **training)
    trainer.train()
    return trainer


def small_trainer(output_dir: Path, adapters: bool = False, **training: Any) -> Any:
    """Of a model with experts, whose router's loss must not grow with the ranks; whole, or adapters and the router."""
    model = tiny_model("qwen3_moe", layers=1)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    if adapters:
        torch.manual_seed(2)
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_parameters=names, modules_to_save=["gate"], init_lora_weights=False)
        )
    prepare(model)
    return make_trainer(
        output_dir,
        model=model,
        packs=Packs(5),
        eval_packs=Packs(3, seed=8),
        num_train_epochs=1,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        **training,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def signalled_main(rank: int, ranks: int, folder: str, port: int) -> None:
    join(rank, ranks, port)
    trainer, stop = small_trainer(Path(folder) / "ranks"), StopAfterStep()
    trainer.add_callback(stop)
    if rank == 1:
        trainer.add_callback(SignalAtStepBegin())
    with caught_signals(stop, lambda _: None):
        trainer.train()
    torch.save({"received": stop.received, "step": trainer.state.global_step}, Path(folder) / f"rank{rank}.pt")


class SignalAtStepBegin(TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def join(rank: int, ranks: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def rank_main(rank: int, ranks: int, folder: str, port: int, adapters: bool) -> None:
    join(rank, ranks, port)
    trainer = trained(Path(folder) / "ranks", adapters)
    seen = list(trainer.train_dataset.seen)
    state = {
        "losses": losses(trainer),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": weights(trainer.model),
        "seen": seen,
    }
    torch.save(state, Path(folder) / f"rank{rank}.pt")
