"""Checkpoints: what is one, what is none, and that nothing starts at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_cases import save_checkpoint

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError
from deltatune.training import checkpoint
from deltatune.training.checkpoint import empty_model, load_config, load_model, load_tokenizer
from deltatune.training.reloading import reload_weights
from tiny import FAMILIES, tiny_conditional, tiny_model


def section(path: Path | str, **values: Any) -> ModelSection:
    return ModelSection(name_or_path=str(path), **values)


@pytest.mark.parametrize("name", [*FAMILIES, "conditional"])
def test_a_checkpoint_loads_as_the_class_it_was_saved_from(tmp_path: Path, name: str) -> None:
    saved = tiny_conditional() if name == "conditional" else tiny_model(name)
    saved.save_pretrained(tmp_path)
    loaded = load_model(section(tmp_path))
    assert type(loaded) is type(saved)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in saved.state_dict().items())
    empty = empty_model(section(tmp_path, dtype="bfloat16"))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [p.shape for p in empty.parameters()] == [p.shape for p in saved.parameters()]
    assert next(empty.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_dtype_asked_for(tmp_path: Path, dtype: Any) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(section(tmp_path, dtype=dtype)).parameters()} == {getattr(torch, dtype)}


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no checkpoint: it holds no config.json"):
        load_config(section(tmp_path))
    with pytest.raises(UserError, match=r"is no folder; expected a checkpoint folder"):
        load_config(section(tmp_path / "nowhere"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter, not a model; merge it first"):
        load_config(section(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read"):
        load_config(section(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match=r"no_such_model"):
        load_config(section(tmp_path))


@pytest.mark.parametrize("name", ["outputs/mien", "./outputs/mien", "other/outputs/mien"])
def test_a_mistyped_folder_is_told_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also where the name may be one on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "silence", lambda: "the Hub does not answer")
    for folder in ("outputs/mine", "other/outputs/mine"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=r"no folder.*; did you mean mine\?$"):
        load_config(section(name))
    with pytest.raises(UserError) as caught:
        load_config(section("owner/mien"))
    assert "folder owner" not in str(caught.value)


def test_weights_that_are_missing_are_an_error(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the weights .* such as model.layers.1.mlp.up_proj.weight"):
        load_model(section(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot load"):
        load_model(section(tmp_path))


def test_a_headless_model_is_refused(tmp_path: Path) -> None:
    tiny_model("qwen3").model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Qwen3Model has no language-model head"):
        load_model(section(tmp_path))


def test_weights_of_another_model_do_not_reload(tmp_path: Path) -> None:
    tiny_model("qwen3", layers=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is no checkpoint of this model"):
        reload_weights(tiny_model("qwen3", layers=2), tmp_path)


def test_a_template_file_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", tiny_model("qwen3"))
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    chosen = load_tokenizer(section(tmp_path / "base", chat_template=str(tmp_path / "mine.jinja")))
    assert chosen.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    known = load_tokenizer(section(tmp_path / "base", chat_template="{{ 'text' }}"))
    assert known.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "text"
    with pytest.raises(UserError, match=r"model.chat_template: cannot read"):
        load_tokenizer(section(tmp_path / "base", chat_template=str(tmp_path / "none.jinja")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load a tokenizer from .*; set model.tokenizer"):
        load_tokenizer(section(tmp_path / "base", tokenizer=str(tmp_path / "empty")))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_checkpoint(tmp_path / "base", tiny_model("qwen3"))
    vocabulary = load_tokenizer(section(tmp_path / "base")).get_vocab()
    assert load_tokenizer(section("~/base")).get_vocab() == vocabulary
    assert load_tokenizer(section("a/b", tokenizer="~/base")).get_vocab() == vocabulary
    assert load_config(section("~/base")).model_type == "qwen3"
    for key, chosen in (("name_or_path", section("~/bas")), ("tokenizer", section("~/base", tokenizer="~/bas"))):
        with pytest.raises(UserError, match=rf"^model.{key}: ~/bas is no folder; .*did you mean base\?"):
            load_tokenizer(chosen)
