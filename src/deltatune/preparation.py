"""prepare(model): plan, check, apply; a report of all of it; and revert()."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deltatune.compile.auto import decide_for
from deltatune.compile.graphs import CompileReport, graphs_of
from deltatune.compile.tuners import check_tuners
from deltatune.cost import WHOLE, ExpertSplit
from deltatune.hf import attention_interface, capture, peft
from deltatune.hf import model as hf_model
from deltatune.hf.experts import has_divided_experts
from deltatune.hf.forwards import foreign_forward
from deltatune.hf.patches import rotates_otherwise
from deltatune.layers.decoder import DOUBLE_CHECKPOINTING
from deltatune.layers.lora import check_all_fused, install_lora
from deltatune.layers.mlp import GatedMLP
from deltatune.layers.rotary import length_dependent_rotary
from deltatune.models.family import Family
from deltatune.models.plan import Planned, check_reached, plan_swaps, refuse_offload
from deltatune.models.refusals import attention_dropout
from deltatune.models.registry import family_of
from deltatune.ops import LoraGatedSpec, choose
from deltatune.options import CompileOptions, Options, validate_checkpointing
from deltatune.packing.group import Recurrent
from deltatune.quantization.products import op_specs, set_impls
from deltatune.report import PrepareReport, SwapRow, kernel_rows, report_of
from deltatune.state import AutoCheckpointing, CheckpointingChoice, Facts, Precision, State
from deltatune.subclass import is_covered, restore, stock_class, swap

__all__ = ["Prepared", "prepare"]


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
        return report_of(self.model, self._family, self._state, self._swaps)

    @property
    def compile_report(self) -> CompileReport | None:
        """Graphs, breaks, recompiles and seconds so far; None without compile."""
        if self._state.options.compile is None:
            return None
        return graphs_of(self._state).report

    @property
    def auto_checkpointing(self) -> CheckpointingChoice | None:
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
        shard: int = 1,
        sequence: int = 1,
        recurrent: Recurrent = "heads",
        experts: ExpertSplit = WHOLE,
    ) -> CheckpointingChoice | None:
        """Decides ``checkpointing="auto"`` now, for batches of one row; None where the setting was given.

        Args:
            tokens: of a batch; of one rank's part of it in a sequence group.
            optimizer: transformers' name of the one that will train.
            compute_dtype: of activations where autocast makes it another than the weights'.
            accumulates: gradients of several batches are summed before a step of the optimizer.
            device: where the model will train, for one that is not there yet or will be sharded: the shapes decide, and
                nothing runs. None decides from the graphs of the layers, where the model is.
            shard: ranks among which the weights will be divided.
            sequence: ranks that will hold a pack together.
            recurrent: how they will divide recurrent layers; see ``shard_sequence``.
            experts: how the routed experts will be divided.
        """
        if self._state.facts.auto is None:
            return None
        self._state.facts.auto = AutoCheckpointing(
            optimizer, accumulates, compute_dtype, shard, sequence, recurrent, experts
        )
        decide_for(hf_model.base_model(self.model), tokens, device)
        return self.auto_checkpointing

    def computes_in(self, dtype: torch.dtype | None, *, gathered: bool = False) -> None:
        """Tells the report what calls will compute in: autocast's dtype, or that in which FSDP2 gathers weights.

        Nothing else reads it: a call goes by what it finds. ``parallelize(param_dtype=)`` tells it too.

        Args:
            dtype: None for the weights' own.
            gathered: weights reach layers in it.
        """
        self._state.facts.precision = None if dtype is None else Precision(dtype, gathered)

    def revert(self) -> None:
        """The model as it was: classes and configs; adapters and weights stay as they are now.

        Raises:
            ValueError: a model that was sharded since, whose classes are FSDP2's, one whose experts were divided among
            ranks, or one with another class over ours.
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
    base, text_model = hf_model.base_model(model), hf_model.text_model(model)
    _validate(model, compile, checkpointing, lora)
    family = family_of(text_model)
    _refuse(base, text_model, family, compile)
    plan = plan_swaps(base, text_model, family)
    requests = _kernel_requests(family, plan, base, kernels)
    check_reached(base, plan)
    # raises for a kernel that cannot run
    kernel_rows(((planned.layer, module) for planned in plan for module in planned.modules), requests, model)
    # adapters say at each call whether their layers are part of the products; what cannot run at all is known now
    choose(LoraGatedSpec(hf_model.device_of(model), hf_model.compute_dtype(model)), requests["lora_gated"])
    if lora == "fused":
        check_all_fused(base, text_model)
    if compile is not None and compile.strict:
        check_tuners(text_model, lambda module: lora != "stock" and hasattr(module, "parameter_name"))
    _revert(base)
    put = foreign_forward(base)
    if put is not None and base is not text_model:
        warnings.warn(
            f"{type(base).__name__}.forward was replaced on this model before prepare, by {put}, so a loss from "
            "labels= is that function's; boundaries are kept all the same, also between labels. Prepare the model "
            "before it is given to a trainer",
            stacklevel=2,
        )
    options = Options(requests, family.mask_form, compile, checkpointing, lora, interface=not family.swaps)
    # "auto" is decided at the first training forward, which knows the tokens of a batch
    auto = AutoCheckpointing() if checkpointing == "auto" else None
    state = State(options, Facts(head="unknown" if options.interface else "linear", auto=auto))
    if state.options.interface:
        attention_interface.install(text_model, requests["varlen_attention"])
    for planned in plan:
        for module in planned.modules:
            swap(module, planned.layer, state)
    install_lora(text_model, state)
    set_impls(base, requests)
    swaps = [SwapRow(p.stock, p.layer.__name__, p.expected, len(p.modules)) for p in plan]
    return Prepared(model, family, state, swaps)


