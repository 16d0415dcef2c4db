"""The routed experts of a mixture-of-experts layer, as two grouped matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune import ops
from deltatune.cost import Cost
from deltatune.hf.cached import in_stock_path, reached
from deltatune.ops import Spec
from deltatune.subclass import Swapped

__all__ = ["Experts"]


class Experts(Swapped):
    """``sum_k w_k * down_e(act(gate_e(x)) * up_e(x))`` over a token's experts ``e``, traceable and order-independent.

    Every token's result is bitwise the same whatever other tokens are routed where, which the stock loop over experts
    does not give, and the number of tokens an expert gets never reaches the graph.
    """

    ops = ("grouped_mm",)
    replaces_forward = True

    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: Any
    config: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[N, E], [N, k], [N, k] -> [N, E]``; the stock forward inside a cached call."""
        if in_stock_path(self):
            stock: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return stock
        reached(self)
        return ops.moe_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            self.act_fn,
            impl=self._deltatune.options.kernels["grouped_mm"],
        )

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of the grouped products."""
        return (ops.GroupedMmSpec(device, dtype, weight_shape=module.gate_up_proj.shape),)

    @property
    def active_share(self) -> float:
        """The share of the experts' weights that a token meets."""
        return float(self.config.num_experts_per_tok / self.gate_up_proj.shape[0])

    def cost(self, tokens: int, squares: int) -> Cost:
        """Kept: inputs, hidden units before and after activation, and outputs, for each expert that a token visits."""
        del squares
        widths = sum(sum(weight.shape[1:]) for weight in (self.gate_up_proj, self.down_proj))
        return Cost(kept=float(tokens * self.config.num_experts_per_tok * widths))
