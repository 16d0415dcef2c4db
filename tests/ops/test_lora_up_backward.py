"""``t = dy B`` and ``dB = dy^T u``: the op on any device, its kernels in Triton's interpreter and on a GPU."""

# M tokens, N output width, W columns of B and u

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deltatune.ops._lora_linear import op as ops
from deltatune.ops._lora_linear.op import lora_sum_products

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, set by test_interpreted.py"
)
HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a CUDA device of compute capability 9.x",
)


def matrices(m: int, n: int, w: int, dtype=torch.float64, *, device="cpu", more=8) -> tuple[Tensor, Tensor, Tensor]:
    """dy, B and u, each inside a wider matrix."""
    generator = torch.Generator(device).manual_seed(m + n + w)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return random(m, n + more)[:, :n], random(n, w + 16)[:, 16:], random(m, w + 16)[:, 16:]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def exact(dy: Tensor, up: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
    return dy.double() @ up.double(), dy.double().mT @ narrow.double()


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_every_gradient_has_its_columns_and_others_are_zero(tokens):
    dy, first, narrow = matrices(tokens, 24, 20)
    second = torch.randn(7, 3, dtype=torch.float64)
    grads = [dy, torch.randn(7, tokens, dtype=torch.float64).mT]
    t, *sums = ops.lora_up_backward(grads, [first[:, :5], second], narrow, [1, 12], 20)
    assert t.shape == (tokens, 20)
    for dy, up, offset, found in zip(grads, (first[:, :5], second), (1, 12), sums, strict=True):
        columns = slice(offset, offset + up.shape[1])
        want, want_sums = exact(dy, up, narrow[:, columns])
        torch.testing.assert_close(t[:, columns], want)
        torch.testing.assert_close(found, want_sums)
    assert not t[:, [0, *range(6, 12), *range(15, 20)]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    dy, up, narrow = matrices(9, 24, 8, dtype)
    torch.library.opcheck(
        torch.ops.deltatune.lora_up_backward.default, ([dy, up.mT.contiguous().mT[:9]], [up, up[:8]], narrow, [0, 0], 8)
    )


def test_both_products_count():
    dy, up, narrow = matrices(9, 24, 8)
    with FlopCounterMode(display=False) as counter:
        ops.lora_up_backward([dy] * 2, [up, up[:, :3]], narrow, [0, 3], 8)
    assert counter.get_total_flops() == 4 * 9 * 24 * (8 + 3)


def test_autocast_rounds_nothing():
    dy, up, narrow = matrices(9, 24, 8, torch.float32)
    want = ops.lora_up_backward([dy], [up], narrow, [0], 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.lora_up_backward([dy], [up], narrow, [0], 8)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])


@interpreted
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize(
    ("tokens", "outer", "programs"),
    [(100, 208, 0), (133, 208, 20), (65, 64, 2), (1, 64, 1), (31, 16, 1)],
    ids=["one row of programs", "rows of programs", "one column of programs", "one token", "less than a tile"],
)
def test_interpreted_kernels(tokens, outer, programs, width):
    from deltatune.ops._lora_linear.one_read import Tile, both_products

    dy, up, narrow = matrices(tokens, outer, width, torch.float16)
    wide = torch.full((tokens, width + 8), float("nan"), dtype=torch.float16)
    t = wide[:, :width]
    want, want_sums = exact(dy, up, narrow)
    sums = both_products(dy, up, narrow, t, Tile(32, 64, 4, 1, programs))
    assert sums.dtype == torch.float32
    assert relative(t, want) <= 2**-11  # rounded once
    assert relative(sums, want_sums) <= 1e-6
    assert wide[:, width:].isnan().all()


@pytest.mark.cuda
@HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize(("tokens", "outer"), [(16384, 2048), (5501, 6144), (16390, 2064)])
def test_one_read_is_as_exact_as_two_products_and_repeats_its_bits(tokens, outer, width, dtype):
    dy, up, narrow = matrices(tokens, outer, width, dtype, device="cuda", more=64)
    assert ops._reads_once(dy, up, narrow)
    want = exact(dy, up, narrow)
    t, sums = ops.lora_up_backward([dy], [up], narrow, [0], width)
    again = ops.lora_up_backward([dy], [up], narrow, [0], width)
    assert torch.equal(again[0], t)
    assert torch.equal(again[1], sums)
    assert relative(t, want[0]) <= 2 * relative(dy @ up, want[0])
    assert relative(sums, want[1]) <= 2 * relative(lora_sum_products(dy, narrow), want[1])


@pytest.mark.cuda
@HOPPER
def test_rows_that_the_kernel_cannot_address_take_two_products():
    dy, up, narrow = matrices(16384, 2048, 16, torch.bfloat16, device="cuda", more=7)
    assert not ops._reads_once(dy, up, narrow)
    t, sums = ops.lora_up_backward([dy], [up], narrow, [0], 16)
    want = exact(dy, up, narrow)
    assert relative(t, want[0]) <= 2**-8
    assert relative(sums, want[1]) <= 1e-4
