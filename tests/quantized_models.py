"""Tiny models whose layers' weights are in few bits, and the same models of their values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from deltatune import ops
from deltatune.compile.partition import Partitioner
from deltatune.quantization.tensor import QuantizedTensor
from mixtures import mixture

_EXPERTS = ("gate_up_proj", "down_proj")


def quantized(weight: Tensor, format: str = "nf4", *, transposed: bool = False) -> nn.Parameter:
    upright = weight.detach().mT if transposed else weight.detach()
    values = QuantizedTensor(ops.quantize(upright, format), weight.dtype, transposed=transposed)
    return nn.Parameter(values, requires_grad=False)


def quantize_layers(model: Any, format: str = "nf4") -> list[str]:
    """Puts all projections and experts of the decoder layers in few bits; their names."""
    found = []
    for path, module in model.get_decoder().layers.named_modules():
        if type(module) is nn.Linear and path.endswith("_proj"):
            module.weight = quantized(module.weight, format)
            found.append(path)
        for name in _EXPERTS:
            if isinstance(module._parameters.get(name), nn.Parameter):
                transposed = getattr(module, "is_transposed", False) or "GptOss" in type(module).__name__
                setattr(module, name, quantized(getattr(module, name), format, transposed=transposed))
                found.append(f"{path}.{name}")
    return found


def decoded(model: nn.Module) -> nn.Module:
    """A copy whose weights are the values."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedTensor):
                module._parameters[name] = nn.Parameter(weight.decoded().clone(), requires_grad=False)
    return plain


def adapted(model: Any, **changes: Any) -> Any:
    """With adapters on all linear layers, and on experts where there are any; B is not zero."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    if any(name in module._parameters for module in model.modules() for name in _EXPERTS):
        values["target_parameters"] = [f"experts.{name}" for name in _EXPERTS]
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{**values, **changes})).train()


def both(
    family: str, format: str = "nf4", dtype: torch.dtype = torch.float32, layers: int = 2, **changes: Any
) -> tuple[Any, Any]:
    """With weights in few bits and with their values, the same adapters on both."""
    model = mixture(family, dtype, layers)
    assert quantize_layers(model, format)
    plain = decoded(model)
    return adapted(model, **changes), adapted(plain, **changes)


def compiled(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """As decoder layers are, by our partitioner."""
    graph = torch.compile(layer, fullgraph=True)

    def run(x: Tensor) -> Tensor:
        with inductor_config.patch(custom_partitioner_fn=Partitioner(1.0)):
            return graph(x)

    return run
