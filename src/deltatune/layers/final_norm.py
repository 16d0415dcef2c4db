"""The norm behind the last decoder layer, outside every layer's graph."""

# B rows, T tokens a row, E width of the residual stream

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune import ops
from deltatune.hf.cached import in_stock_path
from deltatune.hf.model import is_sharded
from deltatune.ops import Spec
from deltatune.subclass import Swapped

__all__ = ["FinalNorm", "OffsetFinalNorm", "eps_of"]


class FinalNorm(Swapped):
    """``RMSNorm(x) * weight`` (Qwen3), one kernel each way where one runs; elsewhere, and in a graph, the stock norm.

    A layer's norms are part of its graph. This one is not, and the stock code keeps float32 copies of its input for a
    backward of many passes.
    """

    ops = ("rms_norm_rope",)
    #: the norm multiplies by ``1 + weight``
    unit_offset = False

    weight: Tensor

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """``[B, T, E] -> [B, T, E]``; stock norms have several names for their argument."""
        (x,) = (*args, *kwargs.values())
        impl = self._kernel(x)
        if impl is None:
            stock: Tensor = super().forward(x)
            return stock
        # one head as wide as the stream, of which nothing turns
        angles = x.new_empty(1, x.shape[1], 0)
        return ops.rms_norm_rope(
            x.unsqueeze(2), self.weight, angles, angles, eps=eps_of(self), unit_offset=self.unit_offset, impl=impl
        ).squeeze(2)

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of the norm, of which nothing turns."""
        del module
        return (ops.RmsNormRopeSpec(device, dtype),)

    def _kernel(self, x: Tensor) -> str | None:
        """The kernel that runs; None where the stock norm does."""
        if torch.compiler.is_compiling() or in_stock_path(self) or x.ndim != 3 or is_sharded(self.weight):
            return None
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        impl = ops.choose(ops.RmsNormRopeSpec(x.device, dtype), self._deltatune.options.kernels["rms_norm_rope"]).impl
        return None if impl == "reference" else impl


class OffsetFinalNorm(FinalNorm):
    """``RMSNorm(x) * (1 + weight)`` (Qwen3-Next, Qwen3.5)."""

    unit_offset = True


def eps_of(norm: Any) -> float:
    """What a norm adds to the mean square; the families spell it in two ways."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
