"""The precision of products with a frozen base, as a recipe names it: refused, set and told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.quantization.products import compute_in_fp8, quantized_weights, refusal, why_decoded
from deltatune.quantization.tensor import QuantizedTensor, computes_in_fp8
from deltatune.training.arguments import autocast_dtype

__all__ = ["check_products", "compute_by_recipe", "product_lines"]


def check_products(recipe: Recipe, model: nn.Module, device: torch.device) -> None:
    """Refuses products in fp8 where the device has none, before weights are read.

    Args:
        recipe: the run.
        model: of the recipe, on any device.
        device: where it will train.

    Raises:
        UserError: with the remedy.
    """
    if not _in_fp8(recipe):
        return
    dtype, impl = _activations_in(recipe, model), _impl(recipe)
    try:
        why = refusal(device, torch.bfloat16, impl)
        if why is not None:
            raise UserError(f"model.quantization.compute: fp8: {why}; set it to bf16")
        if refusal(device, dtype, impl) is not None:
            raise UserError(
                f"model.quantization.compute: fp8 goes with activations in bfloat16, and these are in {_name(dtype)}; "
                "set training.bf16: true, or compute: bf16"
            )
    except ValueError as error:
        raise UserError(str(error)) from error


def compute_by_recipe(recipe: Recipe, model: nn.Module, device: torch.device) -> None:
    """Has products computed in fp8 where the recipe says so, and the weights allow.

    Args:
        recipe: the run.
        model: before ``prepare``.
        device: where it will train.

    Raises:
        UserError: a device or a model that has none.
    """
    if not _in_fp8(recipe):
        return
    check_products(recipe, model, device)
    try:
        compute_in_fp8(model, device, _activations_in(recipe, model), _impl(recipe))
    except ValueError as error:
        raise UserError(f"model.quantization.compute: fp8: {error}; set it to bf16") from error


def product_lines(recipe: Recipe, model: nn.Module, device: torch.device) -> list[str]:
    """What is computed in which precision, of a prepared model; nothing where no product is in fp8."""
    dtype = _activations_in(recipe, model)
    weights: dict[str, list[tuple[str, QuantizedTensor]]] = {}
    for path, weight in _named(hf_model.base_model(model)):
        why = "" if computes_in_fp8(weight) else why_decoded(weight, device, dtype, weight.impls.fp8_mm) or ""
        weights.setdefault(why, []).append((path, weight))
    multiplied = [pair for pairs in weights.values() for pair in pairs if computes_in_fp8(pair[1])]
    if not multiplied:
        return []
    wide = _name(dtype)
    lines = [
        f"products in fp8, forward and backward: {_kinds(multiplied)}",
        "  activations and their gradients are rounded to fp8 row by row, a token's with a scale of its own",
    ]
    if rounded := [pair for pair in multiplied if pair[1].rounded]:
        lines.append(
            "  rounded once more, from 128x128 blocks to a scale for each output channel, by 2.6% in the root mean "
            f"square: {_kinds(rounded)}"
        )
    lines += [f"  in {wide}, {why}: {_kinds(pairs)}" for why, pairs in weights.items() if why]
    return [*lines, f"  in {wide}: adapters, routers, embeddings, the head, and all that is in no few bits"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_fp8(recipe: Recipe) -> bool:
    given = recipe.model.quantization
    return given is not None and given.compute == "fp8"


def _activations_in(recipe: Recipe, model: nn.Module) -> torch.dtype:
    return autocast_dtype(recipe.training) or hf_model.compute_dtype(model)


def _impl(recipe: Recipe) -> str:
    return "auto" if isinstance(recipe.kernels, str) else recipe.kernels.get("fp8_mm", "auto")


def _named(model: nn.Module) -> Iterable[tuple[str, QuantizedTensor]]:
    """By the names of weights, without PEFT's wrappers."""
    paths = {id(module): path for path, module in model.named_modules()}
    for module, name, weight in quantized_weights(model):
        yield f"{paths[id(module)]}.{name}".replace(".base_layer", ""), weight


def _kinds(pairs: Iterable[tuple[str, QuantizedTensor]]) -> str:
    """``"7 weights (experts.down_proj 4, q_proj 3)"``."""
    counts = Counter(_kind(path) for path, _ in pairs)
    total = sum(counts.values())
    listed = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    return f"{total:,} {'weight' if total == 1 else 'weights'} ({listed})"


def _kind(path: str) -> str:
    """The projection's own name, after ``experts`` or ``shared_expert`` where it is theirs."""
    parts = path.removesuffix(".weight").split(".")
    owner = parts[-2] if len(parts) > 1 and re.search("expert", parts[-2]) else None
    return parts[-1] if owner is None else f"{owner}.{parts[-1]}"
