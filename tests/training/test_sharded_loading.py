"""Weights, buffers and adapters that two processes hold between them after loading are those that one would hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from training_cases import byte_tokenizer, make_recipe, save_checkpoint
from transformers import set_seed

from deltatune.parallel.filling import spread, tensors_of
from deltatune.parallel.mesh import Mesh
from deltatune.training import loading
from deltatune.training.arguments import training_arguments
from deltatune.training.checkpoint import load_config
from deltatune.training.layout import shard_by_recipe
from deltatune.training.loading import load_by_recipe
from deltatune.training.planned import prepare_by_recipe
from deltatune.training.resuming import found_by_rank_0
from deltatune.training.sealed import seal
from forked import free_port, run_ranks
from tiny import tiny_conditional, tiny_model

RANKS, SEED = 2, 5
LORA = {"r": 4, "target_modules": ["o_proj"]}
#: which checkpoint, and what a recipe says of it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("qwen3_moe", {"lora": None}),
    "images": ("images", {"lora": None}),
    "wide": ("narrow", {"lora": None, "model": {"dtype": "float32"}}),
    "tied": ("tied", {"lora": LORA}),
    "tied_twice": ("tied_twice", {"lora": None}),
    "modules": ("qwen3_moe", {"lora": {**LORA, "modules_to_save": ["lm_head", "mlp"]}}),
    "dora": ("tied", {"lora": {**LORA, "use_dora": True}}),
    "bin": ("bin", {"lora": None}),
    "goes_on": ("tied", {"lora": {"name_or_path": "adapter"}}),
}
WHOLE = {"dora": "lora.use_dora takes the norms of its weights", "bin": "its weights are no safetensors"}


def recipe_of(case: str, folder: Path, scratch: Path) -> Any:
    checkpoint, sections = CASES[case]
    sections = {name: dict(value) if isinstance(value, dict) else value for name, value in sections.items()}
    if (lora := sections.get("lora")) is not None and "name_or_path" in lora:
        lora["name_or_path"] = str(folder / lora["name_or_path"])
    model = {"name_or_path": str(folder / checkpoint), **sections.pop("model", {})}
    return make_recipe(scratch, folder / checkpoint, model=model, compile=None, **sections)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def differing(case: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """Names whose tensors are not those of one process."""
    recipe = recipe_of(case, folder, scratch)
    config, mesh = load_config(recipe.model), Mesh(RANKS, dist.get_rank(), RANKS)
    set_seed(SEED)
    alone = tensors_of(loading._whole(recipe, config).model)
    set_seed(SEED)
    loaded = load_by_recipe(recipe, config, mesh)
    prepare_by_recipe(recipe, loaded.model, device=None, shard=RANKS)
    shard_by_recipe(recipe, loaded, mesh, training_arguments(recipe.training))
    ours = {name: whole(tensor) for name, tensor in tensors_of(loaded.model).items()}
    other = [
        name for name in alone if ours[name].dtype != alone[name].dtype or not torch.equal(ours[name], alone[name])
    ]
    frequencies = [name for name in ours if "inv_freq" in name]
    return {"other": other, "keys": ours.keys() == alone.keys(), "said": loaded.said, "frequencies": frequencies}


def spread_refusals() -> dict[str, str]:
    def broken() -> Any:
        yield ("a",), torch.ones(2)
        raise OSError("the disk is gone")

    attempts: dict[str, Any] = {
        "missing": lambda: iter([(("a",), torch.ones(2))]),
        "unknown": lambda: iter([(("c",), torch.ones(2))]),
        "twice": lambda: iter([(("a", "b"), torch.ones(2)), (("a",), torch.ones(2))]),
        "shape": lambda: iter([(("a",), torch.ones(3))]),
        "unreadable": broken,
    }
    said = {}
    for name, pieces in attempts.items():
        targets = {"a": torch.zeros(2), "b": torch.zeros(2)}
        try:
            spread(targets, pieces() if dist.get_rank() == 0 else None)
        except ValueError as error:
            said[name] = str(error)
    return said


def resumed(folder: Path) -> dict[str, Any]:
    """What ranks find of a checkpoint, and of one that only rank 0 sees whole."""
    from deltatune.training import sealed

    class Launched:
        world_size, process_index = RANKS, dist.get_rank()

    read: list[Path] = []
    crc = sealed._crc32
    sealed._crc32 = lambda path: read.append(path) or crc(path)  # type: ignore[func-returns-value]
    try:
        found = found_by_rank_0(folder / "run", True, Launched())
        try:
            found_by_rank_0(folder / "none", True, Launched())
        except ValueError as error:
            refusal = str(error)
    finally:
        sealed._crc32 = crc
    return {"found": found, "read": len(read), "refusal": refusal}


def rank_main(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo")
    scratch = Path(folder) / f"scratch{rank}"
    scratch.mkdir()
    found: dict[str, Any] = {case: differing(case, Path(folder), scratch) for case in CASES}
    found["refusals"], found["resumed"] = spread_refusals(), resumed(Path(folder))
    torch.save(found, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("loading")
    words = len(byte_tokenizer())
    tied = tiny_model("qwen3_5", vocab_size=words, tie_word_embeddings=True)
    tied.tie_weights()
    models = {
        "qwen3_moe": tiny_model("qwen3_moe", vocab_size=words),
        "images": tiny_conditional(),
        "narrow": tiny_model("qwen3_5", vocab_size=words, dtype=torch.bfloat16),
        "tied": tied,
        "tied_twice": tied,
        "bin": tiny_model("qwen3_5", vocab_size=words),
    }
    for name, model in models.items():
        save_checkpoint(folder / name, model)
    from safetensors.torch import load_file, save_file

    twice = folder / "tied_twice" / "model.safetensors"
    tensors = load_file(twice)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, twice, {"format": "pt"})
    (folder / "bin" / "model.safetensors").unlink()
    torch.save(models["bin"].state_dict(), folder / "bin" / "pytorch_model.bin")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **LORA, modules_to_save=["norm"], init_lora_weights=False)
    adapted = peft.get_peft_model(tied, settings)
    with torch.no_grad():
        adapted.base_model.model.model.norm.modules_to_save["default"].weight.add_(1)
    adapted.save_pretrained(folder / "adapter")
    checkpoint = folder / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"state")
    seal(checkpoint, {})
    (folder / "none").mkdir()
    run_ranks(rank_main, str(folder), free_port(), count=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_that_of_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found[case]["keys"]
        assert found[case]["other"] == []
        assert found[case]["frequencies"]
    (said, *_), silent = (*ranks[0][case]["said"], ""), ranks[1][case]["said"]
    assert said.endswith(WHOLE.get(case, ""))
    assert said.startswith("rank 0 loads the whole model into host memory" if case in WHOLE else "")
    assert bool(said) == (case in WHOLE)
    assert silent == ()


def test_what_rank_0_lacks_every_rank_says(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["refusals"] == ranks[1]["refusals"] == {
        "missing": "expected the same names, got no b",
        "unknown": "expected the same names, got c on one side alone",
        "twice": "expected the same names, got a twice",
        "shape": "a: expected [2], got [3]",
        "unreadable": "the disk is gone",
    }  # fmt: skip


def test_rank_0_alone_reads_every_byte_of_a_checkpoint(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["resumed"] for found in ranks)
    assert first["found"] == second["found"]
    assert first["found"][0].name == "checkpoint-2"
    assert (first["read"], second["read"]) == (1, 0)
    assert first["refusal"] == second["refusal"]
    assert "holds no checkpoint to resume from" in first["refusal"]
