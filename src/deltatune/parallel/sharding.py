"""Weights in shards: which modules are gathered as one, in which dtype, and the loss of a head that is one of them."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from deltatune.hf import model as hf_model
from deltatune.hf.units import gathered_units, head_unit, trained_beside_text
from deltatune.layers.causal_lm import CausalLM
from deltatune.layers.head_loss import with_loss_of_its_own
from deltatune.state import Precision
from deltatune.subclass import Swapped

__all__ = ["check_shardable", "full_precision_parameters", "shard_model"]


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    beside: AbstractSet[nn.Parameter] = frozenset(),
) -> None:
    """Applies ``fully_shard`` to a prepared model, in place: rank ``r`` of ``S`` keeps the r-th part of every weight.

    A unit is gathered before its forward and freed after it, again in backward, and its gradients are then averaged
    over all ranks and scattered. Units are each decoder layer, and an embedding and a head that share no weight. What
    is left (a tied embedding with its head, the final norm, a vision tower) belongs to the model itself, which holds it
    whole from its forward to the end of its backward: then all gradients of a tied weight are there, and every rank
    gathers a tower, whether its call brings images or not.

    Weights are gathered in ``param_dtype``, those that a layer names in ``full_precision`` in their own: they are one
    unit of the text model. Gradients are averaged in float32, and no output is cast: the loss stays float32.

    Args:
        model: a prepared ``*ForCausalLM`` or ``*ForConditionalGeneration``, with or without PEFT; its weights on any
            device, the meta device included.
        mesh: ``[shard]`` or ``[replicate, shard]``; its device type is where the shards lie.
        param_dtype: of weights and activations inside the layers; None for the weights' own.
        beside: weights that stay as they are, being divided already.

    Raises:
        ValueError: a model that is not prepared or already sharded, one compiled as a whole, weights that train outside
            of the text model and the head, or of several dtypes that train in one unit.
    """
    base, text = hf_model.base_model(model), hf_model.text_model(model)
    _refuse(base, text, sharded=not beside and hf_model.is_sharded(model))
    _refuse_unused(model)
    in_full = full_precision_parameters(model)
    units, head = list(gathered_units(model)), head_unit(model)
    _refuse_mixed(model, units, in_full, beside)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    in_units = {weight for unit in units for weight in unit.parameters()}
    # from the outside in: a unit takes all that it can see and is not told to leave
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=in_units | in_full | beside)
    if in_full:
        others = set(model.parameters()) - in_full
        own = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(text, mesh=mesh, mp_policy=own, ignored_params=others, reshard_after_forward=False)
    apart = full_precision_parameters(model) | beside
    for unit in units:
        # backward begins with the head
        frees = unit is not head
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=apart, reshard_after_forward=frees)
    known = None if param_dtype is None else Precision(param_dtype, gathered=True)
    cast("Any", text)._deltatune.facts.precision = known
    if head is not None:
        with_loss_of_its_own(cast("FSDPModule", head))


def check_shardable(model: nn.Module, beside: AbstractSet[nn.Parameter]) -> None:
    """Checks that ``shard_model`` takes a model, before anything is done to it; see there.

    Raises:
        ValueError: as by ``shard_model``.
    """
    _refuse(hf_model.base_model(model), hf_model.text_model(model), sharded=hf_model.is_sharded(model))
    _refuse_unused(model)
    _refuse_mixed(model, list(gathered_units(model)), full_precision_parameters(model), beside)


def full_precision_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What the layers of a prepared model name in ``full_precision``."""
    return {
        getattr(module, name)
        for module in model.modules()
        if isinstance(module, Swapped)
        for name in module.full_precision
    }


def _refuse(base: nn.Module, text: nn.Module, *, sharded: bool) -> None:
    if not isinstance(base, CausalLM):
        raise ValueError(f"expected a prepared model with a head, got {type(base).__name__}; call prepare(model) first")
    if sharded:
        raise ValueError("the model is sharded already; shard a model once")
    options = cast("Any", text)._deltatune.options
    if options.compile is not None and options.compile.scope == "model":
        raise ValueError(
            "compile scope 'model' puts all layers into one graph, and sharded weights are gathered between layers; "
            "use CompileOptions(scope='layer')"
        )


def _refuse_unused(model: nn.Module) -> None:
    """Ranks scatter the gradients of a unit together, so each needs as many."""
    if names := trained_beside_text(model):
        raise ValueError(
            f"{names[0]} trains outside of the text model and the head, where a rank whose call is text alone has no "
            "gradient for the others; freeze that part before (requires_grad_(False)), or leave shard out"
        )


def _refuse_mixed(
    model: nn.Module, units: list[nn.Module], in_full: set[nn.Parameter], beside: AbstractSet[nn.Parameter]
) -> None:
    """One gradient reduction has one dtype."""
    named = {weight: name for name, weight in model.named_parameters()}
    inside = [set(unit.parameters()) - in_full - beside for unit in units]
    for weights in (*inside, in_full, set(model.parameters()).difference(in_full, beside, *inside)):
        trained = {weight.dtype: named[weight] for weight in weights if weight.requires_grad}
        if len(trained) > 1:
            examples = " and ".join(f"{name} ({dtype})" for dtype, name in trained.items())
            raise ValueError(f"weights that train together have one dtype when they are sharded, got {examples}")
