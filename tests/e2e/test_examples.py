"""The examples run as they stand, on a small checkpoint."""

from __future__ import annotations

import os
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from deltatune.demo.checkpoint import save_checkpoint
from deltatune.demo.conversations import make_conversations
from deltatune.errors import UserError
from forked import free_port, run_ranks
from tiny import tiny_model

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


@pytest.mark.slow
def test_the_sharded_loop_runs_on_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    """Each with packs of its own, both with parts of each pack, both with some of the experts."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    mixture = tiny_model("qwen3_moe", layers=1, vocab_size=len(tokenizer), num_experts_per_tok=1)
    mixture.model.layers[0].mlp.gate.weight.data.zero_()  # all visits are to one expert
    for saved in (mixture, tokenizer):
        saved.save_pretrained(tmp_path / "mixture")
    run_ranks(sharded_main, str(checkpoint), str(tmp_path), [free_port() for _ in RUNS], count=2)
    for name in ("alone", "sequence", "expert"):
        before, after = (
            load_file(path / "model.safetensors")
            for path in (tmp_path / "mixture" if name == "expert" else checkpoint, tmp_path / name)
        )
        assert before.keys() == after.keys()
        assert any(not torch.equal(after[key], value) for key, value in before.items())
    assert not (tmp_path / "no room").exists()


#: arguments of the sharded loop, by where it saves
RUNS = {
    "alone": [],
    "sequence": ["--sequence", "2"],
    "expert": ["--expert", "2", "--expert-capacity", "2"],
    "no room": ["--expert", "2", "--expert-capacity", "1"],
}


def sharded_main(rank: int, checkpoint: str, output: str, ports: list[int]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    for (name, arguments), port in zip(RUNS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        model = f"{output}/mixture" if "--expert" in arguments else checkpoint
        sys.argv = [SHARDED, model, "--output", f"{output}/{name}", "--steps", "2", *arguments]
        refused = pytest.raises(UserError, match="set expert_capacity to 2") if name == "no room" else nullcontext()
        with refused:
            runpy.run_path(str(EXAMPLES / SHARDED), run_name="__main__")


def test_the_native_loop_stays_short() -> None:
    assert len((EXAMPLES / "native_loop.py").read_text(encoding="utf-8").splitlines()) <= 60
