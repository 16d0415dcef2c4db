"""The normalisation of query and key heads and their rotary embedding, in one op."""

# B batch, T tokens, N and M heads, D head dim, R rotary dim

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._numerics import most_demanding
from deltatune.ops._registry import Choice, choose
from deltatune.ops._rms_norm_rope import op, reference
from deltatune.ops._rms_norm_rope.providers import RmsNormRopeSpec
from deltatune.ops._validation import check_tensors

__all__ = ["rms_norm_rope", "rms_norm_rope_pair"]


def rms_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    unit_offset: bool = False,
    impl: str = "auto",
) -> Tensor:
    """``rope(RMSNorm(x) * weight)`` for each head.

    The first R dims rotate by halves: with ``a = y[:R/2]`` and ``b = y[R/2:R]`` they become ``a cos - b sin`` and
    ``b cos + a sin`` (cos and sin of the half they stand in); dims from R on pass.

    Rounding follows the stock modules. The norm runs in fp32 (fp64 for fp64 input). Then, without ``unit_offset``
    (Qwen3), it is rounded to ``x.dtype`` before it is multiplied by ``weight``; with it (Qwen3-Next, Qwen3.5) it is
    multiplied by ``1 + weight`` in fp32 and rounded after. The rotation runs in the dtype that this and cos and sin
    promote to, which is the dtype of the result.

    Args:
        x: ``[B, T, N, D]``, any strides.
        weight: ``[D]``, or None for a norm without scale.
        cos: ``[B or 1, T, R]``, R even and at most D; with R = 0 nothing rotates, a norm alone.
        sin: the shape of ``cos``.
        eps: added to the mean square, inside the root.
        unit_offset: scale by ``1 + weight`` rather than ``weight``.
        impl: ``"triton"``: one kernel each way, on NVIDIA GPUs, for bf16, fp16 and fp32, where cos and sin want no
            gradient. ``"reference"``: plain torch, anywhere. ``"auto"``: the first that can run.

    Returns:
        ``[B, T, N, D]``, contiguous from the kernel.

    The kernel keeps x, weight, cos and sin for backward and nothing else. Its backward computes in fp32 without the
    roundings in between; gradients are those of first order; that of ``weight`` is computed where it is needed, in a
    fixed order, so that runs repeat bit for bit.

    Raises:
        ValueError: shapes that do not fit, an odd R or one above D, or an implementation that cannot run.

    Source: ``Qwen3RMSNorm``, ``Qwen3_5RMSNorm`` and ``apply_rotary_pos_emb`` of transformers.
    """
    _check(x, weight, cos, sin)
    return _run(_choose_for((x, weight), cos, sin, impl), x, weight, cos, sin, eps, unit_offset)


def rms_norm_rope_pair(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    unit_offset: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``rms_norm_rope`` of an attention's q ``[B, T, N, D]`` and k ``[B, T, M, D]``, bit for bit.

    Where the kernel runs and both have the same dtypes, they share one launch each way: on an H200 at 8192 tokens and
    16/4 heads of 256 that is 1.07 times as fast. Arguments and errors are those of ``rms_norm_rope``; ``cos``, ``sin``
    and what follows serve both.
    """
    _check(q, q_weight, cos, sin)
    _check(k, k_weight, cos, sin)
    choice = _choose_for((q, k, q_weight, k_weight), cos, sin, impl)
    kinds = [(x.shape[-1], x.dtype, None if w is None else w.dtype) for x, w in ((q, q_weight), (k, k_weight))]
    if choice.impl == "triton" and kinds[0] == kinds[1]:
        return op.rms_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, unit_offset)
    rest = (cos, sin, eps, unit_offset)
    return _run(choice, q, q_weight, *rest), _run(choice, k, k_weight, *rest)


def _run(
    choice: Choice, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, unit_offset: bool
) -> Tensor:
    if choice.impl == "triton":
        return op.rms_norm_rope(x, None, weight, None, cos, sin, eps, unit_offset)[0]
    return reference.rms_norm_rope(x, weight, cos, sin, eps, unit_offset)


def _choose_for(tensors: tuple[Tensor | None, ...], cos: Tensor, sin: Tensor, impl: str) -> Choice:
    given = [x.dtype for x in (*tensors, cos, sin) if x is not None]
    angles_grad = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    return choose(RmsNormRopeSpec(cos.device, most_demanding(*given), angles_grad), impl)


def _check(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    name = "rms_norm_rope"
    rows = "1" if cos.ndim == 3 and cos.shape[0] == 1 else "B"
    sizes = check_tensors(
        name, x=(x, "B T N D"), cos=(cos, f"{rows} T R"), sin=(sin, f"{rows} T R"), weight=(weight, "D")
    )
    if sizes["R"] % 2 or sizes["R"] > sizes["D"]:
        raise ValueError(
            f"{name}: the rotary size R of cos and sin must be even and at most D={sizes['D']}, got R={sizes['R']}"
        )
