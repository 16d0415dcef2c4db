"""Tiles of the kernels of a gated activation with adapters: each held to plain torch, then timed; the fastest first.

    python -m benchmarks.tune_gated                                          # widths of 2B and 9B models
    python -m benchmarks.tune_gated --model qwen3.5-27b --tokens 8192 --rank 32

The kernels alone, without the base products, each way; beside them the activation of sums that are there already, as
Inductor makes it, and what a copy of as many bytes takes. Constants in ``ops/_lora_gated/kernel.py`` come from here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gated_cases import RANKS
from benchmarks.op_cases import Run
from benchmarks.shapes import shape_named
from benchmarks.timing import copy_rate
from benchmarks.tune_grouped import timed

__all__ = ["main", "problems", "tiles"]

_ALLOWED: Final = 1e-2
#: rows, columns and warps
_SHAPES: Final = ((64, 64, 4), (64, 128, 8), (128, 64, 8), (64, 256, 8), (128, 128, 8))
#: stages and steps: one tile, several without and with loads ahead
_LOOPS: Final = ((1, 1), (1, 8), (2, 4), (2, 16), (3, 8))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for every width, rank and direction."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_gated", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", nargs="+", default=["qwen3.5-2b", "qwen3.5-9b"])
    add("--tokens", nargs="+", type=int, default=[16384])
    add("--rank", nargs="+", type=int, default=list(RANKS))
    add("--rounds", type=int, default=3)
    add("--best", type=int, default=6, metavar="N", help="tiles to print of each table")
    args = parser.parse_args(argv)
    run, ok = Run(torch.device("cuda")), True
    for model, tokens, rank in itertools.product(args.model, args.tokens, args.rank):
        outer = shape_named(model).values["intermediate_size"]
        for name, num_bytes, calls, expected in problems(outer, tokens, rank, run):
            rows = list(timed(calls, expected, run.device, args.rounds))
            ok = ok and all(error <= _ALLOWED for *_, error in rows)
            least = 1e3 * num_bytes / copy_rate(run.device, num_bytes // 2)
            sys.stdout.write(f"{name}, N={outer}, T={tokens}, rank {rank}; a copy of as many bytes: {least:.3f} ms\n")
            first = [row for row in rows if not row[0].startswith("(")]
            rest = sorted((row for row in rows if row[0].startswith("(")), key=lambda row: row[1])[: args.best]
            for what, ms, error in first + rest:
                sys.stdout.write(f"  {what:44}{ms:8.3f} ms {least / ms:6.0%} of the copy  error {error:.1e}\n")
            sys.stdout.flush()
    return 0 if ok else 1


Problem = tuple[str, int, dict[str, Callable[[int], Tensor]], Tensor]


def problems(outer: int, tokens: int, rank: int, run: Run) -> Iterator[Problem]:
    """Name, bytes that must move, what computes it by name, and what plain torch in fp32 makes of it."""
    from deltatune.ops._lora_gated.kernel import Tile, backward, forward

    normal = run.draw(0)
    dh, gate, up = (normal(tokens, outer) for _ in range(3))
    inputs = [gate, up, normal(tokens, 2 * rank), *(normal(outer, rank, scale=rank**-0.5) for _ in range(2))]
    sums = [
        base.float() + low.float() @ b.float().mT
        for base, low, b in zip(inputs[:2], torch.split(inputs[2], rank, dim=1), inputs[3:], strict=True)
    ]

    def ours(_: int, tile: Tile | None = None) -> Tensor:
        h = torch.empty_like(gate)
        forward(inputs, h, gelu=False, tile=tile)
        return h

    def ours_backward(_: int, tile: Tile | None = None) -> Tensor:
        grads = gate.new_empty(2, *gate.shape)
        backward(dh, inputs, list(grads), gelu=False, tile=tile)
        return grads

    ready = [x.to(run.dtype) for x in sums]
    activation = torch.compile(_plain, dynamic=False)
    derivative = torch.compile(_plain_backward, dynamic=False)
    size = tokens * outer * run.dtype.itemsize
    for name, passes, kernel, inductors, expected in (
        ("forward", 3, ours, lambda _: activation(*ready), _plain(*sums)),
        ("backward", 5, ours_backward, lambda _: derivative(dh, *ready), _plain_backward(dh.float(), *sums)),
    ):
        calls: dict[str, Any] = {"default": kernel}
        calls["activation of sums, by Inductor"] = inductors
        for shape in tiles():
            tile = Tile(*shape)
            calls[str(shape)] = lambda i, kernel=kernel, tile=tile: kernel(i, tile)
        yield name, passes * size, calls, expected


def tiles() -> Iterator[tuple[int, int, int, int, int]]:
    """Rows, columns, warps, stages and steps worth a try; each takes seconds to build."""
    for shape, loop in itertools.product(_SHAPES, _LOOPS):
        yield *shape, *loop


def _plain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _plain_backward(dh: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Both gradients, ``[2, M, N]``."""
    d, x, y = dh.float(), gate.float(), up.float()
    return torch.stack([torch.ops.aten.silu_backward(d * y, x), d * F.silu(x)]).to(dh.dtype)


if __name__ == "__main__":
    sys.exit(main())
