"""Weights of a model in few bits: read or made a module at a time, kept frozen, and told of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import ops
from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.hf.quantizable import quantizable
from deltatune.hf.reading import NotInPiecesError, load_described
from deltatune.quantization.blank import Encoding
from deltatune.quantization.tensor import QuantizedTensor, stored_bytes
from deltatune.training.quantized_base import QuantizedBase

__all__ = ["check_frozen", "load_quantized", "quantized_lines", "weights_in_few_bits"]


def load_quantized(
    loader: Any, base: QuantizedBase, *, device: torch.device, in_few_bits: bool = True, **call: Any
) -> tuple[Any, dict[str, Any]]:
    """``loader.from_pretrained(output_loading_info=True, **call)`` with weights in few bits, a module at a time.

    Args:
        loader: a model class of transformers.
        base: how its weights come to be in few bits.
        device: where they are made; they are left on the CPU.
        in_few_bits: whether they stay so, or their values are taken.
        call: what ``from_pretrained`` takes, its config as of a checkpoint in 16 bits.

    Raises:
        ValueError: a checkpoint that cannot be read a module at a time, or parts of weights that do not fit.
    """

    def become(model: nn.Module) -> Callable[[str, Tensor], Tensor]:
        made = _making(base, model, device)
        return made if in_few_bits else lambda name, tensor: _values(made(name, tensor))

    try:
        found = load_described(loader, _everything, few_bits=base.method, become=become, **call)
    except NotInPiecesError as error:
        raise ValueError(str(error)) from error
    return found.model, found.info


def weights_in_few_bits(loader: Any, base: QuantizedBase, model: nn.Module, **call: Any) -> dict[str, QuantizedTensor]:
    """Those of a model, on the meta device; of a checkpoint that holds them so as the headers of its files say.

    Raises:
        ValueError: as by ``load_quantized``.
    """
    if (encoding := _encoding(base)) is not None:
        return quantizable(model, encoding)
    try:
        return load_described(loader, None, few_bits=base.method, **call).pieces.quantized
    except NotInPiecesError as error:
        raise ValueError(str(error)) from error


def _making(base: QuantizedBase, model: nn.Module, device: torch.device) -> Callable[[str, Tensor], Tensor]:
    """What puts a weight in few bits in the place of one of 16."""
    encoding = _encoding(base)
    chosen = {} if encoding is None else quantizable(model, encoding)

    @torch.no_grad()
    def become(name: str, tensor: Tensor) -> Tensor:
        like = chosen.get(name)
        if encoding is None or like is None:
            return tensor
        there = tensor.to(device)
        weight = ops.quantize(there.mT if like.transposed else there, encoding.format, blocks=encoding.blocks)
        return QuantizedTensor(weight, tensor.dtype, transposed=like.transposed).to("cpu")

    return become


def _encoding(base: QuantizedBase) -> Encoding | None:
    return None if base.format is None else Encoding(base.format, base.blocks)


def _values(tensor: Tensor) -> Tensor:
    return tensor.decoded().contiguous() if isinstance(tensor, QuantizedTensor) else tensor


def _everything(model: Any) -> set[str]:
    return set(model.state_dict())


def check_frozen(model: nn.Module, trained: Iterable[str] | None = None) -> None:
    """Refuses weights in few bits that train, or would: those of these names.

    Raises:
        UserError: one, by its name.
    """
    wanted = None if trained is None else {*trained}
    for name, weight in model.named_parameters():
        if isinstance(weight, QuantizedTensor) and (weight.requires_grad if wanted is None else name in wanted):
            raise UserError(
                f"{name.removeprefix('base_model.model.')} is in {weight.format} and cannot train; leave it out of "
                "training.unfrozen_parameters and lora.modules_to_save, or train in 16 bits without model.quantization"
            )


def quantized_lines(model: nn.Module, base: QuantizedBase | None = None) -> list[str]:
    """Which weights are in few bits, and which stay as they are; nothing where none is in few bits.

    ``base``: how they come to be, of a model that is planned.
    """
    few: dict[str, list[Tensor]] = {}
    rest: dict[str, list[Tensor]] = {}
    for name, weight in _base_weights(model):
        if isinstance(weight, QuantizedTensor):
            few.setdefault(weight.format, []).append(weight)
        else:
            rest.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(weight)
    if not few:
        unknown = "the checkpoint is in few bits; which weights, and how many bytes, is known once its files are here"
        return [] if base is None else [unknown]
    lines = [f"base weights in {format}: {_amount(weights)}" for format, weights in few.items()]
    matrices = {name: weights for name, weights in rest.items() if weights[0].ndim > 1}
    lines += [f"  as they are: {name}, {_amount(weights)}" for name, weights in matrices.items()]
    vectors = [weight for name, weights in rest.items() if name not in matrices for weight in weights]
    return [*lines, f"  as they are: norms, biases and other vectors, {_amount(vectors)}"]


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    base = hf_model.base_model(model)
    for name, weight in base.named_parameters():
        if not re.search(r"\blora_|\.modules_to_save\.|token_adapter", name):
            yield name.replace(".base_layer", "").replace(".original_module", ""), weight


def _amount(weights: list[Tensor]) -> str:
    size = sum(map(stored_bytes, weights))
    unit, scale = next((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if size >= s or s == 2**10)
    return f"{len(weights):,} {'tensor' if len(weights) == 1 else 'tensors'}, {size / scale:.2f} {unit}"
