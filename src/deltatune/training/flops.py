"""Model FLOPs of a training step: what the mathematics asks for, whatever is recomputed or padded."""

# H query heads, D head dim, G value heads, K key dim, V value dim, n document length

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

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
    where it trains. Routed experts count with the share of them that a token visits. Full attention costs
    ``2 * n**2 * H * D`` forward (causal: half of ``4 n**2``) and twice that backward; a gated delta rule, in its
    recurrent form, ``6 * G * K * V`` a token forward (decay and read, write, output) and twice that backward.
    Recomputation by checkpointing is not counted, nor is padding: this is the work that trains.
    """

    per_token: float
    per_square: float

    @classmethod
    def of(cls, model: nn.Module) -> StepFlops:
        """The FLOPs of a causal language model, adapters included; embeddings are lookups and cost nothing."""
        config = _text_config(model)
        matrices = sum(
            (6.0 if weight.requires_grad else 4.0) * weight.numel() * _share(weight, config)
            for weight in _matrices(model)
        )
        kinds = _layer_kinds(config)
        linear = 18.0 * _value(config, "linear_num_value_heads") * _value(config, "linear_key_head_dim")
        linear *= _value(config, "linear_value_head_dim") * kinds.count("linear_attention")
        heads = _value(config, "num_attention_heads")
        width = heads * (_value(config, "head_dim") or _value(config, "hidden_size") // max(heads, 1))
        return cls(matrices + linear, 6.0 * width * (len(kinds) - kinds.count("linear_attention")))

    def __call__(self, counts: PackCounts) -> float:
        """FLOPs of the batches counted."""
        return self.per_token * counts.tokens + self.per_square * counts.squares


def _text_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None else object()


def _value(config: object, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _layer_kinds(config: object) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    return list(kinds) if kinds else ["full_attention"] * _value(config, "num_hidden_layers")


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights that multiply activations in a text-only step: of linear layers (a tied head once) and of experts."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings.discard(id(head.weight))
    return [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim in (2, 3)
        and id(weight) not in embeddings
        and not _outside_text(name)
        # a depthwise convolution's weight is [D, 1, W]: its work is the size of an elementwise pass
        and not (weight.ndim == 3 and weight.shape[1] == 1)
    ]


def _outside_text(name: str) -> bool:
    return any(part in ("visual", "vision_tower", "audio_tower", "mtp") for part in name.split("."))


def _share(weight: nn.Parameter, config: object) -> float:
    experts = _value(config, "num_experts")
    if weight.ndim < 3 or weight.shape[0] != experts or not experts:
        return 1.0
    return _value(config, "num_experts_per_tok") / experts
