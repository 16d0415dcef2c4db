"""The Inductor settings a recipe may touch, all switches: one list, read by the recipe's rules and by the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["INDUCTOR_OPTIONS"]


# Numerics-changing and process-wide settings are left out on purpose: what is here changes speed and memory alone.
INDUCTOR_OPTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "coordinate_descent_tuning": (
            "Search block sizes of generated kernels one at a time; slower compile, often faster kernels."
        ),
        "coordinate_descent_check_all_directions": (
            "Let that search move several block sizes at once when single moves stop helping."
        ),
        "shape_padding": "Pad matrix shapes to tensor-core friendly sizes where it pays.",
        "epilogue_fusion": "Fuse elementwise work into the end of matrix products.",
        "max_autotune_gemm": "Time Triton matrix products against the library's, keep the best.",
        "fx_graph_cache": "Reuse compiled graphs of earlier runs from disk.",
        "assume_aligned_inputs": "Promise 16-byte aligned inputs; wrong results if they are not.",
        "comprehensive_padding": "Pad strides of intermediates for coalesced memory access.",
        "decompose_mem_bound_mm": "Replace memory-bound matrix products by fused reductions.",
        "triton.cudagraphs": "Replay CUDA graphs; skipped with packing, whose boundaries are read on the host.",
    }
)
