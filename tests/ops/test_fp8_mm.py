"""Products in fp8: the formula, what rounding costs, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltatune import ops
from deltatune.ops._fp8_mm import torch_scaled
from deltatune.ops._fp8_mm.api import quantize_rows
from deltatune.ops._fp8_mm.op import fp8_product
from lora_cases import relative

EIGHT = torch.float8_e4m3fn
CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


def operands(
    rows: int = 5, width: int = 32, out: int = 16, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
):
    torch.manual_seed(0)
    x = torch.randn(rows, width, dtype=dtype, device=device)
    codes = torch.randn(out, width, device=device).mul(50).to(EIGHT)
    return x, codes, torch.rand(out, 1, device=device) + 0.1


def by_hand(x: Tensor, codes: Tensor, scales: Tensor, of_x: Tensor) -> Tensor:
    """In float64, but for the codes."""
    values = x.float() * of_x.mT
    a = values.abs().amax(1, keepdim=True) / 448
    return a.double() * ((values / a).to(EIGHT).double() @ codes.double().mT) * scales.double().mT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_formula(device: str, dtype: torch.dtype) -> None:
    x, codes, scales = operands(device=device, dtype=dtype)
    of_x, ones = torch.rand(32, 1, device=device) + 0.1, torch.ones(32, 1, device=device)
    bound = 8e-3 if dtype == torch.bfloat16 else 1e-5
    for given, expected in [
        ({"scales": scales}, by_hand(x, codes, scales, ones)),
        ({"of_x": of_x}, by_hand(x, codes, torch.ones_like(scales), of_x)),
        ({"scales": scales, "of_x": of_x}, by_hand(x, codes, scales, of_x)),
    ]:
        found = ops.fp8_mm(x, codes, **given)
        assert (found.dtype, list(found.shape)) == (dtype, [5, 16])
        assert relative(found, expected) < bound


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_others(device: str) -> None:
    x, codes, scales = operands(device=device)
    changed = x.clone()
    changed[0] *= 1e4
    found, other = ops.fp8_mm(x, codes, scales), ops.fp8_mm(changed, codes, scales)
    assert relative(other[1:], found[1:]) < 1e-6


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x, codes, scales = operands()
    x[0], x[1, 3], x[2, 5] = 0, float("inf"), float("nan")
    found = ops.fp8_mm(x, codes, scales)
    assert not found[0].any()
    assert not found[1:3].isfinite().any()
    assert found[3:].isfinite().all()


def test_rounding_is_that_of_three_bits() -> None:
    x = torch.randn(64, 512)
    codes, scale = quantize_rows(x)
    assert 0.02 < relative(codes.float() * scale, x) < 0.03
    assert codes.float().abs().amax(1).eq(448).all()


def test_the_library_s_call(monkeypatch) -> None:
    """Operands as the device's product takes them: the second by columns, a scale for each row and column."""

    def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype, use_fast_accum) -> Tensor:
        assert a.is_contiguous()
        assert b.mT.is_contiguous()
        assert (scale_a.shape, scale_b.shape) == ((a.shape[0], 1), (1, b.shape[1]))
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert use_fast_accum
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, codes, scales = operands()
    rows, of_rows = quantize_rows(x)
    found = torch_scaled.product(rows, of_rows, codes, scales, torch.bfloat16)
    assert torch.equal(found, ops.fp8_mm(x, codes, scales))


def test_opcheck_and_one_graph() -> None:
    x, codes, scales = operands()
    rows, of_rows = quantize_rows(x)
    arguments = (rows.view(torch.uint8), of_rows, codes.view(torch.uint8), scales, torch.bfloat16, "reference")
    torch.library.opcheck(fp8_product, arguments)
    found = torch.compile(ops.fp8_mm, fullgraph=True)(x, codes, scales)
    assert relative(found, ops.fp8_mm(x, codes, scales)) < 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(16, 32)}, "must be contiguous float8_e4m3fn, got torch.float32"),
        ({"codes": torch.zeros(32, 16).to(EIGHT).mT}, "must be contiguous"),
        ({"codes": torch.zeros(16, 24).to(EIGHT)}, "K"),
        ({"scales": torch.ones(16)}, r"scales must be float32 \[16, 1\], got torch.float32 \[16\]"),
        ({"of_x": torch.ones(16, 1)}, r"of_x must be float32 \[32, 1\]"),
        ({"x": torch.zeros(5, 32, dtype=torch.int32)}, "floating"),
        ({"impl": "torch"}, "needs an NVIDIA GPU"),
    ],
)
def test_what_is_refused(change: dict, message: str) -> None:
    x, codes, scales = operands()
    with pytest.raises(ValueError, match=message):
        ops.fp8_mm(**({"x": x, "codes": codes, "scales": scales} | change))
