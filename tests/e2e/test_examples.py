"""The examples run as they stand, on a small checkpoint."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltatune.demo.checkpoint import save_checkpoint
from deltatune.demo.conversations import make_conversations
from forked import free_port, run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
# what each leaves in its output folder
SCRIPTS = {
    "transformers_trainer.py": "model.safetensors",
    "trl_sft.py": "adapter_model.safetensors",
    "native_loop.py": "model.safetensors",
}
# on several processes
SHARDED = "sharded_loop.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, make_conversations(50, seed=0))
    return folder


@pytest.mark.parametrize(("script", "written"), SCRIPTS.items())
def test_it_runs(
    script: str,
    written: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [script, str(checkpoint), "--output", str(tmp_path / "output"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert (tmp_path / "output" / written).is_file()
    assert "family qwen3_5" in capsys.readouterr().out


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, SHARDED}


def test_the_sharded_loop_runs_on_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    """Each with packs of its own, then both with parts of each pack."""
    run_ranks(sharded_main, str(checkpoint), str(tmp_path), [free_port(), free_port()], count=2)
    before, *after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "1", tmp_path / "2"))
    for found in after:
        assert before.keys() == found.keys()
        assert any(not torch.equal(found[name], value) for name, value in before.items())


def sharded_main(rank: int, checkpoint: str, output: str, ports: list[int]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    for ranks_of_a_pack, port in zip(("1", "2"), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = [SHARDED, checkpoint, "--output", f"{output}/{ranks_of_a_pack}", "--steps", "2"]
        sys.argv += ["--sequence", ranks_of_a_pack]
        runpy.run_path(str(EXAMPLES / SHARDED), run_name="__main__")


def test_the_native_loop_stays_short() -> None:
    assert len((EXAMPLES / "native_loop.py").read_text(encoding="utf-8").splitlines()) <= 60
