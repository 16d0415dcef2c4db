"""Tiles of the Triton kernels for grouped products: each held to plain torch, then timed; the fastest first.

    python -m benchmarks.tune_grouped                                # experts of Qwen3.5-35B-A3B
    python -m benchmarks.tune_grouped --model qwen3-next-80b-a3b --tokens 8192 --skewed
    python -m benchmarks.tune_grouped --no-tiles --output out        # torch's, quack's and ours as it is

The four products of a layer's experts (up and down, forward and input gradient), alone and with adapters' narrow rows,
the first of them with the gather of its rows, and the sums of adapters' gradients; by torch's own product and, where it
is installed, quack's. Constants in ``ops/_grouped_mm/triton_grouped.py`` come from here. Of a model's products a record
is made; exit status 1 where one of them is not exact enough.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

import deltatune
from benchmarks.moe_cases import BALANCED, RANK, SKEWED, Sizes, draw_inputs, draw_weights, sizes_of
from benchmarks.op_cases import Run
from benchmarks.records import RECORDS, head, source_of, write_record
from benchmarks.shapes import shape_named
from benchmarks.timing import measure, summary
from benchmarks.worker import failures, outcome_of
from deltatune.ops._grouped_mm.routing import Routing, route

__all__ = ["main", "problems", "tiles", "timed"]

_METHOD: Final = (
    "device time between CUDA events, the queue kept full by a wait on the device before each turn; calls interleaved, "
    "each on the same inputs every time; quack's with the tile that its own tuner takes; errors are relative L2 "
    "against float32 products of the same inputs; sums are float32, but torch's bfloat16; flops are those of the rows"
)
#: What a record keeps by name; of the tiles it keeps the fastest.
_NAMED: Final = ("torch", "quack", "quack, not tuned", "default")

_ALLOWED: Final = 1e-2
_TILES: Final = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4),
    (64, 256, 64, 8, 4), (64, 128, 64, 4, 4), (128, 128, 128, 8, 3),
)  # fmt: skip
#: of sums: the wide side, rows read at a time, warps, stages
_SUMS: Final = ((64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3), (256, 32, 8, 4), (128, 128, 4, 3))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for every product and writes a record of all."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune_grouped", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--model", default="qwen3.5-35b-a3b")
    add("--tokens", nargs="+", type=int, default=[16384])
    add("--skewed", action="store_true", help="the busiest expert has 16 times the mean's rows")
    add("--rounds", type=int, default=3)
    add("--best", type=int, default=6, metavar="N", help="tiles to print of each product")
    add("--no-tiles", action="store_true", help="ours with its default tile alone")
    add("--device", default="cuda")
    add("--commit", metavar="HASH", help="of the source, where it lies without its history")
    add("--output", type=Path, default=RECORDS, metavar="DIR", help="benchmarks/records by default")
    args = parser.parse_args(argv)
    run, busiest = Run(torch.device(args.device)), SKEWED if args.skewed else BALANCED
    sizes = sizes_of(shape_named(args.model))
    configs: list[dict[str, Any]] = []
    for tokens in args.tokens:
        about = {"model": args.model, "T": tokens, **sizes._asdict(), "busiest": busiest, "dtype": "bfloat16"}
        for name, flops, calls, expected in problems(sizes, tokens, run, busiest=busiest, tiled=not args.no_tiles):
            results = _results(calls, expected, run.device, args.rounds, flops)
            configs.append({"config": {"product": name, **about}, "flops": flops, "results": _kept(results)})
            sys.stdout.write("\n".join([f"{name}, T={tokens}", *_lines(results, args.best), ""]))
            sys.stdout.flush()
    ok = all(result["status"] != "red check" for config in configs for result in config["results"])
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    source = source_of(Path(deltatune.__file__).parent, args.commit)
    record = head("products", args.model, _METHOD, device=device, source=source) | {"ok": ok, "configs": configs}
    sys.stdout.write(f"{write_record(record, args.output)}\n")
    return 0 if ok else 1


def _results(
    calls: Mapping[str, Callable[[int], Tensor]], expected: Tensor, device: torch.device, rounds: int, flops: float
) -> list[dict[str, Any]]:
    """Of every call, the fastest first; those that do not run come last, with the reason."""
    errors, failed = _errors(calls, expected)
    found = []
    for name, samples in measure({name: calls[name] for name in errors}, device, rounds=rounds, warmup=1).items():
        error, times = errors[name], summary(samples)
        close = error <= _ALLOWED  # NaN compares as False
        red = None if close else f"relative error of {error:.1e}, allowed {_ALLOWED:.1e}"
        result = {"impl": name, "status": "ok" if close else "red check", "reason": red, **times}
        rate = flops / times["median_ms"] / 1e9
        found.append({**result, "tflops": rate, "error": error if math.isfinite(error) else None})
    found.sort(key=lambda result: float(result["median_ms"]))
    return found + [{"impl": name, "status": status, "reason": why} for name, (status, why) in failed.items()]


def _kept(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What has a name, and the fastest of the tiles; every one whose answer is wrong."""
    named = [result for result in results if result["impl"] in _NAMED]
    tiled = [result for result in results if result["impl"] not in _NAMED]
    exact = [result for result in tiled if result["status"] == "ok"]
    return named + exact[:1] + [result for result in tiled if result["status"] == "red check"]


def _lines(results: Iterable[Mapping[str, Any]], best: int) -> list[str]:
    """A table for a terminal: the fastest, and all that have a name."""
    found = []
    for number, result in enumerate(results):
        what = f"  {result['impl']:44}"
        if "median_ms" not in result:
            found += [f"{what}{result['status']}: {result['reason']}"] if result["impl"] in _NAMED else []
        elif number < best or result["impl"] in _NAMED:
            error = "-" if result["error"] is None else f"{result['error']:.1e}"
            found.append(f"{what}{result['median_ms']:8.3f} ms {result['tflops']:7.0f} TFLOP/s  error {error}")
    return found


