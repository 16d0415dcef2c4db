"""Weights of a checkpoint a few at a time: read as ``from_pretrained`` does, written as ``save_pretrained`` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.core_model_loading import MergeModulelist

from deltatune.hf.reading import NotInPiecesError, load_described
from deltatune.hf.writing import SavedWeights
from tiny import tiny_conditional, tiny_model

#: family (``images`` for the class with a vision tower), what is changed of it
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("qwen3_5", {}),
    "tied": ("qwen3_5", {"tie_word_embeddings": True}),
    "mixed_dtypes": ("qwen3_5", {"dtype": torch.bfloat16}),
    "one_file_an_expert": ("qwen3_moe", {}),
    "hybrid_experts": ("qwen3_5_moe", {}),
    "experts_with_biases": ("gpt_oss", {}),
    "images": ("images", {}),
}


def make(name: str) -> Any:
    family, changes = MODELS[name]
    model = tiny_conditional() if family == "images" else tiny_model(family, layers=3, **changes)
    if "dtype" in changes:
        model.model.layers[0].linear_attn.A_log.data = model.model.layers[0].linear_attn.A_log.data.float()
    model.tie_weights()
    return model


def nothing(_: Any) -> set[str]:
    return set()


def edit(folder: Path, change: Any) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("size", ["20KB", "50GB"])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_what_from_pretrained_loads(name: str, size: str, tmp_path: Path) -> None:
    made = make(name)
    made.save_pretrained(tmp_path, max_shard_size=size)
    stock, info = type(made).from_pretrained(tmp_path, output_loading_info=True)
    found = load_described(type(made), nothing, pretrained_model_name_or_path=tmp_path)
    assert found.info == info
    assert type(found.model) is type(made)
    assert found.model.config.to_dict() == stock.config.to_dict()
    assert found.model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert all(weight.untyped_storage().nbytes() <= 4 for weight in found.model.parameters())
    described = {key: (t.shape, t.dtype) for key, t in found.model.state_dict().items()}
    assert described == {key: (t.shape, t.dtype) for key, t in stock.state_dict().items()}
    for ours, theirs in zip(found.model.buffers(), stock.buffers(), strict=True):  # such as RoPE's frequencies
        assert torch.equal(ours, theirs)
    read = dict(found.pieces.take())
    expected = stock.state_dict()
    assert expected.keys() - read.keys() == ({"lm_head.weight"} if name == "tied" else set())
    for key, tensor in read.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]), key


def test_as_much_is_drawn_at_random_as_by_from_pretrained(tmp_path: Path) -> None:
    """A run draws its adapters next."""
    made = make("hybrid_experts")
    made.save_pretrained(tmp_path)
    after = []
    for load in (type(made).from_pretrained, lambda **call: load_described(type(made), nothing, **call)):
        torch.manual_seed(3)
        load(pretrained_model_name_or_path=tmp_path)
        after.append(torch.rand(()))
    assert after[0] == after[1]


def test_a_module_is_read_at_a_time(tmp_path: Path) -> None:
    made = make("one_file_an_expert")
    made.save_pretrained(tmp_path)
    pieces = load_described(type(made), nothing, pretrained_model_name_or_path=tmp_path).pieces
    at_once = pieces.take({"model.layers.1.mlp.experts.down_proj"})
    assert {name for name, _ in at_once} == {
        f"model.layers.1.mlp.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    assert not any(".1.mlp." in name for name in pieces.names)
    assert [name for name, _ in pieces.take({"lm_head.weight"})] == ["lm_head.weight"]


def test_what_is_kept_has_weights_at_once(tmp_path: Path) -> None:
    made = make("untied")
    made.save_pretrained(tmp_path)
    found = load_described(type(made), lambda _: {"lm_head.weight"}, pretrained_model_name_or_path=tmp_path)
    assert torch.equal(found.model.lm_head.weight, made.lm_head.weight)
    assert found.model.model.norm.weight.isnan().all()
    assert "lm_head.weight" not in dict(found.pieces.take())


def test_missing_and_unexpected_names_are_those_of_from_pretrained(tmp_path: Path) -> None:
    made = make("untied")
    made.save_pretrained(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.other"] = torch.ones(2)

    edit(tmp_path, change)
    _, info = type(made).from_pretrained(tmp_path, output_loading_info=True)
    found = load_described(type(made), nothing, pretrained_model_name_or_path=tmp_path)
    assert found.info == info
    assert info["missing_keys"] == {"model.layers.0.mlp.up_proj.weight"}
    assert info["unexpected_keys"] == {"model.layers.0.mlp.other"}


def test_other_shapes_are_refused_as_by_from_pretrained(tmp_path: Path) -> None:
    made = make("untied")
    made.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(3, 32)}))
    said = []
    for load in (type(made).from_pretrained, lambda **call: load_described(type(made), nothing, **call)):
        with pytest.raises(RuntimeError) as error:
            load(pretrained_model_name_or_path=tmp_path)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_there_beside_the_embedding_is_tied_where_it_equals_it(same: bool, tmp_path: Path) -> None:
    made = make("tied")
    made.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone() + (not same)}))
    stock = type(made).from_pretrained(tmp_path)
    found = load_described(type(made), nothing, pretrained_model_name_or_path=tmp_path).model
    for model in (stock, found):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == same
    assert torch.equal(found.lm_head.weight, stock.lm_head.weight)


def test_what_is_not_in_safetensors_is_read_whole(tmp_path: Path) -> None:
    made = make("untied")
    made.config.save_pretrained(tmp_path)
    torch.save(made.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(NotInPiecesError, match="its weights are no safetensors"):
        load_described(type(made), nothing, pretrained_model_name_or_path=tmp_path)
    with pytest.raises(NotInPiecesError, match="loads in another way"):
        load_described(nn.Linear, nothing, pretrained_model_name_or_path=tmp_path)


def _numbers(tensor: torch.Tensor) -> None:
    tensor.sum().item()


@pytest.mark.parametrize("looks", [_numbers, torch.nonzero, torch.Tensor.numpy])
def test_what_cannot_be_converted_without_numbers_is_read_whole(
    looks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("one_file_an_expert")
    made.save_pretrained(tmp_path)
    convert = MergeModulelist.convert

    def looking(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = convert(self, input_dict, *args, **kwargs)
        for tensor in result.values():
            looks(tensor)
        return result

    monkeypatch.setattr(MergeModulelist, "convert", looking)
    type(made).from_pretrained(tmp_path)
    with pytest.raises(NotInPiecesError, match=r"experts.* is converted in a way that needs its numbers"):
        load_described(type(made), nothing, pretrained_model_name_or_path=tmp_path)


@pytest.mark.parametrize("size", ["20KB", "50GB"])
@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_save_pretrained_to_the_byte(name: str, size: str, tmp_path: Path) -> None:
    model, whole, parts = make(name), tmp_path / "whole", tmp_path / "parts"
    model.save_pretrained(whole, max_shard_size=size)
    model.save_pretrained(parts, state_dict={})
    state = model.state_dict(keep_vars=True)
    asked: list[str] = []

    def weight(name: str) -> torch.Tensor:
        asked.append(name)
        return state[name].detach()

    plan = SavedWeights.of(model, {key: tensor.detach().to("meta") for key, tensor in state.items()}, size)
    plan.write(parts, weight)
    assert asked == [name for group in plan.groups for name in group]
    assert {path.name for path in parts.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert (parts / path.name).read_bytes() == path.read_bytes(), path.name
    assert ("index" in str([*parts.iterdir()])) == (size == "20KB")
    if size == "20KB":
        index = json.loads((parts / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_parameters"] == model.num_parameters()
