"""The gated delta rule: the linear attention of Gated DeltaNet layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltatune.ops._choice import Candidate, Choice, choose
from deltatune.ops._gated_delta_rule import fla, flash_qla, op
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device, check_sequences
from deltatune.packing.sequences import Sequences

__all__ = ["choose_gated_delta_rule", "gated_delta_rule"]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    sequences: Sequences | None = None,
    scale: float | None = None,
    qk_l2norm: bool = True,
    impl: str = "auto",
) -> Tensor:
    """A linear recurrence over each document, whose state ``S`` ``[K, V]`` begins at zero::

        S   <- exp(g_t) S
        S   <- S + k_t (beta_t (v_t - S^T k_t))^T
        o_t  = S^T (scale q_t)

    Args:
        q: ``[B, T, H, K]``, any strides, like all inputs.
        k: ``[B, T, H, K]``.
        v: ``[B, T, G, V]``, G a multiple of H; value head j reads key head ``j // (G // H)``.
        g: ``[B, T, G]``, natural-log decay, <= 0; fp32 beside bf16 q, k and v is usual.
        beta: ``[B, T, G]``, the strength of each write.
        sequences: documents of the flattened ``[B*T]`` stream; None makes each row one document.
        scale: of q; None means ``K ** -0.5``.
        qk_l2norm: first replace q and k by ``x * rsqrt(sum(x^2) + 1e-6)``.
        impl: ``"flash_qla"``: FlashQLA, bf16 or fp16 with K = V = 128 on GPUs of compute capability 9.0, 10.0 and 10.3.
            ``"fla"``: flash-linear-attention, bf16 or fp16 on other NVIDIA GPUs. ``"reference"``: anywhere.
            ``"auto"``: the first of these that can run.

    Returns:
        ``o`` in the shape and dtype of ``v``. Accumulation is in fp32, or fp64 if q, k or v is fp64. Each gradient
        has the dtype of its input; the gradient of a document's output with respect to another document's inputs is
        exactly zero, and no value of a document reaches another, NaN and infinity included (but for gradients on FLA:
        there a NaN can reach those of neighbours). The libraries take a decay below -100 for -100: 0 all the same.

    The reference saves its inputs and runs forward again in backward. The libraries save v, g, beta, the normalised q
    and k with a number per token and head each, and 64 numbers per token and value head. Backward cannot be
    differentiated itself (RuntimeError).

    Raises:
        ValueError: shapes or devices that do not fit, or an implementation that is unknown or cannot run.

    Source: Gated Delta Networks, arXiv 2412.06464; the chunked form, arXiv 2406.06484.
    """
    _check(q, k, v, g, beta, sequences)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    choice = choose_gated_delta_rule(v.device, dtype, head_dims=(k.shape[-1], v.shape[-1]), impl=impl)
    return op.gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        None if sequences is None else sequences.cu_seqlens,
        None if sequences is None else sequences.cu_seqlens_cpu,
        q.shape[-1] ** -0.5 if scale is None else scale,
        qk_l2norm,
        choice.impl,
    )


def choose_gated_delta_rule(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    head_dims: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Choice:
    """Which implementation of ``gated_delta_rule`` runs, and why.

    Args:
        device: of the inputs.
        dtype: of q, k and v; where they differ, the one they promote to.
        head_dims: K and V; None leaves them out of the choice.
        impl: ``"auto"``, or a name.

    Raises:
        ValueError: ``impl`` is unknown or cannot run here.
    """
    device = torch.device(device)
    flash_refusal, fla_refusal = _library_refusal("flash_qla", device, dtype), _library_refusal("fla", device, dtype)
    if head_dims is not None:
        flash_refusal = flash_refusal or flash_qla.dim_refusal(*head_dims)
        fla_refusal = fla_refusal or fla.dim_refusal(*head_dims)
    accumulation = "fp64" if dtype == torch.float64 else "fp32"
    candidates = (
        Candidate("flash_qla", "FlashQLA's fused kernels for this GPU, head dims of 128", flash_refusal),
        Candidate("fla", "FLA's Triton kernels", fla_refusal),
        Candidate("reference", f"chunked torch on {device.type}, accumulating in {accumulation}"),
    )
    return choose("gated_delta_rule", impl, candidates)


def _library_refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{name} needs an NVIDIA GPU, the inputs are on {device.type}; use impl='reference'"
    return _constant_refusal(name, device, dtype)


def _installed_refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    return fla.refusal(capability, dtype) if name == "fla" else flash_qla.refusal(capability, dtype)


# What is installed does not change under a graph, and tracing the look-up would break it.
_assume_constant: Any = torch.compiler.assume_constant_result
_constant_refusal: Callable[[str, torch.device, torch.dtype], str | None] = _assume_constant(_installed_refusal)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, sequences: Sequences | None) -> None:
    name = "gated_delta_rule"
    patterns = {
        "q": (q, "B T H K"),
        "k": (k, "B T H K"),
        "v": (v, "B T G V"),
        "g": (g, "B T G"),
        "beta": (beta, "B T G"),
    }
    sizes = bind_shapes(name, **patterns)
    if sizes["H"] == 0 or sizes["G"] % sizes["H"]:
        raise ValueError(
            f"{name}: value heads must be a multiple of key heads, each key head serving G // H of them; "
            f"got G={sizes['G']} (v {list(v.shape)}) and H={sizes['H']} (k {list(k.shape)})"
        )
    check_floating(name, q=q, k=k, v=v, g=g, beta=beta)
    check_same_device(name, q=q, k=k, v=v, g=g, beta=beta)
    check_sequences(name, sequences, v)
