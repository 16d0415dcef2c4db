"""Recipes whose packs are each held by two processes, from the rows to the saved files: what one process does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_sharded_runs import Seen, assert_equal, copy_checkpoint, files, saved
from training_cases import byte_tokenizer, make_recipe, save_checkpoint, write_conversations, write_pairs

from deltatune import CompileOptions
from deltatune.training import planned
from deltatune.training import run as run_module
from deltatune.training.run import train
from forked import free_port, run_ranks
from tiny import tiny_model

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
SAVED = {"save_strategy": "steps", "save_steps": 2}
#: what each adds to a small recipe
CASES: dict[str, dict[str, Any]] = {
    "adapter": {
        "data": {"val_size": 0.2},
        "samples": {"prompts": ["1 + 1?"], "max_new_tokens": 4},
        "training": {
            **SAVED, "max_grad_norm": 0.05, "eval_strategy": "steps", "eval_steps": 2, "on_nonfinite": "skip",
            "gradient_accumulation_steps": 2,
        },
    },
    "full": {"lora": None, "parallel": {"shard": 2}, "training": {**SAVED, "learning_rate": 1e-3}},
    "routed": {
        "lora": None,
        "checkpointing": "layer",
        "parallel": {"shard": 2},
        "training": {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2},
    },
    "streamed": {"data": {"streaming": True}, "training": SAVED},
    "preference": {"preference": {}, "data": {"overlong": "drop", "val_size": 0.2}},
    "preference_of_start": {
        "preference": {"loss": "ipo"},
        "lora": None,
        "parallel": {"shard": 2},
        "data": {"overlong": "drop"},
        "training": {"gradient_accumulation_steps": 2},
    },
    # last: what a compiler leaves is searched for garbage in every run that follows
    "compiled": {
        "compile": True,
        "checkpointing": "auto",
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "impl": "fused"},
    },
}  # fmt: skip
#: resumed in the middle, on the other number of ranks
RESUMED = ("adapter", "full", "streamed")
#: of which checkpoint, where it is not the dense hybrid
MODELS = {"routed": "routed", "compiled": "attention"}
#: four processes are two data ranks, whose weights lie in four shards
FOUR = {"lora": None, "training": {"learning_rate": 1e-3, "gradient_accumulation_steps": 2}}
FIGURES = ("loss", "grad_norm", "eval_loss", "eval_trained_tokens", "rewards/margins", "rewards/accuracies", "fill")
COUNTED = ("packs", "tokens", "trained_tokens", "steps", "fill")


def recipe_of(case: str, folder: Path, shared: Path, *, ranks: int, data_ranks: int = 1) -> Any:
    given = CASES.get(case, FOUR)
    sections = {name: dict(section) if isinstance(section, dict) else section for name, section in given.items()}
    if ranks == 1:
        sections.pop("compile", None)  # graphs are held to what layers compute without them
    steps = 4 if case in RESUMED else 2
    training = {"output_dir": str(folder / case), "max_steps": steps, **sections.pop("training", {})}
    training["gradient_accumulation_steps"] = training.get("gradient_accumulation_steps", 1) // data_ranks
    axes = {**sections.pop("parallel", {}), "sequence": 2} if ranks > 1 else {}
    pairs = case.startswith("preference")
    rows = [{"path": str(shared / ("pairs.jsonl" if pairs else "train.jsonl"))}]
    model = {"name_or_path": str(shared / MODELS.get(case, "dense"))}
    sections.pop("parallel", None)
    scratch = folder / f"scratch-{os.environ.get('RANK', 'alone')}"
    scratch.mkdir(parents=True, exist_ok=True)
    return make_recipe(
        scratch, shared / "dense", model=model, training=training, parallel=axes if ranks < 4 else {**axes, "shard": 4},
        data={"train": rows, "cache_dir": str(shared / "cache"), **sections.pop("data", {})},
        verify={"enabled": True} if case == "adapter" else {"enabled": False, "lengths": None}, **sections,
    )  # fmt: skip


def run_case(recipe: Any, resume: Any = None) -> dict[str, Any]:
    seen, build = Seen() if recipe.parallel.shard in (2, 4) else None, run_module._trainer

    def watched(run: Any, *more: Any) -> Any:
        trainer = build(run, *more)
        if seen is not None:
            trainer.add_callback(seen)
        return trainer

    run_module._trainer = watched
    compile_options, planned.compile_options = planned.compile_options, traced
    try:
        result = train(recipe, resume=resume, console=QUIET)
    finally:
        run_module._trainer, planned.compile_options = build, compile_options
    history = [{k: v for k, v in e.items() if k in FIGURES} for e in result.log_history]
    leg = result.metrics["leg"]
    return {
        "history": [entry for entry in history if entry],
        "counts": {name: leg[name] for name in COUNTED if name in leg},
        "compile": leg["compile"],
        "kinds": set() if seen is None else seen.kinds,
    }


def traced(recipe: Any) -> CompileOptions | None:
    return None if recipe.compile is None else CompileOptions(backend="aot_eager")


def meet(rank: int, count: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo")  # one for all runs


def two_main(rank: int, folder: str, port: int) -> None:
    meet(rank, 2, port)
    shared, found = Path(folder), {}
    for case in RESUMED:
        into = shared / "one_to_two"
        copy_checkpoint(shared / "one" / case, into / case, rank)
        run_case(recipe_of(case, into, shared, ranks=2), resume=True)
    for case in CASES:
        found[case] = run_case(recipe_of(case, shared / "two", shared, ranks=2))
    torch.save(found, shared / f"rank{rank}.pt")


def four_main(rank: int, folder: str, port: int) -> None:
    meet(rank, 4, port)
    found = run_case(recipe_of("four", Path(folder) / "ranks", Path(folder), ranks=4, data_ranks=2))
    if rank == 0:
        torch.save(found, Path(folder) / "four.pt")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sequence")
    words = len(byte_tokenizer())
    save_checkpoint(folder / "dense", tiny_model("qwen3_5", vocab_size=words))
    routed = tiny_model("qwen3_moe", vocab_size=words, output_router_logits=True, router_aux_loss_coef=0.5)
    save_checkpoint(folder / "routed", routed)
    save_checkpoint(folder / "attention", tiny_model("qwen3", layers=1, vocab_size=words))
    write_conversations(folder / "train.jsonl", 40)
    write_pairs(folder / "pairs.jsonl", 30)
    alone = {case: run_case(recipe_of(case, folder / "one", folder, ranks=1)) for case in (*CASES, "four")}
    torch.save(alone, folder / "alone.pt")
    run_ranks(two_main, str(folder), free_port(), count=2)
    return folder


def assert_figures_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["history"]) == len(theirs["history"])
    for one, other in zip(ours["history"], theirs["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
    assert ours["counts"] == theirs["counts"]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_of_a_pack_train_what_one_process_does(case: str, shared: Path) -> None:
    alone, *ranks = (
        torch.load(shared / f"{name}.pt", weights_only=False)[case] for name in ("alone", "rank0", "rank1")
    )
    for one in ranks:
        assert_figures_equal(one, alone)
        assert ("DTensor" in one["kinds"]) == (CASES[case].get("parallel") is not None)
    one, two = shared / "one" / case, shared / "two" / case
    assert files(one) == files(two)
    assert_equal(saved(two), saved(one))


def test_nothing_breaks_a_graph_or_compiles_again(shared: Path) -> None:
    for rank in (0, 1):
        compiled = torch.load(shared / f"rank{rank}.pt", weights_only=False)["compiled"]["compile"]
        assert set(compiled["graphs"].values()) == {1}
        assert compiled["breaks"] == compiled["recompiles"] == []


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("way", ["one_to_two", "two_to_one"])
def test_a_run_goes_on_with_another_number_of_ranks_of_a_pack(way: str, case: str, shared: Path) -> None:
    if way == "two_to_one":
        copy_checkpoint(shared / "two" / case, shared / way / case)
        run_case(recipe_of(case, shared / way, shared, ranks=1), resume=True)
    assert_equal(saved(shared / way / case), saved(shared / "one" / case))


def test_four_processes_are_two_data_ranks_in_four_shards(shared: Path) -> None:
    run_ranks(four_main, str(shared), free_port(), count=4)
    alone, four = (torch.load(shared / f"{name}.pt", weights_only=False) for name in ("alone", "four"))
    assert_figures_equal(four, alone["four"])
    assert "DTensor" in four["kinds"]
    assert_equal(saved(shared / "ranks" / "four"), saved(shared / "one" / "four"))
