"""Which frozen weights of a model compute in fp8, which are decoded, and what runs either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

from deltatune.ops import DequantizeSpec, Fp8MmSpec, Spec, choose
from deltatune.ops._lora_linear.gradients import FEW
from deltatune.quantization.tensor import Impls, QuantizedTensor, computes_in_fp8, in_fp8

__all__ = ["compute_in_fp8", "op_specs", "quantized_weights", "refusal", "set_impls", "why_decoded"]

_MULTIPLE: Final = 16


def compute_in_fp8(model: nn.Module, device: torch.device, dtype: torch.dtype, impl: str = "auto") -> None:
    """Has the products of a model's weights in fp8 computed in fp8, forward and backward, where ``why_decoded`` allows.

    Args:
        model: before ``prepare``, on the meta device too.
        device: where it will train.
        dtype: of its activations.
        impl: of ``ops.fp8_mm``.

    Raises:
        ValueError: ``refusal``, or a model of whose weights in few bits none can.
    """
    if (why := refusal(device, dtype, impl)) is not None:
        raise ValueError(why)
    weights = list(quantized_weights(model))
    reasons = [why_decoded(weight, device, dtype, impl) for _, _, weight in weights]
    if weights and None not in reasons:
        raise ValueError(f"no weight can compute in fp8: {'; '.join(dict.fromkeys(map(str, reasons)))}")
    for (module, name, weight), why in zip(weights, reasons, strict=True):
        if why is None and not computes_in_fp8(weight):
            module._parameters[name] = nn.Parameter(in_fp8(weight), requires_grad=False)


def refusal(device: torch.device, dtype: torch.dtype, impl: str = "auto") -> str | None:
    """Why no product can be computed in fp8 on a device; None where it can, and on a CPU, where the reference runs.

    Raises:
        ValueError: an ``impl`` that is named and cannot run there.
    """
    return _falls_back(Fp8MmSpec(device, dtype), impl)


def why_decoded(weight: QuantizedTensor, device: torch.device, dtype: torch.dtype, impl: str = "auto") -> str | None:
    """Why the products of a weight are computed of its values, in the dtype of activations; None where in fp8.

    Raises:
        ValueError: an ``impl`` that is named and cannot run there.
    """
    shape = weight.stored.shape
    if weight.format != "fp8":
        return f"in {weight.format}"
    if any(width % _MULTIPLE for width in shape[-2:]):
        return f"widths that are no multiples of {_MULTIPLE}"
    if len(shape) == 2 and shape[0] <= FEW:
        return f"no more than {FEW} outputs, part of the adapters' product in backward"
    return _falls_back(Fp8MmSpec(device, dtype, shape), impl)


def _falls_back(spec: Fp8MmSpec, impl: str) -> str | None:
    """Why the device's own product does not run where it should: the reference there only serves to compare."""
    choice = choose(spec, impl)
    on_cpu = spec.device.type == "cpu"
    return choice.reason if choice.impl == "reference" and impl == "auto" and not on_cpu else None


def quantized_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, QuantizedTensor]]:
    """Every weight in few bits, with the module that has it and its name there."""
    for module in model.modules():
        own: dict[str, Any] = module._parameters
        for name, weight in list(own.items()):
            if isinstance(weight, QuantizedTensor):
                yield module, name, weight


def set_impls(model: nn.Module, requests: Mapping[str, str]) -> None:
    """Names what decodes and multiplies the weights in few bits, by op; ``"auto"`` where it is not said."""
    given = Impls(**{op: requests[op] for op in Impls._fields if op in requests})
    for _, _, weight in quantized_weights(model):
        weight.impls = given


def op_specs(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[Spec]:
    """What the choice of an implementation goes by, for every op that weights in few bits call.

    Args:
        model: with them.
        device: where it runs.
        dtype: of the activations.
    """
    for _, _, weight in quantized_weights(model):
        if computes_in_fp8(weight):
            yield Fp8MmSpec(device, dtype, weight.stored.shape)
        else:
            yield DequantizeSpec(device, dtype)
