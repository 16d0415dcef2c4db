import json

import pytest
import torch

from deltatune.cli import main
from deltatune.commands import train as command
from deltatune.compile.graphs import GraphBreakError
from deltatune.config.load import load_recipe
from deltatune.errors import InterruptedRunError


@pytest.fixture
def trained(write_recipe, tmp_path):
    assert main(["train", str(write_recipe())]) == 0
    return tmp_path / "output"


def test_train_then_merge(trained, checkpoint, tmp_path, capsys) -> None:
    from transformers import AutoModelForCausalLM

    merged = tmp_path / "merged"
    assert main(["merge", str(trained), "--output", str(merged)]) == 0
    base, model = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (checkpoint, merged))
    assert base.keys() == model.keys()
    changed = {name for name in base if not torch.equal(base[name], model[name])}
    assert changed
    assert all(name.endswith(("q_proj.weight", "in_proj_qkv.weight")) for name in changed)
    # a second merge into the same folder would mix two models
    assert main(["merge", str(trained), "--output", str(merged)]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{}, {"loss": "orpo"}])
def test_train_on_pairs(write_recipe, pairs, tmp_path, capsys, settings) -> None:
    recipe = write_recipe(pairs, preference=settings)
    assert main(["train", str(recipe), "--set", "data.val_size=3"]) == 0
    metrics = json.loads((tmp_path / "output" / "metrics.json").read_text())
    assert metrics["eval_pairs"] == 3
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1
    assert load_recipe(tmp_path / "output" / "config.yaml").recipe.preference is not None
    lines = [json.loads(line) for line in (tmp_path / "output" / "run.jsonl").read_text().splitlines()]
    assert any("rewards/margins" in line for line in lines)


def test_the_resolved_recipe_runs_again(trained) -> None:
    recipe = load_recipe(trained / "config.yaml").recipe
    assert recipe.training.max_steps == 2
    assert recipe.packing.tokens_per_batch == 128


def test_a_graph_break_is_one_line_and_not_the_users_fault(monkeypatch, capsys, write_recipe) -> None:
    def breaks(recipe, **settings):
        raise GraphBreakError("layer 0:\nunsupported call")

    monkeypatch.setattr(command, "train", breaks)
    assert main(["train", str(write_recipe())]) == 1
    assert capsys.readouterr().err == "error: layer 0: unsupported call\n"


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, capsys, write_recipe) -> None:
    asked = []

    def stopped(recipe, **settings):
        asked.append(settings)
        raise InterruptedRunError("SIGTERM: stopped after step 3 of 6, with a checkpoint; go on with --resume", 143)

    monkeypatch.setattr(command, "train", stopped)
    assert main(["train", str(write_recipe()), "--resume", "auto", "--allow-change"]) == 143
    assert capsys.readouterr().err.startswith("SIGTERM: stopped after step 3 of 6")
    assert asked == [{"resume": "auto", "allow_change": True}]
