"""A product in fp8: documentation, validation and choice."""

# M rows, K input width, N output width

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from deltatune.ops._fp8_mm.op import fp8_product
from deltatune.ops._fp8_mm.providers import Fp8MmSpec
from deltatune.ops._registry import choose
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device

__all__ = ["fp8_mm", "quantize_rows"]

_LARGEST: Final = 448.0  # of e4m3


def fp8_mm(
    x: Tensor, codes: Tensor, scales: Tensor | None = None, *, of_x: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """``y_mn = a_m s_n sum_k q_mk c_nk``, with ``a_m = max_k |x_mk| / 448`` and ``q_mk = x_mk / a_m`` rounded to e4m3.

    The rows of x are quantised in plain torch, which a compiler fuses into what makes them; products that share x share
    its codes.

    Args:
        x: ``[M, K]``, floating point.
        codes: ``c [N, K]``, contiguous, float8_e4m3fn.
        scales: ``s [N, 1]`` fp32; 1 by default.
        of_x: ``[K, 1]`` fp32, what the columns of x are multiplied with before they are quantised; 1 by default.
        impl: ``"torch"``: ``torch._scaled_mm``, bfloat16 on NVIDIA GPUs from compute capability 8.9, N and K multiples
            of 16. ``"reference"``: the sum in fp32, anywhere. ``"auto"``: the first that can run.

    Returns:
        ``[M, N]`` in the dtype of x: sums in fp32, rounded once. A row with a value that is not finite is not finite.
        There is no gradient; that of x, for a frozen ``W = diag(s) c``, is ``fp8_mm(dy, c^T, of_x=s)``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an ``impl`` that cannot run here.
    """
    op = "fp8_mm"
    sizes = bind_shapes(op, x=(x, "M K"), codes=(codes, "N K"))
    check_floating(op, x=x)
    if codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous():
        raise ValueError(f"{op}: codes must be contiguous float8_e4m3fn, got {codes.dtype}, strides {codes.stride()}")
    check_same_device(op, x=x, codes=codes)
    for name, given, size in (("scales", scales, sizes["N"]), ("of_x", of_x, sizes["K"])):
        if given is not None and (given.dtype != torch.float32 or given.shape != (size, 1)):
            raise ValueError(f"{op}: {name} must be float32 {[size, 1]}, got {given.dtype} {list(given.shape)}")
    chosen = choose(Fp8MmSpec(x.device, x.dtype, codes.shape), impl).impl
    rows, of_rows = quantize_rows(x if of_x is None else x.float() * of_x.mT)
    return fp8_product(rows.view(torch.uint8), of_rows, codes.view(torch.uint8), scales, x.dtype, chosen)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn ``[M, K]`` and a scale fp32 ``[M, 1]`` for each row of ``[M, K]``; see ``fp8_mm``."""
    values = x.float()
    # of zeros a number that can divide
    scale = (values.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scale).to(torch.float8_e4m3fn), scale
