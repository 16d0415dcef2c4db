"""Compiling the kernels of a model's shapes before its first run: they are cached on disk by those who compile them."""

# G value heads

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from deltatune.bench.ops.case import Case, Setting
from deltatune.bench.ops.catalog import OPS
from deltatune.bench.ops.gate import results
from deltatune.bench.shapes import Shape
from deltatune.ops._lora_linear import gated_act, up_backward

__all__ = ["Built", "build", "document_counts"]

#: Columns that the kernels of an op take, each compiled apart.
_WIDTHS: Final = {"lora_gated": gated_act.WIDTHS, "lora_low_rank": up_backward.WIDTHS}


@dataclass(frozen=True)
class Built:
    """What was compiled: an op, its implementation, for which of its kernels, and how long the first call took."""

    op: str
    impl: str
    kind: str
    seconds: float


def build(shape: Shape, tokens: int, device: torch.device) -> Iterator[Built]:
    """Runs every op of a model forward and backward, as ``auto`` chooses, on random values of a pack's shape.

    A second call of the same kind finds the kernels in the caches of FlashQLA's TileLang and of Triton and takes next
    to no time. The graphs of ``torch.compile`` depend on the model and are cached by its own first run.
    """
    for op, entry in OPS.items():
        if not entry.built_ahead or (entry.hybrid and not shape.hybrid):
            continue
        for kind, setting in _settings(op, shape, device):
            case = entry.build(shape, tokens, setting)
            yield Built(op, case.auto, kind, _first_call(case, device))


def _settings(op: str, shape: Shape, device: torch.device) -> Iterator[tuple[str, Setting]]:
    """One for each kernel that an op may choose, by what it is chosen by."""
    if op == "gated_delta_rule":
        for count in document_counts(shape, device):
            yield f"{count} document{'s' * (count > 1)}", Setting(device, documents=count)
    elif op in _WIDTHS:
        for rank in _WIDTHS[op]:
            yield f"rank {rank}", Setting(device, documents=1, rank=rank)
    else:
        yield "1 document", Setting(device, documents=1)


def document_counts(shape: Shape, device: torch.device) -> list[int]:
    """One count of documents for each kernel that FlashQLA may choose.

    It compiles its forward for blocks of 32, 64 or 128 value dims: the smaller ones for packs whose documents times
    value heads would leave processors without work. The limits are a factor of two apart, so counts that double meet
    every class.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    counts = [1]
    while counts[-1] * shape.values["linear_num_value_heads"] < processors:
        counts.append(2 * counts[-1])
    return counts


def _first_call(case: Case, device: torch.device) -> float:
    function = next(variant for variant in case.variants if variant.name == case.auto).build()
    inputs = case.draw(1)
    _wait(device)
    started = time.perf_counter()
    results(function, inputs, case.outputs, case.trained)
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
