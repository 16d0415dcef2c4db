"""What is missing on this machine, before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_cases import make_recipe
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from deltatune.config.schema import Recipe
from deltatune.config.training_section import TrainingSection
from deltatune.errors import UserError
from deltatune.training import beginning
from deltatune.training import devices as devices_module
from deltatune.training import preflight as module
from deltatune.training.devices import surely_on_cpu
from deltatune.training.preflight import missing_optimizer, preflight


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")

    def build(**sections: Any) -> Recipe:
        return make_recipe(tmp_path, tmp_path / "base", **sections)

    return build


def test_what_is_there_passes(recipe: Any, tmp_path: Path) -> None:
    preflight(recipe(training={"output_dir": str(tmp_path / "not" / "there" / "yet")}))
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name_or_path": "~/no such checkpoint"}}, r"model ~/no such checkpoint is no folder"),
        ({"model": {"name_or_path": "."}}, r"model \. is no checkpoint: it holds no config\.json"),
        ({"data": {"train": [{"path": "{folder}/trian.jsonl"}]}}, r"data\.train\.0: .*; did you mean train\.jsonl"),
        ({"data": {"eval": [{"path": "~/no/rows.jsonl"}]}}, r"data\.eval\.0: ~/no/rows\.jsonl does not exist"),
        ({"data": {"cache_dir": "{folder}/train.jsonl/cache"}}, r"cache_dir: .*train\.jsonl is a file; it cannot"),
        ({"training": {"output_dir": "{folder}/train.jsonl"}}, r"output_dir: .* is a file; choose a folder"),
        (
            {"training": {"output_dir": "{folder}/purged"}},
            r"output_dir: .*purged is a link to gone, which is not there",
        ),
        ({"data": {"cache_dir": "{folder}/purged/x"}}, r"cache_dir: .*purged is a link to gone, which is not there"),
        ({"training": {"output_dir": "a\0b"}}, r"training\.output_dir: 'a\\x00b' names no folder"),
        ({"data": {"cache_dir": "a\0b"}}, r"data\.cache_dir: 'a\\x00b' names no folder"),
        ({"training": {"report_to": "wandb"}}, r"report_to: the package of wandb is not installed; pip install wandb"),
        ({"training": {"report_to": ["comet_ml"]}}, r"comet_ml is not installed; pip install comet-ml, or set"),
    ],
)
def test_what_is_not_there_is_one_line(recipe: Any, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    (tmp_path / "purged").symlink_to("gone")
    found = recipe(**filled(sections, str(tmp_path)))
    with pytest.raises(UserError, match=message) as caught:
        preflight(found)
    assert "\n" not in str(caught.value)


def filled(value: Any, folder: str) -> Any:
    """With the folder in the place of its name."""
    if isinstance(value, dict):
        return {name: filled(item, folder) for name, item in value.items()}
    if isinstance(value, list):
        return [filled(item, folder) for item in value]
    return value.replace("{folder}", folder) if isinstance(value, str) else value


def test_a_folder_without_permission_to_write(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "os", SimpleNamespace(access=lambda path, mode: path != tmp_path, W_OK=2, X_OK=1))
    with pytest.raises(UserError, match=r"training\.output_dir: .* cannot be written to; choose another folder"):
        preflight(recipe())


def test_a_record_without_permission_to_write(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "output").mkdir()
    for name in ("config.yaml", "train.log"):  # the first is replaced
        (tmp_path / "output" / name).touch()
    monkeypatch.setattr(beginning, "os", SimpleNamespace(access=lambda path, mode: not path.is_file(), W_OK=2))
    with pytest.raises(UserError, match=r"training\.output_dir: .*train\.log cannot be written to; change its perm"):
        preflight(recipe())


@pytest.mark.parametrize(
    ("optimizer", "remedy"),
    [
        ("adamw_8bit", r"'deltatune\[optimizers\]'"),
        ("paged_lion_32bit", r"'deltatune\[optimizers\]'"),
        ("adamw_torch_4bit", r"'deltatune\[optimizers\]'"),
        ("galore_adamw", "galore-torch"),
        ("stable_adamw", "torch-optimi"),
    ],
)
def test_an_optimizer_needs_its_package(
    recipe: Any, optimizer: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    found = recipe(training={"optim": optimizer})
    with pytest.raises(UserError, match=rf"optim: {optimizer} needs the package .*; pip install {remedy}$"):
        preflight(found)


def test_pushing_needs_a_token(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "silence", lambda: None)
    monkeypatch.setattr(module, "huggingface_hub", SimpleNamespace(get_token=lambda: None))
    found = recipe(training={"push_to_hub": True, "save_strategy": "steps"})
    with pytest.raises(UserError, match="needs a token; run hf auth login, or set HF_TOKEN"):
        preflight(found)


@pytest.mark.parametrize(("devices", "cpu"), [((), True), (("nvidia*",), False), (("kfd",), False)])
def test_files_of_devices_tell_that_there_is_none(monkeypatch: pytest.MonkeyPatch, devices: Any, *, cpu: bool) -> None:
    class Folder:
        def __init__(self, _: str) -> None: ...

        def glob(self, name: str) -> list[str]:
            return [name] if name in devices else []

    monkeypatch.setattr(devices_module, "Path", Folder)
    assert surely_on_cpu(TrainingSection(use_cpu=False)) is (cpu and sys.platform == "linux")
    assert surely_on_cpu(TrainingSection(use_cpu=True))


@pytest.mark.parametrize("optimizer", [name.value for name in OptimizerNames])
def test_every_optimizer_is_there_or_its_package_is_named(tmp_path: Path, optimizer: str) -> None:
    arguments = TrainingArguments(str(tmp_path), optim=optimizer, use_cpu=True)
    if missing_optimizer(optimizer) is None:
        assert Trainer.get_optimizer_cls_and_kwargs(arguments)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, deltatune.training.preflight; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
