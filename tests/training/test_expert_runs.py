"""Recipes on processes that hold the experts of a mixture together, from the rows to the saved files."""

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

from deltatune.errors import RankFailedError, UserError
from deltatune.layers.experts import Experts
from deltatune.training import loading
from deltatune.training import run as run_module
from deltatune.training.run import train
from forked import free_port, run_ranks
from tiny import tiny_model

pytestmark = pytest.mark.slow

RANKS = 2
QUIET = Console(quiet=True)
SAVES = {"save_strategy": "steps", "save_steps": 2}
EXPERTS_TOO = {"r": 4, "target_modules": "all-linear", "target_parameters": "all-experts"}
#: what each adds to a small recipe; how many shards the other weights lie in on two processes
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "adapter": (1, {"lora": EXPERTS_TOO, "training": {**SAVES, "max_grad_norm": 0.05}}),
    "sharded_adapter": (2, {"lora": EXPERTS_TOO, "training": {**SAVES, "max_grad_norm": 0.05}}),
    "experts_alone": (1, {"lora": None, "training": {"learning_rate": 1e-3, "unfrozen_parameters": ["experts"]}}),
    "full_tied": (1, {"lora": None, "training": {"learning_rate": 1e-3, "max_grad_norm": 0.0}}),
    "sharded_full": (2, {"lora": None, "training": {**SAVES, "learning_rate": 1e-3}}),
    "best": (
        2,
        {
            "lora": None,
            "data": {"val_size": 0.2},
            "training": {
                **SAVES, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5, "optim": "sgd",
                "load_best_model_at_end": True, "save_total_limit": 1, "max_steps": 6,
            },
        },
    ),
    "shared_packs": (1, {"lora": EXPERTS_TOO, "training": {**SAVES, "max_grad_norm": 0.05}}),
    "shared_packs_in_shards": (2, {"lora": None, "training": {**SAVES, "learning_rate": 1e-3}}),
    "preference": (1, {"lora": EXPERTS_TOO, "preference": {}, "data": {"overlong": "drop"}}),
    "preference_in_shared_packs": (
        1,
        {"lora": EXPERTS_TOO, "preference": {"loss": "orpo"}, "data": {"overlong": "drop"}},
    ),
}  # fmt: skip
#: cases that are the run of another one where one process does all
AS = {"sharded_adapter": "adapter", "shared_packs": "adapter", "shared_packs_in_shards": "sharded_full"}
SHARED_PACKS = {"shared_packs": 2, "shared_packs_in_shards": 2, "preference_in_shared_packs": 2}
#: resumed in the middle, by how the experts lay before and how they lie after
RESUMED = {
    "one_to_two": ("adapter", "sharded_full"),
    "two_to_two": ("sharded_adapter",),
    "two_to_shards": ("adapter", "sharded_full"),
    "two_to_one": ("sharded_adapter", "sharded_full", "shared_packs", "shared_packs_in_shards"),
}
SAVED = {case for cases in RESUMED.values() for case in cases}
WAYS = [(way, case) for way, cases in RESUMED.items() for case in cases]
PROBED = "adapter"
FIGURES = ("loss", "grad_norm", "eval_loss", "rewards/margins", "learning_rate")


def recipe_of(case: str, folder: Path, shared: Path, *, parallel: dict[str, Any], **more: Any) -> Any:
    _, given = CASES[case]
    sections = {name: dict(section) if isinstance(section, dict) else section for name, section in given.items()}
    data_ranks = int(os.environ.get("WORLD_SIZE", "1")) // parallel.get("sequence", 1)
    rows = shared / ("pairs.jsonl" if "preference" in CASES[case][1] else "train.jsonl")
    training = {
        "output_dir": str(folder / case), "max_steps": 4 if case in SAVED else 2,
        "gradient_accumulation_steps": 4 // data_ranks, **sections.pop("training", {}),
    }  # fmt: skip
    scratch = folder / f"scratch-{os.environ.get('RANK', 'alone')}"
    scratch.mkdir(parents=True, exist_ok=True)
    return make_recipe(
        scratch, shared / "untied",
        model={"name_or_path": str(shared / more.pop("model", "tied" if "_tied" in case else "untied"))},
        data={"train": [{"path": str(rows)}], "cache_dir": str(shared / "cache"), **sections.pop("data", {})},
        training=training, verify={"enabled": True} if case == PROBED else {"enabled": False, "lengths": None},
        packing={"tokens_per_batch": 128}, parallel=parallel, **sections, **more,
    )  # fmt: skip


