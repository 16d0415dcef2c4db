"""What rank 0 holds of a sharded model in host memory: its part and a module, while it loads, saves and resumes."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from training_cases import make_recipe, save_checkpoint

from deltatune.parallel.mesh import Mesh
from deltatune.training import loading
from deltatune.training.arguments import training_arguments
from deltatune.training.checkpoint import load_config
from deltatune.training.layout import shard_by_recipe
from deltatune.training.loading import load_by_recipe
from deltatune.training.planned import prepare_by_recipe
from deltatune.training.reloading import reload_weights
from deltatune.training.sharded_files import save_weights
from forked import free_port, run_ranks
from tiny import tiny_model

pytestmark = pytest.mark.slow

RANKS, LAYERS, HIDDEN, WIDE = 2, 28, 512, 2048
FILES = "60MB"
MLP = 3 * HIDDEN * WIDE * 4
#: the most that a module takes: as it is read, as it is sent, as it is cut; and buffers of gloo and the allocator
SLACK = 3 * MLP + 64 * 2**20


def peak() -> int:
    """The most memory that this process has had, file mappings included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank_main(rank: int, folder: str, way: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo")
    if way == "whole":
        loading._why_whole = lambda *_: "a test"
    scratch = Path(folder) / f"{way}{rank}"
    scratch.mkdir()
    model = {"name_or_path": str(Path(folder) / "model"), "dtype": "float32"}
    recipe = make_recipe(scratch, Path(folder) / "model", model=model, lora=None, compile=None)
    arguments = training_arguments(recipe.training)
    config, mesh = load_config(recipe.model), Mesh(RANKS, rank, RANKS)
    found: dict[str, Any] = {}
    before = peak()
    loaded = load_by_recipe(recipe, config, mesh)
    prepare_by_recipe(recipe, loaded.model, device=None, shard=RANKS)
    shard_by_recipe(recipe, loaded, mesh, arguments)
    found["loaded"], found["said"] = peak() - before, loaded.said
    if way == "pieces":
        save_weights(loaded.model, scratch if rank == 0 else None, max_shard_size=FILES)
        found["saved"] = peak() - before
        dist.barrier()
        with torch.no_grad():
            for weight in loaded.model.parameters():
                weight.zero_()
        reload_weights(loaded.model, Path(folder) / "model")
        found["resumed"] = peak() - before
        again = scratch / "again"
        again.mkdir()
        save_weights(loaded.model, again if rank == 0 else None, max_shard_size=FILES)
    torch.save(found, Path(folder) / f"{way}{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]], int]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("host")
    model = tiny_model("qwen3_5", layers=LAYERS, hidden_size=HIDDEN, intermediate_size=WIDE)
    size = sum(weight.nbytes for weight in model.parameters())
    save_checkpoint(folder / "model", model.bfloat16())  # wide weights are no pages of the file
    (folder / "model" / "model.safetensors").unlink()
    model.save_pretrained(folder / "model", max_shard_size=FILES)
    model = type(model).from_pretrained(folder / "model", dtype=torch.float32)
    model.save_pretrained(folder / "one", max_shard_size=FILES)
    del model
    for way in ("pieces", "whole"):
        run_ranks(rank_main, str(folder), way, free_port(), count=RANKS)
    names = [f"{way}{rank}" for way in ("pieces", "whole") for rank in range(RANKS)]
    return folder, {name: torch.load(folder / f"{name}.pt") for name in names}, size


@pytest.mark.parametrize("when", ["loaded", "saved", "resumed"])
def test_no_rank_holds_more_than_its_part_and_a_module(when: str, found: Any) -> None:
    folder, ranks, size = found
    assert len([*(folder / "model").glob("*.safetensors")]) > 2
    limit = size / RANKS + SLACK
    assert limit < 0.8 * size
    assert ranks["pieces0"]["said"] == ()
    assert ranks["pieces0"][when] < limit
    assert ranks["pieces1"][when] < limit


def test_the_whole_model_would_be_seen(found: Any) -> None:
    _, ranks, size = found
    assert ranks["whole0"]["said"] == (
        f"rank 0 loads the whole model into host memory, {size / 2**30:.1f} GiB: a test",
    )
    assert ranks["whole0"]["loaded"] > 0.9 * size


@pytest.mark.parametrize("files", ["pieces0", "pieces0/again"])
def test_files_are_those_of_one_process_to_the_byte(files: str, found: Any) -> None:
    folder, _, _ = found
    weights = [path.name for path in (folder / "one").glob("model*")]
    assert sorted(path.name for path in (folder / files).glob("model*")) == sorted(weights)
    for name in weights:
        assert (folder / files / name).read_bytes() == (folder / "one" / name).read_bytes()
