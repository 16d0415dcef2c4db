"""What is timed: a model with adapters, a loss and an optimizer, ours or a baseline's, behind one interface."""

# T tokens of a batch, E width of the residual stream, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bench.baselines import fused_loss, leak_free, liger_patched, reference, shipped
from deltatune.bench.models import Targets, adapters, copy_of, own_adapted_weights, storage_bytes, with_lora
from deltatune.bench.protocol import synchronize
from deltatune.bench.workload import Batch
from deltatune.compile.graphs import CompileOptions
from deltatune.compile.memory import Choice
from deltatune.layers.decoder import catch_hidden
from deltatune.ops._lora_linear.layout import Operands
from deltatune.preparation import Prepared, prepare
from deltatune.verification.untouched import compiled_as

__all__ = ["BASELINES", "Adapters", "Setting", "System", "build_system"]

SystemName = Literal["deltatune", "stock", "stock liger", "stock as shipped", "stock compiled", "reference"]

BASELINES: Final[tuple[SystemName, ...]] = ("stock", "stock liger", "stock as shipped")

_STOCK: Final[Mapping[str, Callable[[Any], Any]]] = {
    "stock": leak_free,
    "stock compiled": leak_free,
    "stock liger": liger_patched,
    "stock as shipped": shipped,
    "reference": reference,
}
_STOCK_METADATA: Final = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

#: The optimizer does all of its work and adapters stay as they are: every step of every system is the same step.
_LEARNING_RATE: Final = 0.0


@dataclass(frozen=True)
class Adapters:
    """LoRA's settings, the same for every system of a run."""

    rank: int = 16
    alpha: int = 32
    dtype: Literal["float32", "model"] = "float32"


@dataclass(frozen=True)
class Setting:
    """What one result of a record stands for.

    Attributes:
        system: ours, a baseline, or the float32 reference of the gates.
        checkpointing: ``"none"``, ``"layer"``; ours also a share or ``"auto"``.
        targets: which projections have adapters.
        lora: ours: as ``prepare`` takes it; baselines have PEFT's own layers.
    """

    system: SystemName
    checkpointing: str | float = "none"
    targets: Targets = "qkvo"
    lora: Literal["auto", "stock", "fused"] = "stock"

    @property
    def name(self) -> str:
        """Unique among the results of a configuration."""
        parts = [self.system, str(self.checkpointing), self.targets]
        return " ".join(parts + ([self.lora] if self.system == "deltatune" else []))

    def to_dict(self) -> dict[str, Any]:
        """The keys of a record's result."""
        return {"name": self.name, **asdict(self)}


class System:
    """One model that trains.

    Attributes:
        setting: what it is.
        model: with adapters, as PEFT wraps it.
        prepared: ours alone.
        first_step_seconds: from ``prepare`` to the end of the first optimizer step, once ``first_step`` has run.
    """

    def __init__(self, setting: Setting, model: Any, prepared: Prepared | None) -> None:
        self.setting, self.model, self.prepared = setting, model, prepared
        self.device: torch.device = next(model.parameters()).device
        self.first_step_seconds: float | None = None
        self.started = time.perf_counter()
        self._base: Any = model.get_base_model()
        self._loss_of_hidden = None if prepared is not None else self._loss_function()
        trained = [parameter for _, parameter in adapters(model)]
        self.optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True)

    @property
    def choice(self) -> Choice | None:
        """What ``checkpointing="auto"`` took, from the first step on; None where it was given."""
        return None if self.prepared is None else self.prepared.auto_checkpointing

    @property
    def head(self) -> Tensor:
        """``[V, E]``."""
        weight = self._base.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch on the device, as this system computes it in training."""
        if self._loss_of_hidden is None:
            call = {name: batch.tensors[name] for name in ("input_ids", "labels", "position_ids", "sequences")}
            found = self.model(**call).loss
        else:
            targets = F.pad(batch.tensors["labels"], (0, 1), value=-100)[..., 1:]
            found = self._loss_of_hidden(self.hidden(batch), self.head, targets.flatten())
        assert isinstance(found, Tensor)
        return found

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden state ``[T, E]`` of a batch on the device."""
        call = {name: batch.tensors[name] for name in ("input_ids", "position_ids")}
        if self.prepared is not None:
            # as the model resolves them, so that layers see the same arguments as in training and no graph is new
            with catch_hidden() as caught:
                self.model(**call, sequences=batch.sequences, logits_to_keep=1)
            state = caught.state
        else:
            if self.setting.system != "reference":
                call |= {name: batch.tensors[name] for name in _STOCK_METADATA}
            state = self._base.get_decoder()(**call, use_cache=False)[0]
        assert isinstance(state, Tensor)
        return state.flatten(0, -2)

    def step(self, batch: Batch) -> None:
        """One step of training: the batch to the device, forward, loss, backward, optimizer."""
        self.loss(batch.to(self.device)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def first_step(self, batch: Batch) -> None:
        """The first step, waited for."""
        self.step(batch)
        synchronize(self.device)
        self.first_step_seconds = time.perf_counter() - self.started

    def static_bytes(self) -> int:
        """Weights, adapters and optimizer state, storages that tensors share counted once."""
        return storage_bytes(self._tensors())

    @contextmanager
    def eager(self) -> Iterator[None]:
        """The same system without its compiled graphs, every layer recomputed: eager layers keep far more."""
        state = None if self.prepared is None else self._base.get_decoder().__dict__.get("_deltatune")
        if state is None:
            yield
            return
        before, state.checkpointing = state.checkpointing, "layer"
        try:
            with compiled_as(state, compiled=False):
                yield
        finally:
            state.checkpointing = before

    def _loss_function(self) -> Any:
        if self.setting.system == "reference":
            return fused_loss(torch.device("cpu"))[1]
        return fused_loss(self.device)[1]

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for layer in self._base.get_decoder().layers:
            for group in layer.__dict__.get("_lora_groups", ()):
                if group.operands is not None:
                    yield from _operand_tensors(group.operands)
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _operand_tensors(operands: Operands) -> Iterator[Tensor]:
    yield from (operands.down, operands.rows, operands.scale, *operands.bordered, *operands.up)


def build_system(
    setting: Setting, base: Any, lora: Adapters, *, options: CompileOptions | None = None, seed: int = 0
) -> System:
    """A system over the frozen weights of ``base``, which it shares but for those it lays out anew.

    Args:
        setting: which one.
        base: a stock model without adapters.
        lora: of every system in the run.
        options: how ours is compiled; None runs it eagerly.
        seed: of the adapters' values.

    Raises:
        ValueError: Liger has no patch for this model, or ``prepare`` refuses the setting.
    """
    if setting.system != "deltatune":
        stock = _STOCK[setting.system](base)
        model = _adapted(stock, setting, lora, seed)
        if setting.checkpointing == "layer":
            stock.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return System(setting, model.train(), None)
    model = _adapted(copy_of(base), setting, lora, seed)
    if setting.lora != "stock":
        own_adapted_weights(model)
    started = time.perf_counter()
    prepared = prepare(model, compile=options, checkpointing=setting.checkpointing, lora=setting.lora)
    system = System(setting, model.train(), prepared)
    system.started = started
    return system


def _adapted(model: Any, setting: Setting, lora: Adapters, seed: int) -> nn.Module:
    adapted = with_lora(
        model,
        setting.targets,
        rank=lora.rank,
        alpha=lora.alpha,
        autocast_adapter_dtype=lora.dtype == "float32",
        seed=seed,
    )
    assert isinstance(adapted, nn.Module)
    return adapted