def divided(case: str, **more: Any) -> dict[str, Any]:
    sequence = SHARED_PACKS.get(case, 1)
    return {"shard": CASES[case][0], "sequence": sequence, "expert": 2, "expert_capacity": 2.0, **more}


class Seen(TrainerCallback):
    """How the weights lie that a run trains, and what a token costs."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.shards = self.autocast = False
        self.flops = 0.0

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        def note(*_: Any) -> None:
            self.autocast |= torch.is_autocast_enabled("cpu")

        model.get_input_embeddings().register_forward_hook(note)

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.held |= {module.down_proj.shape[0] for module in model.modules() if isinstance(module, Experts)}
        self.shards |= any(isinstance(weight, DTensor) for weight in model.parameters())


def run_case(recipe: Any, resume: Any = None) -> dict[str, Any]:
    seen, build = Seen(), run_module._trainer

    def watched(*given: Any) -> Any:
        trainer = build(*given)
        trainer.add_callback(seen)
        seen.flops = trainer.meter.flops.per_token
        return trainer

    run_module._trainer = watched
    try:
        result = train(recipe, resume=resume, console=QUIET)
    finally:
        run_module._trainer = build
    history = [{k: v for k, v in e.items() if k in FIGURES} for e in result.log_history]
    return {"history": [entry for entry in history if entry], **vars(seen)}


def join_ranks(rank: int, port: int, ranks: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo")  # one for all runs


def rank_main(rank: int, folder: str, port: int) -> None:
    join_ranks(rank, port, RANKS)
    loading.load_checkpoint = None  # nobody loads a whole model
    if rank > 0:
        loading.describe_checkpoint = None  # rank 0 alone reads weights
    shared, found = Path(folder), {}
    for case in CASES:
        found[case] = run_case(recipe_of(case, shared / "two", shared, parallel=divided(case)))
    for way, case in WAYS:
        if way != "two_to_one":
            copy_checkpoint(shared / way.partition("_")[0] / case, shared / way / case, rank)
            # experts in shards, as all else, or divided
            parallel = {"shard": 2} if way == "two_to_shards" else divided(case)
            run_case(recipe_of(case, shared / way, shared, parallel=parallel), resume=True)
    for case in RESUMED["two_to_shards"]:
        copy_checkpoint(shared / "two_to_shards" / case, shared / "shards_to_two" / case, rank, step=4)
        run_case(longer(recipe_of(case, shared / "shards_to_two", shared, parallel=divided(case))), resume=True)
    found["narrow"] = narrow(shared)
    found["overflow"] = overflow(shared, rank)
    torch.save(found, shared / f"rank{rank}.pt")


def longer(recipe: Any) -> Any:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 6})})


def narrow(shared: Path) -> bool:
    """Whether a run that accelerate wraps in nothing computes under autocast."""
    recipe = recipe_of("experts_alone", shared / "narrow", shared, parallel={"expert": 2})
    changed = recipe.training.model_copy(update={"bf16": True, "max_steps": 1})
    seen = run_case(recipe.model_copy(update={"training": changed}))
    return bool(seen["autocast"])


def overflow(shared: Path, rank: int) -> dict[str, str]:
    """All tokens go to the one expert of rank 0; it is seen where the run logs or saves."""
    found = {}
    silent = {"logging_strategy": "no", "logging_steps": 10}  # the default, which says nothing
    for when, training in {"logged": {"logging_steps": 1}, "saved": {**silent, **SAVES}}.items():
        recipe = recipe_of("full_tied", shared / f"overflow_{when}", shared, parallel={"expert": 2}, model="one_expert")
        changed = recipe.training.model_copy(update=training)
        with pytest.raises((UserError, RankFailedError)) as caught:
            train(recipe.model_copy(update={"training": changed}), console=QUIET)
        found[when] = str(caught.value)
    return found


def copy_checkpoint(source: Path, target: Path, rank: int = 0, *, step: int = 2) -> None:
    if rank == 0:
        target.mkdir(parents=True)
        shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("experts")
    words = len(byte_tokenizer())
    for name, settings in {
        "untied": {},
        "tied": {"tie_word_embeddings": True},
        "one_expert": {"num_experts_per_tok": 1},
    }.items():
        model = tiny_model("qwen3_moe", vocab_size=words, **settings)
        model.tie_weights()
        if name == "one_expert":
            for layer in model.model.layers:
                layer.mlp.gate.weight.data.zero_()
        save_checkpoint(folder / name, model)
    write_conversations(folder / "train.jsonl", 40)
    write_pairs(folder / "pairs.jsonl", 30)
    alone: dict[str, Any] = {}
    for case in CASES:
        if (same := AS.get(case)) is None:
            alone[case] = run_case(recipe_of(case, folder / "one", folder, parallel={}))
        else:  # on one process it is the same run
            alone[case] = alone[same]
            (folder / "one" / case).symlink_to(folder / "one" / same)
    for case in RESUMED["two_to_shards"]:
        copy_checkpoint(folder / "one" / case, folder / "one_longer" / case, step=4)
        run_case(longer(recipe_of(case, folder / "one_longer", folder, parallel={})), resume=True)
    torch.save(alone, folder / "alone.pt")
    run_ranks(rank_main, str(folder), free_port(), count=RANKS)
    return folder


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


def files(folder: Path) -> set[str]:
    """All that a run leaves but what differs by the number of processes."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not any(part in name for part in ("optimizer", "rng_state"))}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def found_by(shared: Path, name: str) -> Any:
    return torch.load(shared / f"{name}.pt", weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_save_what_one_does(case: str, shared: Path) -> None:
    one, two = shared / "one" / case, shared / "two" / case
    assert files(one) == files(two)
    assert_equal(saved(two), saved(one))


@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_one_process_on_every_rank(case: str, shared: Path) -> None:
    alone, *ranks = (found_by(shared, name)[case] for name in ("alone", "rank0", "rank1"))
    assert alone["held"] == {4}
    for one in ranks:
        assert one["held"] == {2}
        assert one["shards"] == (CASES[case][0] > 1)
        assert one["flops"] == pytest.approx(alone["flops"])
        assert len(one["history"]) == len(alone["history"])
        for ours, theirs in zip(one["history"], alone["history"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    norms = [[entry.get("grad_norm") for entry in one["history"]] for one in ranks]
    assert norms[0] == norms[1]


@pytest.mark.parametrize(("way", "case"), WAYS)
def test_a_run_goes_on_in_other_parts_where_it_stopped(way: str, case: str, shared: Path) -> None:
    if way == "two_to_one":
        copy_checkpoint(shared / "two" / case, shared / way / case)
        run_case(recipe_of(case, shared / way, shared, parallel={}), resume=True)
    assert_equal(saved(shared / way / case), saved(shared / "one" / case))


@pytest.mark.parametrize("case", RESUMED["two_to_shards"])
def test_a_run_in_shards_goes_on_with_divided_experts(case: str, shared: Path) -> None:
    assert_equal(saved(shared / "shards_to_two" / case), saved(shared / "one_longer" / case))


def test_experts_that_train_alone_compute_under_autocast(shared: Path) -> None:
    assert all(found_by(shared, f"rank{rank}")["narrow"] for rank in range(RANKS))
    assert not any(found_by(shared, "rank0")[case]["autocast"] for case in CASES)


@pytest.mark.parametrize(("when", "step"), [("logged", 1), ("saved", 2)])
def test_visits_without_room_end_a_run_on_every_rank(when: str, step: int, shared: Path) -> None:
    for rank in range(RANKS):
        message = found_by(shared, f"rank{rank}")["overflow"][when]  # one says it, and the others that it did
        assert "layers.0.mlp.experts: rank 0 needed room for 2.000 times its even share" in message
        assert "set parallel.expert_capacity to 2, which is enough" in message
        assert message.endswith("nothing after the last checkpoint is saved")
    left = shared / f"overflow_{when}" / "full_tied"
    assert not list(left.glob("*.safetensors"))
    assert not list(left.glob("checkpoint-*"))
    leg = json.loads((left / "run.json").read_text())["legs"][-1]
    assert "parallel.expert_capacity" in leg["reason"]
    assert leg["to_step"] == step


def test_replicas_of_experts_in_shards_train_as_one_process(shared: Path) -> None:
    """Two groups of two hold all experts, two copies of two shards all else."""
    run_ranks(four_main, str(shared), free_port(), count=4)
    found = found_by(shared, "four")
    assert found["held"] == {2}
    for ours, theirs in zip(found["history"], found_by(shared, "alone")["sharded_adapter"]["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert_equal(saved(shared / "four" / "sharded_adapter"), saved(shared / "one" / "sharded_adapter"))


def four_main(rank: int, folder: str, port: int) -> None:
    join_ranks(rank, port, 4)
    case = "sharded_adapter"
    found = run_case(recipe_of(case, Path(folder) / "four", Path(folder), parallel=divided(case)))
    if rank == 0:
        torch.save(found, Path(folder) / "four.pt")
