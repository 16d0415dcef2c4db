"""A run goes on from a start that has moved, and from no other."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from training_cases import make_recipe, save_checkpoint

from deltatune.config.schema import LoraSection
from deltatune.errors import UserError
from deltatune.training import weights_digest
from deltatune.training.export import merge_adapter
from deltatune.training.run import train
from deltatune.training.since import changed_settings, evaluates_otherwise
from deltatune.training.weights_digest import digest_of

QUIET = Console(quiet=True)


def recipe(folder: Path, base: Path, steps: int, adapter: Path | None = None) -> Any:
    training = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "output_dir": str(folder / "output")}
    verify = {"enabled": False, "lengths": None}
    found = make_recipe(folder, base, lora={"target_modules": ["q_proj"]}, training=training, verify=verify)
    return found if adapter is None else found.model_copy(update={"lora": LoraSection(name_or_path=str(adapter))})


def change_a_weight(folder: Path, file: str) -> None:
    tensors = load_file(folder / file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, folder / file, {"format": "pt"})


def test_a_moved_base_is_the_same_start_and_another_is_not(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = save_checkpoint(tmp_path / "base")
    train(recipe(tmp_path, base, 2), console=QUIET)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"base is no folder; .*goes on with --resume where the key"):
        train(recipe(tmp_path, base, 4), resume=True, console=QUIET)

    other = shutil.copytree(tmp_path / "elsewhere", tmp_path / "other")
    change_a_weight(other, "model.safetensors")
    message = r"model\.name_or_path: .* cannot act on a run that goes on: the weights there are others"
    with pytest.raises(UserError, match=message):
        train(recipe(tmp_path, other, 4), resume=True, console=QUIET)

    now = recipe(tmp_path, tmp_path / "elsewhere", 4)
    assert not evaluates_otherwise(changed_settings(now, tmp_path / "output" / "checkpoint-2", allow=False))
    result = train(now, resume=True, console=QUIET)
    assert result.metrics["leg"]["steps"] == 2
    legs = json.loads((tmp_path / "output" / "run.json").read_text())["legs"]
    assert legs[-1]["changes"][0].startswith("model.name_or_path: ")


def test_a_moved_adapter_is_the_same_start_and_another_is_not(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = save_checkpoint(tmp_path / "base")
    (tmp_path / "first").mkdir()
    train(recipe(tmp_path / "first", base, 2), console=QUIET)
    adapter = tmp_path / "adapter"
    (tmp_path / "first" / "output").rename(adapter)
    train(recipe(tmp_path, base, 2, adapter=adapter), console=QUIET)
    adapter.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"lora\.name_or_path: .* is no folder; .*goes on with --resume where the key"):
        train(recipe(tmp_path, base, 4, adapter=adapter), resume=True, console=QUIET)
    other = shutil.copytree(tmp_path / "moved", tmp_path / "other")
    change_a_weight(other, "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lora\.name_or_path: .*: the weights there are others"):
        train(recipe(tmp_path, base, 4, adapter=other), resume=True, console=QUIET)
    result = train(recipe(tmp_path, base, 4, adapter=tmp_path / "moved"), resume=True, console=QUIET)
    assert result.metrics["leg"]["steps"] == 2


@pytest.mark.parametrize("adapter", ["output", "output/checkpoint-2"])
def test_an_adapter_is_merged_into_the_base_that_it_was_trained_on(tmp_path: Path, adapter: str) -> None:
    torch.set_num_threads(1)
    base, said = save_checkpoint(tmp_path / "base"), list[str]()
    train(recipe(tmp_path, base, 2), console=QUIET)
    other = shutil.copytree(base, tmp_path / "other")
    change_a_weight(other, "model.safetensors")
    with pytest.raises(UserError, match=r"other holds other weights, .* or say --allow-other-base") as caught:
        merge_adapter(tmp_path / adapter, tmp_path / "merged", base=str(other))
    assert digest_of(str(base))[:12] in str(caught.value)  # type: ignore[index]
    assert not (tmp_path / "merged").exists()
    merge_adapter(tmp_path / adapter, tmp_path / "merged", base=str(other), allow_other_base=True, say=said.append)
    assert said[0].startswith(f"{other} holds other weights")

    record, run = (json.loads((tmp_path / name).read_text()) for name in ("merged/merge.json", "output/run.json"))
    assert record["model"] == run["model"] | {"name_or_path": str(other), "digest": digest_of(str(other))}
    weights = tmp_path / adapter / "adapter_model.safetensors"
    assert record["adapter"] == {
        "path": str(tmp_path / adapter),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "run": {"folder": str(tmp_path / "output"), "started": run["legs"][0]["started"], "status": "finished"},
    }
    leg = run["legs"][0]
    assert {name: record[name] for name in ("folder", "host", "git", "deltatune", "versions")} == {
        name: leg[name] for name in ("folder", "host", "git", "deltatune", "versions")
    }
    assert leg["ended"] <= record["started"] <= record["ended"]
    assert record["dtype"] == "auto"
    assert record["check"]["difference"] <= record["check"]["limit"]

    base.rename(tmp_path / "elsewhere")
    merge_adapter(tmp_path / adapter, tmp_path / "again", base=str(tmp_path / "elsewhere"), say=said.append)
    assert f"{tmp_path / 'elsewhere'} is the base model that it was trained on, by the digest of its weights" in said


def test_an_adapter_without_a_record_says_that_nothing_tells_its_base(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base, said = save_checkpoint(tmp_path / "base"), list[str]()
    train(recipe(tmp_path, base, 2), console=QUIET)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "alone").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "output" / name, tmp_path / "alone")
    shutil.copytree(base, tmp_path / "copy")
    merge_adapter(tmp_path / "alone", tmp_path / "merged", say=said.append)
    assert not any("no record" in line for line in said), "it is where the adapter says"
    merge_adapter(tmp_path / "alone", tmp_path / "again", base=str(tmp_path / "copy"), say=said.append)
    assert any(line.startswith(f"no record of {tmp_path / 'alone'} tells") for line in said)


def test_a_digest_is_of_names_sizes_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_digest, "_WHOLE", 64)
    monkeypatch.setattr(weights_digest, "_BLOCK", 8)
    file = tmp_path / "model.safetensors"
    found = set()
    contents = [bytes(64), bytes(63), bytes(1000), bytes(1001), b"x" + bytes(999), bytes(999) + b"x"]
    contents += [bytes(500) + b"x" * 40 + bytes(460)]
    for content in contents:
        file.write_bytes(content)
        found.add(digest_of(str(tmp_path)))
    assert len(found) == len(contents)
    (tmp_path / "notes.txt").write_text("of no weight")
    assert digest_of(str(tmp_path)) in found
    file.rename(tmp_path / "renamed.safetensors")
    assert digest_of(str(tmp_path)) not in found
    assert digest_of("owner/name") is None
    assert digest_of(None) is None
