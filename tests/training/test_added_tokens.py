"""Tokens that a recipe adds: one token in text, rows that train and are saved, in stock PEFT and merged too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file
from training_cases import make_recipe, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltatune import prepare
from deltatune.config.schema import LoraSection, ModelSection
from deltatune.errors import UserError
from deltatune.layers import causal_lm
from deltatune.training.adapters import adapt, adapt_by_recipe
from deltatune.training.checkpoint import empty_model, load_tokenizer
from deltatune.training.export import merge_adapter
from deltatune.training.run import train
from deltatune.training.tokens import token_rows
from tiny import tiny_model

QUIET = Console(quiet=True)
TOKENS = ["<call>", "</call>"]
VOCABULARY = 259


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    model = tiny_model("qwen3_5", vocab_size=VOCABULARY, tie_word_embeddings=request.param)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base", model)


def with_calls(folder: Path, checkpoint: Path, **sections: Any) -> Any:
    """Rows whose answers hold the new tokens."""
    rows = folder / "calls.jsonl"
    answers = [f"<call>{number}</call>" for number in range(24)]
    messages = [
        [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": answer}]
        for number, answer in enumerate(answers)
    ]
    rows.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    model = {"name_or_path": str(checkpoint), "added_tokens": TOKENS, "special_tokens": {"pad_token": "<|im_start|>"}}
    values = {"lora": {"r": 2, "target_modules": ["q_proj"]}, "verify": {"enabled": False, "lengths": None}, **sections}
    return make_recipe(folder, checkpoint, data={"train": [{"path": str(rows)}]}, model=model, **values)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(225, 261)[None], use_cache=False).logits
    return found


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(torch.linalg.vector_norm(first - second) < 1e-5 * torch.linalg.vector_norm(second))


def test_new_rows_train_beside_adapters_and_load_everywhere(tmp_path: Path, checkpoint: Path) -> None:
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": False}
    result = train(with_calls(tmp_path, checkpoint, training=training), console=QUIET)
    for folder in (result.output_dir, result.output_dir / "checkpoint-1"):
        saved = load_file(folder / "adapter_model.safetensors")
        assert max(weight.shape[0] for name, weight in saved.items() if "lora" not in name) == 2, "rows alone"
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    assert tokenizer.encode("1<call>2</call>", add_special_tokens=False)[1::2] == [VOCABULARY, VOCABULARY + 1]
    assert tokenizer.pad_token == "<|im_start|>"
    torch.manual_seed(1)  # other rows than those that the run drew
    stock: Any = AutoPeftModelForCausalLM.from_pretrained(result.output_dir)
    embedding = stock.get_base_model().get_input_embeddings()
    delta = embedding.token_adapter.trainable_tokens_delta["default"]
    assert delta.shape[0] == 2
    assert not torch.equal(delta, embedding.token_adapter.base_layer.weight[VOCABULARY:])
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(result.output_dir, tmp_path / "merged"))
    assert merged.config.vocab_size == VOCABULARY + 2
    assert close(logits(merged), logits(stock))
    tied = stock.get_base_model().config.tie_word_embeddings
    assert merged.config.tie_word_embeddings == tied, "rows that train are the same in both"
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(merged.get_input_embeddings().weight[:VOCABULARY], base.get_input_embeddings().weight)

    unfinished = {**training, "max_steps": 3}
    resumed = train(with_calls(tmp_path, checkpoint, training=unfinished), resume=True, console=QUIET)
    assert resumed.metrics["leg"]["steps"] == 1
    second = {"max_steps": 1, "learning_rate": 0.0, "output_dir": str(tmp_path / "second")}
    lora = {"name_or_path": str(tmp_path / "output"), "target_modules": "all-linear", "r": 16}
    train(with_calls(tmp_path, checkpoint, training=second, lora=lora), console=QUIET)
    first, again = (AutoPeftModelForCausalLM.from_pretrained(tmp_path / name) for name in ("output", "second"))
    assert close(logits(again), logits(first))


def test_embeddings_that_train_whole_are_merged_with_them(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base")
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    result = train(with_calls(tmp_path, checkpoint, lora=lora, training={"max_steps": 1}), console=QUIET)
    stock = AutoPeftModelForCausalLM.from_pretrained(result.output_dir)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(result.output_dir, tmp_path / "merged"))
    assert merged.config.vocab_size == VOCABULARY + 2
    assert close(logits(merged), logits(stock))


def test_every_weight_trains_with_them(tmp_path: Path, checkpoint: Path) -> None:
    result = train(with_calls(tmp_path, checkpoint, lora=None, training={"max_steps": 2}), console=QUIET)
    model = AutoModelForCausalLM.from_pretrained(result.output_dir)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == VOCABULARY + 2
    assert logits(model).shape[-1] == VOCABULARY + 2


def test_a_plan_counts_the_rows(tmp_path: Path, checkpoint: Path) -> None:
    recipe = with_calls(tmp_path, checkpoint)
    model = adapt_by_recipe(empty_model(recipe.model), recipe)
    rows = {name: p.shape[0] for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    tied = json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"]
    assert list(rows.values()) == ([2] if tied else [2, 2])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"added_tokens": ["<|im_end|>"]}, r"added_tokens: <\|im_end\|> is in the vocabulary already \(2\)"),
        ({"special_tokens": {"pad_token": "<|im_and|>"}}, r"special_tokens.pad_token: <\|im_and\|> is not in the voc"),
    ],
)
def test_tokens_that_cannot_be(checkpoint: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(ModelSection(name_or_path=str(checkpoint), **model))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": None, "training": {"unfrozen_parameters": ["norm"]}}, "added_tokens would not train: .*; add"),
        ({"lora": {"r": 2, "target_modules": ["embed_tokens"]}}, "embed_tokens cannot have adapters beside"),
    ],
)
def test_rows_that_would_not_train(tmp_path: Path, checkpoint: Path, sections: dict[str, Any], message: str) -> None:
    recipe = with_calls(tmp_path, checkpoint, **sections)
    with pytest.raises(UserError, match=message):
        adapt_by_recipe(empty_model(recipe.model), recipe)


def test_modules_that_train_whole_need_no_rows() -> None:
    section = LoraSection(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",))
    model = adapt(tiny_model("qwen3_5"), section, None, [94, 95])
    rows = [name for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    assert len(rows) == 1
    assert "embed_tokens" in rows[0]


@pytest.mark.parametrize(
    ("tied", "whole", "rows"),
    [
        (False, None, ["model.embed_tokens", "lm_head"]),
        (False, "embed_tokens", ["lm_head"]),
        (True, None, ["model.embed_tokens"]),
        (True, "embed_tokens", []),
    ],
)
def test_a_tied_head_has_no_rows_of_its_own(tied: bool, whole: str | None, rows: list[str]) -> None:
    section = LoraSection(r=2, target_modules=("q_proj",), modules_to_save=(whole,) if whole else None)
    assert list(token_rows(tiny_model("qwen3_5", tie_word_embeddings=tied), [94], section)) == rows


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_reads_the_rows_without_whole_logits(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    section = LoraSection(r=2, target_modules=("q_proj",))
    model = adapt(tiny_model("qwen3_5", tie_word_embeddings=tied), section, None, [94, 95])
    ids = torch.arange(60, 96)[None]
    rows = [p for name, p in model.named_parameters() if "trainable_tokens" in name]
    losses, gradients = [], []
    for prepared in (False, True):
        if prepared:
            prepare(model)
            monkeypatch.setattr(causal_lm, "_chunked_loss", None)
        for row in rows:
            row.grad = None
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([row.grad for row in rows if row.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
