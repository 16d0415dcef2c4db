"""The routed experts of a mixture, as two grouped linear layers; their adapters as part of those products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune import ops
from deltatune.cost import Cost, ExpertSplit
from deltatune.errors import UserError
from deltatune.hf.cached import in_stock_path, reached
from deltatune.hf.experts import ExpertsLayout, experts_layout, experts_per_token
from deltatune.layers.dispatch import ExpertPart, mix_on_ranks
from deltatune.ops import Adapter, ExpertLinear, Spec
from deltatune.packing.group import Recurrent
from deltatune.subclass import Swapped

__all__ = ["Experts"]


class Experts(Swapped):
    """``sum_k w_k * down_e(gate(up_e(x)))`` over a token's experts ``e``, traceable and order-independent.

    One layer for every class whose weights are fused (see ``ExpertsLayout``); the gate is the stock class's own
    function of the rows. Every token's result is bitwise the same whatever other tokens are routed where, which the
    stock loop over experts does not give, and the number of tokens an expert gets never reaches the graph.
    """

    ops = ("grouped_mm",)
    replaces_forward = True

    config: Any
    down_proj: Tensor
    _apply_gate: Any
    act_fn: Any
    #: set where the ranks of a group hold the experts together, and the weights here are those of a part of them
    _deltatune_part: ExpertPart | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[N, E], [N, k], [N, k] -> [N, E]``; the stock forward inside a cached call.

        Raises:
            ValueError: a cached call of experts that ranks hold together.
        """
        if in_stock_path(self):
            self._refuse_ranks()
            stock: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return stock
        return self.mix(hidden_states, top_k_index, top_k_weights, {})

    def mix(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        adapters: Mapping[str, Sequence[Adapter]],
    ) -> Tensor:
        """The same with adapters of each weight, by its name, in cached calls too; ids outside the experts are absent.

        Raises:
            ValueError: a cached call of experts that ranks hold together, or experts in none of the known layouts.
        """
        reached(self)
        if in_stock_path(self):
            self._refuse_ranks()
        layout = experts_layout(self)
        if layout is None:
            raise ValueError(
                f"{type(self).__name__}: its experts changed since prepare, and are no two fused linear layers now; "
                "call prepare(model) again"
            )
        part = self._deltatune_part
        up, down = (self._linear(layout, name, adapters, part) for name in (layout.up, "down_proj"))

        def mix(tokens: Tensor, index: Tensor, weights: Tensor, max_rows: int | None) -> Tensor:
            return ops.moe_experts(
                tokens,
                index,
                weights,
                up,
                down,
                self._apply_gate if layout.gated else self.act_fn,
                max_rows=max_rows,
                impl=self._deltatune.options.kernels["grouped_mm"],
            )

        if part is None:
            return mix(hidden_states, top_k_index, top_k_weights, None)
        return mix_on_ranks(hidden_states, top_k_index, top_k_weights, part, mix)

    def _refuse_ranks(self) -> None:
        if self._deltatune_part is not None:
            raise ValueError(
                "a call with a key-value cache is one rank's own, and its experts lie on several; generate with "
                "the saved model, or leave the cache out (use_cache=False) and call the model on every rank"
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # who asks for the Parameters themselves gathers them
        if self._deltatune_part is not None and not keep_vars:
            raise UserError(
                f"{prefix.removesuffix('.')} lie on several ranks, so state_dict() would hold one rank's part of them; "
                "use Parallel.state_dict(), and save_pretrained(folder, state_dict=...) with what it gives"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _linear(
        self, layout: ExpertsLayout, name: str, adapters: Mapping[str, Sequence[Adapter]], part: ExpertPart | None
    ) -> ExpertLinear:
        weight: Tensor = getattr(self, name)
        bias: Tensor | None = getattr(self, f"{name}_bias") if layout.biased else None
        if part is not None and part.dtype is not None and weight.dtype == torch.float32:
            # what is sharded around them is gathered so
            weight, bias = weight.to(part.dtype), None if bias is None else bias.to(part.dtype)
        return ExpertLinear(weight.mT if layout.transposed else weight, bias, adapters.get(name, ()))

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of the grouped products."""
        up, down, transposed = _weights(module)
        shapes = [weight.mT.shape if transposed else weight.shape for weight in (up, down)]
        return tuple(ops.GroupedMmSpec(device, dtype, weight_shape=shape) for shape in dict.fromkeys(shapes))

    @property
    def active_share(self) -> float:
        """The share of the experts' weights, and of their adapters, that a token meets."""
        return self._per_token() / self.down_proj.shape[0]

    def cost(self, tokens: int, squares: int, *, recurrent: Recurrent = "heads") -> Cost:
        """Kept of each expert that a token visits: rows before the gate, and what the gate and the weight leave."""
        del squares, recurrent
        return Cost(kept=float(tokens * self._per_token() * self._kept_of_visit()))

    def dispatched(self, split: ExpertSplit) -> tuple[float, float]:
        """Received are ``P C`` tokens, a rank's experts take R visits where one process has ``t k``: ``ExpertPart``."""
        up, _, transposed = _weights(self)
        per_token, held = self._per_token(), up.shape[0] // split.ranks
        received = split.ranks * min(1.0, split.capacity * per_token / split.ranks)
        visits = min(split.capacity * per_token, received * min(per_token, held))
        width = up.shape[1] if transposed else up.shape[2]
        return received * width, (visits - per_token) * self._kept_of_visit()

    def _kept_of_visit(self) -> int:
        up, down, transposed = _weights(self)
        before, behind = (up.shape[2], down.shape[1]) if transposed else (up.shape[1], down.shape[2])
        return int(before + 3 * behind)

    def _per_token(self) -> int:
        return experts_per_token(self.config, self.down_proj.shape[0])


def _weights(module: Any) -> tuple[Tensor, Tensor, bool]:
    layout = experts_layout(module)
    assert layout is not None, "only known layouts are swapped"
    return getattr(module, layout.up), module.down_proj, layout.transposed
