"""Names of layers, held against the files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltatune.config.schema import LoraSection, ModelSection, Recipe
from deltatune.errors import UserError
from deltatune.training.adapters import adapt
from deltatune.training.checkpoint import empty_model
from deltatune.training.layer_names import check_layer_names
from tiny import tiny_model


def check(folder: Path, *names: str, **settings: Any) -> None:
    check_sections(folder, model=settings, lora={"target_modules": names} if names else None)


def check_sections(folder: Path, **sections: Any) -> None:
    model = {"name_or_path": str(folder), **sections.pop("model", {})}
    given = {"model": model, "data": {"train": [{"path": "rows.jsonl"}]}, **sections}
    check_layer_names(Recipe.model_validate(given))


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(path)
    return path


def test_every_module_passes(folder: Path) -> None:
    model = empty_model(ModelSection(name_or_path=str(folder)))
    names = [name for name, _ in model.named_modules() if name]
    check(folder, *names, *(name.rpartition(".")[2] for name in names), "all-linear")


def test_a_name_that_is_nowhere_is_refused_as_by_the_model(folder: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules: 'q_porj' matches no module; nearest: q_proj") as early:
        check(folder, "k_proj", "q_porj")
    with pytest.raises(UserError) as late:
        adapt(empty_model(ModelSection(name_or_path=str(folder))), LoraSection(r=4, target_modules=("q_porj",)))
    assert str(late.value).partition(";")[0] == str(early.value).partition(";")[0]


def test_modules_to_save_are_looked_at_too(folder: Path) -> None:
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}
    with pytest.raises(UserError, match=r"lora\.modules_to_save: 'lm_haed' matches no module"):
        check_sections(folder, lora=lora)


def patterned(key: str, pattern: str) -> dict[str, Any]:
    """Sections in which a key holds a pattern; other keys match everything."""
    section, name = key.split(".")
    value: Any = {"unfrozen_parameters": [pattern], "target_modules": pattern, "exclude_modules": pattern}.get(name)
    return {section: {name: {pattern: 1} if value is None else value}}


PATTERNS = {
    "lora.target_modules": "module",
    "lora.exclude_modules": "module",
    "lora.rank_pattern": "layer",
    "lora.alpha_pattern": "layer",
    "training.unfrozen_parameters": "parameter",
    "training.learning_rates": "parameter",
}


@pytest.mark.parametrize(("key", "what"), PATTERNS.items())
@pytest.mark.parametrize(
    "pattern",
    [
        "q_porj", r".*\.q_porj", r"^layers\.3.self_attn.q_porj$", "layers.1.+porj",
        r".*\.(q|k)_porj", r"layers\.(?:0|1)\.((self|cross)_atn|lniear).*", "q_porj|(k|v)_porj",
    ],
)  # fmt: skip
def test_a_pattern_of_words_that_are_nowhere_is_refused(folder: Path, key: str, what: str, pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        check_sections(folder, **patterned(key, pattern))
    assert str(caught.value).startswith(f"{key}: {pattern!r} matches no {what}; nearest: ")


@pytest.mark.parametrize("key", PATTERNS)
@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "proj", r".*\.q_proj", r"^model\.layers\.0\.", ".", "norm.weight$",
        # what may match otherwise than by each of its words
        "q_porj|q_proj", "(q_porj)?", "(q_porj)*", r"(q_porj|norm)(\.weight)?", "(?=q_porj).*",
        r".*\.(q|k)_(porj|proj)", "(a|b)" * 30, "[q_porj]", "q_porj{0}", "(?i)Q_PROJ", r"\w+porj*",
    ],
)  # fmt: skip
def test_other_patterns_are_left_to_the_model(folder: Path, key: str, pattern: str) -> None:
    check_sections(folder, **patterned(key, pattern))


def test_rates_of_parameters_that_adapters_bring_are_left_to_them(folder: Path) -> None:
    check_sections(folder, lora={}, training={"learning_rates": {"lora_B": 1e-3}})


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    tiny_model("qwen3_5").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with pytest.raises(UserError, match=r"nearest: q_proj"):
        check(tmp_path, "q_porj")


def _own_code(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}


def _unknown_type(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "model_type": "of_no_kind"}


@pytest.mark.parametrize("change", [_own_code, _unknown_type, lambda _: []])
def test_what_is_not_known_for_certain_is_left_to_the_model(tmp_path: Path, change: Any) -> None:
    tiny_model("qwen3_5").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    check(tmp_path, "q_porj")


def test_weights_that_cannot_be_read_are_left_to_the_model(tmp_path: Path) -> None:
    tiny_model("qwen3_5").save_pretrained(tmp_path)
    check(tmp_path, "gate_porj_of_experts")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    check(tmp_path, "q_porj")
    (tmp_path / "model.safetensors").unlink()
    check(tmp_path, "q_porj")
