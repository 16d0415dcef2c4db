"""The gated activation as one op over base products and the narrow product: no layer's output with adapters exists."""

# M tokens, K input width, N outputs of gate and of up, W columns of u

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._lora_gated.op import lora_gated_activation, lora_gated_activation_backward
from deltatune.ops._lora_linear.api import Adapter, arguments, check_scales, noted_scales
from deltatune.ops._lora_linear.gradients import gradients
from deltatune.ops._lora_linear.operands import forward_operands, parts
from deltatune.ops._opaque import first_order_backward

__all__ = ["lora_gated"]


def lora_gated(x: Tensor, weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]], activation: str) -> Tensor:
    """``act(gate) * up`` of sums that are not rounded."""
    h = _apply(x.reshape(-1, x.shape[-1]), activation, *arguments(weights, adapters))
    return h.view(*x.shape[:-1], h.shape[-1])


class _LoraGated(torch.autograd.Function):
    # Dynamo takes a forward with as many parameters as arguments for one without ctx; there are always more arguments.
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        activation, counts, scales, *tensors = rest
        (gate_weight, up_weight), down, up = parts(tensors, len(scales))
        across, columns, _ = forward_operands(x.dtype, counts, scales, down, up)
        read = x @ gate_weight.mT, x @ up_weight.mT, x @ across, *columns
        ctx.activation, ctx.counts, ctx.scales = activation, counts, scales
        ctx.save_for_backward(noted_scales(scales), x, *read, *tensors)
        return lora_gated_activation(*read, activation)

    @staticmethod
    @first_order_backward("lora_gated", remedy="detach its input and its adapters")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        noted, x, gate, up, narrow, gate_b, up_b, *tensors = ctx.saved_tensors
        check_scales("lora_gated", noted, ctx.scales)
        x_trains, _, _, _, *train = ctx.needs_input_grad
        of_sums = lora_gated_activation_backward(*grads, gate, up, narrow, gate_b, up_b, ctx.activation)
        dx, of_tensors = gradients(of_sums, x, narrow, tensors, ctx.counts, ctx.scales, (x_trains, *train))
        return dx, None, None, None, *of_tensors


_apply: Callable[..., Tensor] = _LoraGated.apply
