"""A layer written as docs/adding-a-model.md says, declared in one Family."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from deltatune import Sequences, ops, prepare, verify
from deltatune.hf.cached import check_boundaries
from deltatune.models import families, registry
from deltatune.models.family import Swap
from deltatune.subclass import Swapped
from packed_cases import packed_call
from tiny import tiny_model


class OwnAttention(Swapped):
    """Qwen3's attention, from nothing but ``Swapped``."""

    replaces_forward = True
    ops = ("varlen_attention",)

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Any = None,
        *, sequences: Sequences | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        check_boundaries(self, sequences)
        if sequences is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (project(hidden_states).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), *position_embeddings, unsqueeze_dim=2)
        mixed = ops.varlen_attention(q, k, v, sequences=sequences, scale=self.scaling)
        return self.o_proj(mixed.flatten(2)), None


def test_a_declaration_and_a_layer_are_all_that_a_family_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen3 = next(family for family in families.FAMILIES if family.name == "qwen3")
    own = dataclasses.replace(qwen3, swaps=(Swap("Qwen3Attention", OwnAttention, qwen3.swaps[0].expected),))
    stock, model = tiny_model("qwen3"), tiny_model("qwen3")
    prepare(stock)
    monkeypatch.setattr(registry, "FAMILIES", (own,))
    assert prepare(model).report.family == "qwen3"
    torch.testing.assert_close(model(**packed_call()).logits, stock(**packed_call()).logits, rtol=1e-4, atol=1e-5)
    report = verify(model, lengths=(3, 1, 20))
    assert report.ok, str(report)
