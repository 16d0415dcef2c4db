"""Names of layers, held against the files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltatune.config.schema import LoraSection, ModelSection
from deltatune.errors import UserError
from deltatune.training.adapters import adapt
from deltatune.training.checkpoint import empty_model
from deltatune.training.layer_names import check_layer_names
from tiny import tiny_model


def check(folder: Path, *names: str, **settings: Any) -> None:
    lora = LoraSection(r=4, target_modules=names)
    check_layer_names(ModelSection(name_or_path=str(folder), **settings), lora)


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
    lora = LoraSection(r=4, target_modules=("q_proj",), modules_to_save=("lm_haed",))
    with pytest.raises(UserError, match=r"lora\.modules_to_save: 'lm_haed' matches no module"):
        check_layer_names(ModelSection(name_or_path=str(folder)), lora)


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
