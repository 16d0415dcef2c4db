"""``[h | h A^T]`` for ``h = silu(gate) up``: the op that reads what a gated MLP's activation reads, and nothing twice.

Where its kernel does not run the activation is plain torch, which a compiler fuses.
"""

# M tokens, K width of the activation, W border width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deltatune.ops._autocast import without_autocast
from deltatune.ops._triton import triton_refusal

__all__ = ["WIDTHS", "gated_act", "gated_act_runs", "swiglu_backward"]

WIDTHS: Final = (16, 32)
"""The columns of A^T that the kernel takes."""

torch.library.define("deltatune::lora_gated_act", "(Tensor gate, Tensor up, Tensor down, SymInt used) -> Tensor")


def gated_act(gate: Tensor, up: Tensor, down: Tensor, used: int) -> Tensor:
    """``[h | h down | 0]`` ``[M, K + W]`` for ``h = silu(gate) up``.

    Args:
        gate: ``[M, K]``.
        up: ``[M, K]``.
        down: ``[K, W]``.
        used: columns of it that are not zero.

    h is computed in fp32 (fp64 for fp64) and rounded once; its product with ``down`` is of the rounded h.
    """
    extended: Tensor = torch.ops.deltatune.lora_gated_act(gate, up, down, used)
    return extended


def gated_act_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can run."""
    return dtype in (torch.bfloat16, torch.float16) and triton_refusal(device, dtype) is None


def swiglu_backward(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``dgate = dh up (s + gate s (1 - s))`` with ``s = sigmoid(gate)``, and ``dup = dh gate s``."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    d, x, y = dh.to(wide), gate.to(wide), up.to(wide)
    return torch.ops.aten.silu_backward(d * y, x).to(gate.dtype), (d * F.silu(x)).to(gate.dtype)


def _gated_act(gate: Tensor, up: Tensor, down: Tensor, used: int) -> Tensor:
    inner, width = down.shape
    extended = gate.new_empty(gate.shape[0], inner + width)
    rows_are_dense = all(matrix.stride(1) == 1 for matrix in (gate, up, down))
    if used in WIDTHS and rows_are_dense and gated_act_runs(gate.device, gate.dtype):
        from deltatune.ops._lora_linear.gated_act_kernel import write_extended

        with torch.cuda.device(gate.device):
            write_extended(gate, up, down[:, :used], extended)
        return extended
    with without_autocast(gate):
        wide = torch.promote_types(gate.dtype, torch.float32)
        extended[:, :inner] = F.silu(gate.to(wide)) * up.to(wide)
        torch.mm(extended[:, :inner], down, out=extended[:, inner:])
    return extended


def _gated_act_fake(gate: Tensor, _up: Tensor, down: Tensor, _used: int) -> Tensor:
    return gate.new_empty(gate.shape[0], sum(down.shape))


torch.library.impl("deltatune::lora_gated_act", "CompositeExplicitAutograd", _gated_act)
torch.library.register_fake("deltatune::lora_gated_act", _gated_act_fake)


@register_flop_formula(torch.ops.deltatune.lora_gated_act)
def _gated_act_flops(
    gate_shape: Sequence[int], _up: object, down_shape: Sequence[int], used: int, *_: Any, **__: Any
) -> int:
    return 2 * gate_shape[0] * down_shape[0] * used
