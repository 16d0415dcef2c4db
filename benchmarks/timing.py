"""Interleaved timing on a full queue with cold inputs, peak memory, and what the device can do at most.

``python -m benchmarks.timing DEVICE DTYPE`` prints the ceilings as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any, Final

import torch
from torch import Tensor

__all__ = [
    "between_ms",
    "ceilings",
    "copy_rate",
    "gemm_rate",
    "mark",
    "measure",
    "num_sets",
    "peak_bytes",
    "summary",
    "synchronize",
]

# A wait on the device of this many cycles (some 4 ms at 2 GHz) lets the host queue calls before the first of them runs.
_FILL_CYCLES: Final = 8_000_000
# Input sets in turn are together larger than the last-level cache of any GPU (H200: 60 MB), so none is read from it.
_COLD_BYTES: Final = 256 * 2**20
_COPY_BYTES: Final = 2**28
_GEMM_SIDE: Final = 8192


def summary(samples_ms: Iterable[float]) -> dict[str, Any]:
    """The keys of a record's result: median, 20th and 80th percentile, and the samples in the order they were taken.

    Raises:
        ValueError: no samples.
    """
    taken = [float(sample) for sample in samples_ms]
    if not taken:
        raise ValueError("a timing needs at least one sample, got none")
    ordered = sorted(taken)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"median_ms": statistics.median(taken), "p20_ms": low, "p80_ms": high, "samples_ms": taken}


def measure(
    variants: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    rounds: int = 10,
    calls: int = 4,
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Samples in ms of variants of one thing: in each round, every variant is called a few times in turn.

    On a GPU each call lies between two events of its own, and a wait on the device at the start of a variant's turn
    lets the host run ahead, so that samples hold device time and no launch gaps. On the CPU the wall clock is read.

    Args:
        variants: name -> what to call, with a number that rises from call to call: pick inputs by it, ``num_sets`` of
            them in turn.
        device: where they run.
        rounds: how often the turn goes round.
        calls: samples a variant gives in each round.
        warmup: calls of each variant before the first round, untimed: compilation, autotuning, handles.
    """
    number = count()
    for call in variants.values():
        for _ in range(warmup):
            call(next(number))
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name] += _turn(call, islice(number, calls), device)
    return samples


def _turn(call: Callable[[int], object], numbers: Iterator[int], device: torch.device) -> list[float]:
    if device.type == "cuda":
        cuda: Any = torch.cuda
        cuda._sleep(_FILL_CYCLES)
    pairs = []
    for number in numbers:
        begin = mark(device)
        call(number)
        pairs.append((begin, mark(device)))
    synchronize(device)
    return [between_ms(begin, end) for begin, end in pairs]


def mark(device: torch.device) -> Any:
    """A point in the device's queue, or in time on the CPU, for ``between_ms``."""
    if device.type != "cuda":
        return time.perf_counter()
    make: Any = torch.cuda.Event
    event = make(enable_timing=True)
    event.record()
    return event


def between_ms(begin: Any, end: Any) -> float:
    """Ms from one mark to another; the device must have passed both."""
    return 1e3 * (end - begin) if isinstance(begin, float) else float(begin.elapsed_time(end))


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was queued; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call allocates at its peak beyond what is allocated before it, in bytes; None on the CPU."""
    if device.type != "cuda":
        call()
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def num_sets(num_bytes: int) -> int:
    """How many input sets of this size to use in turn, so that each is cold."""
    return max(2, min(16, -(-_COLD_BYTES // max(1, num_bytes))))


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of a plain copy of a buffer of ``num_bytes``, bytes read and bytes written both counted."""
    elements = max(1, num_bytes // 2)
    sets = num_sets(2 * elements)
    sources = [torch.randn(elements, device=device).to(torch.bfloat16) for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    samples = measure({"copy": lambda i: targets[i % sets].copy_(sources[i % sets])}, device, rounds=5)["copy"]
    return 4 * elements / (statistics.median(samples) / 1e3)


def gemm_rate(device: torch.device, m: int, k: int, n: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP a second of ``[m, k] @ [n, k]^T`` by ``torch.mm`` on random values, as a linear layer multiplies."""
    sets = num_sets((m * k + k * n) * dtype.itemsize)
    pairs = [
        (torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype).t())
        for _ in range(sets)
    ]
    out = torch.empty(m, n, device=device, dtype=dtype)

    def product(i: int) -> Tensor:
        return torch.mm(*pairs[i % sets], out=out)

    samples = measure({"mm": product}, device, rounds=5)["mm"]
    return 2 * m * k * n / (statistics.median(samples) / 1e3)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The rates of a large copy and a large product, as records carry them."""
    cuda = device.type == "cuda"
    side = _GEMM_SIDE if cuda else 256
    return {
        "copy_bytes_per_second": copy_rate(device, _COPY_BYTES if cuda else 2**20),
        "gemm_flops_per_second": gemm_rate(device, side, side, side, dtype),
        "gemm_side": side,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(ceilings(torch.device(sys.argv[1]), getattr(torch, sys.argv[2]))) + "\n")
