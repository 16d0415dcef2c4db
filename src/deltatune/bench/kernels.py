"""Where the time of one step goes, kernel by kernel, under the names the floor uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch

from deltatune.bench.protocol import synchronize

__all__ = ["GROUPS", "NARROW", "WIDE", "group_of", "kernel_table", "op_of", "part_of", "regrouped"]

_OP: Final = "deltatune::"
#: What an op that an eager call differentiates runs under in the profiler.
_EAGER: Final = re.compile(r"GeneratedBackwardFor_deltatune_(\w+)_default")
# The first group whose pattern is in the name of one of our ops is that op's.
_OPS: Final[tuple[tuple[str, str], ...]] = (
    ("delta rule", "gated_delta_rule"),
    ("convolution", "causal_conv"),
    ("attention", "varlen_attention"),
    ("cross-entropy", "linear_cross_entropy"),
    ("norm and elementwise", r"rms_norm|lora_gated_act"),
    ("GEMM", "lora_"),
)
# The first group with a pattern in a kernel's name is its group.
_PATTERNS: Final[tuple[tuple[str, str], ...]] = (
    # Inductor names a kernel by the operators it fused: padding is the convolution's alone
    ("convolution", r"^triton_.*constant_pad_nd|^(?!void|triton_).*(conv1d|causal_conv)"),
    ("norm and elementwise", r"^triton_|rms_norm|layer_norm|rope|l2_?norm|swiglu"),
    ("attention", r"flash|fmha"),
    ("delta rule", r"gdr|gated_delta|delta_rule|kkt|prepare_h|chunk_(fwd|bwd|scaled|local|delta)|solve_tril|wy_"),
    ("cross-entropy", r"cross_entropy|^_(powers|settle|hidden_gradient|gradients|label_logits)|softmax|nll_loss"),
    ("optimizer", r"adam"),
    ("GEMM", r"gemm|nvjet|cutlass|cublas|splitk|xmma|wgmma"),
    ("copy", r"memcpy|memset|copy|catarray"),
    ("norm and elementwise", r"elementwise|reduce|silu|sigmoid|embedding|index|fill|multi_tensor"),
)  # fmt: skip
GROUPS: Final = (*dict.fromkeys(group for group, _ in (*_OPS, *_PATTERNS)), "other")
"""Groups of kernels; the floor's parts go by these names too."""

WIDE: Final = "wide products"
NARROW: Final = "narrow products"
#: The tile of a product that its library's kernel is named by.
_TILE: Final = re.compile(r"_(\d+)x(\d+)_")
#: Sides of tiles up to here are those of products with a few columns, such as adapters'.
_NARROWEST: Final = 96

_Rows = dict[tuple[str, str], tuple[float, int]]  # (kernel, our op or "") -> (ms, launches)


def group_of(kernel: str, op: str = "") -> str:
    """The group of a kernel by its name, or by the op of ours that launched it; a product is one wherever it runs."""
    named = next((group for group, pattern in _PATTERNS if re.search(pattern, kernel.lower())), "other")
    if named == "GEMM" or not op:
        return named
    return next((group for group, pattern in _OPS if re.search(pattern, op)), named)


def part_of(kernel: str, op: str = "") -> str:
    """``group_of``, but products by their tiles: ``NARROW`` where a side is short, as ours are, or ``WIDE``.

    A product that contracts a few columns alone has the tiles of a wide one.
    """
    group = group_of(kernel, op)
    if group != "GEMM":
        return group
    tile = _TILE.search(kernel)
    if tile is None:  # ours, and what adds up the parts of split products
        return NARROW if op or "splitk" in kernel.lower() else WIDE
    return NARROW if min(map(int, tile.groups())) <= _NARROWEST else WIDE


def kernel_table(step: Callable[[], object], device: torch.device, *, floor: Mapping[str, float] | None) -> Any:
    """Runs a warm step under torch's profiler: ms and launches of every kernel, and of every group beside its floor.

    On the CPU it is operators that are listed.

    Args:
        step: one step, queued whole; run once more before, unprofiled.
        device: where.
        floor: group -> ms, see ``Floor.groups``.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    step()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        step()
        synchronize(device)
    return _table(_rows(profiler, cuda=cuda), floor or {})


def regrouped(rows: Iterable[Mapping[str, Any]], floor: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """A record's kernels by the groups of today, the largest first; ``floor``: group -> ms."""
    sums: dict[str, tuple[float, int]] = dict.fromkeys(floor, (0.0, 0))
    for row in rows:
        group = group_of(row["kernel"], row.get("op") or "")
        ms, launches = sums.get(group, (0.0, 0))
        sums[group] = ms + row["ms"], launches + row["launches"]
    return [
        {"group": group, "ms": sums[group][0], "launches": sums[group][1], "floor_ms": floor.get(group)}
        for group in _by_time(sums)
    ]


def _rows(profiler: Any, *, cuda: bool) -> _Rows:
    """Kernels that one of our ops launched under its name, the rest of every kernel's time without one."""
    rows: _Rows = {}
    for event in profiler.events() if cuda else ():
        op = op_of(event.name)
        for kernel in event.kernels if op else ():
            ms, launches = rows.get((kernel.name, op), (0.0, 0))
            rows[kernel.name, op] = ms + kernel.duration / 1e3, launches + 1
    known: dict[str, tuple[float, int]] = {}
    for (kernel, _), (ms, launches) in rows.items():
        before = known.get(kernel, (0.0, 0))
        known[kernel] = before[0] + ms, before[1] + launches
    for event in profiler.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us and ("CUDA" in str(event.device_type)) == cuda and not getattr(event, "is_user_annotation", False):
            ms, launches = known.get(event.key, (0.0, 0))
            if event.count > launches:
                rows[event.key, ""] = us / 1e3 - ms, event.count - launches
    return rows


def op_of(event: str) -> str:
    """The op of ours that an event of the profiler stands for, or nothing."""
    eager = _EAGER.fullmatch(event)
    if eager is not None:
        return _OP + eager[1]
    return event if event.startswith(_OP) else ""


def _table(rows: _Rows, floor: Mapping[str, float]) -> dict[str, Any]:
    groups: dict[str, tuple[float, int]] = {}
    for key, (ms, launches) in rows.items():
        before = groups.get(group_of(*key), (0.0, 0))
        groups[group_of(*key)] = (before[0] + ms, before[1] + launches)
    for group in floor:
        groups.setdefault(group, (0.0, 0))
    return {
        "busy_ms": sum(ms for ms, _ in rows.values()),
        "groups": [
            {"group": group, "ms": groups[group][0], "launches": groups[group][1], "floor_ms": floor.get(group)}
            for group in _by_time(groups)
        ],
        "rows": [
            {
                "kernel": key[0],
                "op": key[1].removeprefix(_OP) or None,
                "group": group_of(*key),
                "ms": rows[key][0],
                "launches": rows[key][1],
            }
            for key in _by_time(rows)
        ],
    }


def _by_time(rows: Mapping[Any, tuple[float, int]]) -> Iterable[Any]:
    return sorted(rows, key=lambda name: -rows[name][0])
