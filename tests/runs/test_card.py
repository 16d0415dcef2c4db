"""The card says what is known, and what the Hub reads of it is what the Hub takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from run_cases import entry, leg, recipe, write_run

from deltatune.config.schema import Recipe
from deltatune.runs.card import model_card
from deltatune.runs.folder import read_run

HUB = {"name_or_path": "Qwen/Qwen3.5-2B", "commit": "abc123"}


def card(folder: Path, *legs: dict[str, Any], **files: Any) -> ModelCard:
    return ModelCard(model_card(read_run(write_run(folder / "mine", *legs, **files))))


def test_an_adapter_of_a_model_on_the_hub(tmp_path: Path) -> None:
    found = card(tmp_path, leg(data={"org/chats": "streamed", "rows.jsonl": "fbd4"}), model=HUB)
    data = found.data.to_dict()
    assert data == {
        "base_model": "Qwen/Qwen3.5-2B",
        "datasets": ["org/chats"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["deltatune", "lora", "base_model:adapter:Qwen/Qwen3.5-2B"],
    }
    assert 'Qwen3ForCausalLM.from_pretrained("Qwen/Qwen3.5-2B", revision="abc123")' in found.text
    assert "| rows.jsonl | fbd4 |" in found.text
    assert f"One model of both: `deltatune merge {tmp_path / 'mine'} --output MERGED`" in found.text


def test_a_model_whose_base_is_a_folder_names_no_base_that_the_hub_cannot_find(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    found = card(tmp_path, model={"name_or_path": str(base)}, recipe={**recipe(), "lora": None})
    data = found.data.to_dict()
    assert "base_model" not in data
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["deltatune"]
    assert "deltatune merge" not in found.text
    assert f"| base model | {base}, Qwen3ForCausalLM |" in found.text


def test_steps_tokens_and_losses_are_of_all_legs(tmp_path: Path) -> None:
    entries = [entry(2, 4.0), entry(4, 9.0), {"leg": 1, "step": 2, "eval_loss": 3.5}, entry(4, 2.25, leg=2)]
    legs = (leg("killed", to_step=4), leg("running", from_step=2, to_step=4))
    text = card(tmp_path, *legs, entries=entries).text
    assert "| steps | 4 in 2 legs |" in text
    assert "| tokens | 12,000, 3,000 of them trained, in 200 s |" in text
    assert "| loss | 4.0000 at first, 2.2500 at last |" in text
    assert "| held-out loss | 3.5000 at step 2 |" in text


def test_settings_that_were_changed_on_the_way_are_told(tmp_path: Path) -> None:
    changes = ["training.learning_rate: 0.0002 -> 0.001", 'data.train.0.path: "a|b" -> "c"']
    text = card(tmp_path, leg("interrupted", to_step=4), leg("running", from_step=4, changes=changes)).text
    assert f"| changed after step 4 | {changes[0]}; {changes[1]} |".replace("a|b", r"a\|b") in text
    assert "The settings of the last leg that are not the defaults" in text
    alone = card(tmp_path / "alone").text
    assert "changed after" not in alone
    assert "last leg" not in alone


@pytest.mark.parametrize(("given", "excerpt"), [({"learning_rate": 0.5}, "learning_rate: 0.5"), ({}, "output_dir")])
def test_the_recipe_is_shown_without_its_defaults(tmp_path: Path, given: dict[str, Any], excerpt: str) -> None:
    shown = card(tmp_path, recipe=recipe(seed=42, **given)).text
    assert excerpt in shown
    assert "seed" not in shown, "42 is the default"


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        ({"lora": {}}, "lora:\n  r: 16\n  lora_alpha: 32\n  target_modules: all-linear\n"),
        ({"lora": {"r": 4, "use_rslora": True}},
         "lora:\n  r: 4\n  lora_alpha: 32\n  target_modules: all-linear\n  use_rslora: true\n"),
        ({"lora": {"name_or_path": "first"}}, "lora:\n  name_or_path: first\n"),
        ({"lora": {}, "compile": {}}, "compile: true\n"),
        ({"preference": {}}, "preference:\n  loss: dpo\n  beta: 0.1\n"),
        ({"preference": {"loss": "simpo"}}, "preference:\n  loss: simpo\n  beta: 2.0\n"),
    ],
)  # fmt: skip
def test_a_section_that_was_chosen_says_what_it_chose(tmp_path: Path, chosen: dict[str, Any], shown: str) -> None:
    given = {**recipe(), **chosen}
    # as a run writes it, with its defaults
    text = card(tmp_path, recipe=Recipe.model_validate(given).model_dump(mode="json")).text
    excerpt = text.partition("```yaml\n")[2].partition("```")[0]
    assert shown in excerpt
    assert "{}" not in excerpt
    # what is shown is the recipe; beta is its default, in words
    read = Recipe.model_validate(yaml.safe_load(excerpt))
    assert (read.lora, read.compile) == (Recipe.model_validate(given).lora, Recipe.model_validate(given).compile)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 4}, "A LoRA adapter of rank 4 for"),
        ({"r": 4, "init_lora_weights": "pissa_niter_4"}, "A LoRA adapter of rank 8 for"),
        ({"r": 16, "name_or_path": "first"}, "A LoRA adapter that went on from `first`, for"),
    ],
)
def test_an_adapter_has_the_rank_that_its_file_has(tmp_path: Path, lora: dict[str, Any], words: str) -> None:
    assert words in card(tmp_path, recipe={**recipe(), "lora": lora}).text


def test_a_base_model_whose_card_is_broken_has_no_license(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [apache: {\n---\n# Base\n")
    assert "license" not in card(tmp_path, model={"name_or_path": str(tmp_path)}).data.to_dict()


def test_weights_that_are_not_the_last_have_their_own_figures(tmp_path: Path) -> None:
    entries = [{"leg": 1, "step": 2, "eval_loss": 1.5}, {"leg": 1, "step": 6, "eval_loss": 3.5}]
    run = read_run(write_run(tmp_path, leg(), entries=entries))
    assert "| held-out loss | 1.5000 at step 2 |" in model_card(run, 2)
    assert "| steps | 6; the weights are those of step 2 |" in model_card(run, 2)
    assert "| held-out loss | 3.5000 at step 6 |" in model_card(run, 6)
