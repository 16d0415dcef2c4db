"""prepare(model): plan, check, apply; a report of all of it; and revert()."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltatune import ops
from deltatune.compile.auto import AutoCheckpointing, decide_for
from deltatune.compile.graphs import CompileOptions, CompileReport, graphs_of, validate_checkpointing
from deltatune.compile.memory import Choice
from deltatune.compile.tuners import check_tuners
from deltatune.hf import attention_interface, capture, peft
from deltatune.hf import model as hf_model
from deltatune.layers.causal_lm import CausalLM
from deltatune.layers.decoder import DOUBLE_CHECKPOINTING, DecoderLayer, TextModel
from deltatune.layers.lora import check_all_fused, install_lora, lora_modes
from deltatune.layers.rotary import DocumentRotary, length_dependent_rotary
from deltatune.models.family import Family
from deltatune.models.registry import family_of
from deltatune.report import KernelRow, LoraRow, PrepareReport, SwapRow, TrainableRow
from deltatune.state import Facts, Options, State
from deltatune.subclass import Swapped, restore, stock_class, swap

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class _Planned:
    """One kind of module and what it becomes."""

    stock: str
    layer: type[Swapped]
    expected: int | None
    modules: tuple[nn.Module, ...]


class Prepared:
    """A prepared model: what was done to it, and how to undo it.

    Attributes:
        model: the model that was given to ``prepare``.
    """

    def __init__(self, model: nn.Module, family: Family, state: State, swaps: list[SwapRow]) -> None:
        self.model = model
        self._family, self._state, self._swaps = family, state, swaps

    @property
    def report(self) -> PrepareReport:
        """What runs now: trainable parameters and compile counts are read when this is called."""
        return PrepareReport(
            family=self._family.name,
            features={name: _feature_text(feature) for name, feature in self._family.features.items()},
            swaps=self._swaps,
            kernels=_kernel_rows(_swapped(self.model), self._state.options.kernels, self.model),
            trainable=_trainable_rows(self.model),
            total_parameters=sum(p.numel() for p in self.model.parameters()),
            checkpointing=self._state.checkpointing,
            checkpointing_reason=_auto_reason(self._state),
            compile=self._state.options.compile,
            compile_report=self.compile_report,
            lora=_lora_text(self.model),
            lora_rows=_lora_rows(self.model, self._state.options.lora, hf_model.device_of(self.model)),
            head=self._state.facts.head,
        )

    @property
    def compile_report(self) -> CompileReport | None:
        """Graphs, breaks, recompiles and seconds so far; None without compile."""
        if self._state.options.compile is None:
            return None
        return graphs_of(self._state, self._state.options.compile, self._state.checkpointing).report

    @property
    def auto_checkpointing(self) -> Choice | None:
        """What ``checkpointing="auto"`` took, the predicted peak and why; None before it did, or where it was given."""
        return None if self._state.facts.auto is None else self._state.facts.auto.choice

    def decide_checkpointing(
        self,
        tokens: int,
        *,
        optimizer: str = "adamw_torch_fused",
        compute_dtype: torch.dtype | None = None,
        accumulates: bool = False,
        device: torch.device | None = None,
    ) -> Choice | None:
        """Decides ``checkpointing="auto"`` now, for batches of one row; None where the setting was given.

        Args:
            tokens: of a batch.
            optimizer: transformers' name of the one that will train.
            compute_dtype: of activations where autocast makes it another than the weights'.
            accumulates: gradients of several batches are summed before a step of the optimizer.
            device: where the model will train, for one that is not there yet or will be sharded: the shapes decide, and
                nothing runs. None decides from the graphs of the layers, where the model is.
        """
        if self._state.facts.auto is None:
            return None
        self._state.facts.auto = AutoCheckpointing(optimizer, accumulates, compute_dtype)
        decide_for(hf_model.base_model(self.model), tokens, device)
        return self.auto_checkpointing

    def revert(self) -> None:
        """The model as it was: classes and configs; adapters and weights stay as they are now.

        Raises:
            ValueError: a model that was sharded since, whose classes are FSDP2's.
        """
        _refuse_sharded(self.model, "revert() comes")
        base = hf_model.base_model(self.model)
        if hf_model.text_model(base).__dict__.get("_deltatune") is self._state:
            _revert(base)


def prepare(
    model: nn.Module,
    *,
    kernels: str | Mapping[str, str] = "auto",
    compile: CompileOptions | None = None,
    checkpointing: str | float = "none",
    lora: str = "auto",
) -> Prepared:
    """Makes a transformers model keep packed documents apart, and compiles its layers without a graph break.

    The model is changed in place: instances of known stock classes become our subclasses of them and share their
    Parameters. It works before or after PEFT's ``get_peft_model``, and again on a prepared model (which starts over);
    it comes before ``fully_shard`` and before DistributedDataParallel. Adapters added later are honoured.

    Args:
        model: a ``*ForCausalLM`` or ``*ForConditionalGeneration``, a bare text model, or a PeftModel around one.
        kernels: ``"auto"``, or op name -> implementation; an op that is left out is ``"auto"``.
        compile: how to compile; None runs eagerly.
        checkpointing: ``"none"``; ``"layer"`` recomputes every layer in backward; a number from 0 to 1 lets the
            compiler keep that share of a layer's activations; ``"auto"`` takes the least recomputation whose predicted
            peak of a step with AdamW fits the device, at the first training forward and again where a batch has more
            tokens (``Prepared.auto_checkpointing`` then says what and why).
        lora: ``"auto"`` makes LoRA adapters part of the base products of the decoder layers where that is exact and
            pays (16-bit weights on a GPU), calls the base layer and adds their product in the dtype of the activations
            where only that can be (dropout, sharded, quantised or trained bases), and leaves all else, and a CPU, to
            PEFT's own layers. ``"fused"`` is an error where a layer cannot be fused; ``"stock"`` keeps PEFT's layers.
            How a layer runs is decided at every call, and the report counts it. Adapters added later are PEFT's own
            until the model is prepared again.

    Raises:
        ValueError: a model that cannot be kept leak-free (with the reason), an unknown kernel or one that cannot run
            here, a checkpointing setting that cannot act, adapters that ``lora="fused"`` cannot fuse, or that
            a strict compile would break on, or modules that are not as the config says.
    """
    if compile is not None and not isinstance(compile, CompileOptions):
        raise ValueError(f"compile must be a deltatune.CompileOptions or None, got {compile!r}")
    base, text_model = hf_model.base_model(model), hf_model.text_model(model)
    _check_head(base, text_model)
    _refuse_sharded(model, "prepare(model) comes")
    validate_checkpointing(checkpointing, compile)
    if checkpointing != "none" and any(getattr(layer, "gradient_checkpointing", False) for layer in text_model.layers):
        raise ValueError(DOUBLE_CHECKPOINTING)
    _validate_lora(lora)
    peft.refuse_prompt_learning(model)
    family = family_of(text_model)
    for refusal in family.refusals:
        reason = refusal(text_model)
        if reason is not None:
            raise ValueError(f"{stock_class(base).__name__} cannot be prepared: {reason}")
    requests = _kernel_requests(family, kernels)
    plan = _plan(base, text_model, family)
    # raises for a kernel that cannot run
    _kernel_rows(((planned.layer, module) for planned in plan for module in planned.modules), requests, model)
    if lora == "fused":
        check_all_fused(base, text_model)
    _refuse_rotary_in_one_graph(text_model, compile)
    if compile is not None and compile.strict:
        check_tuners(text_model)
    _revert(base)
    layer_types = tuple(dict.fromkeys(getattr(text_model.config, "layer_types", None) or ("full_attention",)))
    if "forward" in base.__dict__:
        warnings.warn(
            f"{type(base).__name__}.forward was replaced on this model before prepare, so a loss from labels= is that "
            "function's; boundaries are kept all the same. Prepare the model before it is given to a trainer",
            stacklevel=2,
        )
    stock_config = None if family.swaps else text_model.config
    stock_attention = None if family.swaps else text_model.config._attn_implementation
    # "auto" is decided at the first training forward, which knows the tokens of a batch
    auto = AutoCheckpointing() if checkpointing == "auto" else None
    state = State(
        Options(requests, family.mask_form, layer_types, compile, checkpointing, lora, stock_config, stock_attention),
        Facts(head="linear" if family.swaps else "unknown", auto=auto),
    )
    if not family.swaps:
        attention_interface.register()
        ours = copy.copy(text_model.config)
        ours._attn_implementation_internal = attention_interface.NAME
        _set_config(text_model, ours)
        attention_interface.mark(text_model, requests["varlen_attention"])
    for planned in plan:
        for module in planned.modules:
            swap(module, planned.layer, state)
            module.configure(text_model.config)  # type: ignore[operator]
    install_lora(text_model, state)
    swaps = [SwapRow(p.stock, p.layer.__name__, p.expected, len(p.modules)) for p in plan]
    return Prepared(model, family, state, swaps)


def _revert(base: nn.Module) -> None:
    """Gives every swapped module its stock class back; nothing on a model that is not prepared."""
    text_model = hf_model.text_model(base)
    state = text_model.__dict__.get("_deltatune")
    if state is None:
        return
    if state.options.stock_config is not None:
        _set_config(text_model, state.options.stock_config)
        attention_interface.forget_marks(text_model)
    capture.forget_capture_hooks(text_model)
    for module in base.modules():
        restore(module)


def _set_config(text_model: Any, config: Any) -> None:
    """Replaces the config of the text model and of what reads it there; another model may share the object."""
    before = text_model.config
    for module in text_model.modules():
        if getattr(module, "config", None) is before:
            module.config = config


def _plan(base: nn.Module, text_model: Any, family: Family) -> list[_Planned]:
    """Every module to swap, checked against what the config implies."""
    plan = []
    found = family.find(text_model) if family.swaps else {}
    for declared in family.swaps:
        modules = tuple(module for _, module in found[declared.stock])
        # PEFT's modules_to_save keeps a trained copy next to the original
        places = sum(".modules_to_save." not in path for path, _ in found[declared.stock])
        expected = None if declared.expected is None else declared.expected(text_model.config)
        if expected is not None and places != expected:
            raise ValueError(
                f"{type(base).__name__}: expected {expected} {declared.stock} from its config, found {places}; "
                "modules that were replaced by other tools cannot be kept leak-free"
            )
        if modules:
            plan.append(_Planned(declared.stock, declared.layer, expected, modules))
    by_class: dict[str, list[nn.Module]] = {}
    for layer in text_model.layers:
        by_class.setdefault(type(layer).__name__, []).append(layer)
    for name, modules_of in by_class.items():
        expected = int(text_model.config.num_hidden_layers) if len(by_class) == 1 else None
        plan.append(_Planned(name, DecoderLayer, expected, tuple(modules_of)))
    if family.final_norm is not None:
        norms = _final_norms(text_model, family)
        if norms:
            plan.append(_Planned(type(norms[0]).__name__, family.final_norm, None, norms))
    plan.append(_Planned(type(text_model).__name__, TextModel, 1, (text_model,)))
    if base is not text_model:
        plan.append(_Planned(type(base).__name__, CausalLM, 1, (base,)))
    by_class = {}
    for rotary in length_dependent_rotary(text_model):
        by_class.setdefault(type(rotary).__name__, []).append(rotary)
    plan.extend(_Planned(name, DocumentRotary, None, tuple(modules)) for name, modules in by_class.items())
    return plan


def _final_norms(text_model: Any, family: Family) -> tuple[nn.Module, ...]:
    """The norm behind the last layer, and PEFT's trained copies of it; another tool's norm is left alone."""
    return tuple(module for module in text_model.norm.modules() if stock_class(module).__module__ == family.module)


def _check_head(base: Any, text_model: nn.Module) -> None:
    if base is not text_model and hf_model.head_of(base) is None:
        raise ValueError(
            f"{type(base).__name__} has no language-model head; prepare a *ForCausalLM, a *ForConditionalGeneration "
            "or the bare text model"
        )


def _refuse_sharded(model: nn.Module, what_comes: str) -> None:
    if hf_model.is_sharded(model):
        raise ValueError(f"{what_comes} before fully_shard(model): its layers are sharded already")


def _refuse_rotary_in_one_graph(text_model: Any, compile: CompileOptions | None) -> None:
    """Lengths of documents are read on the host between the stock forwards of such a module."""
    if length_dependent_rotary(text_model) and compile is not None and compile.scope == "model":
        raise ValueError(
            "compile scope 'model' cannot hold rotary embeddings whose frequencies depend on the length of a document "
            "(rope_type 'longrope' or 'dynamic'); use CompileOptions(scope='layer')"
        )


def _validate_lora(lora: str) -> None:
    if lora not in ("auto", "stock", "fused"):
        raise ValueError(f"lora must be 'auto', 'fused' or 'stock', got {lora!r}")


def _kernel_requests(family: Family, kernels: str | Mapping[str, str]) -> dict[str, str]:
    requests = dict.fromkeys(family.ops, "auto")
    if isinstance(kernels, str):
        if kernels != "auto":
            raise ValueError(f"kernels must be 'auto' or a mapping of op names, got {kernels!r}")
        return requests
    for op, impl in kernels.items():
        if op not in requests:
            raise ValueError(f"kernels: {op!r} is not an op of {family.name}; expected one of {', '.join(requests)}")
        requests[op] = impl
    return requests


def _swapped(model: nn.Module) -> Iterator[tuple[type[Swapped], nn.Module]]:
    return ((type(module), module) for module in model.modules() if isinstance(module, Swapped))


def _kernel_rows(
    layers: Iterable[tuple[type[Swapped], nn.Module]], requests: Mapping[str, str], model: nn.Module
) -> list[KernelRow]:
    """What the layers in front of these modules take: chosen as they do, by the same specs."""
    device, dtype = hf_model.device_of(model), hf_model.compute_dtype(model)
    specs = dict.fromkeys(spec for layer, module in layers for spec in layer.op_specs(module, device, dtype))
    rows = [(spec.op, ops.choose(spec, requests[spec.op])) for spec in specs]
    order = list(requests)
    found = dict.fromkeys(KernelRow(op, choice.impl, choice.reason) for op, choice in rows)
    return sorted(found, key=lambda row: order.index(row.op))


def _trainable_rows(model: nn.Module) -> list[TrainableRow]:
    """Trainable parameters by the kind of module that owns them, layer numbers left out."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
            tensors, elements = counts.get(kind, (0, 0))
            counts[kind] = (tensors + 1, elements + parameter.numel())
    return [TrainableRow(kind, tensors, elements) for kind, (tensors, elements) in counts.items()]


def _feature_text(feature: object) -> str:
    detail = getattr(feature, "limit", None) or getattr(feature, "reason", None)
    name = type(feature).__name__.lower()
    return f"{name}: {detail}" if detail else name


def _auto_reason(state: State) -> str | None:
    if state.facts.auto is None:
        return None
    choice = state.facts.auto.choice
    return "auto, decided at the first training forward" if choice is None else f"auto takes it, {choice.reason}"


def _lora_text(model: nn.Module) -> str | None:
    adapters = getattr(model, "peft_config", None)
    return f"adapter {', '.join(adapters)}" if adapters else None


def _lora_rows(model: nn.Module, setting: str, device: torch.device) -> list[LoraRow]:
    """Layers with adapters, counted by how they run and why."""
    counts: dict[tuple[str, str], int] = {}
    for _, mode in lora_modes(model, hf_model.text_model(model), setting, device):
        key = (mode.name, mode.reason)
        counts[key] = counts.get(key, 0) + 1
    return [LoraRow(mode, reason, count) for (mode, reason), count in counts.items()]
