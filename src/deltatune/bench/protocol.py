"""How figures are taken and kept: interleaved timing on a full queue, the device's ceilings, and immutable records."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deltatune.bench.provenance import device_name, source_digest, source_state, versions

__all__ = [
    "RECORDS",
    "Timing",
    "between_ms",
    "copy_rate",
    "device_name",
    "gemm_rate",
    "head",
    "laid_out",
    "mark",
    "measure",
    "peak_bytes",
    "source_digest",
    "source_state",
    "synchronize",
    "versions",
    "write_record",
]

RECORDS: Final = Path("bench/records")

# A wait on the device of this many cycles (some 4 ms at 2 GHz) lets the host queue calls before the first of them runs.
_FILL_CYCLES: Final = 8_000_000
# Buffers in turn: together larger than the last-level cache of any GPU (H200: 60 MB), so that none is read from it.
_COLD_BYTES: Final = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Samples of one variant, in ms, in the order they were taken."""

    samples_ms: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Timing:
        """Of samples in ms.

        Raises:
            ValueError: no samples.
        """
        taken = tuple(float(sample) for sample in samples)
        if not taken:
            raise ValueError("a timing needs at least one sample, got none")
        return cls(taken)

    @property
    def median_ms(self) -> float:
        """The median."""
        return statistics.median(self.samples_ms)

    @property
    def p20_ms(self) -> float:
        """The sample that a fifth of the others lie below."""
        return self._quantile(0.2)

    @property
    def p80_ms(self) -> float:
        """The sample that four fifths of the others lie below."""
        return self._quantile(0.8)

    def to_dict(self) -> dict[str, Any]:
        """The keys of a record's result."""
        return {
            "median_ms": self.median_ms,
            "p20_ms": self.p20_ms,
            "p80_ms": self.p80_ms,
            "samples_ms": list(self.samples_ms),
        }

    def _quantile(self, share: float) -> float:
        ordered = sorted(self.samples_ms)
        return ordered[round(share * (len(ordered) - 1))]


