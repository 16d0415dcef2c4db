"""Model FLOPs of a training step: what the mathematics asks for, whatever is recomputed or padded."""

# n document length

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from deltatune.compile.memory import layer_cost
from deltatune.hf.model import head_of, text_model
from deltatune.training.batches import PackCounts

__all__ = ["PEAK_FLOPS", "StepFlops", "peak_flops"]

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense 16-bit matrix FLOP/s with 32-bit sums, by a part of the device's name; from the makers' data sheets."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's 16-bit matrix FLOP/s; None where it is not known, or for a 32-bit model."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward as ``per_token * tokens + per_square * sum(n**2)`` over documents of length n.

    A matrix of N weights costs ``2N`` a token forward, ``2N`` for the input's gradient, and ``2N`` more for its own
    where it trains. Routed experts count with the share of them that a token visits. Attention and the gated delta rule
    cost what their layers' ``cost`` says forward, and twice that backward.
    Recomputation by checkpointing is not counted, nor is padding: this is the work that trains.
    """

    per_token: float
    per_square: float

    @classmethod
    def of(cls, model: nn.Module) -> StepFlops:
        """The FLOPs of a prepared language model, adapters included; embeddings are lookups and cost nothing."""
        shares = _active_shares(model)
        matrices = sum(
            (6.0 if weight.requires_grad else 4.0) * weight.numel() * shares.get(weight, 1.0)
            for weight in _matrices(model)
        )
        # forward, and twice that backward
        return cls(
            matrices + 3 * layer_cost(model, tokens=1).flops,
            3 * layer_cost(model, squares=1).flops,
        )

    def __call__(self, counts: PackCounts) -> float:
        """FLOPs of the batches counted."""
        return self.per_token * counts.tokens + self.per_square * counts.squares


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights that multiply activations in a text-only step: of linear layers (a tied head once) and of experts."""
    text, head = text_model(model), head_of(model)
    weights = dict.fromkeys([*text.parameters(), *(() if head is None else head.parameters())])
    lookups = {module.weight for module in text.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        lookups.discard(head.weight)
    # a depthwise convolution's weight is [D, 1, W]: its work is the size of an elementwise pass
    kept = [weight for weight in weights if weight.ndim == 2 or (weight.ndim == 3 and weight.shape[1] != 1)]
    return [weight for weight in kept if weight not in lookups]


def _active_shares(model: nn.Module) -> dict[nn.Parameter, float]:
    """The share of a weight that a token meets, where that is not all of it: routed experts."""
    found: dict[nn.Parameter, float] = {}
    for module in model.modules():
        share = getattr(module, "active_share", None)
        if isinstance(share, float):
            found |= dict.fromkeys(module.parameters(recurse=False), share)
    return found
