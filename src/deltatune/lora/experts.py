"""PEFT's adapters of expert weights (``target_parameters``) as part of the grouped products."""

# X experts, K input width, N output width, r rank of an expert

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from deltatune.hf.cached import in_stock_path, reached
from deltatune.hf.experts import experts_layout
from deltatune.hf.hooks import is_hooked
from deltatune.lora.mode import FUSED, STOCK, Mode, active_adapters
from deltatune.ops import Adapter
from deltatune.subclass import Swapped

__all__ = ["LoRAExperts", "expert_adapters_mode", "is_expert_lora"]

#: Made once, where a call would make the compiler trace how.
_ONE_PRODUCT = Mode(FUSED, "adapters of all experts in the grouped products")


class LoRAExperts(Swapped):
    """The outermost of PEFT's wrappers around experts: reads the adapters of each weight, and calls the experts.

    PEFT's own forward builds every expert's weight anew, and in backward a gradient as large as all of them; it runs
    for merged and disabled adapters, hooks on the parts that are read, and cached calls.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the experts: ``[N, K], [N, k], [N, k] -> [N, K]``."""
        if kwargs or in_stock_path(self) or expert_adapters_mode(self, self._deltatune.options.lora).name == STOCK:
            stock: Tensor = super().forward(x, *args, **kwargs)
            return stock
        reached(self)
        *wrappers, experts = _chain(self)
        mixed: Tensor = experts.mix(x, *args, {wrapper.parameter_name: _adapters(wrapper) for wrapper in wrappers})
        return mixed


def is_expert_lora(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's wrappers around a weight of experts that we know; inner ones are too."""
    if not type(module).__module__.startswith("peft.tuners.lora.") or not hasattr(module, "parameter_name"):
        return False
    *wrappers, experts = _chain(module)
    layout = experts_layout(experts)
    return layout is not None and all(wrapper.parameter_name in (layout.up, "down_proj") for wrapper in wrappers)


def expert_adapters_mode(outermost: Any, setting: str) -> Mode:
    """How PEFT's wrappers around one module of experts run, from what they are now."""
    if setting == "stock":
        return Mode(STOCK, "asked for")
    *wrappers, experts = _chain(outermost)
    for part in (*wrappers[1:], experts):
        if is_hooked(part):
            return Mode(STOCK, f"hooks on {type(part).__name__} inside the adapters' wrapper")
    for wrapper in wrappers:
        if wrapper._disable_adapters:
            return Mode(STOCK, "adapters are disabled")
        if wrapper.merged_adapters:
            return Mode(STOCK, "merged into the expert weights")
        names = active_adapters(wrapper)
        if not names:
            return Mode(STOCK, "no active adapter")
        for name in names:
            reason = _stock_reason(wrapper, name)
            if reason is not None:
                return Mode(STOCK, reason)
    return _ONE_PRODUCT


def _stock_reason(wrapper: Any, name: str) -> str | None:
    if name in wrapper.lora_variant:
        return f"a variant of LoRA ({type(wrapper.lora_variant[name]).__name__})"
    weight = getattr(wrapper.get_base_layer(), wrapper.parameter_name)
    layout = experts_layout(wrapper.get_base_layer())
    groups, outer, inner = weight.mT.shape if layout is not None and layout.transposed else weight.shape
    linears: tuple[Any, Any] = wrapper.lora_A[name], wrapper.lora_B[name]
    for linear in linears:
        if type(linear) is not nn.Linear or getattr(linear, "bias", None) is not None:
            return f"an adapter is a {type(linear).__name__}, or has a bias"
        if is_hooked(linear):
            return "hooks on the adapters (offload, or a tool's own)"
        if type(linear.weight) is not nn.Parameter or hasattr(linear.weight, "ds_id"):
            return "the adapters are sharded"
    (rows, reads), (writes, cols) = (linear.weight.shape for linear in linears)
    if (reads, writes) != (inner, outer) or rows != cols or rows % groups:
        return (
            f"A {[rows, reads]} and B {[writes, cols]} are not those of experts [{groups}, {outer}, {inner}]; PEFT "
            "before 0.19 made them the other way round"
        )
    return None


def _chain(wrapper: Any) -> Iterator[Any]:
    """The wrappers from the outermost on, then the experts."""
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
