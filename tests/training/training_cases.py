"""Packs, trainers, checkpoints and recipes of small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltatune import prepare
from deltatune.config.schema import Recipe
from deltatune.config.training_section import TrainingSection
from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.training.arguments import training_arguments
from deltatune.training.trainer import PackedTrainer
from tiny import VOCAB, tiny_model

TOKENS = 48


class Packs:
    """Packs of known content: documents of varying length, a varying share of their tokens trained."""

    def __init__(self, count: int, *, tokens: int = TOKENS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.packs = [self._pack(rng, tokens, trained, n) for n, trained in enumerate(np.linspace(0.15, 1.0, count))]
        self.seen: list[int] = []

    @staticmethod
    def _pack(rng: np.random.Generator, tokens: int, trained: float, number: int) -> list[Sample]:
        samples: list[Sample] = []
        room = int(rng.integers(tokens * 2 // 3, tokens + 1))
        while room >= 3:
            length = min(room, int(rng.integers(3, 20)))
            ids = rng.integers(1, VOCAB, length)
            labels = np.where(rng.random(length) < trained, ids, IGNORE_INDEX)
            labels[-1] = ids[-1]
            samples.append(Sample(ids, labels, 100 * number + len(samples)))
            room -= length
        return samples

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Sample]:
        self.seen.append(index)
        return self.packs[index]

    def where(self, origin: int) -> str:
        return f"pack {origin // 100}, row {origin % 100}"

    def squares(self, _: int) -> np.ndarray:
        return np.array([sum(len(sample) ** 2 for sample in pack) for pack in self.packs])

    def epochs(self, _: int) -> range:
        return range(len(self))

    @property
    def num_trained(self) -> int:
        return sum(sample.num_trained for pack in self.packs for sample in pack)


def make_trainer(
    output_dir: Path,
    *,
    model: Any = None,
    packs: Packs | None = None,
    eval_packs: Any = None,
    tokens: int = TOKENS,
    offloading: torch.device | None = None,
    **training: Any,
) -> PackedTrainer:
    values = {"output_dir": str(output_dir), "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **training}
    arguments = training_arguments(TrainingSection(**values))
    if model is None:
        model = tiny_model("qwen3_5")
        prepare(model)
    return PackedTrainer(
        model,
        arguments,
        train_dataset=packs if packs is not None else Packs(4),
        eval_dataset=eval_packs,
        tokens_per_batch=tokens,
        pad_token_id=0,
        offloading=offloading,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def byte_tokenizer() -> Any:
    """One token a byte, and the chat markers."""
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*markers, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def save_checkpoint(folder: Path, model: Any = None) -> Path:
    """A model and its tokenizer, as any checkpoint."""
    tokenizer = byte_tokenizer()
    model = tiny_model("qwen3_5", vocab_size=len(tokenizer)) if model is None else model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_conversations(path: Path, count: int, *, first: int = 0) -> Path:
    """Sums, asked and answered; answers of unequal length."""
    rows = []
    for number in range(first, first + count):
        question, answer = f"{number} + {number % 7}?", "so " * (number % 4) + str(number + number % 7)
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pairs(path: Path, count: int, *, first: int = 1) -> Path:
    """Sums with a right and a wrong answer, of unequal length."""
    rows = []
    for number in range(first, first + count):
        right, wrong = " so" * (number % 4) + f" {2 * number}", f" {number}" + "!" * (5 * number % 7)
        rows.append({"prompt": f"{number} + {number}?", "chosen": right, "rejected": wrong})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_recipe(folder: Path, checkpoint: Path, **sections: Any) -> Recipe:
    """A small run on the CPU; sections given here are laid over it key by key."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(checkpoint)},
        "data": {
            "train": [{"path": str(write_conversations(folder / "train.jsonl", 40))}],
            "cache_dir": str(folder / "cache"),
        },
        "packing": {"tokens_per_batch": 256},
        "lora": {"r": 4, "target_modules": "all-linear"},
        "training": {
            "output_dir": str(folder / "output"),
            "max_steps": 6,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "verify": {"lengths": [5, 1, 9]},
    }
    for name, section in sections.items():
        merge = isinstance(section, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **section} if merge else section
    return Recipe.model_validate({name: value for name, value in values.items() if value is not None})
