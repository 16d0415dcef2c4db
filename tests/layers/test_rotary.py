"""Rotary frequencies that depend on a document's length: every document gets those it has alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from deltatune import CompileOptions, Sequences, prepare
from tiny import documents, tiny_model

_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
_OF_64 = {"original_max_position_embeddings": 64}
_BY_TYPE = {"full_attention": _DYNAMIC, "sliding_attention": {**_LONG, "original_max_position_embeddings": 32}}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "rope_parameters": _BY_TYPE}


def dense(kind: str, **changes: Any) -> Any:
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values | changes))


MODELS: dict[str, Callable[[], Any]] = {
    "longrope, the bound in rope_parameters": lambda: dense(
        "phi3", max_position_embeddings=256, **_OF_64, rope_parameters={**_LONG, **_OF_64}
    ),
    "longrope, the bound next to them": lambda: dense(
        "phi3", max_position_embeddings=256, **_OF_64, rope_parameters=dict(_LONG)
    ),
    "longrope that scales by length": lambda: dense(
        "phimoe",
        max_position_embeddings=256,
        num_local_experts=2,
        rope_parameters={**_LONG, **_OF_64, "short_mscale": 1.1, "long_mscale": 1.3},
    ),
    "dynamic": lambda: dense("llama", rope_parameters=_DYNAMIC),
    "dynamic, a family": lambda: tiny_model("qwen3", max_position_embeddings=64, rope_parameters=_DYNAMIC),
    "dynamic, three-row positions": lambda: tiny_model(
        "qwen3_5",
        max_position_embeddings=64,
        rope_parameters={**_DYNAMIC, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    ),
    "by type of layer": lambda: dense("gemma3_text", **_BOTH),
}


def alone(stock: Any, docs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of every document by a stock model that has seen nothing else."""
    with torch.no_grad():
        return [copy.deepcopy(stock)(doc[None], use_cache=False).logits[0] for doc in docs]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("lengths", "padding"), [([20, 30], 90), ([20, 100, 64, 65, 1, 80], 30)])
def test_every_document_is_as_if_alone(name: str, lengths: list[int], padding: int) -> None:
    model = MODELS[name]().eval()
    stock = copy.deepcopy(model)
    prepare(model)
    docs = documents(lengths)
    tokens = torch.cat([*docs, torch.zeros(padding, dtype=torch.long)])[None]
    for _ in range(2):  # nothing is left over from the call before
        with torch.no_grad():
            packed = model(tokens, sequences=Sequences.from_lengths(lengths, total=tokens.shape[1])).logits[0]
        for part, expected in zip(packed.split([*lengths, padding])[:-1], alone(stock, docs), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["longrope, the bound in rope_parameters", "dynamic"])
def test_rows_of_a_padded_batch_are_as_if_alone(name: str) -> None:
    model = MODELS[name]().eval()
    stock = copy.deepcopy(model)
    prepare(model)
    docs = documents([90, 30])
    tokens, mask = torch.zeros(2, 90, dtype=torch.long), torch.zeros(2, 90, dtype=torch.long)
    for row, doc in enumerate(docs):
        tokens[row, 90 - len(doc) :], mask[row, 90 - len(doc) :] = doc, 1
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
    for row, expected in enumerate(alone(stock, docs)):
        torch.testing.assert_close(logits[row, -len(expected) :], expected, rtol=1e-4, atol=2e-5)


def test_the_stock_module_keeps_its_state_and_comes_back() -> None:
    model = MODELS["dynamic"]().eval()
    stock = copy.deepcopy(model)
    prepared = prepare(model)
    model(documents([100])[0][None])
    rotary = model.model.rotary_emb
    assert rotary.max_seq_len_cached == 64
    assert torch.equal(rotary.inv_freq, stock.model.rotary_emb.inv_freq)
    prompt = documents([100])[0][None]
    generate = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **generate), stock.generate(prompt, **generate))
    prepared.revert()
    assert type(model.model.rotary_emb) is type(stock.model.rotary_emb)


def test_a_longer_call_with_a_cache_changes_no_packed_call_after_it() -> None:
    model = MODELS["dynamic"]().eval()
    stock = copy.deepcopy(model)
    prepare(model)
    model(documents([200])[0][None], use_cache=True)  # the stock path, which remembers the length
    docs = documents([100, 20])
    with torch.no_grad():
        packed = model(torch.cat(docs)[None], sequences=Sequences.from_lengths([100, 20])).logits[0]
    for part, expected in zip(packed.split([100, 20]), alone(stock, docs), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["longrope, the bound in rope_parameters", "dynamic"])
def test_calls_of_other_lengths_in_other_threads_change_nothing(name: str) -> None:
    model = MODELS[name]().eval()
    prepare(model)
    short, long = documents([20, 100])
    with torch.no_grad():
        expected = model(short[None]).logits
        wrong = []

        def call_short() -> None:
            for _ in range(30):
                with torch.no_grad():
                    wrong.append(not torch.equal(model(short[None]).logits, expected))

        thread = threading.Thread(target=call_short)
        thread.start()
        while thread.is_alive():
            model(long[None])
    assert not any(wrong)


def test_one_graph_of_the_whole_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rope_type 'longrope' or 'dynamic'\); use CompileOptions\(scope='layer'\)"):
        prepare(MODELS["dynamic"](), compile=CompileOptions(scope="model"))


def test_lengths_beyond_the_bound_are_no_new_graphs() -> None:
    model = MODELS["dynamic"]()
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager"))
    for lengths in ([20, 100], [80, 40], [120], [5] * 24):
        model(torch.cat(documents(lengths))[None], sequences=Sequences.from_lengths(lengths)).logits.sum().backward()
    assert prepared.compile_report is not None
    assert list(prepared.compile_report.graphs.values()) == [1]


def test_inside_a_layer_it_is_refused() -> None:
    model = MODELS["dynamic"]()
    model.model.layers[0].self_attn.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    with pytest.raises(ValueError, match=r"inside a decoder layer .*\(rope_type dynamic\).*set a rope_type"):
        prepare(model)
