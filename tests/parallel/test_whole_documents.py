"""When ranks of a pack take whole documents, by what a model exchanges and attends."""

from __future__ import annotations

import pytest

from deltatune import prepare
from deltatune.parallel.mesh import ALONE, Mesh
from deltatune.parallel.whole_documents import whole_documents
from tiny import tiny_model

PAIR = Mesh.at(2, 0, sequence=2)


def test_an_exchange_is_worth_the_attention_of_its_time() -> None:
    model = tiny_model("qwen3", layers=2)
    prepare(model)
    text = model.config
    found = whole_documents(model, Mesh.at(4, 1, sequence=4))
    assert found is not None
    assert found.ranks == 4
    heads = text.num_attention_heads + max(text.num_key_value_heads, 4)
    sent = 2 * (2 * heads * text.head_dim) * 2 * 2 * 3 / 4
    a_square = 2 * 2 * text.num_attention_heads * text.head_dim * 4.5
    assert found.worth == pytest.approx((sent / 350e9) / (a_square / 260e12))


def test_nothing_is_laid_out_for_one_rank_nor_where_padding_counts() -> None:
    model = tiny_model("qwen3_moe")
    prepare(model)
    assert whole_documents(model, ALONE) is None
    assert whole_documents(model, PAIR) is not None
    model.config.output_router_logits = True
    assert whole_documents(model, PAIR) is None
