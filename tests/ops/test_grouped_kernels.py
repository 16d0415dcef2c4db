"""The Triton kernels of grouped products, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import itertools
import os
from itertools import pairwise

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
SIZES = {"mixed": [5, 1, 0, 20, 37], "first empty": [0, 9, 8], "all on one": [0, 40, 0], "none": [0, 0, 0]}
#: the interpreter takes the bits of bf16 for integers
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
#: ragged, whole tiles, wide and narrow
WIDTHS = [(24, 40), (64, 32), (70, 16)]
CASES = list(itertools.product(SIZES, WIDTHS, DTYPES))
if INTERPRETED:  # both ways to read rows, ragged and by tiles, meet all sizes, and every width both dtypes
    read = {(24, 40): torch.float32, (64, 32): torch.float16}
    CASES = [case for case in CASES if case[0] == "mixed" or read.get(case[1]) == case[2]]


def random(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(device, dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    return bool((found.double() - expected).norm() <= bound * expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("of", "widths", "dtype"), CASES)
def test_kernels(of: str, widths: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    from deltatune.ops._grouped_mm.triton_grouped import Tile, gram, product, reads_by_tile

    sizes, (inner, outer) = SIZES[of], widths
    tile, groups, rows = Tile(16, 16, 16, 4, 1), len(sizes), sum(sizes) + 19
    x = random(rows, inner, device=device, dtype=dtype)
    x[sum(sizes) :] = float("nan")  # absent rows
    stored = random(groups, inner, outer, device=device, dtype=dtype)
    low = random(rows, 16, device=device, dtype=dtype)
    up = random(groups, outer, 16, device=device, dtype=dtype)
    offsets = torch.tensor(sizes, device=device).cumsum(0).int()
    ends = [0, *offsets.tolist()]
    for weight in (stored.mT, stored.mT.contiguous()):
        assert reads_by_tile(x, weight, tile) == (inner == 64)
        for narrow, b in ((None, None), (low, up)):
            found = product(x, weight, offsets, narrow, b, tile)
            assert found.dtype == dtype
            assert not found[ends[-1] :].any()
            for group, (start, end) in enumerate(pairwise(ends)):
                want = x[start:end].double() @ weight[group].double().T
                if b is not None:
                    want = want + low[start:end].double() @ b[group].double().T
                assert close(found[start:end], want, dtype)
    right = random(rows, outer, device=device, dtype=dtype, seed=1)
    for given in (torch.float32, dtype):
        sums = gram(x, right, offsets, given, tile)
        assert sums.dtype == given
        for group, (start, end) in enumerate(pairwise(ends)):
            want = x[start:end].double().T @ right[start:end].double()
            assert close(sums[group], want, given if start != end else torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_default_tiles_and_odd_strides(device: str) -> None:
    from deltatune.ops._grouped_mm.triton_grouped import gram, product

    dtype = DTYPES[-1]
    wide = random(70, 100, device=device, dtype=dtype)
    weight = random(3, 48, 50, device=device, dtype=dtype)
    offsets = torch.tensor([10, 10, 60], dtype=torch.int32, device=device)
    for x in (wide[:, :50], wide[:, ::2], wide[:1, :50].expand(70, -1)):
        found = product(x, weight, offsets, None, None)
        want = torch.cat([x[:10].double() @ weight[0].double().T, x[10:60].double() @ weight[2].double().T])
        assert close(found[:60], want, dtype)
        assert close(gram(x, wide, offsets, torch.float32)[2], x[10:60].double().T @ wide[10:60].double(), dtype)
    assert product(x[:0], weight, torch.zeros_like(offsets), None, None).shape == (0, 48)
    assert gram(x[:0], wide[:0], torch.zeros_like(offsets), torch.float32).abs().sum() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_many_groups(device: str) -> None:
    from deltatune.ops._grouped_mm.triton_grouped import product

    sizes = [i % 3 for i in range(70)]
    x = random(sum(sizes), 16, device=device, dtype=torch.float32)
    weight = random(70, 16, 16, device=device, dtype=torch.float32)
    offsets = torch.tensor(sizes, device=device).cumsum(0).int()
    groups = torch.repeat_interleave(torch.arange(70), torch.tensor(sizes)).to(device)
    want = torch.einsum("rk,rnk->rn", x.double(), weight.double()[groups])
    assert close(product(x, weight, offsets, None, None), want, torch.float32)
