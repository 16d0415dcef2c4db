"""Quantised matrices: their values against the formulas, what is refused, and what quantising loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune import ops
from deltatune.ops import QuantizedWeight
from quantized_cases import CASES, case, finite, same, value_by_value

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
EXPERTS = [name for name, (_, lead, *_) in CASES.items() if lead]


def byte(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_formulas(name: str) -> None:
    weight = case(name)
    expected = value_by_value(weight)
    assert weight.shape == expected.shape
    for dtype in DTYPES:
        found = ops.dequantize(weight, dtype)
        assert found.is_contiguous()
        assert same(found, expected.to(dtype)), dtype


def test_cases_hold_every_byte_and_what_is_not_a_number() -> None:
    for name in ("nf4", "mxfp4", "nvfp4", "fp8, blocks"):
        weight = case(name)
        assert weight.codes.contiguous().view(torch.uint8).unique().numel() == 256
        assert weight.scales.view(torch.uint8).unique().numel() >= (256 if weight.format != "fp8" else 1)
        assert value_by_value(weight).isnan().any() == (weight.format != "nf4")


def test_two_codes_of_a_byte_are_in_the_order_of_their_format() -> None:
    ones = torch.cat([torch.ones(257), torch.zeros(1)]).unsqueeze(0)
    nf4 = QuantizedWeight("nf4", byte(0xF0, 0x7E).repeat(1, 16), byte(0), ones[0])
    assert ops.dequantize(nf4, torch.float32)[0, :4].tolist() == [1.0, -1.0, 0.0, 0.7229568362236023]
    mxfp4 = QuantizedWeight("mxfp4", byte(0x21, 0xF7).repeat(1, 8), byte(128).view(1, 1))
    assert ops.dequantize(mxfp4, torch.float32)[0, :4].tolist() == [1.0, 2.0, 12.0, -12.0]
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    nvfp4 = QuantizedWeight("nvfp4", byte(0x43, 0x8A).repeat(1, 4), one, torch.tensor([2.0]))
    assert ops.dequantize(nvfp4, torch.float32)[0, :3].tolist() == [3.0, 4.0, -2.0]
    divided = nvfp4._replace(divides=True)
    assert ops.dequantize(divided, torch.float32)[0, :3].tolist() == [0.75, 1.0, -0.5]


def test_powers_of_two_reach_from_the_smallest_to_infinity() -> None:
    codes = byte(0x11, 0x77).repeat(4, 8)  # 0.5 and 6
    weight = QuantizedWeight("mxfp4", codes, byte(0, 127, 254, 255).view(4, 1))
    found = ops.dequantize(weight, torch.float32)
    assert found[:3, 0].tolist() == [2.0**-128, 0.5, 2.0**126]
    assert found[:3, 2].tolist() == [6 * 2.0**-127, 6.0, float("inf")]
    assert found[3].isnan().all()
    assert ops.dequantize(weight, torch.bfloat16)[0, 0].item() == 2.0**-128


def test_gate_and_up_have_global_scales_of_their_own() -> None:
    weight = case("nvfp4, gate and up")
    assert weight.extra is not None
    halves = [
        QuantizedWeight("nvfp4", *(x.chunk(2, 1)[i] for x in weight[1:3]), weight.extra[:, i : i + 1]) for i in (0, 1)
    ]
    apart = torch.cat([ops.dequantize(half, torch.bfloat16) for half in halves], 1)
    assert same(ops.dequantize(weight, torch.bfloat16), apart)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_without_rows_may_be_left_out(name: str) -> None:
    weight = case(name)
    whole = ops.dequantize(weight, torch.float32)
    ends = [4, 4, 9][: len(whole)]
    found = ops.dequantize(weight, torch.float32, offsets=torch.tensor(ends, dtype=torch.int32))
    assert found[1].isnan().all()
    for group in {0, 2} & set(range(len(whole))):
        assert same(found[group], whole[group])
    none = ops.dequantize(weight, torch.float32, offsets=torch.zeros(len(whole), dtype=torch.int32))
    assert none.isnan().all()


@pytest.mark.parametrize("name", ["nf4, experts", "mxfp4", "nvfp4, gate and up, divided", "fp8, ragged blocks"])
def test_one_op_in_a_whole_graph(name: str) -> None:
    weight = finite(case(name))
    offsets = None if len(weight.shape) == 2 else torch.tensor([1, 2, 5], dtype=torch.int32)[: weight.shape[0]]
    as_bytes = (x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in weight[1:3])
    args = (*as_bytes, weight.extra, offsets, weight.format, weight.divides, torch.bfloat16, "reference")
    torch.library.opcheck(torch.ops.deltatune.dequantize.default, args)

    def product(x: Tensor, weight: QuantizedWeight, offsets: Tensor | None) -> Tensor:
        return x @ ops.dequantize(weight, x.dtype, offsets=offsets).mT

    torch._dynamo.reset()
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, weight.shape[-1]).bfloat16().requires_grad_()
    y, expected = (function(x, weight, offsets) for function in (compiled, product))
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(out, x, torch.ones_like(out)) for out in (y, expected)]
    assert torch.equal(*(grad for (grad,) in grads))
    if offsets is not None:
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert compiled(x, weight, offsets * 0).isnan().all()


def test_autocast_changes_nothing() -> None:
    weight = case("nvfp4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.dequantize(weight, torch.float32)
    assert same(found, ops.dequantize(weight, torch.float32))


def test_tensors_that_are_not_contiguous() -> None:
    weight = case("mxfp4, experts")
    strided = weight._replace(codes=weight.codes.mT.contiguous().mT, scales=weight.scales.mT.contiguous().mT)
    assert not strided.codes.is_contiguous()
    assert same(ops.dequantize(strided, torch.float32), ops.dequantize(weight, torch.float32))


def test_a_gradient_is_refused() -> None:
    weight = case("fp8, channels")
    trained = weight._replace(scales=weight.scales.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"scales requires a gradient, .* call .*requires_grad_\(False\)"):
        ops.dequantize(trained, torch.float32)
    with torch.no_grad():
        assert same(ops.dequantize(trained, torch.float32), ops.dequantize(weight, torch.float32))


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "format": ("mxfp4", {"format": "int4"}, "unknown format 'int4'; expected one of 'nf4', 'fp8'"),
    "codes": ("fp8, channels", {"codes": byte(0).view(1, 1)}, "codes of fp8 must be float8_e4m3fn, got .*; pass"),
    "dims": ("mxfp4", {"codes": byte(*range(16))}, r"codes must be \[N, columns\] or \[G, N, columns\], got \[16\]"),
    "divides": ("mxfp4", {"divides": True}, "divides=True is for the global scales of nvfp4; mxfp4 has none"),
    "scales": ("mxfp4", {"scales": byte(0).view(1, 1)}, r"scales of mxfp4 .* must be \[256, 2\], got \[1, 1\]"),
    "scales dtype": ("nvfp4", {"scales": torch.ones(16, 16)}, "scales of nvfp4 must be float8_e4m3fn, got .*32$"),
    "scale grid": ("fp8, blocks", {"scales": torch.ones(2, 2)}, r"scales of .* must be \[2, 1\] or \[256, 1\], got"),
    "columns": ("mxfp4", {"codes": torch.zeros(2, 8, dtype=torch.uint8)}, "mxfp4 needs K a multiple of 32, got K=16"),
    "values": ("nf4", {"codes": torch.zeros(3, 3, dtype=torch.uint8)}, r"nf4 needs N \* K a multiple of 64.*16 bits"),
    "no extra": ("nf4", {"extra": None}, "nf4 needs extra, its nested absolute maxima, table and offset; got None"),
    "extra": ("nf4", {"extra": torch.ones(258)}, r"extra of nf4 .* must be \[259\], got \[258\]"),
    "extra dtype": ("nf4", {"extra": torch.ones(259).half()}, "extra of nf4 must be float32, got torch.float16$"),
    "too much": ("mxfp4", {"extra": torch.ones(1)}, r"mxfp4 has no extra tensor, got \[1\]; pass None"),
    "parts": ("nvfp4", {"extra": torch.ones(3)}, r"extra of .* must be \[P\] with P a divisor of 16 rows, got \[3\]"),
    "scalar": ("nvfp4", {"extra": torch.tensor(1.0)}, r"extra of nvfp4 must be .* got \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_weight_that_does_not_fit_its_format_is_an_error(what: str) -> None:
    name, change, message = WRONG[what]
    weight = case(name)._replace(**change)
    with pytest.raises(ValueError, match=f"^dequantize: {message}"):
        ops.dequantize(weight, torch.float32)
    with pytest.raises(ValueError, match=f"^QuantizedWeight: {message}"):
        weight.check()


def test_other_errors_say_what_is_expected() -> None:
    weight, offsets = case("nf4, experts"), torch.tensor([1, 2, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="dtype must be floating point"):
        ops.dequantize(weight, torch.int8)
    for wrong in (offsets.long(), offsets[:2]):
        with pytest.raises(ValueError, match=r"expected offsets int32 \[G\] for a weight \[G, N, K\], got torch.int"):
            ops.dequantize(weight, torch.float32, offsets=wrong)
    with pytest.raises(ValueError, match="expected offsets"):
        ops.dequantize(case("nf4"), torch.float32, offsets=offsets)
    with pytest.raises(ValueError, match="scales is on meta but codes is on cpu"):
        ops.dequantize(weight._replace(scales=weight.scales.to("meta")), torch.float32)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: .*use impl='reference'"):
        ops.dequantize(weight, torch.float32, impl="triton")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(*shape)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_nf4_loses_half_a_step(dtype: torch.dtype) -> None:
    weight = draw(96, 40, dtype=dtype)
    found = ops.quantize(weight, "nf4")
    found.check()
    values = ops.dequantize(found, torch.float32)
    absmax = weight.float().view(-1, 64).abs().amax(1, keepdim=True)
    assert found.extra is not None
    widest, of_a_scale = 0.3039 / 2, 0.0071 * found.extra[0]  # of nf4, and of the table of scales, half a step
    assert ((values - weight).view(-1, 64).abs() <= widest * absmax + of_a_scale).all()
    assert 0.05 < (values - weight).norm() / weight.float().norm() < 0.1


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_fp8_loses_half_a_step(dtype: torch.dtype, blocks: bool) -> None:
    weight = draw(2, 130, 300, dtype=dtype)
    weight[0, 0] = 0
    found = ops.quantize(weight, "fp8", blocks=blocks)
    found.check()
    assert found.scales.shape == ((2, 2, 3) if blocks else (2, 130, 1))
    assert found.scales.dtype == torch.float32
    corner = weight[1, 128:, 256:] if blocks else weight[1, -1]
    assert found.scales[1, -1, -1] == corner.float().abs().max() / 448
    values = ops.dequantize(found, torch.float32)
    scale = (
        found.scales.repeat_interleave(128, 1)[:, :130].repeat_interleave(128, 2)[..., :300] if blocks else found.scales
    )
    half_a_step = torch.maximum(weight.float().abs() * 2**-4, scale * 2**-10)
    assert ((values - weight).abs() <= half_a_step * (1 + 1e-5)).all()
    assert found.codes.float().abs().amax((1, 2)).tolist() == [448, 448]
    assert not values[0, 0].any()


@pytest.mark.parametrize(("format", "options"), [("nf4", {}), ("fp8", {}), ("fp8", {"blocks": True})])
def test_every_matrix_is_quantised_by_itself(format: str, options: dict[str, bool]) -> None:
    weight = draw(3, 24, 40) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1)
    together = ops.quantize(weight, format, **options)
    strided = ops.quantize(weight.mT.contiguous().mT, format, **options)
    for group in range(3):
        alone = ops.quantize(weight[group], format, **options)
        for a, b, c in zip(alone[1:4], together[1:4], strided[1:4], strict=True):
            if a is not None:
                assert torch.equal(a.view(torch.uint8), b[group].view(torch.uint8))
                assert torch.equal(a.view(torch.uint8), c[group].view(torch.uint8))


@pytest.mark.parametrize("format", ["nf4", "fp8"])
def test_what_is_not_finite_does_not_become_a_number(format: str) -> None:
    for bad in (float("nan"), float("inf")):
        weight = draw(4, 64)
        weight[1, 3] = bad
        assert not ops.dequantize(ops.quantize(weight, format), torch.float32)[1, 3].isfinite()


def test_what_cannot_be_quantised_is_an_error() -> None:
    for shape in ((3, 5), (64, 3)):
        with pytest.raises(ValueError, match=r"nf4 needs N \* K a multiple of 64 and K even, got N=.*16 bits"):
            ops.quantize(draw(*shape), "nf4")
    with pytest.raises(ValueError, match="expected format 'nf4' or 'fp8', got 'mxfp4'"):
        ops.quantize(draw(8, 32), "mxfp4")
    with pytest.raises(ValueError, match=r"expected a weight \[N, K\] or \[G, N, K\] in bf16, fp16 or fp32"):
        ops.quantize(draw(64), "nf4")
    with pytest.raises(ValueError, match=r"got .* in torch\.float64"):
        ops.quantize(draw(8, 64).double(), "fp8")
    with pytest.raises(ValueError, match="blocks=True is for fp8"):
        ops.quantize(draw(8, 64), "nf4", blocks=True)
