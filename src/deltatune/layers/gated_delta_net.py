"""The Gated DeltaNet layer: projections, short convolution, gated delta rule, gated norm, output projection."""

# B rows, T tokens a row, H key heads, G value heads, K key dim, V value dim

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune import ops
from deltatune.cost import Cost
from deltatune.hf.cached import check_boundaries
from deltatune.hf.hooks import OFFLOADED
from deltatune.hf.peft import readable, readable_conv
from deltatune.layers.exchange import all_tokens, heads_of_rank, own_heads, own_tokens
from deltatune.layers.state_passing import delta_rule_over_ranks, with_tokens_before
from deltatune.lora.linear import project
from deltatune.ops import Spec
from deltatune.packing.group import Recurrent, SequenceGroup, exchanging
from deltatune.packing.sequences import Sequences
from deltatune.subclass import Swapped, stock_class

__all__ = ["GatedDeltaNet", "InterleavedGatedDeltaNet"]


class GatedDeltaNet(Swapped):
    """Gated DeltaNet with one projection each for qkv, gate, write strength and decay (Qwen3.5).

    ``mixed = silu(conv(x W_qkv))`` with the window cut at every document's start, ``g = -exp(A_log) softplus(a + dt)``,
    ``beta = sigmoid(b)``, ``y = W_o (rmsnorm(delta_rule(q, k, v, g, beta)) * silu(z))``. Source: Yang et al., Gated
    Delta Networks (2024); parameter names of transformers' modules.
    """

    ops = ("causal_conv", "gated_delta_rule", "gated_rms_norm")
    full_precision = ("A_log", "dt_bias")
    replaces_forward = True

    num_v_heads: int
    num_k_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int
    key_dim: int
    value_dim: int
    A_log: Tensor
    dt_bias: Tensor
    conv1d: nn.Module
    norm: nn.Module
    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        *,
        sequences: Sequences | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[B, T, E] -> [B, T, E]``; without ``sequences`` (a cached call) the stock forward."""
        check_boundaries(self, sequences)
        if sequences is None:
            stock: Tensor = super().forward(hidden_states, cache_params, attention_mask, **kwargs)
            return stock
        mixed, z, b, a = self.project(hidden_states)
        out = self.mix_tokens(mixed, b, a, sequences)
        projected: Tensor = self.out_proj(self.norm_and_gate(out, z).flatten(-2))
        return projected

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """Of the convolution, the delta rule and the norm behind it."""
        return (
            ops.CausalConvSpec(device, dtype, width=module.conv_kernel_size),
            ops.GatedDeltaRuleSpec(device, dtype, head_dims=(module.head_k_dim, module.head_v_dim)),
            ops.GatedRmsNormSpec(device, dtype),
        )

    def cost(self, tokens: int, squares: int, *, recurrent: Recurrent = "heads") -> Cost:
        """``6 G K V`` FLOPs a token in the recurrent form: decay and read, write, output.

        Kept: the convolved channels, the rule's output, the norm and the activated gate after it, a row of 64 entries
        of the chunk's triangular matrix a head; float32 decay and write strength. Where ranks pass states on, also the
        inputs of the two rows of a rank's map, their rows of 64 entries, and what its tokens read of the state.
        """
        del squares
        heads, width, of_map = self.num_v_heads, self.num_v_heads * self.head_v_dim, 0
        if recurrent == "state":
            a_row = max(self.head_k_dim, self.head_v_dim) + 64
            of_map = 4 * self.key_dim + heads * (2 * a_row + self.head_k_dim)
        return Cost(
            flops=6.0 * tokens * width * self.head_k_dim,
            kept=float(tokens * (2 * self.key_dim + 4 * width + 64 * heads + of_map)),
            kept_bytes=2.0 * 4 * tokens * heads * (3 if of_map else 1),
        )

    def exchanged(self, size: int, *, recurrent: Recurrent = "heads") -> float:
        """q, k, v, write strength and decay of all heads, of which fewer than ranks go to several, and the output.

        Nothing where states are passed on: what is sent does not grow with the tokens.
        """
        if recurrent == "state":
            return 0.0
        keys = max(self.num_k_heads, size) * self.head_k_dim
        return float(2 * keys + 2 * self.num_v_heads * (1 + self.head_v_dim))

    def mix_tokens(self, mixed: Tensor, b: Tensor, a: Tensor, sequences: Sequences) -> Tensor:
        """Convolution and delta rule ``[B, T, G, V]`` of projections, with what a sequence group's ranks exchange."""
        group = exchanging(self._deltatune.sequence, sequences, mixed.shape[1])
        impl = self._deltatune.options.kernels["gated_delta_rule"]
        if group is None:
            rule = self.rule_inputs(self.convolve(mixed, sequences), b, a, self.A_log, self.dt_bias)
            return ops.gated_delta_rule(*rule, sequences=sequences, qk_l2norm=False, impl=impl)
        if group.recurrent == "state":
            before = self.conv_kernel_size - 1
            convolved = self.convolve(*with_tokens_before(mixed, self.conv_kernel_size, sequences, group))
            rule = self.rule_inputs([x[:, before:] for x in convolved], b, a, self.A_log, self.dt_bias)
            return delta_rule_over_ranks(*rule, sequences=sequences, group=group, impl=impl)
        mixed, b, a = self.exchange_tokens(mixed, b, a, group)
        gates = b, a, own_heads(self.A_log, group), own_heads(self.dt_bias, group)
        rule = self.rule_inputs(self.convolve(mixed, sequences, group), *gates)
        return own_tokens(ops.gated_delta_rule(*rule, sequences=sequences, qk_l2norm=False, impl=impl), group)

    def rule_inputs(
        self, qkv: Iterable[Tensor], b: Tensor, a: Tensor, A_log: Tensor, dt_bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k and v by heads, ``g = -exp(A_log) softplus(a + dt)`` in fp32 and ``beta = sigmoid(b)``."""
        g = -A_log.float().exp() * F.softplus(a.float() + dt_bias)
        dims = (self.head_k_dim, self.head_k_dim, self.head_v_dim)
        q, k, v = (torch.unflatten(x, -1, (-1, dim)) for x, dim in zip(qkv, dims, strict=True))
        return q, k, v, g, b.sigmoid()

    def convolve(self, mixed: Tensor, sequences: Sequences, group: SequenceGroup | None = None) -> tuple[Tensor, ...]:
        """q, k and v ``[B, T, ...]``, q and k normalised: the delta rule would read and write them once more for it.

        With ``group`` the channels are those of this rank's heads.
        """
        conv = readable_conv(self.conv1d)
        hook = conv.__dict__.get(OFFLOADED)
        if hook is not None:
            hook.pre_forward(conv)
        weight, bias = cast("Tensor", conv.weight).squeeze(1), cast("Tensor | None", conv.bias)
        if group is not None:
            weight = self.own_channels(weight, group)
            bias = None if bias is None else self.own_channels(bias, group)
        convolved = ops.causal_conv(
            mixed,
            weight,
            bias,
            activation="silu",
            sequences=sequences,
            split=self.widths(group),
            l2norm=(self.head_k_dim, self.head_k_dim, 0),
            impl=self._deltatune.options.kernels["causal_conv"],
        )
        if hook is not None:
            hook.post_forward(conv, ())
        return convolved

    def widths(self, group: SequenceGroup | None) -> list[int]:
        """Channels of q, k and v that this process convolves: all of them, or those of its heads."""
        if group is None:
            return [self.key_dim, self.key_dim, self.value_dim]
        keys = heads_of_rank(self.num_k_heads, group.size) * self.head_k_dim
        return [keys, keys, heads_of_rank(self.num_v_heads, group.size) * self.head_v_dim]

    def exchange_tokens(self, mixed: Tensor, b: Tensor, a: Tensor, group: SequenceGroup) -> tuple[Tensor, ...]:
        """``mixed``, ``b`` and ``a`` ``[1, t, ...]`` of this rank's tokens to ``[1, P t, ...]`` of its heads."""
        q, k, v = torch.split(mixed, self.widths(None), dim=-1)
        q, k = (torch.unflatten(x, -1, (self.num_k_heads, -1)) for x in (q, k))
        v = torch.unflatten(v, -1, (self.num_v_heads, -1))
        received = all_tokens([q, k, v, b[..., None], a[..., None]], group)
        heads = heads_of_rank(self.num_v_heads, group.size)
        parts = torch.split(received, [sum(self.widths(group)), heads, heads], dim=-1)
        return tuple(part.to(given.dtype) for part, given in zip(parts, (mixed, b, a), strict=True))

    def own_channels(self, weight: Tensor, group: SequenceGroup) -> Tensor:
        """The rows of q, k and v ``[2HK + GV, ...]`` that belong to this rank's heads."""
        heads = (self.num_k_heads, self.num_k_heads, self.num_v_heads)
        rows = zip(torch.split(weight, self.widths(None)), heads, strict=True)
        return torch.cat([own_heads(torch.unflatten(x, 0, (n, -1)), group).flatten(0, 1) for x, n in rows])

    def norm_and_gate(self, out: Tensor, z: Tensor) -> Tensor:
        """``rmsnorm(out) * weight * silu(z)`` over each head of ``out [B, T, G, V]``, ``z [B, T, GV]``."""
        norm, gate = readable(self.norm, stock_class(self)), torch.unflatten(z, -1, (-1, self.head_v_dim))
        if norm is None:
            called: Tensor = self.norm(out.reshape(-1, self.head_v_dim), gate.reshape(-1, self.head_v_dim))
            return called.view(out.shape)
        return ops.gated_rms_norm(
            out,
            gate,
            norm.weight,  # type: ignore[arg-type]
            eps=norm.variance_epsilon,  # type: ignore[arg-type]
            impl=self._deltatune.options.kernels["gated_rms_norm"],
        )

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(mixed qkv [B, T, 2HK + GV], z [B, T, GV], b [B, T, G], a [B, T, G])``."""
        qkv, z, b, a = project(hidden_states, self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        return qkv, z, b, a


class InterleavedGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet whose projections interleave q, k, v, z and b, a by key head (Qwen3-Next)."""

    in_proj_qkvz: nn.Module
    in_proj_ba: nn.Module

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the base class, from ``[B, T, H * (2K + 2GV/H)]`` and ``[B, T, H * 2G/H]``."""
        heads, group = self.num_k_heads, self.num_v_heads // self.num_k_heads
        width = group * self.head_v_dim
        qkvz, ba = project(hidden_states, self.in_proj_qkvz, self.in_proj_ba)
        qkvz = torch.unflatten(qkvz, -1, (heads, -1))
        q, k, v, z = torch.split(qkvz, [self.head_k_dim, self.head_k_dim, width, width], dim=-1)
        b, a = torch.split(torch.unflatten(ba, -1, (heads, -1)), [group, group], dim=-1)
        mixed = torch.cat([q.flatten(-2), k.flatten(-2), v.flatten(-2)], dim=-1)
        return mixed, z.flatten(-2), b.flatten(-2), a.flatten(-2)
