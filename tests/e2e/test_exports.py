"""What a run leaves behind loads in stock transformers and PEFT, and answers as the trained model did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from trainer_cases import hybrid, lora, samples, training_values
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from deltatune import Sequences, prepare
from tiny import documents, tiny_conditional, tiny_model

KINDS: dict[str, tuple[Callable[[], Any], Any]] = {
    "text": (hybrid, transformers.AutoModelForCausalLM),
    "conditional": (tiny_conditional, transformers.AutoModelForImageTextToText),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "head_and_norm_too": {"modules_to_save": ["lm_head", "norm"]},
    "weight_decomposed": {"use_dora": True},
}


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path]:
    """A model loaded from a checkpoint, the class that loads it, and the checkpoint."""
    build, loader = KINDS[request.param]
    build().save_pretrained(tmp_path / "base")
    return load(loader, tmp_path / "base"), loader, tmp_path / "base"


def load(loader: Any, folder: Path) -> Any:
    return loader.from_pretrained(folder, dtype=torch.float32).eval()


def train(model: Any, folder: Path) -> None:
    arguments = TrainingArguments(**training_values(folder / "run", max_steps=2, learning_rate=0.02))
    Trainer(model, arguments, data_collator=DataCollatorWithFlattening(), train_dataset=samples()).train()
    model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    (tokens,) = documents([40], seed=5)
    found: torch.Tensor = model(input_ids=tokens[None]).logits
    return found


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_loads_in_stock_peft(
    base: tuple[Any, Any, Path], when: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, loader, checkpoint = base
    untrained = logits(model)
    if when == "before":
        prepared = prepare(model)
        model = peft.get_peft_model(model, lora(**options))
    else:
        model = peft.get_peft_model(model, lora(**options))
        prepared = prepare(model)
    train(model, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    stock = peft.PeftModel.from_pretrained(load(loader, checkpoint), str(tmp_path / "adapter")).eval()
    assert_close(logits(model), logits(stock))
    assert (logits(model) - untrained).norm() > 0.1 * untrained.norm()
    prepared.revert()
    assert torch.equal(logits(model), logits(stock))


@pytest.mark.parametrize("reverted", [True, False])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_a_merged_model_loads_in_stock_transformers(
    base: tuple[Any, Any, Path], options: dict[str, Any], reverted: bool, tmp_path: Path
) -> None:
    model, loader, checkpoint = base
    model = peft.get_peft_model(model, lora(**options))
    prepared = prepare(model)
    train(model, tmp_path)
    adapted = logits(model)
    if reverted:
        prepared.revert()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    stock = load(loader, tmp_path / "merged")
    assert_close(logits(stock), adapted)
    assert_close(logits(stock), logits(merged))
    if reverted:
        assert torch.equal(logits(stock), logits(merged))
    assert_saved_as_stock(tmp_path / "merged", load(loader, checkpoint), tmp_path / "stock")


def test_a_fully_trained_model_loads_in_stock_transformers(base: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model, loader, checkpoint = base
    prepared = prepare(model)
    train(model, tmp_path)
    model.save_pretrained(tmp_path / "trained")
    stock = load(loader, tmp_path / "trained")
    assert_close(logits(model), logits(stock))
    assert_saved_as_stock(tmp_path / "trained", load(loader, checkpoint), tmp_path / "stock")
    prepared.revert()
    assert type(stock) is type(model)
    assert torch.equal(logits(model), logits(stock))


def assert_saved_as_stock(saved: Path, stock: Any, folder: Path) -> None:
    """The config, and the names, shapes and dtypes of the tensors, that the stock model is saved with."""
    ours = json.loads((saved / "config.json").read_text())
    stock.config.use_cache = ours["use_cache"]  # Trainer's doing
    stock.save_pretrained(folder)
    assert ours == json.loads((folder / "config.json").read_text())
    tensors = (load_file(path / "model.safetensors").items() for path in (saved, folder))
    trained, expected = ({name: (tensor.shape, tensor.dtype) for name, tensor in items} for items in tensors)
    assert trained == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe", "gpt_oss"])
def test_shards_of_a_trained_mixture_load_in_stock_transformers(family: str, tmp_path: Path) -> None:
    """Transformers writes experts one by one for Qwen, fused for gpt-oss."""
    model = tiny_model(family)
    prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.cat(documents([20, 9]))[None]
    model(input_ids=tokens, labels=tokens, sequences=Sequences.from_lengths([20, 9])).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(shards) > 2
    names = {name for shard in shards for name in load_file(shard)}
    assert any(name.endswith("mlp.experts.3.down_proj.weight") for name in names) == (family != "gpt_oss")
    assert any(name.endswith("mlp.experts.down_proj") for name in names) == (family == "gpt_oss")
    stock = load(transformers.AutoModelForCausalLM, tmp_path / "saved")
    assert_close(logits(model), logits(stock))
    untouched = tiny_model(family).eval()
    assert (logits(stock) - logits(untouched)).norm() > 1e-2 * logits(untouched).norm(), "it trained"
