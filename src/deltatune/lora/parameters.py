"""PEFT's adapters of Parameters (``target_parameters``): of experts as part of the grouped products, of others added.

PEFT's own forward registers a parametrization around every call, which no graph can hold, and builds every expert's
weight anew, with a gradient as large as all of them.
"""

# X experts, K input width, N output width, r rank of an expert

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltatune.hf.cached import reached
from deltatune.hf.experts import experts_layout
from deltatune.hf.forwards import replaced_since
from deltatune.hf.hooks import ON_INSTANCE, is_hooked
from deltatune.lora.merging import Merging
from deltatune.lora.mode import FUSED, STOCK, UNFUSED, Mode, active_adapters, is_lora_linear, is_read_whole
from deltatune.ops import Adapter
from deltatune.subclass import Swapped

__all__ = ["LoRAParameters", "is_parameter_lora", "parameters_mode"]

#: Made once, where a call would make the compiler trace how.
_ONE_PRODUCT = Mode(FUSED, "adapters of all experts in the grouped products")
_ADDED = Mode(UNFUSED, "the Parameter and its adapters' product are added in every call")

#: Held by who puts something on a module for the length of a call, and by who looks at one. One for all models: torch
#: keeps one cache of parametrized weights for the process.
_changing: Final = threading.RLock()


