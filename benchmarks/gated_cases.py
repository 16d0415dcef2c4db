"""The gate of an MLP with adapters on both projections at the shapes of models, and other ways to compute it."""

# T tokens, E width of the residual stream, N width of the MLP, r rank

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune import ops
from deltatune.ops import Adapter

__all__ = ["FACTORS", "RANKS", "baselines", "draw_factors", "draw_weights", "ours", "separate"]

RANKS: Final = (16, 64)
FACTORS: Final = ("gate_A", "gate_B", "up_A", "up_B")
_SCALE: Final = 2.0


def draw_weights(normal: Callable[..., Tensor], hidden: int, inner: int) -> dict[str, Tensor]:
    """Of gate and up, ``[N, E]``."""
    return {name: normal(inner, hidden, scale=hidden**-0.5) for name in ("gate", "up")}


def draw_factors(normal: Callable[..., Tensor], hidden: int, inner: int, rank: int) -> dict[str, Tensor]:
    """In fp32, as PEFT keeps them: ``A [r, E]`` and ``B [N, r]`` of both."""
    sizes = {"A": (rank, hidden), "B": (inner, rank)}
    return {name: normal(*sizes[name[-1]], dtype=torch.float32, scale=sizes[name[-1]][1] ** -0.5) for name in FACTORS}


def ours(impl: str) -> Callable[[Any], Tensor]:
    """``ops.lora_gated``."""

    def run(t: Any) -> Tensor:
        adapters = [[Adapter(t[f"{name}_A"], t[f"{name}_B"], _SCALE)] for name in ("gate", "up")]
        return ops.lora_gated(t["x"], [t["gate"], t["up"]], adapters, impl=impl)

    return run


def separate(t: Any) -> Tensor:
    """Every product for itself and in the dtype of x, added to its base."""

    def linear(name: str) -> Tensor:
        a, b = (t[f"{name}_{factor}"].to(t["x"].dtype) for factor in "AB")
        return F.linear(t["x"], t[name]) + _SCALE * F.linear(F.linear(t["x"], a), b)

    return F.silu(linear("gate")) * linear("up")


def baselines(
    weights: dict[str, Tensor], rank: int, device: torch.device
) -> Iterable[tuple[str, str, Callable[[], Any]]]:
    """Name, whose it is, and how to build it."""

    def peft(*, compiled: bool) -> Callable[[Any], Tensor]:
        import peft as library

        inner, hidden = weights["gate"].shape
        with torch.device("meta"):
            layers = nn.ModuleDict({name: nn.Linear(hidden, inner, bias=False) for name in weights})
        for name, weight in weights.items():
            linear: Any = layers[name]
            linear.weight = nn.Parameter(weight, requires_grad=False)
        config = library.LoraConfig(r=rank, lora_alpha=int(_SCALE * rank), target_modules=list(weights))
        wrapped = library.inject_adapter_in_model(config, layers).to(device)
        paths = {f"{name[:-2]}.lora_{name[-1]}.default.weight": name for name in FACTORS}

        class Gate(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = wrapped

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = F.silu(self.layers["gate"](x)) * self.layers["up"](x)
                return result

        gate = Gate()

        def run(t: Any) -> Tensor:
            given = {f"layers.{path}": t[name] for path, name in paths.items()}
            result: Tensor = torch.func.functional_call(gate, given, (t["x"],))
            return result

        return torch.compile(run, dynamic=False) if compiled else run

    yield "PEFT's layers", "stock", functools.partial(peft, compiled=False)
    yield "PEFT's layers, compiled", "stock", functools.partial(peft, compiled=True)
    yield "separate products, compiled", "library", lambda: torch.compile(separate, fullgraph=True, dynamic=False)
