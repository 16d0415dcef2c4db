"""Files beside the base's weights travel with what is made of it: byte for byte where nothing changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import adapter_on, add_to_file, conditional, logits, relative, saved, stock, text
from rich.console import Console
from safetensors.torch import load_file
from training_cases import make_recipe
from transformers import AutoTokenizer, GenerationConfig

from deltatune.training.companions import write_tokenizer
from deltatune.training.export import merge_adapter
from deltatune.training.run import train

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Written by hand, as checkpoints of other people are: other spacing, more files, a head that no class loads."""
    folder = saved(tmp_path / "base", conditional())
    for name in PROCESSORS:
        (folder / name).write_text(json.dumps({"processor_class": "Qwen3VLProcessor", "of": name}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content, separators=(",", ":")))
    (folder / "vocab.json").write_text("{ }")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0],  "pad_token_id": 0, "temperature": 0.6}')
    (folder / "README.md").write_text("the base's own card")
    add_to_file(folder, {"mtp.fc.weight": torch.ones(2, 2)})
    return folder


def same(folder: Path, base: Path, names: tuple[str, ...]) -> bool:
    return all((folder / name).read_bytes() == (base / name).read_bytes() for name in names)


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["adapter", "full"])
def test_files_of_the_base_come_out_of_a_run_as_they_are(base: Path, tmp_path: Path, lora: Any) -> None:
    training = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    console = Console(record=True, width=200, file=(tmp_path / "screen.txt").open("w"))
    train(make_recipe(tmp_path, base, lora=lora, training=training), console=console)
    output = tmp_path / "output"
    assert same(output, base, (*TOKENIZER, *PROCESSORS, "generation_config.json"))
    assert not (output / "README.md").exists() or not same(output, base, ("README.md",))
    if lora is None:
        assert torch.equal(load_file(output / "model.safetensors")["mtp.fc.weight"], torch.ones(2, 2))
        assert "1 tensors that Qwen3_5ForConditionalGeneration does not load" in console.export_text()
        return
    # a checkpoint's tokenizer is PEFT's and the Trainer's, and says the same
    for folder in (output, output / "checkpoint-1"):
        merged = merge_adapter(folder, tmp_path / f"merged {folder.name}")
        assert same(merged, base, (*TOKENIZER, *PROCESSORS, "generation_config.json"))


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["adapter", "full"])
def test_settings_without_effect_end_no_run_whose_tokens_are_aligned(base: Path, tmp_path: Path, lora: Any) -> None:
    """transformers warns of them when it loads a model, and refuses to save them once one of them has changed."""
    (base / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 5}')
    training = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    train(make_recipe(tmp_path, base, lora=lora, training=training), console=Console(quiet=True))
    saved = [tmp_path / "output"] if lora else [tmp_path / "output", tmp_path / "output" / "checkpoint-1"]
    for folder in saved:
        written = json.loads((folder / "generation_config.json").read_text())
        assert (written["temperature"], written["pad_token_id"]) == (0.6, 0)
        assert "do_sample" not in written


def test_a_template_of_ones_own_is_saved_and_the_rest_stays(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "the base's"}))
    recipe = make_recipe(
        tmp_path, base, model={"chat_template": "chatml", "name_or_path": str(base)}, training={"max_steps": 1}
    )
    train(recipe, console=Console(quiet=True))
    for folder in (tmp_path / "output", merge_adapter(tmp_path / "output", tmp_path / "merged")):
        assert same(folder, base, ("tokenizer.json", "vocab.json", "merges.txt"))
        template = AutoTokenizer.from_pretrained(folder).chat_template
        assert template == (folder / "chat_template.jinja").read_text()
        assert template != (base / "chat_template.jinja").read_text()
        assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_a_vocabulary_that_grew_is_saved_anew(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<note>"])
    write_tokenizer(tokenizer, [base], tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<note>") == len(tokenizer) - 1
    assert same(tmp_path, base, ("chat_template.jinja",))
    assert not (tmp_path / "vocab.json").exists(), "it lacks the new token"


def test_what_a_call_leaves_in_a_tokenizer_does_not_change_it(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    write_tokenizer(tokenizer, [base], tmp_path)
    assert same(tmp_path, base, TOKENIZER)


def test_tokens_that_end_an_answer_are_not_lost(base: Path, tmp_path: Path) -> None:
    """The Trainer adds the tokenizer's to those of the base, which is no longer what its file says."""
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')
    train(make_recipe(tmp_path, base, training={"max_steps": 1}), console=Console(quiet=True))
    for folder in (tmp_path / "output", merge_adapter(tmp_path / "output", tmp_path / "merged")):
        assert 2 in GenerationConfig.from_pretrained(folder).eos_token_id


def test_a_tokenizer_of_another_model_stays_that_ones(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    text().save_pretrained(bare)
    adapter_on(bare, tmp_path / "adapter")
    for name in TOKENIZER:
        (tmp_path / "adapter" / name).unlink(missing_ok=True)
        (tmp_path / "adapter" / name).write_bytes((base / name).read_bytes())
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert same(merged, base, TOKENIZER)
    assert relative(logits(stock(merged)), logits(stock(bare))) > 0.05
