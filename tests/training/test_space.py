"""What a run will save, held against what the disk has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_cases import make_recipe, make_trainer

from deltatune import prepare
from deltatune.errors import UserError
from deltatune.training import space
from deltatune.training.adapters import adapt
from deltatune.training.sealed import manifest
from deltatune.training.space import Room, check_space
from tiny import tiny_model


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(space, "shutil", SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=free)))


def room_of(tmp_path: Path, **sections: Any) -> Room:
    recipe = make_recipe(tmp_path, tmp_path, **sections)
    return Room.of(adapt(tiny_model("qwen3"), recipe.lora), recipe)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_the_estimate_is_what_a_checkpoint_holds(tmp_path: Path, lora: Any, optim: str) -> None:
    training = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "optim": optim}
    recipe = make_recipe(tmp_path, tmp_path, lora=lora, training=training)
    model = adapt(tiny_model("qwen3"), recipe.lora)
    room = check_space(model, recipe)
    prepare(model)
    make_trainer(tmp_path / "run", model=model, max_steps=1, save_strategy="steps", optim=optim).train()
    files = manifest(tmp_path / "run" / "checkpoint-1")["files"]
    model_files = sum(f["bytes"] for name, f in files.items() if name.endswith(".safetensors"))
    assert room.model_bytes <= model_files <= 1.2 * room.model_bytes + 8000
    saved = model_files + files["optimizer.pt"]["bytes"]
    # names and headers weigh as much as such small tensors
    assert room.checkpoint_bytes <= saved <= 1.2 * room.checkpoint_bytes + 40_000


def test_a_first_save_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path, tmp_path, training={"save_strategy": "steps"})
    model = adapt(tiny_model("qwen3"), recipe.lora)
    needed = check_space(model, recipe).checkpoint_bytes
    with_free(monkeypatch, needed)
    check_space(model, recipe)
    with_free(monkeypatch, needed - 1)
    with pytest.raises(UserError, match=r"training\.output_dir: the first save needs .* KiB, and .* free; make room"):
        check_space(model, recipe)


def test_checkpoints_that_are_kept_and_do_not_fit_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"save_strategy": "steps", "save_total_limit": 2}
    needed = 3 * room_of(tmp_path, training=training).checkpoint_bytes
    with_free(monkeypatch, needed)
    assert room_of(tmp_path, training=training).warnings() == []
    with_free(monkeypatch, needed - 1)
    (warning,) = room_of(tmp_path, training=training).warnings()
    assert warning.startswith("training.save_total_limit: 3 checkpoints at once, one of them being written, need ")
    assert room_of(tmp_path, training={"save_strategy": "no"}).warnings() == []


def test_a_model_alone_has_no_optimizers_state(tmp_path: Path) -> None:
    alone = room_of(tmp_path, training={"save_strategy": "steps", "save_only_model": True})
    assert alone.checkpoint_bytes == alone.model_bytes
    assert room_of(tmp_path, training={"save_strategy": "no"}).checkpoint_bytes == 0
