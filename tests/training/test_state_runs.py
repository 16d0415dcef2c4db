"""A recipe whose packs are held by two processes that pass the delta rule's states on: what one process does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sequence_runs import assert_figures_equal, meet, run_case
from test_sharded_runs import assert_equal, files, saved
from torch.nn.parallel import DistributedDataParallel
from training_cases import byte_tokenizer, make_recipe, save_checkpoint, write_conversations

from deltatune.errors import UserError
from deltatune.parallel.heads import check_sequence_size
from deltatune.parallel.sizes import Sizes
from deltatune.training.layout import sizes_lines
from forked import free_port, run_ranks
from tiny import tiny_model

THREE_HEADS = {"linear_num_value_heads": 3, "linear_num_key_heads": 3}


def recipe_of(folder: Path, name: str, **parallel: Any) -> Any:
    scratch = folder / f"scratch {name}"
    scratch.mkdir(exist_ok=True)
    training = {"output_dir": str(folder / name), "max_steps": 2}
    training |= {"optim": "sgd", "learning_rate": 0.1}  # Adam's first steps have the size of rounding where that is all
    return make_recipe(
        scratch, folder / "model", training=training, parallel=parallel,
        data={"train": [{"path": str(folder / "train.jsonl")}], "cache_dir": str(folder / "cache")},
        verify={"enabled": False, "lengths": None},
    )  # fmt: skip


def rank_main(rank: int, folder: str, port: int) -> None:
    meet(rank, 2, port)
    recipe = recipe_of(Path(folder), "two", sequence=2, recurrent="state")
    sends_buffers, forward = set(), DistributedDataParallel.forward

    def watched(replicated: Any, *args: Any, **kwargs: Any) -> Any:
        sends_buffers.add(replicated.broadcast_buffers)
        return forward(replicated, *args, **kwargs)

    DistributedDataParallel.forward = watched  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*broadcast_buffers")
        figures = run_case(recipe)
    assert sends_buffers == {False}
    torch.save(figures, Path(folder) / f"rank{rank}.pt")


def test_two_ranks_that_pass_states_on_train_what_one_process_does(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_model("qwen3_5", vocab_size=len(byte_tokenizer()), **THREE_HEADS)
    with pytest.raises(UserError, match="does not divide"):
        check_sequence_size(model.config, 2)  # so tokens for heads cannot be what runs
    save_checkpoint(tmp_path / "model", model)
    write_conversations(tmp_path / "train.jsonl", 12)
    alone = run_case(recipe_of(tmp_path, "one"))
    run_ranks(rank_main, str(tmp_path), free_port(), count=2)
    for rank in (0, 1):
        assert_figures_equal(torch.load(tmp_path / f"rank{rank}.pt", weights_only=False), alone)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert_equal(saved(tmp_path / "two"), saved(tmp_path / "one"))


def test_a_run_says_how_its_recurrent_layers_are_divided(tmp_path: Path) -> None:
    sizes = Sizes(2, 1, "as the recipe says", 2)
    *_, heads = sizes_lines(recipe_of(tmp_path, "one", sequence=2), sizes)
    *_, states = sizes_lines(recipe_of(tmp_path, "two", sequence=2, recurrent="state"), sizes)
    assert heads == "parallel: sequence 2: 1 data rank"
    assert states == "parallel: sequence 2, recurrent layers by state: 1 data rank"
