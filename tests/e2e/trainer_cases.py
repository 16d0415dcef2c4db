"""Training on documents one by one with the stock model: what every packed run is held against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tiny import VOCAB, documents, tiny_model

LENGTHS = [5, 1, 30, 7, 12, 9, 3, 40, 2, 17, 4, 6]
BATCH, STEPS, RATE = 4, 3, 0.002
TARGETS = ["q_proj", "v_proj", "out_proj", "in_proj_qkv", "gate_proj"]

Features = list[dict[str, Any]]
Gradients = dict[str, torch.Tensor]
Loss = Callable[[Any, Features], torch.Tensor]


def samples() -> Features:
    """Documents of ``LENGTHS``; of every second one the first third is a prompt that is not trained."""
    rows: Features = []
    for number, ids in enumerate(documents(LENGTHS)):
        labels = ids.tolist()
        if number % 2:
            labels[: len(labels) // 3] = [-100] * (len(labels) // 3)
        rows.append({"input_ids": ids.tolist(), "labels": labels})
    return rows


def training_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Plain gradient descent, so that weights after a step show the gradient and nothing else."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return values | changes


class Record(transformers.TrainerCallback):
    """The weights a run begins with, and the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.gradients: list[Gradients] = []

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.start = {name: value.clone() for name, value in model.state_dict().items()}

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@dataclass
class Remembering:
    """A collator that remembers the documents of every batch it made."""

    collator: Any
    batches: list[Features] = field(default_factory=list)

    def __call__(self, features: Features) -> dict[str, Any]:
        self.batches.append(copy.deepcopy(features))
        batch: dict[str, Any] = self.collator(features)
        return batch


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits_alone(model: Any, features: Features) -> list[torch.Tensor]:
    """The logits of every document, each in a forward of its own."""
    return [model(torch.tensor(row["input_ids"])[None]).logits[0] for row in features]


def loss_alone(model: Any, features: Features) -> torch.Tensor:
    """Mean cross-entropy over the trained tokens of documents that are each a forward of their own."""
    total, count = torch.zeros(()), 0
    for row, logits in zip(features, logits_alone(model, features), strict=True):
        targets = torch.tensor(row.get("labels", row["input_ids"]))[1:]
        count += int((targets != -100).sum())
        total = total + F.cross_entropy(logits[:-1].float(), targets, reduction="sum", ignore_index=-100)
    return total / count


def train_alone(model: Any, batches: list[Features], loss_of: Loss = loss_alone) -> tuple[list[float], list[Gradients]]:
    """Gradient descent on the documents of these batches, unpacked: losses and gradients of every step."""
    model.train()
    values, gradients = [], []
    for features in batches:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, features)
        loss.backward()
        values.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
    return values, gradients


def assert_same_training(
    trainer: Any, record: Record, stock: Any, batches: list[Features], loss_of: Loss = loss_alone
) -> None:
    """The trainer's losses, gradients and final weights are those of the documents trained one by one."""
    steps = trainer.args.max_steps
    values, gradients = train_alone(stock, batches[:steps], loss_of)
    assert len(record.gradients) == steps
    torch.testing.assert_close(losses(trainer), values, rtol=1e-5, atol=0)
    for ours, theirs in zip(record.gradients, gradients, strict=True):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name
    trained = dict(trainer.model.named_parameters())
    for name, expected in stock.named_parameters():
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6)


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **changes})


def tokenizer() -> Any:
    """One word a token, as many as the small models know."""
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCAB)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<1>", pad_token="<0>")


def hybrid(**changes: Any) -> Any:
    return tiny_model("qwen3_5", **changes)
