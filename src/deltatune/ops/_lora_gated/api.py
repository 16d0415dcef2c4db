"""``act(x Wg^T + s (x Ag^T) Bg^T) * (x Wu^T + s (x Au^T) Bu^T)``: what a gated MLP with adapters hands to its end."""

# M tokens, K input width, N outputs of gate and of up, R rank

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from deltatune.ops._lora_gated import reference, sums
from deltatune.ops._lora_gated.providers import LoraGatedSpec
from deltatune.ops._lora_linear.api import Adapter
from deltatune.ops._registry import choose
from deltatune.ops._validation import check_floating, check_same_device

__all__ = ["ACTIVATIONS", "lora_gated"]

#: SiLU, and GELU by its approximation with tanh.
ACTIVATIONS: Final = ("silu", "gelu_tanh")


def lora_gated(
    x: Tensor,
    weights: Sequence[Tensor],
    adapters: Sequence[Sequence[Adapter]],
    *,
    activation: str = "silu",
    impl: str = "auto",
) -> Tensor:
    """``act(gate) * up`` for ``gate, up`` = ``x W_i^T + sum_j s_ij (x A_ij^T) B_ij^T``.

    Args:
        x: ``[..., K]``, in the dtype of the weights.
        weights: of gate and of up, ``[N, K]`` each, frozen: they get no gradient.
        adapters: of gate and of up, one of each at least, ``A [R, K]`` and ``B [N, R]`` in any floating dtype.
        activation: ``"silu"`` or ``"gelu_tanh"``.
        impl: ``"reference"``: products that add to their adapters' in the epilogue, which writes and reads again the
            adapters' part of gate and of up; then torch's activation. ``"triton"``: base products alone, and a kernel
            that adds the adapters' part where it reads them, on NVIDIA GPUs, in bf16 and fp16, up to 64 columns of a
            layer's adapters. ``"auto"``: the reference, until a record shows where the kernel pays.

    Returns:
        ``[..., N]`` in the dtype of ``x``. ``x A^T`` is rounded to it; gradients of A and B are fp32 sums.

    Saved for backward: ``x``, its narrow product with all A, the weights, A and B, and gate and up; by the kernel the
    base products in place of gate and up, rounded before adapters are added in fp32, and B as it was cast. Backward is
    of first order.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, another activation, or an ``impl`` that cannot run here.

    Source: Shazeer, GLU Variants (2020); Hu et al., LoRA (2021).
    """
    _check(x, weights, adapters, activation)
    width = max(sum(adapter.down.shape[0] for adapter in of_layer) for of_layer in adapters)
    if choose(LoraGatedSpec(x.device, x.dtype, width), impl).impl == "triton":
        return sums.lora_gated(x, weights, adapters, activation)
    return reference.lora_gated(x, weights, adapters, activation)


def _check(x: Tensor, weights: Sequence[Tensor], adapters: Sequence[Sequence[Adapter]], activation: str) -> None:
    name = "lora_gated"
    if activation not in ACTIVATIONS:
        known = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{name}: activation must be {known}, got {activation!r}")
    if len(weights) != 2 or len(adapters) != 2 or not all(adapters):
        raise ValueError(
            f"{name}: expected the weights of gate and up, and an adapter of each at least; got {len(weights)} weights "
            f"and {[len(of_layer) for of_layer in adapters]} adapters"
        )
    inner, outer = x.shape[-1], weights[0].shape[0]
    for weight, of_layer in zip(weights, adapters, strict=True):
        fits = weight.shape == (outer, inner) and all(
            a.ndim == b.ndim == 2 and a.shape[1] == inner and b.shape == (outer, a.shape[0]) for a, b, _ in of_layer
        )
        if not fits:
            factors = [(list(a.shape), list(b.shape)) for a, b, _ in of_layer]
            raise ValueError(
                f"{name}: expected x [..., K], weights [N, K], A [R, K], B [N, R]; got x {list(x.shape)}, weight "
                f"{list(weight.shape)}, A and B {factors}"
            )
        if weight.dtype != x.dtype:
            raise ValueError(f"{name}: expected weights in the dtype of x, {x.dtype}, got {weight.dtype}")
        for a, b, _ in of_layer:
            check_floating(name, x=x, A=a, B=b)
            check_same_device(name, x=x, weight=weight, A=a, B=b)
