"""The Inductor settings a recipe may touch: one list, read by the recipe's rules and by the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = ["INDUCTOR_OPTIONS", "InductorOption"]


@dataclass(frozen=True)
class InductorOption:
    """One allowed key of ``torch._inductor.config``.

    Attributes:
        type: the type of its value; anything else is an error.
        doc: what it does, in one line.
    """

    type: type
    doc: str


# Numerics-changing and process-wide settings are left out on purpose: what is here changes speed and memory alone.
INDUCTOR_OPTIONS: Final[Mapping[str, InductorOption]] = MappingProxyType(
    {
        "coordinate_descent_tuning": InductorOption(
            bool, "Search block sizes of generated kernels one at a time; slower compile, often faster kernels."
        ),
        "coordinate_descent_check_all_directions": InductorOption(
            bool, "Let that search move several block sizes at once when single moves stop helping."
        ),
        "shape_padding": InductorOption(bool, "Pad matrix shapes to tensor-core friendly sizes where it pays."),
        "epilogue_fusion": InductorOption(bool, "Fuse elementwise work into the end of matrix products."),
        "max_autotune_gemm": InductorOption(bool, "Time Triton matrix products against the library's, keep the best."),
        "fx_graph_cache": InductorOption(bool, "Reuse compiled graphs of earlier runs from disk."),
        "assume_aligned_inputs": InductorOption(bool, "Promise 16-byte aligned inputs; wrong results if they are not."),
        "comprehensive_padding": InductorOption(bool, "Pad strides of intermediates for coalesced memory access."),
        "decompose_mem_bound_mm": InductorOption(bool, "Replace memory-bound matrix products by fused reductions."),
        "triton.cudagraphs": InductorOption(
            bool, "Replay CUDA graphs; skipped with packing, whose boundaries are read on the host."
        ),
    }
)
