"""The elementwise stages of a step and the fewest bytes of each: what the floor charges at copy bandwidth.

A stage is everything between two products or core kernels that one kernel can do, so neighbours are one stage: each of
its inputs is read once and each of its outputs written once, at the activations' width unless said. Figures of a few
bytes a token (reciprocal norms, cos and sin, log-sum-exps) are left out: the floor only gets lower.
"""

# E width of the residual stream; H key heads, G value heads of dims K and V in the delta
# rule, C = 2HK + GV channels; N query heads, M key-value heads of dim D in attention

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Stage", "elementwise_stages", "optimizer_bytes_moved"]

_F32: Final = 4


@dataclass(frozen=True)
class Stage:
    """One elementwise stage.

    Attributes:
        name: of the table.
        group: of kernels, as a profile names it.
        forward: bytes a token forward.
        backward: bytes a token backward.
        forward_count: how often a step runs it.
        backward_count: how often its backward is needed.
    """

    name: str
    group: str
    forward: float
    backward: float
    forward_count: int
    backward_count: int


def elementwise_stages(config: Any, *, first_trained: int, item: int = 2) -> Iterator[Stage]:
    """Stages of a dense or hybrid model without experts.

    Args:
        config: of the text model.
        first_trained: index of the first layer that holds a trained weight: layers before it need no backward, and
            what comes before its first projection neither.
        item: bytes of an activation.
    """
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    layers, trained = len(kinds), len(kinds) - first_trained
    E, hidden = config.hidden_size, config.intermediate_size
    rest = "norm and elementwise"
    # reads the token's row, writes the residual stream and its norm
    yield Stage("embedding + norm", rest, 3 * E * item, 0, 1, 0)
    # forward reads x and the branch, writes their sum and its norm; backward reads dy, x and the residual's gradient
    # and writes dx: before every mixer but the first, and before every MLP
    yield Stage("residual + norm", rest, 4 * E * item, 4 * E * item, 2 * layers - 1, 2 * trained - 1)
    # before the head no gradient comes beside the norm's
    yield Stage("residual + final norm", rest, 4 * E * item, 3 * E * item, 1, 1)
    # forward reads gate and up, writes the product; backward reads its gradient, gate and up, writes theirs
    yield Stage("SwiGLU", rest, 3 * hidden * item, 5 * hidden * item, layers, trained)
    linear = kinds.count("linear_attention")
    if linear:
        yield from _delta_rule_stages(config, linear, kinds[first_trained:].count("linear_attention"), item)
    if layers - linear:
        yield from _attention_stages(config, layers - linear, kinds[first_trained:].count("full_attention"), item)


def _delta_rule_stages(config: Any, count: int, needed: int, item: int) -> Iterator[Stage]:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    G, C = config.linear_num_value_heads, 2 * keys + values
    yield Stage("convolution + SiLU + l2norm", "convolution", 2 * C * item, 3 * C * item, count, needed)
    # reads a and b, writes g in float32 and beta; backward reads dg, dbeta, a and b, writes da and db
    forward, backward = 3 * G * item + G * _F32, 5 * G * item + G * _F32
    yield Stage("decay and write strength", "norm and elementwise", forward, backward, count, needed)
    # reads o and z, writes y; backward reads dy, o and z, writes do and dz
    yield Stage("gated norm", "norm and elementwise", 3 * values * item, 5 * values * item, count, needed)


def _attention_stages(config: Any, count: int, needed: int, item: int) -> Iterator[Stage]:
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    both = (queries + keys) * item
    yield Stage("norm + RoPE of q and k", "norm and elementwise", 2 * both, 3 * both, count, needed)
    if _has_output_gate(config):
        yield Stage("output gate", "norm and elementwise", 3 * queries * item, 5 * queries * item, count, needed)


def _has_output_gate(config: Any) -> bool:
    return getattr(config, "linear_num_value_heads", None) is not None


def optimizer_bytes_moved(elements: int, *, item: int = _F32) -> int:
    """AdamW: reads weights, gradients and both moments, writes weights and moments."""
    return 7 * item * elements
