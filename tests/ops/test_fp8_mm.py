"""Products in fp8: the formula, what rounding costs, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deltatune import ops
from deltatune.ops import _nvidia
from deltatune.ops._fp8_mm import providers, torch_scaled
from deltatune.ops._fp8_mm.api import quantize_rows
from deltatune.ops._fp8_mm.op import fp8_product
from deltatune.ops._fp8_mm.providers import Fp8MmSpec
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


HOPPER = [
    *CUDA,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9"
    ),
]
#: groups of 3, 0, 5 and 2 rows, and two that belong to none
ENDS, ROWS = [3, 3, 8, 10], 12


def grouped(device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
    x, codes, scales = operands(ROWS, out=4 * 48, device=device, dtype=dtype)
    offsets = torch.tensor(ENDS, dtype=torch.int32, device=device)
    return x, codes.view(4, 48, 32), scales.view(4, 48, 1), offsets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=HOPPER)])
def test_groups_of_rows_have_a_matrix_each(device: str, dtype: torch.dtype) -> None:
    x, codes, scales, offsets = grouped(device, dtype)
    of_x = torch.rand(4, 32, 1, device=device) + 0.1
    x[10] = float("nan")
    found = ops.fp8_mm(x, codes, scales, of_x=of_x, offsets=offsets)
    assert (found.dtype, list(found.shape)) == (dtype, [ROWS, 48])
    assert not found[10:].any()
    for group, (start, end) in enumerate(pairwise([0, *ENDS])):
        if end > start:
            expected = by_hand(x[start:end], codes[group], scales[group], of_x[group])
            assert relative(found[start:end], expected) < (8e-3 if dtype == torch.bfloat16 else 1e-5)


def test_the_reference_is_the_formula_to_the_bit() -> None:
    """Rows whose scale is 1 and codes that are whole numbers: no sum rounds, in whichever order."""
    torch.manual_seed(0)
    x = torch.randint(-8, 9, (ROWS, 32)).float()
    x[:, 0] = 448
    codes, scales = torch.randint(-8, 9, (4, 48, 32)).to(EIGHT), torch.full((4, 48, 1), 0.5)
    offsets = torch.tensor(ENDS, dtype=torch.int32)
    found = ops.fp8_mm(x, codes, scales, offsets=offsets)
    for group, (start, end) in enumerate(pairwise([0, *ENDS])):
        expected = (x[start:end].double() @ codes[group].double().mT / 2).float()
        assert torch.equal(found[start:end], expected)
        assert torch.equal(ops.fp8_mm(x[start:end], codes[group], scales[group]), expected)


def test_a_row_of_a_group_is_bitwise_its_own() -> None:
    x, codes, scales, offsets = grouped(dtype=torch.float32)
    of_x = torch.rand(4, 32, 1) + 0.1
    found = ops.fp8_mm(x, codes, scales, of_x=of_x, offsets=offsets)
    other = x.clone()
    other[:6] *= 1e4
    assert torch.equal(ops.fp8_mm(other, codes, scales, of_x=of_x, offsets=offsets)[6:], found[6:])
    alone = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    assert torch.equal(ops.fp8_mm(x[6:8], codes, scales, of_x=of_x, offsets=alone), found[6:8])


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
    found = torch_scaled.product(rows, of_rows, codes, scales, None, torch.bfloat16)
    assert torch.equal(found, ops.fp8_mm(x, codes, scales))


def test_the_library_s_grouped_call(monkeypatch) -> None:
    """It takes these operands by its own checks, which hold their layouts; groups without rows change nothing."""
    library = torch._scaled_grouped_mm

    def scaled_grouped_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, offs, out_dtype, use_fast_accum):
        meta = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (a, b, scale_a, scale_b)
        )
        checked = library(*meta, offs=offs.to("meta"), out_dtype=out_dtype, use_fast_accum=use_fast_accum)
        assert use_fast_accum
        y = torch.full(checked.shape, float("nan"), dtype=checked.dtype)
        for group, (start, end) in enumerate(pairwise([0, *offs.tolist()])):
            product = a[start:end].float() @ b[group].float() * scale_a[start:end, None] * scale_b[group]
            y[start:end] = product.to(out_dtype)
        return y

    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    x, codes, scales, offsets = grouped()
    rows, of_rows = quantize_rows(x)
    found = torch_scaled.product(rows, of_rows, codes, scales, offsets, torch.bfloat16)
    expected = ops.fp8_mm(x, codes, scales, offsets=offsets)
    assert relative(found[: ENDS[-1]], expected[: ENDS[-1]]) < 1e-2
    assert found[ENDS[-1] :].isnan().all()


@pytest.mark.parametrize("groups", [False, True], ids=["one matrix", "grouped"])
def test_opcheck_and_one_graph(groups: bool) -> None:
    x, codes, scales, offsets = grouped() if groups else (*operands(), None)
    rows, of_rows = quantize_rows(x)
    eights = rows.view(torch.uint8), of_rows, codes.view(torch.uint8), scales
    adapters = (None, None) if groups else (torch.randn(5, 4).bfloat16(), torch.randn(4, 16).bfloat16())
    torch.library.opcheck(fp8_product, (*eights, offsets, *adapters, torch.bfloat16, "reference"))
    more = {"offsets": offsets, "beside": None if groups else adapters}
    found = torch.compile(ops.fp8_mm, fullgraph=True)(x, codes, scales, **more)
    assert relative(found, ops.fp8_mm(x, codes, scales, **more)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
def test_a_narrow_product_is_added(device: str, dtype: torch.dtype) -> None:
    x, codes, scales = operands(device=device, dtype=dtype)
    u, up = torch.randn(5, 4, device=device).to(dtype), torch.randn(4, 16, device=device).mul(50).to(dtype)
    found = ops.fp8_mm(x, codes, scales, beside=(u, up))
    expected = by_hand(x, codes, scales, torch.ones(32, 1, device=device)) + u.double() @ up.double()
    assert relative(found, expected) < (8e-3 if dtype == torch.bfloat16 else 1e-5)
    with FlopCounterMode(display=False) as counter:
        ops.fp8_mm(x, codes, scales, beside=(u, up))
    assert counter.get_total_flops() == 2 * 5 * 16 * (32 + 4)


_GROUPS = {"codes": torch.zeros(2, 16, 32).to(EIGHT), "offsets": torch.tensor([2, 5], dtype=torch.int32)}


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
        ({"codes": torch.zeros(4, 16, 32).to(EIGHT)}, "codes must have 2 dims"),
        ({"offsets": torch.tensor([5], dtype=torch.int32)}, "codes must have 3 dims"),
        ({**_GROUPS, "offsets": torch.tensor([2, 5])}, "offsets must be int32, got torch.int64"),
        ({**_GROUPS, "offsets": torch.tensor([5], dtype=torch.int32)}, "G=1 where 2 is expected"),
        ({"beside": (torch.ones(5, 4), torch.ones(3, 16))}, "W"),
        ({"beside": (torch.ones(5, 4), torch.ones(4, 16))}, "u must have the dtype of x, torch.bfloat16, got torch.fl"),
        ({**_GROUPS, "beside": (torch.ones(5, 4), torch.ones(4, 16))}, "beside goes without offsets"),
        (_GROUPS, r"scales must be float32 \[2, 16, 1\], got torch.float32 \[16, 1\]"),
    ],
)
def test_what_is_refused(change: dict, message: str) -> None:
    x, codes, scales = operands()
    with pytest.raises(ValueError, match=message):
        ops.fp8_mm(**({"x": x, "codes": codes, "scales": scales} | change))


#: compute capability, shape of the weight, and what is said where it cannot run
CARDS = [
    ((8, 0), (32, 32), "compute capability 8.9 or newer, this GPU has 8.0"),
    ((8, 9), (32, 32), None),
    ((10, 0), (32, 32), None),
    ((9, 0), (32, 24), "multiples of 16"),
    ((8, 9), (4, 32, 32), "torch._scaled_grouped_mm needs compute capability 9.0, this GPU has 8.9"),
    ((10, 0), (4, 32, 32), "needs compute capability 9.0, this GPU has 10.0"),
    ((9, 0), (4, 32, 32), None),
    ((9, 0), (1024, 32, 32), "up to 1023 groups, got 1024"),
]


@pytest.mark.parametrize(("capability", "shape", "said"), CARDS)
def test_where_the_library_s_products_run(capability, shape, said: str | None, monkeypatch) -> None:
    monkeypatch.setattr(_nvidia, "capability_of", lambda _: capability)
    monkeypatch.setattr(providers, "capability_of", lambda _: capability)
    choice = ops.choose(Fp8MmSpec(torch.device("cuda"), torch.bfloat16, torch.Size(shape)))
    assert choice.impl == ("torch" if said is None else "reference")
    assert said is None or said in choice.reason
