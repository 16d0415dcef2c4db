"""Models that stand beside each other in one process: structures of their own over one set of frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "TARGETS",
    "Targets",
    "adapters",
    "copy_of",
    "own_adapted_weights",
    "storage_bytes",
    "with_functions",
    "with_lora",
]

Targets = Literal["qkvo", "all"]

TARGETS: Final[Mapping[Targets, str | list[str]]] = {
    "qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": "all-linear",
}
"""What ``--targets`` names, as PEFT takes it."""


def copy_of(model: Any, *, own_weights: bool = False) -> Any:
    """A model of its own, config and modules included, that shares the Parameters of ``model``.

    With ``own_weights`` they are copied too.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shared = {} if own_weights else {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, shared)


def with_lora(
    model: Any, targets: Targets, *, rank: int, alpha: int, autocast_adapter_dtype: bool = True, seed: int = 0
) -> Any:
    """The model with LoRA by PEFT; adapters hold the same random values in every copy of a model.

    B is random as well: at zero the gradient of A would be zero and prove nothing.
    """
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGETS[targets]
    )
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapters(adapted):
            values = torch.randn(parameter.shape, generator=generator)
            # B small, as after some steps of training
            size = 0.1 * rank**-0.5 if ".lora_B." in name else parameter.shape[-1] ** -0.5
            # through bfloat16, so that adapters of any dtype hold the same numbers
            parameter.copy_((values * size).bfloat16())
    return adapted


def own_adapted_weights(model: nn.Module) -> int:
    """Gives the base weights under adapters storage of their own, for a system that lays them out anew: its bytes."""
    copied = 0
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear) and hasattr(module, "lora_A"):
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
            copied += base.weight.nbytes
    return copied


def adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and values of what trains."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes behind tensors, memory that several share counted once and whole."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def with_functions(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> int:
    """Runs the forward of modules with other functions in place of those their file names; returns how many changed.

    Stock modules call functions of their file (the convolution, the delta rule). An instance whose forward reads one
    of these names gets a subclass of its class whose forward is the same code bound to other functions: the file, the
    class and every other model keep theirs.
    """
    made: dict[type[nn.Module], type[nn.Module]] = {}
    changed = 0
    for module in model.modules():
        stock = type(module)
        forward = _innermost(stock.forward)
        if not set(functions) & set(forward.__code__.co_names):
            continue
        if stock not in made:
            made[stock] = _subclass(stock, forward, functions)
        module.__class__ = made[stock]
        changed += 1
    return changed


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _subclass(stock: type[nn.Module], forward: Any, functions: Mapping[str, Callable[..., Any]]) -> type[nn.Module]:
    # a compiler that finds __name__ in a function's globals reads that module's names instead of these
    scope = {name: value for name, value in forward.__globals__.items() if name != "__name__"} | dict(functions)
    bound = type(forward)(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    bound.__kwdefaults__ = forward.__kwdefaults__
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "forward": bound}
    return type(stock.__name__, (stock,), names)
