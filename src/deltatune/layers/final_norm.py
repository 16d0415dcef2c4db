"""The norm behind the last decoder layer, outside every layer's graph."""

# B rows, T tokens a row, E width of the residual stream

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from deltatune import ops
from deltatune.layers.reclass import Swapped

__all__ = ["FinalNorm", "OffsetFinalNorm"]


class FinalNorm(Swapped):
    """``RMSNorm(x) * weight`` (Qwen3), one kernel each way where one runs; elsewhere, and in a graph, the stock norm.

    A layer's norms are part of its graph. This one is not, and the stock code keeps two float32 copies of its input for
    a backward of a dozen passes.
    """

    #: the norm multiplies by ``1 + weight``
    unit_offset = False

    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[B, T, E] -> [B, T, E]``."""
        state = self._deltatune
        if torch.compiler.is_compiling() or state.cached or isinstance(self.weight, DTensor):
            return self._stock(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        impl = ops.choose_rms_norm_rope(hidden_states.device, dtype, impl=state.kernels["rms_norm_rope"]).impl
        if impl == "reference" or hidden_states.ndim != 3:
            return self._stock(hidden_states)
        # one head as wide as the stream, of which nothing turns
        angles = hidden_states.new_empty(1, hidden_states.shape[1], 0)
        return ops.rms_norm_rope(
            hidden_states.unsqueeze(2),
            self.weight,
            angles,
            angles,
            eps=self._eps(),
            unit_offset=self.unit_offset,
            impl=impl,
        ).squeeze(2)

    def _stock(self, hidden_states: Tensor) -> Tensor:
        normed: Tensor = super().forward(hidden_states)
        return normed

    def _eps(self) -> float:
        """The families spell it in two ways."""
        own = self.__dict__
        return float(own["variance_epsilon"] if "variance_epsilon" in own else own["eps"])


class OffsetFinalNorm(FinalNorm):
    """``RMSNorm(x) * (1 + weight)`` (Qwen3-Next, Qwen3.5)."""

    unit_offset = True
