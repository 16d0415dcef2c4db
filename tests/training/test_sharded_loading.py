"""Weights, buffers and adapters that two processes hold between them after loading are those that one would hold."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from training_cases import byte_tokenizer, make_recipe, save_checkpoint
from transformers import TrainerState, set_seed

from deltatune.errors import UserError
from deltatune.hf import writing
from deltatune.parallel.filling import spread, tensors_of
from deltatune.parallel.mesh import Mesh
from deltatune.training import loading
from deltatune.training.arguments import training_arguments
from deltatune.training.checkpoint import load_config
from deltatune.training.layout import shard_by_recipe
from deltatune.training.loading import load_by_recipe
from deltatune.training.planned import prepare_by_recipe
from deltatune.training.resuming import best_beside, found_by_rank_0
from deltatune.training.sealed import resume_point, seal
from deltatune.training.sharded_files import save_weights
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
    "mica": ("tied", {"lora": {**LORA, "init_lora_weights": "mica"}}),
}
WHOLE = {
    "mica": "lora.init_lora_weights: mica takes its weights apart",
    "dora": "lora.use_dora takes the norms of its weights",
    "bin": "its weights are no safetensors",
}


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
    one = loading._whole(recipe, config).model
    alone, trained = tensors_of(one), {name for name, weight in one.named_parameters() if weight.requires_grad}
    set_seed(SEED)
    loaded = load_by_recipe(recipe, config, mesh)
    prepare_by_recipe(recipe, loaded.model, device=None, shard=RANKS)
    shard_by_recipe(recipe, loaded, mesh, training_arguments(recipe.training))
    ours = {name: whole(tensor) for name, tensor in tensors_of(loaded.model).items()}
    other = [
        name for name in alone if ours[name].dtype != alone[name].dtype or not torch.equal(ours[name], alone[name])
    ]
    frequencies = [name for name in ours if "inv_freq" in name]
    trains = {name for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    return {
        "trained": trains ^ trained,
        "other": other,
        "keys": ours.keys() == alone.keys(),
        "said": loaded.said,
        "frequencies": frequencies,
    }


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


class Launched:
    """The ranks that have met."""

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def process_index(self) -> int:
        return dist.get_rank()


def said_by(call: Any) -> str:
    try:
        return f"nothing: {call()}"
    except UserError as error:
        return str(error)


def resumed(folder: Path) -> dict[str, Any]:
    """What ranks find of a checkpoint and of the best beside it, of none, and of one that only rank 0 sees whole."""
    from deltatune.training import resuming, sealed

    read: list[Path] = []
    crc, size_problem = sealed._crc32, resuming.size_problem_of
    sealed._crc32 = lambda path: read.append(path) or crc(path)  # type: ignore[func-returns-value]
    last = folder / "run" / "checkpoint-4"
    try:
        found = found_by_rank_0(partial(resume_point, folder / "run", True), Launched())
        best, damaged = best_beside(last, Launched()), best_beside(folder / "damaged" / "checkpoint-4", Launched())
        of_none = said_by(lambda: found_by_rank_0(partial(resume_point, folder / "none", True), Launched()))
        broken = said_by(lambda: best_beside(folder / "none", Launched()))
        if dist.get_rank() == 1:
            resuming.size_problem_of = lambda _: "state is missing"
        unseen = [
            said_by(call)
            for call in (
                lambda: found_by_rank_0(partial(resume_point, folder / "run", True), Launched()),
                lambda: best_beside(last, Launched()),
            )
        ]
    finally:
        sealed._crc32, resuming.size_problem_of = crc, size_problem
    answers = {"found": found, "best": best, "damaged": damaged, "none": of_none, "broken": broken, "unseen": unseen}
    return {"answers": answers, "read": len(read)}


def saved_whole(folder: Path, scratch: Path) -> dict[str, Any]:
    """A sharded model is saved whose weights are converted by their numbers."""
    recipe = recipe_of("experts", folder, scratch)
    loaded = load_by_recipe(recipe, load_config(recipe.model), Mesh(RANKS, dist.get_rank(), RANKS))
    prepare_by_recipe(recipe, loaded.model, device=None, shard=RANKS)
    shard_by_recipe(recipe, loaded, Mesh(RANKS, dist.get_rank(), RANKS), training_arguments(recipe.training))
    convert = writing.revert_weight_conversion

    def looking(model: Any, state: dict[str, torch.Tensor]) -> Any:
        for tensor in state.values():
            tensor.sum().item()
        return convert(model, state)

    target = folder / "saved"
    writing.revert_weight_conversion = looking
    try:
        said = save_weights(loaded.model, target if dist.get_rank() == 0 else None)
    finally:
        writing.revert_weight_conversion = convert
    if dist.get_rank():
        return {"said": said, "equal": True}
    ours, theirs = (load_file(place / "model.safetensors") for place in (target, folder / "qwen3_moe"))
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return {"said": said, "equal": equal}


def unreadable(folder: Path, scratch: Path) -> list[str]:
    """What every rank says of weights that are broken, and of those that go away after loading has begun."""
    mesh = Mesh(RANKS, dist.get_rank(), RANKS)
    broken = make_recipe(scratch, folder / "broken", compile=None, lora=None)
    said = said_by(lambda: load_by_recipe(broken, load_config(broken.model), mesh))
    recipe = recipe_of("experts", folder, scratch)
    loaded = load_by_recipe(recipe, load_config(recipe.model), mesh)
    prepare_by_recipe(recipe, loaded.model, device=None, shard=RANKS)
    if loaded.pieces is not None:
        first = next(loaded.pieces)

        def gone() -> Any:
            yield first
            raise OSError(errno.EIO, "Input/output error")

        loaded = dataclasses.replace(loaded, pieces=gone())
    return [said, said_by(lambda: shard_by_recipe(recipe, loaded, mesh, training_arguments(recipe.training)))]


def rank_main(rank: int, folder: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo")
    scratch = Path(folder) / f"scratch{rank}"
    scratch.mkdir()
    found: dict[str, Any] = {case: differing(case, Path(folder), scratch) for case in CASES}
    found["refusals"], found["resumed"] = spread_refusals(), resumed(Path(folder))
    found["saved_whole"] = saved_whole(Path(folder), scratch)
    found["unreadable"] = unreadable(Path(folder), scratch)
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
    twice = folder / "tied_twice" / "model.safetensors"
    tensors = load_file(twice)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, twice, {"format": "pt"})
    (folder / "bin" / "model.safetensors").unlink()
    save_checkpoint(folder / "broken", models["bin"])
    (folder / "broken" / "model.safetensors").unlink()
    (folder / "broken" / "model.safetensors.index.json").write_text("{")
    torch.save(models["bin"].state_dict(), folder / "bin" / "pytorch_model.bin")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", **LORA, modules_to_save=["norm"], init_lora_weights=False)
    adapted = peft.get_peft_model(tied, settings)
    with torch.no_grad():
        adapted.base_model.model.model.norm.modules_to_save["default"].weight.add_(1)
    adapted.save_pretrained(folder / "adapter")
    for run in ("run", "damaged"):
        for step in (2, 4):
            checkpoint = folder / run / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "optimizer.pt").write_bytes(b"state")
            state = TrainerState(global_step=step, best_model_checkpoint=f"/elsewhere/{run}/checkpoint-2")
            state.save_to_json(str(checkpoint / "trainer_state.json"))
            seal(checkpoint, {})
    (folder / "damaged" / "checkpoint-2" / "optimizer.pt").write_bytes(b"other")
    (folder / "none").mkdir()
    (folder / "none" / "trainer_state.json").write_text("{")
    run_ranks(rank_main, str(folder), free_port(), count=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_that_of_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found[case]["keys"]
        assert found[case]["other"] == []
        assert found[case]["trained"] == set()
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


def test_what_cannot_be_converted_without_numbers_is_saved_whole(ranks: list[dict[str, Any]]) -> None:
    (said,) = ranks[0]["saved_whole"]["said"]
    assert said.startswith("rank 0 has gathered the whole model in host memory to save it: ")
    assert ranks[0]["saved_whole"]["equal"]
    assert ranks[1]["saved_whole"]["said"] == []


def test_rank_0_alone_reads_every_byte_of_checkpoints(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["resumed"] for found in ranks)
    answers = first["answers"]
    assert answers == second["answers"]
    assert answers["found"][0].name == "checkpoint-4"
    assert Path(answers["best"]).parts[-2:] == ("run", "checkpoint-2")
    assert answers["damaged"] is None
    assert "holds no checkpoint to resume from" in answers["none"]
    assert "trainer_state.json cannot be read" in answers["broken"]
    assert first["read"] >= 2 * 4
    assert second["read"] == 0


def test_a_checkpoint_that_one_rank_does_not_see_is_refused_by_all(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        last, best = found["resumed"]["answers"]["unseen"]
        for said, name in ((last, "checkpoint-4"), (best, "checkpoint-2")):
            assert said.startswith("rank 1 does not see ")
            assert f"{name} as rank 0 does: state is missing; every process reads it" in said


def test_weights_that_cannot_be_read_are_said_in_one_line_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["unreadable"] == ranks[1]["unreadable"]
    broken, gone = ranks[0]["unreadable"]
    assert re.match(r"cannot load model .*broken: ", broken)
    assert re.fullmatch(r"cannot load model .*qwen3_moe: .*Input/output error", gone)
