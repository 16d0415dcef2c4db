"""Bases of many kinds, adapters on them as after training, and what stock libraries make of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from training_cases import byte_tokenizer, save_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from deltatune.config.schema import LoraSection, ModelSection
from deltatune.training.adapters import adapt
from deltatune.training.checkpoint import load_checkpoint
from deltatune.training.export import Origin, save_trained
from deltatune.training.starts import first_factors
from tiny import tiny_conditional, tiny_model

VOCABULARY = 259  # of byte_tokenizer
IDS = torch.arange(3, 40)[None]


def conditional(family: str = "qwen3_5") -> Any:
    """A ``*ForConditionalGeneration`` with room for the byte tokenizer."""
    model = tiny_conditional(family)
    model.resize_token_embeddings(VOCABULARY)
    return model


def tied(model: Any) -> Any:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def text(family: str = "qwen3", **changes: Any) -> Any:
    return tiny_model(family, vocab_size=VOCABULARY, **changes)


def add_to_file(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Puts tensors into a checkpoint of one file."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def adapter_on(base: Path, folder: Path, seed: int = 0, **lora: Any) -> torch.Tensor:
    """Saves an adapter of a run on ``base`` whose weights have moved; returns the logits of the model in memory."""
    section = ModelSection(name_or_path=str(base))
    loaded = load_checkpoint(section)
    torch.manual_seed(seed)
    model = adapt(loaded.model, LoraSection(**{"r": 4, **lora}))
    origin = Origin(section, loaded.unexpected, first_factors(model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    save_trained(model, byte_tokenizer(), folder, origin)
    return logits(model)


def saved(folder: Path, model: Any, **how: Any) -> Path:
    """A checkpoint and its tokenizer."""
    if not how:
        return save_checkpoint(folder, model)
    model.save_pretrained(folder, **how)
    byte_tokenizer().save_pretrained(folder)
    return folder


def stock(folder: Path) -> Any:
    """The model as stock transformers loads it, in the checkpoint's class and dtype."""
    whole = "ForConditionalGeneration" in (folder / "config.json").read_text()
    return (AutoModelForImageTextToText if whole else AutoModelForCausalLM).from_pretrained(folder, dtype="auto")
