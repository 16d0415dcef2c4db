"""What is timed: a model with adapters, a loss and an optimizer, ours or a baseline's, and the packs it trains on."""

# T tokens of a pack, E width of the residual stream, V vocabulary

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import fused_loss, leak_free, liger_patched, reference, shipped
from benchmarks.records import OURS
from benchmarks.shapes import adapters, with_base, with_lora
from benchmarks.timing import synchronize
from deltatune import CompileOptions, PackedCollator, Prepared, Sequences, prepare

__all__ = ["BASELINES", "Batch", "Packs", "Setting", "System", "draw_lengths", "moved", "pinned"]

_STOCK: Final[Mapping[str, Callable[[Any], None]]] = {
    "stock": leak_free,
    "stock liger": liger_patched,
    "stock as shipped": shipped,
    "reference": reference,
}
BASELINES: Final = ("stock", "stock liger", "stock as shipped")
_STOCK_METADATA: Final = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
#: The optimizer does all of its work and adapters stay as they are: every step of every system is the same step.
_LEARNING_RATE: Final = 0.0

Batch = Mapping[str, Any]
"""What ``PackedCollator`` makes."""


def draw_lengths(tokens: int, *, shortest: int = 64, longest: int = 2048, seed: int = 0) -> list[int]:
    """Log-uniform lengths that fill a pack to its last token; one document where ``shortest`` reaches ``tokens``.

    Raises:
        ValueError: bounds that are not ``1 <= shortest <= longest``, or fewer tokens than ``shortest``.
    """
    if not 1 <= shortest <= longest or tokens < shortest:
        raise ValueError(f"documents of {shortest} to {longest} tokens cannot fill a pack of {tokens}")
    if shortest >= tokens:
        return [tokens]
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    left = tokens
    while left:
        drawn = round(math.exp(generator.uniform(math.log(shortest), math.log(longest))))
        drawn = left if left - drawn < shortest else drawn
        if drawn > longest and lengths:
            # what is left is too long for one document and too short for two: it ends at half
            drawn = left // 2
        lengths.append(min(drawn, left))
        left -= lengths[-1]
    return lengths


@dataclass(frozen=True)
class Packs:
    """Packs of one shape: the same lengths in another order and other tokens in each.

    The work is the same in every step, while no step's boundaries are the last one's.
    """

    lengths: tuple[int, ...]
    vocab_size: int
    seed: int = 0

    def batch(self, number: int) -> Batch:
        """The pack of a step, on the CPU; number 0 has the lengths as they are given."""
        generator = np.random.default_rng((self.seed, number))
        order: Sequence[int] = self.lengths
        if number:
            order = [self.lengths[i] for i in generator.permutation(len(self.lengths))]
        return _collated([generator.integers(1, self.vocab_size, length) for length in order])

    def batches(self, start: int = 1) -> Iterator[Batch]:
        """One after the other, without end."""
        while True:
            yield self.batch(start)
            start += 1

    def span(self, document: int) -> slice:
        """Where a document lies in pack 0."""
        start = sum(self.lengths[:document])
        return slice(start, start + self.lengths[document])

    def only(self, document: int) -> Batch:
        """Pack 0 with targets in one document alone."""
        batch, span = self.batch(0), self.span(document)
        labels = torch.full_like(batch["labels"], -100)
        labels[:, span] = batch["labels"][:, span]
        return {**batch, "labels": labels}

    def alone(self, document: int) -> Batch:
        """A document of pack 0 as a pack of its own."""
        return _collated([self.batch(0)["input_ids"][0, self.span(document)].numpy()])


def _collated(documents: Sequence[Any]) -> Batch:
    collate = PackedCollator(tokens_per_batch=sum(map(len, documents)), pad_token_id=0, allow_unlabelled=True)
    return collate([{"input_ids": ids, "labels": ids} for ids in documents])


@dataclass(frozen=True)
class Setting:
    """What one result of a record stands for.

    Attributes:
        system: ours, one of ``BASELINES``, or the float32 reference of the checks.
        checkpointing: ``"none"``, ``"layer"``; ours also a share or ``"auto"``.
        targets: which projections have adapters: ``"qkvo"``, ``"all"`` or ``"experts"``.
        lora: ours: as ``prepare`` takes it; baselines have PEFT's own layers.
        base: ours: the weights of the layers in few bits, one of ``BASES``; baselines and the reference have the
            16-bit values of these. Empty for weights as they are.
    """

    system: str
    checkpointing: str | float = "none"
    targets: str = "qkvo"
    lora: str = "stock"
    base: str = ""

    @property
    def name(self) -> str:
        """Unique among the results of a configuration."""
        parts = [self._on_base, str(self.checkpointing), self.targets]
        return " ".join(parts + ([self.lora] if self.system == OURS else []))

    @property
    def _on_base(self) -> str:
        return f"{self.system} {self.base}".rstrip()

    @property
    def truth(self) -> str:
        """What a reference and a stock path have to share with it: adapters, and the values of the weights."""
        values = self.base.partition("-")[0]
        return f"{self.targets} {values}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The keys of a record's result."""
        leak_free = self.system != "stock as shipped"
        return {"name": self.name, **asdict(self), "system": self._on_base, "leak_free": leak_free}


