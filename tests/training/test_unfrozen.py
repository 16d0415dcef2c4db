"""Parameters that train by their names: only these move, and what is saved is what was trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from training_cases import make_recipe, save_checkpoint
from transformers import AutoModelForCausalLM

from deltatune.config.schema import LoraSection
from deltatune.errors import UserError
from deltatune.training.adapters import adapt
from deltatune.training.export import merge_adapter
from deltatune.training.run import train
from tiny import tiny_conditional, tiny_model

QUIET = Console(quiet=True)
UNPROBED = {"enabled": False, "lengths": None}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 40)[None], use_cache=False).logits
    return found


def test_only_what_matches_trains(tmp_path: Path, checkpoint: Path) -> None:
    training = {"unfrozen_parameters": [r"layers\.1\..*proj", "A_log"], "max_steps": 2}
    train(make_recipe(tmp_path, checkpoint, lora=None, training=training, verify=UNPROBED), console=QUIET)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "output" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ("layers.1." in name and "proj" in name) or "A_log" in name}


def test_beside_adapters_they_are_saved_with_them_and_merged(tmp_path: Path, checkpoint: Path) -> None:
    """Norms and the convolution, which fused ops read, a linear layer that is no adapter's then, and both ends."""
    patterns = ["norm", "conv1d", r"mlp\.gate_proj", "embed_tokens", "lm_head"]
    training = {"unfrozen_parameters": patterns, "max_steps": 2}
    lora = {"r": 2, "target_modules": "all-linear"}
    console = Console(record=True, width=200, file=(tmp_path / "screen.txt").open("w"))
    recipe = make_recipe(tmp_path, checkpoint, lora=lora, training=training)
    result = train(recipe, console=console)
    assert "gate_proj.modules_to_save" in console.export_text()
    assert "gate_proj.lora_A" not in console.export_text()
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(result.output_dir))
    base = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    trained = {
        name.replace("base_model.model.", "").replace(".modules_to_save.default", ""): parameter
        for name, parameter in stock.named_parameters()
        if "modules_to_save" in name
    }
    expected = {name for name in base if re.search("|".join(patterns), name)}
    assert trained.keys() == expected
    assert [name for name in trained if torch.equal(trained[name], base[name])] == [], "all of them moved"
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(result.output_dir, tmp_path / "merged"))
    assert torch.linalg.vector_norm(logits(merged) - logits(stock)) < 1e-5 * torch.linalg.vector_norm(logits(stock))


@pytest.mark.parametrize("lora", [None, LoraSection(r=2, target_modules=("q_proj",))])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_prj", r"unfrozen_parameters: 'q_prj' matches no parameter; their names are such as .*weight"),
        ("(", r"'\(' is no regular expression"),
        ("visual", r"'visual' matches .*visual.*, of a tower that text gives no gradient"),
    ],
)
def test_every_pattern_matches_what_can_train(lora: Any, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt(tiny_conditional(), lora, [pattern])


@pytest.mark.parametrize(
    ("model", "pattern", "message"),
    [
        ({}, "A_log", r"with adapters whole modules train, and .*linear_attn holds dt_bias as well"),
        ({"tie_word_embeddings": True}, "embed_tokens", r"embed_tokens is tied to the head"),
    ],
)
def test_what_cannot_be_saved_with_an_adapter_is_refused(model: dict[str, Any], pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt(tiny_model("qwen3_5", **model), LoraSection(r=2, target_modules=("q_proj",)), [pattern])