def _validate(model: nn.Module, compile: CompileOptions | None, checkpointing: str | float, lora: str) -> None:
    """The arguments of ``prepare``, by themselves and with the model's own settings."""
    if compile is not None and not isinstance(compile, CompileOptions):
        raise ValueError(f"compile must be CompileOptions or None, got {compile!r}; pass compile=CompileOptions()")
    if lora not in ("auto", "stock", "fused"):
        raise ValueError(f"lora must be 'auto', 'fused' or 'stock', got {lora!r}")
    validate_checkpointing(checkpointing, compile)
    layers = hf_model.text_model(model).layers
    if checkpointing != "none" and any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        raise ValueError(DOUBLE_CHECKPOINTING)
    _refuse_sharded(model, "prepare(model) comes")
    peft.refuse_prompt_learning(model)


def _refuse(base: nn.Module, text_model: Any, family: Family, compile: CompileOptions | None) -> None:
    """What a model is, or what other tools made of it, that cannot be kept leak-free."""
    for name, module in base.named_modules():
        if module.__dict__.get("_deltatune", own := text_model.__dict__.get("_deltatune")) is not own:
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) belongs to another prepared model, or was copied out "
                "of one; revert() that model first, or give this one a module of its own"
            )
    if base is not text_model and hf_model.head_of(base) is None:
        raise ValueError(
            f"{type(base).__name__} has no language-model head; prepare a *ForCausalLM, a *ForConditionalGeneration "
            "or the bare text model"
        )
    for refusal in (attention_dropout, *family.refusals):
        reason = refusal(text_model)
        if reason is not None:
            raise ValueError(f"{stock_class(base).__name__} cannot be prepared: {reason}")
    rotary = rotates_otherwise(text_model) if family.swaps else None
    if rotary is not None:
        raise ValueError(rotary)
    if compile is not None:
        refuse_offload(text_model)
    # lengths of documents are read on the host between the stock forwards of such a module
    if compile is not None and length_dependent_rotary(text_model) and compile.scope == "model":
        raise ValueError(
            "compile scope 'model' cannot hold rotary embeddings whose frequencies depend on the length of a document "
            "(rope_type 'longrope' or 'dynamic'); use CompileOptions(scope='layer')"
        )


def _revert(base: nn.Module) -> None:
    """Restores the stock class of every swapped module; nothing on a model that is not prepared."""
    text_model = hf_model.text_model(base)
    state = text_model.__dict__.get("_deltatune")
    if state is None:
        return
    for path, module in base.named_modules():
        if is_covered(module):
            raise ValueError(
                f"{path}: {type(module).__name__} was put over its class after prepare, as "
                "torch.nn.utils.parametrize does; take it off first"
            )
    set_impls(base, {})
    if state.options.interface:
        attention_interface.uninstall(text_model)
    capture.forget_capture_hooks(text_model)
    for module in base.modules():
        restore(module)


def _refuse_sharded(model: nn.Module, what_comes: str) -> None:
    if has_divided_experts(model):
        raise ValueError(f"{what_comes} before parallelize(expert=): its experts lie on several ranks already")
    if hf_model.is_sharded(model):
        raise ValueError(f"{what_comes} before fully_shard(model): its layers are sharded already")


def _kernel_requests(
    family: Family, plan: list[Planned], base: nn.Module, kernels: str | Mapping[str, str]
) -> dict[str, str]:
    layers = [op for planned in plan for op in planned.layer.ops]
    weights = [spec.op for spec in op_specs(base, hf_model.device_of(base), hf_model.compute_dtype(base))]
    requests = dict.fromkeys([*family.ops, *layers, *GatedMLP.ops, *weights], "auto")
    if isinstance(kernels, str):
        if kernels != "auto":
            raise ValueError(f"kernels must be 'auto' or a mapping of op names, got {kernels!r}")
        return requests
    for op, impl in kernels.items():
        if op not in requests:
            raise ValueError(f"kernels: {op!r} is not an op of {family.name}; expected one of {', '.join(requests)}")
        requests[op] = impl
    return requests
