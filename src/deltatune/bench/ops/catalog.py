"""The ops that are measured, and the shapes and token counts each is measured at unless others are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from deltatune.bench.ops import (
    causal_conv,
    gated_delta_rule,
    gated_rms_norm,
    linear_cross_entropy,
    lora_gated,
    lora_linear,
    lora_low_rank,
    rms_norm_rope,
    varlen_attention,
)
from deltatune.bench.ops.case import Case, Setting
from deltatune.bench.shapes import SHAPES, Shape, shape_named

__all__ = ["OPS", "Entry", "shape_of"]

_HYBRID: Final = ("qwen3.5-2b", "qwen3.5-9b")
_HEADS_40_8: Final = "qwen3-14b"

# heads of 40/8 x 128, for ops on heads alone
_EXTRA: Final = {
    _HEADS_40_8: replace(
        SHAPES["qwen3-8b"],
        name=_HEADS_40_8,
        values={**SHAPES["qwen3-8b"].values, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40},
    )
}


@dataclass(frozen=True)
class Entry:
    """An op of the benchmark.

    Attributes:
        build: the case of a shape, a token count and a setting.
        implementations: ours, by name.
        shapes: measured by default.
        tokens: measured by default.
        hybrid: whether only hybrids have it.
        built_ahead: whether its kernels are worth building before a run; not where they come with a layer's graph.
    """

    build: Callable[[Shape, int, Setting], Case]
    implementations: tuple[str, ...]
    shapes: tuple[str, ...] = _HYBRID
    tokens: tuple[int, ...] = (16384,)
    hybrid: bool = False
    built_ahead: bool = True


OPS: Final[Mapping[str, Entry]] = {
    "gated_delta_rule": Entry(gated_delta_rule.case, gated_delta_rule.IMPLEMENTATIONS, hybrid=True),
    "causal_conv": Entry(causal_conv.case, causal_conv.IMPLEMENTATIONS, hybrid=True),
    "causal_conv_l2norm": Entry(causal_conv.case_with_l2norm, causal_conv.IMPLEMENTATIONS, hybrid=True),
    "rms_norm_rope": Entry(
        rms_norm_rope.case,
        rms_norm_rope.IMPLEMENTATIONS,
        shapes=("qwen3.5-9b", _HEADS_40_8),
        tokens=(8192, 16384, 32768),
    ),
    "final_norm": Entry(rms_norm_rope.final_norm, rms_norm_rope.IMPLEMENTATIONS),
    "gated_rms_norm": Entry(gated_rms_norm.case, gated_rms_norm.IMPLEMENTATIONS, hybrid=True),
    "linear_cross_entropy": Entry(linear_cross_entropy.case, linear_cross_entropy.IMPLEMENTATIONS),
    "lora_gated": Entry(lora_gated.case, lora_gated.IMPLEMENTATIONS),
    "lora_linear": Entry(lora_linear.case, lora_linear.IMPLEMENTATIONS, built_ahead=False),
    "lora_low_rank": Entry(lora_low_rank.case, lora_low_rank.IMPLEMENTATIONS),
    "varlen_attention": Entry(varlen_attention.case, varlen_attention.IMPLEMENTATIONS),
}
"""Op, or an op in the form that layers call, -> how to measure it."""


def shape_of(name: str) -> Shape:
    """A model's shape; more are known here than can be trained.

    Raises:
        UserError: an unknown name.
    """
    return SHAPES.get(name) or _EXTRA.get(name) or shape_named(name)
