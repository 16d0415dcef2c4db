"""Tiles of the Triton kernels for grouped products: each held to plain torch, then timed; the fastest first.

    python -m benchmarks.tune_grouped                                # experts of Qwen3.5-35B-A3B
    python -m benchmarks.tune_grouped --model qwen3-next-80b-a3b --tokens 8192 --skewed

The four products of a layer's experts (up and down, forward and input gradient), alone and with adapters' narrow rows,
and the sums of their gradients; by torch's own product and, where it is installed, quack's. Constants in
``ops/_grouped_mm/triton_grouped.py`` come from here.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.moe_cases import BALANCED, RANK, SKEWED, Sizes, draw_inputs, draw_weights, sizes_of
from benchmarks.op_cases import Run
from benchmarks.shapes import shape_named
from benchmarks.timing import measure
from benchmarks.worker import failures
from deltatune.ops._grouped_mm.routing import route

__all__ = ["main", "problems", "tiles", "timed"]

_ALLOWED: Final = 1e-2
_TILES: Final = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4),
    (64, 256, 64, 8, 4), (64, 128, 64, 4, 4), (128, 128, 128, 8, 3),
)  # fmt: skip
#: of sums: the wide side, rows read at a time, warps, stages
_SUMS: Final = ((64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3), (256, 32, 8, 4), (128, 128, 4, 3))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for every product."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_grouped", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--model", default="qwen3.5-35b-a3b")
    add("--tokens", nargs="+", type=int, default=[16384])
    add("--skewed", action="store_true", help="the busiest expert has 16 times the mean's rows")
    add("--rounds", type=int, default=3)
    add("--best", type=int, default=6, metavar="N", help="tiles to print of each product")
    args = parser.parse_args(argv)
    run = Run(torch.device("cuda"))
    ok = True
    for tokens in args.tokens:
        found = problems(sizes_of(shape_named(args.model)), tokens, run, busiest=SKEWED if args.skewed else BALANCED)
        for name, flops, calls, expected in found:
            rows = list(timed(calls, expected, run.device, args.rounds))
            ok = ok and all(error <= _ALLOWED for *_, error in rows)
            sys.stdout.write(f"{name}, T={tokens}\n")
            for what, ms, error in sorted(rows, key=lambda row: row[1])[: args.best]:
                sys.stdout.write(f"  {what:44}{ms:8.3f} ms {flops / ms / 1e9:7.0f} TFLOP/s  error {error:.1e}\n")
            sys.stdout.flush()
    return 0 if ok else 1


Problem = tuple[str, float, dict[str, Callable[[int], Tensor]], Tensor]


def problems(sizes: Sizes, tokens: int, run: Run, *, busiest: int) -> Iterator[Problem]:
    """Name, FLOPs, what computes it by name, and what torch's own product makes of it."""
    from deltatune.ops._grouped_mm.triton_grouped import Tile, gram, product

    experts, top_k, hidden, inner, _ = sizes
    generator, normal = torch.Generator(run.device).manual_seed(0), run.draw(0)
    routing = route(draw_inputs(normal, generator, sizes, tokens, busiest=busiest, rank=0)["index"], experts)
    rows, offsets = tokens * top_k, routing.offsets
    starts = F.pad(offsets, (1, 0))
    weights = draw_weights(normal, sizes)
    for name, backward, adapted in itertools.product(("up", "down"), (False, True), (False, True)):
        matrix = weights[name].mT if backward != sizes.gpt_oss else weights[name]
        x = normal(rows, matrix.shape[2])
        low, up = (normal(rows, RANK), normal(experts, matrix.shape[1], RANK)) if adapted else (None, None)

        def ours(_: int, tile: Tile | None = None, given: Any = (x, matrix, low, up)) -> Tensor:
            a, b, narrow, wide = given
            return product(a, b, offsets, narrow, wide, tile)

        def torchs(_: int, given: Any = (x, matrix, low, up)) -> Tensor:
            a, b, narrow, wide = given
            y = F.grouped_mm(a, b.mT, offs=offsets)
            return y if narrow is None else y.add_(F.grouped_mm(narrow, wide.mT, offs=offsets))

        def quacks(_: int, given: Any = (x, matrix, low, up)) -> Tensor:
            library: Any = importlib.import_module("quack.gemm_interface")
            a, b, narrow, wide = given
            y: Tensor = library.gemm(a, b.mT, cu_seqlens_m=starts)
            if narrow is not None:
                library.gemm_add_inplace(narrow, wide.mT, y, cu_seqlens_m=starts)
            return y

        calls: dict[str, Any] = {"torch": torchs, "quack": quacks, "default": ours}
        for shape in tiles(matrix.shape[1]):
            tile = Tile(*shape)
            calls[str(shape)] = lambda i, ours=ours, tile=tile: ours(i, tile)
        label = f"{name} {'gradient' if backward else 'forward'}{' with adapters' if adapted else ''}"
        flops = 2.0 * rows * matrix.shape[1] * (matrix.shape[2] + (RANK if adapted else 0))
        yield label, flops, calls, torchs(0).float()
    sides = {"dA up": (RANK, hidden), "dB up": (2 * inner, RANK), "dA down": (RANK, inner), "dB down": (hidden, RANK)}
    for label, (high, wide) in sides.items():
        left, right = normal(rows, high), normal(rows, wide)

        def sums(_: int, tile: Tile | None = None, given: Any = (left, right)) -> Tensor:
            a, b = given
            return gram(a, b, offsets, torch.float32, tile)

        def quacks_sums(_: int, given: Any = (left, right)) -> Tensor:
            library: Any = importlib.import_module("quack.gemm_interface")
            a, b = given
            found: Tensor = library.gemm(a.mT, b, out_dtype=torch.float32, cu_seqlens_k=starts)
            return found

        calls = {"quack": quacks_sums, "default": sums}
        for own, *rest in _SUMS:
            tile = Tile(*((RANK, own) if high == RANK else (own, RANK)), *rest)
            calls[str(tuple(tile))] = lambda i, sums=sums, tile=tile: sums(i, tile)
        yield label, 2.0 * rows * high * wide, calls, F.grouped_mm(left.mT, right, offs=offsets).float()


def tiles(outer: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Rows, columns, depth, warps and stages worth a try on Hopper for results so wide; each takes seconds to build."""
    for tile in _TILES:
        if tile[1] <= max(64, outer):
            yield tile


def timed(
    calls: dict[str, Callable[[int], Tensor]], expected: Tensor, device: torch.device, rounds: int
) -> Iterator[tuple[str, float, float]]:
    """Name, median ms and relative error of all that run; one that does not is left out."""
    errors: dict[str, float] = {}
    for name, call in calls.items():
        try:
            errors[name] = float((call(0).float() - expected).norm() / expected.norm())
        except failures() as error:  # a tile that a kernel cannot have: too much shared memory, or registers
            sys.stderr.write(f"{name}: {str(error).splitlines()[0][:100]}\n")
    samples = measure({name: calls[name] for name in errors}, device, rounds=rounds, warmup=1)
    for name, taken in samples.items():
        yield name, statistics.median(taken), errors[name]


if __name__ == "__main__":
    sys.exit(main())