class LoRAParameters(Merging):
    """The outermost of PEFT's wrappers around a module whose Parameters have adapters, one wrapper for each.

    Fused, the experts compute with the factors; unfused, the module is called with the sums of its Parameters and the
    products of their factors. Both leave the module as it is, so calls in other threads notice nothing, and run cached
    calls too. PEFT's own forward computes all else, one call at a time.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module inside; experts ``[N, K], [N, k], [N, k] -> [N, K]``."""
        if torch.compiler.is_compiling():  # a graph holds no lock, and reads weights that nobody changes
            mode = self._mode(kwargs)
            return super().forward(x, *args, **kwargs) if mode == STOCK else self._computed(mode, x, args, kwargs)
        with _changing:
            mode = self._mode(kwargs)
            if mode == STOCK:
                return super().forward(x, *args, **kwargs)
        return self._computed(mode, x, args, kwargs)

    def _mode(self, kwargs: Mapping[str, Any]) -> str:
        if "adapter_names" in kwargs:
            return STOCK
        return parameters_mode(self, self._deltatune.options.lora, called=True).name

    def _computed(self, mode: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reached(self)
        *wrappers, inside = _chain(self)
        if mode == FUSED and not kwargs:
            return inside.mix(x, *args, {wrapper.parameter_name: _adapters(wrapper) for wrapper in wrappers})
        if torch.compiler.is_compiling():
            return functional_call(inside, _sums(wrappers), (x, *args), kwargs)
        if _is_its_class(inside):
            return _with_tensors(inside, _sums(wrappers))(x, *args, **kwargs)
        with _changing:  # hooks and forwards of others know the module itself
            return functional_call(inside, _sums(wrappers), (x, *args), kwargs)

    def _merged_into(self) -> Iterator[tuple[Any, str]]:
        # wrappers inside are PEFT's own, and merge after this one
        *wrappers, inside = _chain(self)
        for wrapper in wrappers:
            yield inside, wrapper.parameter_name

    @property
    def active_share(self) -> float:
        """The share of the factors that a token meets, as of the experts; all of them elsewhere."""
        *_, inside = _chain(self)
        return float(getattr(inside, "active_share", 1.0))

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """What ``active_share`` is said of."""
        for wrapper in [*_chain(self)][:-1]:
            yield from (*wrapper.lora_A.parameters(), *wrapper.lora_B.parameters())


def is_parameter_lora(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's wrappers around a Parameter; inner ones of a chain are too.

    Around the weight of a linear layer it is a LoRA layer like others: ``is_lora_linear``.
    """
    wraps = type(module).__module__.startswith("peft.tuners.lora.") and hasattr(module, "parameter_name")
    return wraps and not is_lora_linear(module)


def parameters_mode(outermost: Any, setting: str, *, called: bool = False) -> Mode:
    """How PEFT's wrappers around one module run, from what they are now; ``called`` as of ``mode_of``."""
    if setting == "stock":
        return Mode(STOCK, "asked for")
    *wrappers, inside = _chain(outermost)
    for wrapper in wrappers:
        if wrapper is not outermost and is_hooked(wrapper):
            return Mode(STOCK, "hooks on a wrapper inside another")
        if wrapper._disable_adapters:
            return Mode(STOCK, "adapters are disabled")
        if wrapper.merged_adapters:
            return Mode(STOCK, "merged into the Parameter")
        names = active_adapters(wrapper)
        if not names:
            return Mode(STOCK, "no active adapter")
        for name in names:
            reason = _stock_reason(wrapper, name, called=called)
            if reason is not None:
                return Mode(STOCK, reason)
    layout = experts_layout(inside)
    swapped = hasattr(inside, "mix") or not isinstance(outermost, Swapped)
    if layout is None or is_hooked(inside) or not swapped:
        return _ADDED
    known = all(wrapper.parameter_name in (layout.up, "down_proj") for wrapper in wrappers)
    return _ONE_PRODUCT if known else _ADDED


def _stock_reason(wrapper: Any, name: str, *, called: bool) -> str | None:
    if name in wrapper.lora_variant:
        return f"a variant of LoRA ({type(wrapper.lora_variant[name]).__name__})"
    linears: tuple[Any, Any] = wrapper.lora_A[name], wrapper.lora_B[name]
    for linear in linears:
        if type(linear) is not nn.Linear:
            return f"an adapter is a {type(linear).__name__}"
        if is_hooked(linear):
            return "hooks on the adapters (offload, or a tool's own)"
        if hasattr(linear.weight, "ds_id") or not is_read_whole(linear, called=called):
            return "the adapters are sharded"
    *groups, rows, cols = getattr(wrapper.get_base_layer(), wrapper.parameter_name).shape
    # of one Parameter in two dimensions, and of experts that are stored as linear layers are
    outer, inner = (rows, cols) if len(groups) == 0 or wrapper._did_swap_in_out_features else (cols, rows)
    (down, reads), (writes, up) = (linear.weight.shape for linear in linears)
    if (reads, writes) != (inner, outer) or down != up or (groups and down % groups[0]):
        return (
            f"A {[down, reads]} and B {[writes, up]} are not those of {[*groups, rows, cols]}; PEFT before "
            "0.19.1 made them the other way round"
        )
    return None


def _chain(wrapper: Any) -> Iterator[Any]:
    """The wrappers from the outermost on, then the module inside."""
    while hasattr(wrapper, "parameter_name"):
        yield wrapper
        wrapper = wrapper.base_layer
    yield wrapper


def _adapters(wrapper: Any) -> list[Adapter]:
    """Those active now: ``A [X r, K]`` expert by expert, ``B [N, r X]`` with the experts innermost."""
    found = []
    for name in active_adapters(wrapper):
        down, up = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        groups = wrapper.num_experts
        a, b = down.view(groups, -1, down.shape[1]), up.view(up.shape[0], -1, groups).permute(2, 0, 1)
        found.append(Adapter(a, b, wrapper.scaling[name]))
    return found


def _sums(wrappers: list[Any]) -> dict[str, Tensor]:
    """The Parameters that have adapters, each with what PEFT adds to it."""
    return {wrapper.parameter_name: _sum(wrapper) for wrapper in wrappers}


def _sum(wrapper: Any) -> Tensor:
    """The Parameter and what PEFT adds to it."""
    total: Tensor = wrapper.get_param()
    for name in active_adapters(wrapper):
        total = total + wrapper.get_delta_weight(name)
    return total


def _is_its_class(module: nn.Module) -> bool:
    """Whether a call is the class's forward alone, so that another object of the class computes the same."""
    if is_hooked(module) or any(name in module.__dict__ for name in ON_INSTANCE):  # a bound method too
        return False
    return not isinstance(module, Swapped) or replaced_since(module) is None


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that is the same in all but some Parameters, whose places ``tensors`` take."""
    other: nn.Module = object.__new__(type(module))
    other.__dict__.update(module.__dict__, _parameters={**module._parameters, **tensors})
    return other
