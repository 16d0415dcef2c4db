"""Recipes on two processes that hold one copy of the weights between them, from the rows to the saved files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from training_cases import byte_tokenizer, make_recipe, save_checkpoint, write_conversations, write_pairs
from transformers import TrainerCallback

from deltatune.training import loading
from deltatune.training import run as run_module
from deltatune.training.run import train
from forked import free_port, run_ranks
from tiny import tiny_model

pytestmark = pytest.mark.slow

RANKS = 2
QUIET = Console(quiet=True)
#: what each adds to a small recipe; of a model with or without a tied head, whose vocabulary is odd
CASES: dict[str, dict[str, Any]] = {
    "adapter": {"training": {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.05}},
    "full_tied": {"lora": None, "training": {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}},
    "full_untied": {"lora": None, "training": {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}},
    "best": {
        "data": {"val_size": 0.2},
        "training": {
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "learning_rate": 0.5,
            "optim": "sgd",
            "load_best_model_at_end": True,
            "save_total_limit": 1,
            "max_steps": 6,
        },
    },
    "pissa": {"lora": {"r": 4, "init_lora_weights": "pissa"}, "training": {"save_strategy": "steps", "save_steps": 2}},
    "dora": {"lora": {"r": 4, "use_dora": True}},
    "whole_modules": {"lora": {"r": 4, "modules_to_save": ["lm_head", "norm"]}, "training": {"learning_rate": 1e-2}},
    "rows": {"model": {"added_tokens": ["<tool>"]}},
    "preference": {"preference": {}, "data": {"overlong": "drop"}},
    "preference_of_start": {"preference": {}, "lora": None, "data": {"overlong": "drop"}},
}
PROBED = "full_untied"
#: loaded whole by rank 0, since adapters begin with a part of the base weights
WHOLE = ("pissa", "dora")
#: resumed in the middle, by the numbers of processes before and after
RESUMED = {
    "one_to_two": ("adapter", "full_tied", "pissa"),
    "two_to_two": ("adapter",),
    "two_to_one": ("adapter", "full_tied", "pissa"),
}
SAVED = {case for cases in RESUMED.values() for case in cases}
WAYS = [(way, case) for way, cases in RESUMED.items() for case in cases]


def recipe_of(case: str, folder: Path, shared: Path, *, ranks: int) -> Any:
    sections = {name: dict(section) if isinstance(section, dict) else section for name, section in CASES[case].items()}
    pairs = case.startswith("preference")
    data = {
        "train": [{"path": str(shared / ("pairs.jsonl" if pairs else "train.jsonl"))}],
        "cache_dir": str(shared / "cache"),
    }
    training = {
        "output_dir": str(folder / case), "max_steps": 4 if case in SAVED else 2,
        "gradient_accumulation_steps": RANKS // ranks, **sections.pop("training", {}),
    }  # fmt: skip
    model = {"name_or_path": str(shared / ("tied" if "_tied" in case else "untied")), **sections.pop("model", {})}
    scratch = folder / f"scratch-{os.environ.get('RANK', 'alone')}"
    scratch.mkdir(parents=True, exist_ok=True)
    return make_recipe(
        scratch, shared / "untied", model=model, data={**data, **sections.pop("data", {})}, training=training,
        verify={"enabled": True} if case == PROBED else {"enabled": False, "lengths": None},
        packing={"tokens_per_batch": 128}, parallel={"shard": ranks}, **sections,
    )  # fmt: skip


class Seen(TrainerCallback):
    """What kind of parameters a run trains."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.kinds |= {type(weight).__name__ for weight in trained} | {type(model).__name__}
        assert all(isinstance(weight, DTensor) or not torch.distributed.is_initialized() for weight in trained)


def run_case(recipe: Any, resume: Any = None) -> dict[str, Any]:
    seen, build = Seen(), run_module._trainer

    def watched(run: Any, *more: Any) -> Any:
        trainer = build(run, *more)
        trainer.add_callback(seen)
        return trainer

    run_module._trainer = watched
    try:
        result = train(recipe, resume=resume, allow_change=resume is not None, console=QUIET)
    finally:
        run_module._trainer = build
    history = [{k: v for k, v in e.items() if k in FIGURES} for e in result.log_history]
    return {"history": [entry for entry in history if entry], "kinds": seen.kinds}


FIGURES = ("loss", "grad_norm", "eval_loss", "rewards/margins", "learning_rate")