class System:
    """One model that trains: adapters by PEFT, ``prepare`` or a baseline's changes, AdamW.

    Attributes:
        setting: what it is.
        model: with adapters, as PEFT wraps it.
        prepared: ours alone.
        first_step_seconds: from ``prepare`` to the end of the first optimizer step, once that has run.
    """

    def __init__(
        self, setting: Setting, model: Any, *, rank: int = 16, alpha: int = 32, backend: str = "inductor", seed: int = 0
    ) -> None:
        """Changes the stock model that it is given.

        Raises:
            ValueError: Liger has no patch for this model, or ``prepare`` refuses the setting.
        """
        self.setting, self.prepared = setting, None
        self.first_step_seconds: float | None = None
        if setting.system != OURS:
            _STOCK[setting.system](model)
            if setting.checkpointing == "layer":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if setting.base:
            with_base(model, setting.base, values=setting.system != OURS)
        self.model = with_lora(model, setting.targets, rank=rank, alpha=alpha, seed=seed)
        self.device: torch.device = model.device
        self._base: Any = model
        self._started = time.perf_counter()
        if setting.system == OURS:
            self.prepared = _prepared(self.model, setting, backend)
        self.model.train()
        on_cpu = setting.system == "reference" or self.device.type != "cuda"
        self._loss_of_hidden = fused_loss(torch.device("cpu") if on_cpu else self.device)
        self.optimizer = torch.optim.AdamW([p for _, p in adapters(self.model)], lr=_LEARNING_RATE, fused=True)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch on the device, as this system computes it in training."""
        if self.prepared is not None:
            found: Tensor = self.model(**self._call(batch), labels=batch["labels"]).loss
            return found
        targets = F.pad(batch["labels"], (0, 1), value=-100)[..., 1:]
        return self._loss_of_hidden(self._hidden(batch), self._head, targets.flatten())

    def logits(self, batch: Batch, spans: Sequence[slice]) -> list[Tensor]:
        """``[n, V]`` of each span of a batch's tokens, by the forward that trains, without gradients."""
        batch = self.moved(batch)
        kept = torch.cat([torch.arange(span.start, span.stop, device=self.device) for span in spans])
        if self.prepared is not None:
            found = self.model(**self._call(batch), logits_to_keep=kept).logits[0].detach()
        else:
            found = F.linear(self._hidden(batch).detach()[kept], self._head.detach())
        return list(torch.split(found, [span.stop - span.start for span in spans]))

    @property
    def _head(self) -> Tensor:
        weight: Tensor = self._base.get_output_embeddings().weight
        return weight

    def _hidden(self, batch: Batch) -> Tensor:
        """``[T, E]`` of a stock model."""
        hidden: Tensor = self._base.get_decoder()(**self._call(batch), use_cache=False)[0]
        return hidden.flatten(0, -2)

    def _call(self, batch: Batch) -> dict[str, Any]:
        names = {OURS: ("sequences",), "reference": ()}.get(self.setting.system, _STOCK_METADATA)
        return {name: batch[name] for name in ("input_ids", "position_ids", *names)}

    def step(self, batch: Batch) -> None:
        """One step of training: the batch to the device, forward, loss, backward, optimizer."""
        torch.autograd.backward(self.loss(self.moved(batch)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.first_step_seconds is None:
            synchronize(self.device)
            self.first_step_seconds = time.perf_counter() - self._started

    def moved(self, batch: Batch) -> Batch:
        """The batch on the device, as ``moved`` takes it there."""
        return moved(batch, self.device)

    def loss_and_gradients(self, batch: Batch) -> tuple[float, dict[str, Tensor]]:
        """The training loss of a batch, and the adapters' gradients by name."""
        loss = self.loss(self.moved(batch))
        torch.autograd.backward(loss)
        gradients = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).detach().float().cpu()
            for name, p in adapters(self.model)
        }
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), gradients


def _prepared(model: Any, setting: Setting, backend: str) -> Prepared:
    options = {"none": None, "aot_eager": CompileOptions(backend="aot_eager")}.get(backend, CompileOptions())
    return prepare(model, compile=options, checkpointing=setting.checkpointing, lora=setting.lora)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, which is not waited for; the CPU copies of boundaries stay."""
    if device.type != "cuda":
        return batch
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor | Sequences) else value
        for name, value in batch.items()
    }


def pinned(batch: Batch) -> Batch:
    """The batch in memory that a device copies from by itself."""
    return {
        name: value.pin_memory() if isinstance(value, Tensor | Sequences) else value for name, value in batch.items()
    }
