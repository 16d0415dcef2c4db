"""Two processes train what one does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import Packs, make_trainer, weights

from deltatune import prepare
from forked import free_port, run_ranks
from tiny import tiny_model


def test_two_ranks_equal_one_process_on_an_uneven_epoch(tmp_path: Path) -> None:
    run_ranks(rank_main, str(tmp_path), free_port(), count=2)
    alone = trained(tmp_path / "alone", gradient_accumulation_steps=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx(losses(alone), rel=1e-5)
        assert found["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)
        for name, value in weights(alone.model).items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-5, atol=1e-6)
    counts = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["seen"] for rank in (0, 1)]
    assert sorted(counts[0] + counts[1]) == [0, 1, 2, 3, 4], "every pack once, none twice"


def trained(output_dir: Path, **training: Any) -> Any:
    """A model with experts, whose router's loss must not grow with the ranks."""
    model = tiny_model("qwen3_moe", layers=1)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    prepare(model)
    trainer = make_trainer(
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
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rank_main(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    trainer = trained(Path(folder) / "ranks")
    seen = list(trainer.train_dataset.seen)
    state = {
        "losses": losses(trainer),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "weights": weights(trainer.model),
        "seen": seen,
    }
    torch.save(state, Path(folder) / f"rank{rank}.pt")