def rank_main(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo")  # one for all runs
    whole = loading.load_checkpoint
    if rank > 0:
        loading.describe_checkpoint = None  # rank 0 alone reads weights
    shared, found = Path(folder), {}
    for case in CASES:
        loading.load_checkpoint = whole if rank == 0 and case in WHOLE else None
        found[case] = run_case(recipe_of(case, shared / "two", shared, ranks=RANKS))
    loading.load_checkpoint = whole if rank == 0 else None
    for way, case in WAYS:
        if way.endswith("_to_two"):
            copy_checkpoint(shared / way.removesuffix("_to_two") / case, shared / way / case, rank)
            run_case(recipe_of(case, shared / way, shared, ranks=RANKS), resume=True)
    torch.save(found, shared / f"rank{rank}.pt")


def copy_checkpoint(source: Path, target: Path, rank: int = 0) -> None:
    if rank == 0:
        target.mkdir(parents=True)
        shutil.copytree(source / "checkpoint-2", target / "checkpoint-2")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sharded")
    words = len(byte_tokenizer())
    assert words % RANKS, "a vocabulary that the ranks do not divide"
    for name, tied in (("untied", False), ("tied", True)):
        model = tiny_model("qwen3_5", vocab_size=words, tie_word_embeddings=tied)
        model.tie_weights()
        save_checkpoint(folder / name, model)
    write_conversations(folder / "train.jsonl", 40)
    write_pairs(folder / "pairs.jsonl", 30)
    alone = {case: run_case(recipe_of(case, folder / "one", folder, ranks=1)) for case in CASES}
    torch.save(alone, folder / "alone.pt")
    run_ranks(rank_main, str(folder), free_port(), count=RANKS)
    return folder


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


def settings(path: Path) -> dict[str, Any]:
    """Of a model or an adapter; PEFT keeps names as a set, in no order."""
    values = json.loads(path.read_text())
    return {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}


def files(folder: Path) -> set[str]:
    """All that a run leaves but what differs by the number of processes."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not any(part in name for part in ("optimizer", "rng_state"))}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("case", CASES)
def test_two_shards_save_what_one_process_does(case: str, shared: Path) -> None:
    one, two = shared / "one" / case, shared / "two" / case
    assert files(one) == files(two)
    assert_equal(saved(two), saved(one))
    for name in {"config.json", "adapter_config.json", "generation_config.json"} & files(one):
        assert settings(two / name) == settings(one / name), name


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_one_process_on_every_rank(case: str, shared: Path) -> None:
    alone, *ranks = (
        torch.load(shared / f"{name}.pt", weights_only=False)[case] for name in ("alone", "rank0", "rank1")
    )
    for one in ranks:
        assert one["kinds"] >= {"DTensor"}
        assert len(one["history"]) == len(alone["history"])
        for ours, theirs in zip(one["history"], alone["history"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    norms = [[entry.get("grad_norm") for entry in one["history"]] for one in ranks]
    assert norms[0] == norms[1]


@pytest.mark.parametrize(("way", "case"), WAYS)
def test_a_run_goes_on_in_as_many_shards_or_others_where_it_stopped(way: str, case: str, shared: Path) -> None:
    if way == "two_to_one":
        copy_checkpoint(shared / "two" / case, shared / way / case)
        run_case(recipe_of(case, shared / way, shared, ranks=1), resume=True)
    assert_equal(saved(shared / way / case), saved(shared / "one" / case))


def test_the_first_layers_are_probed(shared: Path) -> None:
    one, two = (json.loads((shared / name / PROBED / "report.json").read_text())["verify"] for name in ("one", "two"))
    assert two["ok"]
    assert [row["name"] for row in two["rows"]] == [row["name"] for row in one["rows"]]


def test_replicas_of_shards_accumulate_as_one_process_does(shared: Path) -> None:
    """Two copies of two parts each, two packs a rank and step."""
    eight = replicas_recipe(shared, "one_of_eight", ranks=1)
    alone = run_case(eight)
    run_ranks(replicas_main, str(shared), free_port(), count=4)
    found = torch.load(shared / "replicas.pt", weights_only=False)
    assert found["kinds"] >= {"DTensor"}
    for ours, theirs in zip(found["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert_equal(saved(shared / "replicas" / "full_tied"), saved(shared / "one_of_eight" / "full_tied"))


def replicas_recipe(shared: Path, name: str, *, ranks: int) -> Any:
    recipe = recipe_of("full_tied", shared / name, shared, ranks=min(ranks, RANKS))
    training = recipe.training.model_copy(
        update={"gradient_accumulation_steps": 8 // ranks, "max_steps": 2, "save_strategy": "no", "save_steps": 500}
    )
    return recipe.model_copy(update={"training": training})


def replicas_main(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    found = run_case(replicas_recipe(Path(folder), "replicas", ranks=4))
    if rank == 0:
        torch.save(found, Path(folder) / "replicas.pt")
