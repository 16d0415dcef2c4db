"""A product in fp8: documentation, validation and choice."""

# M rows, G groups, K input width, N output width

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from deltatune.ops._fp8_mm.op import fp8_product
from deltatune.ops._fp8_mm.providers import Fp8MmSpec
from deltatune.ops._grouped_mm.linear import columns_of, live_rows
from deltatune.ops._registry import choose
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device

__all__ = ["fp8_mm", "quantize_rows"]

_LARGEST: Final = 448.0  # of e4m3


def fp8_mm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None = None,
    *,
    of_x: Tensor | None = None,
    offsets: Tensor | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """``y_mn = a_m s_n sum_k q_mk c_nk``, with ``a_m = max_k |x_mk| / 448`` and ``q_mk = x_mk / a_m`` rounded to e4m3.

    The rows of x are quantised in plain torch, which a compiler fuses into what makes them; products that share x share
    its codes. A row has a scale of its own, so it knows nothing of other rows.

    With ``offsets`` there is a matrix for each group of rows, as in ``grouped_linear``: ``c``, ``s`` and ``of_x`` are
    those of the group that row m belongs to.

    Args:
        x: ``[M, K]``, floating point.
        codes: ``c [N, K]``, or ``[G, N, K]`` with ``offsets``; contiguous, float8_e4m3fn.
        scales: ``s [N, 1]`` or ``[G, N, 1]`` fp32; 1 by default.
        of_x: ``[K, 1]`` or ``[G, K, 1]`` fp32, what the columns of x are multiplied with before they are quantised; 1
            by default.
        offsets: int32 ``[G]``, where each group ends. Rows past the last one are absent: zero out, whatever they hold.
        beside: ``(u [M, W], B [W, N])`` in the dtype of x, as adapters have them: ``u B`` is added to y, which was
            rounded, in the epilogue of its own product. Not with ``offsets``.
        impl: ``"torch"``: ``torch._scaled_mm``, bfloat16 on NVIDIA GPUs from compute capability 8.9, N and K multiples
            of 16; with ``offsets`` ``torch._scaled_grouped_mm``, on compute capability 9.0. ``"reference"``: the sum in
            fp32, anywhere, with ``offsets`` as that of ``grouped_linear``. ``"auto"``: the first that can run.

    Returns:
        ``[M, N]`` in the dtype of x: sums in fp32, rounded once. A row with a value that is not finite is not finite.
        There is no gradient; that of x, for a frozen ``W = diag(s) c``, is ``fp8_mm(dy, c^T, of_x=s)``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, or an ``impl`` that cannot run here.
    """
    op = "fp8_mm"
    if offsets is None:
        narrow = {} if beside is None else {"u": (beside[0], "M W"), "B": (beside[1], "W N")}
        sizes = bind_shapes(op, x=(x, "M K"), codes=(codes, "N K"), **narrow)
    else:
        sizes = bind_shapes(op, x=(x, "M K"), codes=(codes, "G N K"), offsets=(offsets, "G"))
        check_same_device(op, x=x, offsets=offsets)
        if offsets.dtype != torch.int32:
            raise ValueError(f"{op}: offsets must be int32, got {offsets.dtype}")
        if beside is not None:
            raise ValueError(f"{op}: beside goes without offsets; add the product of groups to the result")
    check_floating(op, x=x)
    if codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous():
        raise ValueError(f"{op}: codes must be contiguous float8_e4m3fn, got {codes.dtype}, strides {codes.stride()}")
    check_same_device(op, x=x, codes=codes)
    u, up = (None, None) if beside is None else beside
    for name, part in (("u", u), ("B", up)):
        if part is not None and part.dtype != x.dtype:
            raise ValueError(f"{op}: {name} must have the dtype of x, {x.dtype}, got {part.dtype}")
    for name, factors, width in (("scales", scales, "N"), ("of_x", of_x, "K")):
        expected = [*codes.shape[:-2], sizes[width], 1]
        if factors is not None and (factors.dtype != torch.float32 or list(factors.shape) != expected):
            raise ValueError(f"{op}: {name} must be float32 {expected}, got {factors.dtype} {list(factors.shape)}")
    chosen = choose(Fp8MmSpec(x.device, x.dtype, codes.shape), impl).impl
    values = x if of_x is None else x.float() * columns_of(of_x, offsets, x.shape[0])
    rows, of_rows = quantize_rows(values)
    eight = (rows.view(torch.uint8), of_rows, codes.view(torch.uint8), scales)
    y = fp8_product(*eight, offsets, u, up, x.dtype, chosen)
    # a select: what an implementation leaves there may be NaN
    return y if offsets is None else torch.where(live_rows(offsets, y.shape[0]), y, 0)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn ``[M, K]`` and a scale fp32 ``[M, 1]`` for each row of ``[M, K]``; see ``fp8_mm``."""
    values = x.float()
    # of zeros a number that can divide
    scale = (values.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scale).to(torch.float8_e4m3fn), scale