Problem = tuple[str, float, dict[str, Callable[[int], Tensor]], Tensor]


def problems(sizes: Sizes, tokens: int, run: Run, *, busiest: int, tiled: bool = True) -> Iterator[Problem]:
    """Name, FLOPs, what computes it by name, and the result in float32; without tiles ours has its default."""
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

        def quacks(_: int, tuned: bool = True, given: Any = (x, matrix, low, up)) -> Tensor:
            library: Any = importlib.import_module("quack.gemm_interface")
            a, b, narrow, wide = given
            y: Tensor = library.gemm(a, b.mT, cu_seqlens_m=starts, tuned=tuned)
            if narrow is not None:
                library.gemm_add_inplace(narrow, wide.mT, y, cu_seqlens_m=starts, tuned=tuned)
            return y

        calls: dict[str, Any] = {"torch": torchs, "quack": quacks, "default": ours}
        calls["quack, not tuned"] = functools.partial(quacks, tuned=False)
        for shape in tiles(matrix.shape[1]) if tiled else ():
            tile = Tile(*shape)
            calls[str(shape)] = lambda i, ours=ours, tile=tile: ours(i, tile)
        label = f"{name} {'gradient' if backward else 'forward'}{' with adapters' if adapted else ''}"
        flops = 2.0 * rows * matrix.shape[1] * (matrix.shape[2] + (RANK if adapted else 0))
        exact = _exact(x, matrix, offsets)
        if low is not None and up is not None:
            exact += _exact(low, up, offsets)
        yield label, flops, calls, exact
    matrix = weights["up"].mT if sizes.gpt_oss else weights["up"]
    yield _gathered(normal(tokens, hidden), matrix, routing, starts, top_k, tiled=tiled)
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

        def torchs_sums(_: int, given: Any = (left, right)) -> Tensor:
            a, b = given
            return F.grouped_mm(a.mT, b, offs=offsets)

        calls = {"torch": torchs_sums, "quack": quacks_sums, "default": sums}
        for own, *rest in _SUMS if tiled else ():
            tile = Tile(*((RANK, own) if high == RANK else (own, RANK)), *rest)
            calls[str(tuple(tile))] = lambda i, sums=sums, tile=tile: sums(i, tile)
        exact = torch.stack([left[span].float().mT @ right[span].float() for span in _spans(offsets)])
        yield label, 2.0 * rows * high * wide, calls, exact


def _gathered(x: Tensor, matrix: Tensor, routing: Routing, starts: Tensor, top_k: int, *, tiled: bool) -> Problem:
    """The first product of a layer with the gather of its rows, which quack's kernel does while it loads them."""
    from deltatune.ops._grouped_mm.triton_grouped import Tile, product

    source, offsets = routing.order // top_k, routing.offsets
    narrow = source.int()

    def ours(_: int, tile: Tile | None = None) -> Tensor:
        return product(x[source], matrix, offsets, None, None, tile)

    def torchs(_: int) -> Tensor:
        return F.grouped_mm(x[source], matrix.mT, offs=offsets)

    def quacks(_: int) -> Tensor:
        library: Any = importlib.import_module("quack.gemm_interface")
        y: Tensor = library.gemm(x, matrix.mT, cu_seqlens_m=starts, A_idx=narrow)
        return y

    calls: dict[str, Any] = {"torch": torchs, "quack": quacks, "default": ours}
    for shape in tiles(matrix.shape[1]) if tiled else ():
        tile = Tile(*shape)
        calls[str(shape)] = lambda i, tile=tile: ours(i, tile)
    flops = 2.0 * len(source) * matrix.shape[1] * matrix.shape[2]
    return "up forward, rows gathered", flops, calls, _exact(x[source], matrix, offsets)


def _exact(x: Tensor, matrix: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([x[span].float() @ matrix[i].float().mT for i, span in enumerate(_spans(offsets))])


def _spans(offsets: Tensor) -> list[slice]:
    return [slice(*span) for span in itertools.pairwise([0, *offsets.tolist()])]


def tiles(outer: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Rows, columns, depth, warps and stages worth a try on Hopper for results so wide; each takes seconds to build."""
    for tile in _TILES:
        if tile[1] <= max(64, outer):
            yield tile


def timed(
    calls: Mapping[str, Callable[[int], Tensor]], expected: Tensor, device: torch.device, rounds: int
) -> Iterator[tuple[str, float, float]]:
    """Name, median ms and relative error of all that run; one that does not is left out."""
    errors, _ = _errors(calls, expected)
    samples = measure({name: calls[name] for name in errors}, device, rounds=rounds, warmup=1)
    for name, taken in samples.items():
        yield name, statistics.median(taken), errors[name]


def _errors(
    calls: Mapping[str, Callable[[int], Tensor]], expected: Tensor
) -> tuple[dict[str, float], dict[str, tuple[str, str]]]:
    """Relative errors by name; of what does not run the status and the reason, which are printed too."""
    errors: dict[str, float] = {}
    failed: dict[str, tuple[str, str]] = {}
    for name, call in calls.items():
        try:
            errors[name] = float((call(0).float() - expected).norm() / expected.norm())
        except failures() as error:  # a tile that a kernel cannot have: too much shared memory, or registers
            failed[name] = outcome_of(error)
            sys.stderr.write(f"{name}: {failed[name][1][:100]}\n")
    return errors, failed


if __name__ == "__main__":
    sys.exit(main())
