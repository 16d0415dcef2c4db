"""What a machine that loses its power keeps: files and names are on the disk before anything says that they are."""

from __future__ import annotations

import functools
import gzip
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from training_cases import make_recipe, save_checkpoint

from deltatune.data.unpacked import unpacked
from deltatune.training.export import export_adapter, merge_adapter
from deltatune.training.run import train


@dataclass
class Disk:
    """What has been synced: the content of files by inode, and the names that folders hold."""

    content: dict[int, int] = field(default_factory=dict)  # time of the last change
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def sync(self, handle: int) -> None:
        path, found = Path(f"/proc/self/fd/{handle}").readlink(), os.fstat(handle)
        self.order.append(path.name)
        if path.is_dir():
            self.names[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.content[found.st_ino] = found.st_mtime_ns

    def lost(self, folder: Path) -> list[str]:
        """Files and folders below one whose content, or whose name, a power cut may take."""
        lost = []
        for path in folder.rglob("*"):
            found, names = path.stat(), self.names.get(path.parent.stat().st_ino, {})
            written = path.is_dir() or self.content.get(found.st_ino) == found.st_mtime_ns
            if not written or names.get(path.name) != found.st_ino:
                lost.append(str(path.relative_to(folder)))
        return lost


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(os, "fsync", found.sync)
    return found


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "model"])
def test_all_of_a_finished_run_is_on_the_disk(tmp_path: Path, disk: Disk, adapter: bool) -> None:
    torch.set_num_threads(1)
    base, output = save_checkpoint(tmp_path / "base"), tmp_path / "output"
    training = {"max_steps": 1, "save_strategy": "no", "output_dir": str(output)}
    recipe = make_recipe(tmp_path, base, lora={"target_modules": ["q_proj"]}, training=training)
    train(recipe if adapter else recipe.model_copy(update={"lora": None}), console=Console(quiet=True))
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
    assert disk.lost(output) == []
    assert disk.order[-2:] == [".run.json.part", "output"], "what says that it is finished comes last"
    if adapter:
        writers: list[tuple[str, Any]] = [
            ("merged", merge_adapter),
            ("exported", functools.partial(export_adapter, layout="peft")),
        ]
        for name, write in writers:
            folder = tmp_path / name
            write(output, folder)
            assert disk.lost(folder) == []
            assert disk.names[tmp_path.stat().st_ino][folder.name] == folder.stat().st_ino


def test_rows_in_the_cache_are_on_the_disk_before_they_have_their_name(tmp_path: Path, disk: Disk) -> None:
    """A name stands for the content of a compressed file, which nobody reads again."""
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    rows = unpacked(file, tmp_path / "cache", None)
    assert disk.lost(rows.parent) == []