def measure(
    variants: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    rounds: int = 10,
    calls: int = 4,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Times variants of one thing side by side: in each round, every variant is called a few times in turn.

    On a GPU each call lies between two events of its own, and a wait on the device at the start of a variant's turn
    lets the host run ahead, so that samples hold device time and no launch gaps. On the CPU the wall clock is read.

    Args:
        variants: name -> what to call, with a number that rises from call to call: pick inputs by it, several sets in
            turn and together larger than the cache.
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
            samples[name] += _turn(call, number, calls, device)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _turn(call: Callable[[int], object], number: Iterable[int], calls: int, device: torch.device) -> list[float]:
    indices = list(islice(number, calls))
    if device.type == "cuda":
        cuda: Any = torch.cuda
        cuda._sleep(_FILL_CYCLES)
    pairs = []
    for index in indices:
        begin = mark(device)
        call(index)
        pairs.append((begin, mark(device)))
    synchronize(device)
    return [between_ms(begin, end) for begin, end in pairs]


def mark(device: torch.device) -> Any:
    """A point in the device's queue, or in time on the CPU, for ``between_ms``."""
    if device.type != "cuda":
        return time.perf_counter()
    cuda: Any = torch.cuda
    event = cuda.Event(enable_timing=True)
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


def copy_rate(device: torch.device, num_bytes: int, *, rounds: int = 5) -> float:
    """Bytes a second of a plain copy of a buffer of ``num_bytes``, bytes read and bytes written both counted."""
    elements = max(1, num_bytes // 2)
    sets = _sets(2 * elements)
    sources = [torch.randn(elements, device=device).to(torch.bfloat16) for _ in range(sets)]
    targets = [torch.empty_like(source) for source in sources]
    timing = measure({"copy": lambda i: targets[i % sets].copy_(sources[i % sets])}, device, rounds=rounds)["copy"]
    return 4 * elements / (timing.median_ms / 1e3)


def gemm_rate(
    device: torch.device,
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "NT",
    *,
    rounds: int = 5,
) -> float:
    """FLOP a second of ``[m, k] @ [k, n]`` by ``torch.mm`` on random values.

    Args:
        device: where.
        m: rows of the product.
        k: what is summed over.
        n: columns of the product.
        dtype: of both operands.
        layout: how the operands lie in memory, N row-major and T column-major: a linear layer's forward is NT (the
            weight is ``[n, k]``), the gradient of its input NN, of its weight TN.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in ("NN", "NT", "TN"):
        raise ValueError(f"layout must be 'NN', 'NT' or 'TN', got {layout!r}")
    sets = _sets((m * k + k * n) * dtype.itemsize)
    pairs = [
        tuple(
            laid_out(torch.randn(rows * columns, device=device).to(dtype), rows, columns, order)
            for rows, columns, order in ((m, k, layout[0]), (k, n, layout[1]))
        )
        for _ in range(sets)
    ]
    out = torch.empty(m, n, device=device, dtype=dtype)

    def product(i: int) -> Tensor:
        return torch.mm(*pairs[i % sets], out=out)

    timing = measure({"mm": product}, device, rounds=rounds)["mm"]
    return 2 * m * k * n / (timing.median_ms / 1e3)


def laid_out(numbers: Tensor, rows: int, columns: int, layout: str) -> Tensor:
    """The first numbers of a buffer as ``[rows, columns]``: row-major for N, column-major for T."""
    flat = numbers[: rows * columns]
    return flat.view(rows, columns) if layout == "N" else flat.view(columns, rows).t()


def _sets(num_bytes: int) -> int:
    """How many buffers of this size to use in turn."""
    return max(2, min(16, -(-_COLD_BYTES // max(1, num_bytes))))


def head(
    kind: str,
    subject: str,
    method: str,
    device: torch.device,
    *,
    argv: Sequence[str],
    commit: str | None = None,
) -> dict[str, Any]:
    """What every record begins with: what ran, on what, of which source; ``configs`` comes after it.

    Args:
        kind: ``"train"``, ``"frontier"``, ``"kernels"`` or ``"ops/<op>"``.
        subject: the model or the op.
        method: how the figures were taken, in words.
        device: where.
        argv: the command line; where it put the record is left out.
        commit: of the source, for a machine that has the files without their history, where ``source_sha256`` alone
            says whether they are that commit's; read from git by default.
    """
    found, dirty = source_state()
    return {
        "schema": 1,
        "kind": kind,
        "subject": subject,
        "device": device_name(device),
        "versions": versions(),
        "commit": commit or found,
        "dirty": dirty if commit is None else None,
        "source_sha256": source_digest(),
        "date": datetime.now(UTC).date().isoformat(),
        "argv": _without_folder(argv),
        "method": method,
    }


def _without_folder(argv: Sequence[str]) -> list[str]:
    kept = [word for word in argv if not word.startswith("--records=")]
    if "--records" in kept:
        at = kept.index("--records")
        del kept[at : at + 2]
    return kept


def write_record(record: Mapping[str, Any], folder: Path = RECORDS) -> Path:
    """Writes a record under a name of its own, ``kind-subject-device-date.json``, and never over another.

    Raises:
        ValueError: a value that is not finite: a record holds null where nothing was measured.
    """
    text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    stem = "-".join((_kind_of_name(record), _slug(str(record["device"])), str(record["date"])))
    for number in count(1):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


def _kind_of_name(record: Mapping[str, Any]) -> str:
    """``train-qwen3.5-2b``; of an op its name alone."""
    kind, subject = str(record["kind"]), str(record["subject"])
    return subject if kind.startswith("ops/") else f"{kind}-{subject}"


def _slug(device: str) -> str:
    words = device.lower().removeprefix("nvidia ").replace("geforce ", "").split()
    return "cpu" if device.startswith("cpu") else "-".join(words)
