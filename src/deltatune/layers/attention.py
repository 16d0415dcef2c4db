"""Causal attention inside documents: q and k normalised and rotated, then variable-length attention."""

# B rows, T tokens a row, N query heads, M key-value heads, D head dim

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune import ops
from deltatune.cost import Cost
from deltatune.hf.cached import check_boundaries
from deltatune.hf.peft import readable
from deltatune.layers.exchange import all_tokens, heads_of_rank, own_heads, own_tokens
from deltatune.layers.final_norm import eps_of
from deltatune.lora.linear import project
from deltatune.ops import Spec
from deltatune.ops._rms_norm_rope.reference import rotate
from deltatune.packing.group import Recurrent, SequenceGroup, exchanging
from deltatune.packing.sequences import Sequences
from deltatune.subclass import Swapped, stock_class

__all__ = ["Attention", "GatedAttention", "SinkAttention", "attention_cost", "attention_spec"]


class Attention(Swapped):
    """Attention with RMS-normalised q and k (Qwen3): ``W_o attend(rope(norm(q)), rope(norm(k)), v)``."""

    ops: ClassVar[tuple[str, ...]] = ("rms_norm_rope", "varlen_attention")
    replaces_forward = True
    #: the norms multiply by ``1 + weight``
    unit_offset = False

    config: Any
    head_dim: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        *,
        sequences: Sequences | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, E] -> [B, T, E]``; without ``sequences`` (a cached call) the stock forward."""
        check_boundaries(self, sequences)
        if sequences is None:
            stock: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
            return stock
        projected, k, v = project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        q, gate = self.split_q(projected)
        k, v = (torch.unflatten(x, -1, (-1, self.head_dim)) for x in (k, v))
        q, k = self.norm_and_rotate(q, k, *position_embeddings)
        group = exchanging(self._deltatune.sequence, sequences, hidden_states.shape[1])
        sinks = getattr(self, "sinks", None)
        if group is not None:
            q, k, v = self.exchange_tokens(q, k, v, group)
            sinks = None if sinks is None else own_heads(sinks, group)
        out = ops.varlen_attention(
            q,
            k,
            v,
            sequences=sequences,
            scale=self.scaling,
            window=getattr(self, "sliding_window", None),
            sinks=sinks,
            impl=self._deltatune.options.kernels["varlen_attention"],
        )
        if group is not None:
            out = own_tokens(out, group)
        if gate is not None:
            # Not flattened: joining the gradients of q and gate took 353 us flattened, 179 us so (H200, 16384 tokens,
            # 16 heads of 256, compiled).
            out = out * torch.sigmoid(gate)
        return self.o_proj(out.flatten(-2)), None

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of both norms and of attention."""
        return ops.RmsNormRopeSpec(device, dtype), attention_spec(module, device, dtype)

    def cost(self, tokens: int, squares: int, *, recurrent: Recurrent = "heads") -> Cost:
        """Causal attention; see ``attention_cost``."""
        del recurrent
        return attention_cost(self.config, tokens, squares)

    def exchanged(self, size: int, *, recurrent: Recurrent = "heads") -> float:
        """q, k and v of all heads, of which fewer than ranks go to several, and the output."""
        del recurrent
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        return float(2 * (heads + max(kv_heads, size)) * self.head_dim)

    def exchange_tokens(self, q: Tensor, k: Tensor, v: Tensor, group: SequenceGroup) -> tuple[Tensor, ...]:
        """q, k and v ``[1, t, ..., D]`` of this rank's tokens to ``[1, P t, ..., D]`` of its heads."""
        heads = [heads_of_rank(x.shape[2], group.size) for x in (q, k, v)]
        received = torch.unflatten(all_tokens([q, k, v], group), -1, (-1, self.head_dim))
        parts = torch.split(received, heads, dim=2)
        return tuple(part.to(given.dtype) for part, given in zip(parts, (q, k, v), strict=True))

    def split_q(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(q [B, T, N, D], output gate [B, T, N, D] or None)``."""
        return torch.unflatten(projected, -1, (-1, self.head_dim)), None

    def norm_and_rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """RMS norm over each head of q ``[B, T, N, D]`` and k ``[B, T, M, D]``, then rotary embedding."""
        owner = stock_class(self)
        q_norm, k_norm = readable(self.q_norm, owner), readable(self.k_norm, owner)
        if q_norm is None or k_norm is None:
            return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return ops.rms_norm_rope_pair(
            q,
            k,
            q_norm.weight,  # type: ignore[arg-type]
            k_norm.weight,  # type: ignore[arg-type]
            cos,
            sin,
            eps=eps_of(q_norm),
            unit_offset=self.unit_offset,
            impl=self._deltatune.options.kernels["rms_norm_rope"],
        )


class GatedAttention(Attention):
    """Attention whose query projection also makes an output gate (Qwen3-Next, Qwen3.5); norms are ``1 + weight``."""

    unit_offset = True

    def split_q(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        """The projection holds ``D`` query and ``D`` gate values for each head in turn."""
        q, gate = torch.unflatten(projected, -1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        return q, gate


class SinkAttention(Attention):
    """Attention with a sink for each head and no norms (gpt-oss): ``o * sigmoid(lse - sink)``."""

    ops = ("varlen_attention",)

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of attention."""
        return (attention_spec(module, device, dtype),)

    def norm_and_rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding alone; its angles come for one half, which the other shares."""
        cos, sin = (torch.cat([angles, angles], -1) for angles in (cos, sin))
        return rotate(q, cos, sin), rotate(k, cos, sin)


def attention_spec(module: Any, device: torch.device, dtype: torch.dtype) -> ops.VarlenAttentionSpec:
    """Of an attention module with ``head_dim`` as transformers' modules have it."""
    return ops.VarlenAttentionSpec(device, dtype, getattr(module, "head_dim", None))


def attention_cost(config: Any, tokens: int, squares: int) -> Cost:
    """``2 n^2 N D`` FLOPs a document of n tokens (causal: half of ``4 n^2 N D``).

    Kept: rotated queries and keys, the output, a float32 log-sum-exp a head.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Cost(
        flops=2.0 * squares * heads * head_dim,
        kept=float(tokens * (2 * heads + kv_heads) * head_dim),
        kept_bytes=4.0 * tokens * heads,
    )
