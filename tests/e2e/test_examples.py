"""The examples run as they stand, on a small checkpoint."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from deltatune.demo.checkpoint import save_checkpoint
from deltatune.demo.conversations import make_conversations

EXAMPLES = Path(__file__).parents[2] / "examples"
# what each leaves in its output folder
SCRIPTS = {
    "transformers_trainer.py": "model.safetensors",
    "trl_sft.py": "adapter_model.safetensors",
    "native_loop.py": "model.safetensors",
}


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
    assert {path.name for path in EXAMPLES.glob("*.py")} == SCRIPTS.keys()


def test_the_native_loop_stays_short() -> None:
    assert len((EXAMPLES / "native_loop.py").read_text(encoding="utf-8").splitlines()) <= 60
