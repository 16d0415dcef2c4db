"""The decoding kernels give the reference's bits, on a GPU and, by test_interpreted.py, in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deltatune import ops
from deltatune.ops import DequantizeSpec, QuantizedWeight, choose
from deltatune.ops._dequantize import providers
from quantized_cases import CASES, case, finite, same

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter truncates where bf16 should round
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
EXPERTS = [name for name, (_, lead, *_) in CASES.items() if lead]
ONE_EACH = ["nf4, experts", "mxfp4, experts", "nvfp4, gate and up", "fp8, ragged blocks"]
ON_A_GPU = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
if not INTERPRETED:
    pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton")
    if INTERPRETED:
        monkeypatch.setattr(providers, "triton_refusal", lambda device, dtype: None)


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, where torch is silent
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_reference(name: str, new_memory_is_nan: None) -> None:
    weight = case(name, DEVICE)
    for dtype in DTYPES:
        found, expected = (ops.dequantize(weight, dtype, impl=impl) for impl in ("triton", "reference"))
        assert found.is_contiguous()
        assert same(found, expected), dtype


@pytest.mark.parametrize("name", EXPERTS)
def test_matrices_without_rows_are_not_written(name: str, new_memory_is_nan: None) -> None:
    weight = finite(case(name, DEVICE))
    whole = ops.dequantize(weight, torch.float32, impl="reference")
    assert not whole.isnan().any()
    for given in (ends(4, 4, 9), ends(0, 2, 2), ends(0, 0, 0)):
        given = given[: len(whole)]
        found, expected = (
            ops.dequantize(weight, torch.float32, offsets=given, impl=impl) for impl in ("triton", "reference")
        )
        assert same(found, expected), given
        assert found.isnan().any((1, 2)).tolist() == (given.diff(prepend=ends(0)) == 0).tolist()


@pytest.mark.parametrize("shape", [(0, 8, 64), (2, 0, 64), (2, 8, 0)])
def test_nothing_to_decode(shape: tuple[int, int, int]) -> None:
    groups, rows, columns = shape
    codes = torch.zeros(groups, rows, columns // 2, dtype=torch.uint8, device=DEVICE)
    weight = QuantizedWeight("mxfp4", codes, codes.new_zeros(groups, rows, columns // 32))
    assert ops.dequantize(weight, torch.float32, impl="triton").shape == shape


@pytest.mark.parametrize("name", ONE_EACH)
def test_one_op_in_a_whole_graph(name: str) -> None:
    weight = finite(case(name, DEVICE))
    offsets = ends(1, 2, 5)[: weight.shape[0]]
    as_bytes = (x.view(torch.uint8) if x.dtype.itemsize == 1 else x for x in weight[1:3])
    args = (*as_bytes, weight.extra, offsets, weight.format, weight.divides, torch.float32, "triton")
    torch.library.opcheck(torch.ops.deltatune.dequantize.default, args)

    def product(x: Tensor, weight: QuantizedWeight, offsets: Tensor) -> Tensor:
        return x @ ops.dequantize(weight, x.dtype, offsets=offsets, impl="triton").mT

    torch._dynamo.reset()
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    x = torch.randn(3, weight.shape[-1], device=DEVICE)
    assert torch.equal(compiled(x, weight, offsets), product(x, weight, offsets))


def test_auto_takes_the_kernel() -> None:
    assert choose(DequantizeSpec(torch.device(DEVICE), torch.float32)).impl == "triton"
    weight = case("nf4", DEVICE)
    assert same(ops.dequantize(weight, torch.float32), ops.dequantize(weight, torch.float32, impl="triton"))


def drawn(name: str, *shape: int) -> QuantizedWeight:
    """Random bytes that are numbers."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=DEVICE, dtype=torch.uint8)

    *lead, rows, columns = shape
    if name == "fp8":
        scales = random(*lead, -(-rows // 128), -(-columns // 128)).float() + 1
        return finite(QuantizedWeight("fp8", random(*shape).view(torch.float8_e4m3fn), scales / 256))
    codes = random(*lead, rows, columns // 2)
    if name == "nf4":
        made = ops.quantize(torch.randn(rows, columns, generator=generator, device=DEVICE), "nf4")
        assert made.extra is not None
        return made._replace(codes=codes, scales=made.scales.repeat(*lead, 1), extra=made.extra.repeat(*lead, 1))
    if name == "mxfp4":
        return QuantizedWeight("mxfp4", codes, random(*lead, rows, columns // 32, low=110, high=130))
    scales = random(*lead, rows, columns // 16, high=127).view(torch.float8_e4m3fn)
    extra = torch.rand(*lead, 2, generator=generator, device=DEVICE) + 0.5
    return QuantizedWeight("nvfp4", codes, scales, extra, divides=name.endswith("/"))


@ON_A_GPU
@pytest.mark.parametrize("shape", [(64, 1024, 2048), (64, 2048, 512)])
@pytest.mark.parametrize("name", ["nf4", "fp8", "mxfp4", "nvfp4", "nvfp4 /"])
def test_the_bits_of_the_reference_at_the_sizes_of_experts(name: str, shape: tuple[int, ...]) -> None:
    weight = drawn(name, *shape)
    offsets = (torch.arange(shape[0], device=DEVICE) // 2 * 2).int()  # every second group has rows
    for dtype in DTYPES:
        found = ops.dequantize(weight, dtype, offsets=offsets, impl="triton")
        for group in (2, 32, 62):
            parts: Any = (x if x is None else x[group] for x in weight[1:4])
            alone = QuantizedWeight(weight.format, *parts, divides=weight.divides)
            assert same(found[group], ops.dequantize(alone, dtype, impl="reference")), (dtype, group)


@ON_A_GPU
@pytest.mark.parametrize("name", ["nf4", "fp8", "mxfp4", "nvfp4"])
def test_more_than_2_to_the_31_values(name: str) -> None:
    weight = drawn(name, 33, 8192, 8192)
    found = ops.dequantize(weight, torch.bfloat16, impl="triton")
    assert found.numel() > 2**31
    for group in (0, 31, 32):
        parts: Any = (x if x is None else x[group] for x in weight[1:4])
        assert same(
            found[group], ops.dequantize(QuantizedWeight(weight.format, *parts), torch.bfloat16, impl="reference")
        )


@ON_A_GPU
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_nothing_waits_for_the_device(name: str, impl: str) -> None:
    weight = case(name, DEVICE)
    offsets = ends(1, 2, 5)[: weight.shape[0]]
    ops.dequantize(weight, torch.bfloat16, offsets=offsets, impl=impl)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.dequantize(weight, torch.bfloat16, offsets=offsets, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode(before)
