"""YaRN: its frequencies are of the config, not of a document, also beyond ``original_max_position_embeddings``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deltatune import Sequences, prepare
from packed_cases import alone, assert_same_gradients
from tiny import documents, tiny_model

ORIGINAL = 32
# within the original length, on its edge, and up to four times as long
LENGTHS = [20, 100, ORIGINAL, ORIGINAL + 1, 1, 120]
MROPE = {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}


def with_yarn(family: str, **changes: Any) -> Any:
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": ORIGINAL,
    }  # fmt: skip
    rope = {**yarn, **(MROPE if family == "qwen3_5" else {}), **changes}
    return tiny_model(family, max_position_embeddings=4 * ORIGINAL, rope_parameters=rope)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3", "qwen3_moe", "qwen3_5"])
def test_a_pack_is_its_documents_alone_in_the_stock_class(family: str) -> None:
    model = with_yarn(family)
    stock = copy.deepcopy(model)
    assert stock.model.rotary_emb.attention_scaling > 1  # which the cosines carry
    prepare(model)
    docs = documents(LENGTHS)
    tokens, sequences = torch.cat(docs)[None], Sequences.from_lengths(LENGTHS)
    with torch.no_grad():
        logits = model(tokens, sequences=sequences).logits[0].split(LENGTHS)
        expected = [stock(doc[None], use_cache=False).logits[0] for doc in docs]
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    loss = model(tokens, sequences=sequences, labels=tokens).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(alone(stock, LENGTHS), rel=1e-5)
    assert_same_gradients(model, stock)


@pytest.mark.parametrize(
    "changes", [{"rope_type": "default"}, {"factor": 2.0}, {"original_max_position_embeddings": 8}]
)
def test_a_pack_shows_what_the_config_says_of_it(changes: dict[str, Any]) -> None:
    tokens, sequences = torch.cat(documents(LENGTHS))[None], Sequences.from_lengths(LENGTHS)
    found = []
    for given in ({}, changes):
        model = with_yarn("gpt_oss", **given)
        prepare(model)
        with torch.no_grad():
            found.append(model(tokens, sequences=sequences).logits)
    assert float((found[0] - found[1]).norm() / found[0].norm()) > 1e-3
