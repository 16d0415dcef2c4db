"""What a prepared model accepts and returns: metadata of every kind, losses, caches, generation."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from deltatune import Sequences, prepare
from packed_cases import LENGTHS, packed_call
from tiny import FAMILIES, documents, tiny_model


def forms() -> dict[str, dict[str, Any]]:
    sequences = Sequences.from_lengths(LENGTHS)
    cu = torch.tensor([0, 5, 6, 36, 43], dtype=torch.int32)
    positions = sequences.positions.long()[None]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
    return {
        "sequences": {"sequences": sequences},
        "cu_seq_lens": {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 30, "max_length_k": 30},
        "indexed_mask": {"attention_mask": ids + 1},
        "seq_idx": {"seq_idx": ids.int()},
        "position_ids": {"position_ids": positions},
        "positions_and_ones": {"position_ids": positions, "attention_mask": torch.ones(1, 43, dtype=torch.long)},
        "four_rows": {"position_ids": positions.expand(4, 1, -1)},
        "use_cache": {"position_ids": positions, "use_cache": True},
        "all": {"sequences": sequences, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "seq_idx": ids.int(),
                "position_ids": positions},
    }  # fmt: skip


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("training", [True, False])
def test_every_form_of_metadata_gives_the_same_logits(form: str, training: bool) -> None:
    model = tiny_model("qwen3_5").train(training)
    prepare(model)
    call = forms()[form]
    expected = model(**packed_call()).logits
    assert torch.equal(model(packed_call()["input_ids"], **call).logits, expected)


def test_padded_rows_match_their_documents() -> None:
    model = tiny_model("qwen3_5")
    stock = copy.deepcopy(model)
    prepare(model)
    docs = documents([9, 4])
    tokens, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for row, doc in enumerate(docs):  # one row padded on the left
        tokens[row, 9 - len(doc) :], mask[row, 9 - len(doc) :] = doc, 1
    logits = model(tokens, attention_mask=mask).logits
    for row, doc in enumerate(docs):
        torch.testing.assert_close(logits[row, 9 - len(doc) :], stock(doc[None]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5, 40], dtype=torch.int32)}, "end at the number of tokens"),
        ({"attention_mask": torch.ones(1, 1, 43, 43)}, r"must be \[B, T\]"),
        ({"position_ids": torch.zeros(3, 1, 43, dtype=torch.long)}, "no document boundaries"),
        ({"sequences": Sequences.from_lengths([42])}, "42 tokens"),
        ({"output_attentions": True}, "output_attentions"),
        (
            {
                "sequences": Sequences.from_lengths([40, 3]),
                "position_ids": Sequences.from_lengths(LENGTHS).positions[None],
            },
            "contradict",
        ),
    ],
)
def test_bad_metadata_is_refused(call: dict[str, Any], message: str) -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    with pytest.raises(ValueError, match=message):
        model(packed_call()["input_ids"], **call)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_stock_model(family: str) -> None:
    model = tiny_model(family).eval()
    stock = copy.deepcopy(model)
    prepare(model)
    tokens = torch.stack(documents([12, 12]))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0  # padded on the left, as generation wants it
    kwargs = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    kwargs |= {"return_dict_in_generate": True, "output_logits": True}
    ours, theirs = model.generate(tokens, **kwargs), stock.generate(tokens, **kwargs)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


CACHES = ("static", "sliding_window", "hybrid", "dynamic")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_generation_with_a_cache_of_fixed_size_with_padding(family: str, cache: str, side: str) -> None:
    changes = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1} if family == "qwen3" else {}
    model = tiny_model(family, **changes).eval()
    stock = copy.deepcopy(model)
    prepare(model)
    tokens, mask = torch.stack(documents([9, 9, 9])), torch.ones(3, 9, dtype=torch.long)
    for row, padding in enumerate((0, 3, 7)):
        mask[row, slice(padding) if side == "left" else slice(9 - padding, None)] = 0
    call = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    call |= {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(model.generate(tokens, **call), stock.generate(tokens, **call))


@pytest.mark.parametrize("cache", [transformers.StaticCache, transformers.DynamicCache])
def test_generation_goes_on_from_a_cache_with_padding(cache: Any) -> None:
    model = tiny_model("qwen3_5").eval()
    stock = copy.deepcopy(model)
    prepare(model)
    tokens, mask = torch.stack(documents([12, 12])), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    found = []
    for one in (model, stock):
        size = {"max_cache_len": 24} if cache is transformers.StaticCache else {}
        kept = cache(config=one.config, **size)
        call = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "past_key_values": kept}
        call |= {"max_new_tokens": 4, "disable_compile": True}
        first = one.generate(tokens, attention_mask=mask, **call)
        longer = torch.nn.functional.pad(mask, (0, first.shape[1] - 12), value=1)
        found.append(one.generate(first, attention_mask=longer, **call))
    assert torch.equal(*found)


def test_packed_documents_with_a_cache_and_a_mask_of_pairs_are_refused() -> None:
    model = tiny_model("qwen3")
    prepare(model)
    pairs = torch.ones(1, 1, 43, 43, dtype=torch.bool)
    with pytest.raises(ValueError, match="past_key_values cannot hold packed documents"):
        model(
            packed_call()["input_ids"],
            attention_mask=pairs,
            position_ids=packed_call()["sequences"].positions.long()[None],
            past_key_values=transformers.DynamicCache(config=model.config),
        )


def test_a_cache_that_is_asked_for_is_returned() -> None:
    model = tiny_model("qwen3_5").eval()
    prepare(model)
    (tokens,) = documents([12])
    first = model(tokens[None, :8], use_cache=True)
    rest = model(tokens[None, 8:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, model(tokens[None]).logits[:, 8:], rtol=1e-4, atol=1e-5)


def test_loss_conventions_of_the_stock_model() -> None:
    stock = tiny_model("qwen3_5")
    model = copy.deepcopy(stock)
    prepare(model)
    (tokens,) = documents([40])
    labels = tokens.clone()
    labels[:11] = -100
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}, {"num_items_in_batch": 7}):
        theirs = stock(tokens[None], labels=labels[None], **extra)
        ours = model(tokens[None], labels=labels[None], **extra)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
        assert ours.logits is None
    asked = model(tokens[None], labels=labels[None], output_logits=True)
    torch.testing.assert_close(asked.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    as_tuple = model(tokens[None], labels=labels[None], return_dict=False)
    assert torch.equal(as_tuple[0], asked.loss)


def test_logits_that_are_scaled_after_the_head_count_in_the_loss() -> None:
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "logits_scaling": 3.0}
    torch.manual_seed(0)
    stock = transformers.GraniteForCausalLM(transformers.GraniteConfig(**values))
    model = copy.deepcopy(stock)
    prepared = prepare(model)
    (tokens,) = documents([40])
    ours, theirs = model(tokens[None], labels=tokens[None]), stock(tokens[None], labels=tokens[None])
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    assert "scaled or capped" in str(prepared.report)
    for keep in (0, 1, 5, torch.tensor([3, 7])):
        kept = model(tokens[None], labels=tokens[None], output_logits=True, logits_to_keep=keep)
        torch.testing.assert_close(kept.loss, theirs.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(kept.logits, stock(tokens[None], logits_to_keep=keep).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "scaled", "adapted"])
def test_each_token_has_a_loss_of_its_own(kind: str) -> None:
    """With a plain head, one whose logits are scaled afterwards, and one that is an adapter's layer."""
    if kind == "scaled":
        config = transformers.GraniteConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, logits_scaling=8.0, tie_word_embeddings=False,
        )  # fmt: skip
        model: Any = transformers.GraniteForCausalLM(config)
    else:
        model = tiny_model("qwen3", layers=1)
    if kind == "adapted":
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        )
    prepare(model)
    call = packed_call()
    labels = call["input_ids"].masked_fill(torch.arange(43) % 5 == 2, -100)
    losses = model(**call, labels=labels, loss_reduction="none").loss
    assert losses.shape == labels.shape
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    targets[:, torch.tensor(LENGTHS).cumsum(0) - 1] = -100
    expected = F.cross_entropy(model(**call).logits[0], targets[0], reduction="none")
    torch.testing.assert_close(losses[0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(losses[0] == 0, targets[0] == -100)
    mean = model(**call, labels=labels).loss
    torch.testing.assert_close(losses.sum() / (targets != -100).sum(), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_reduction": "sum"}, "must be 'none', or left out for the mean, got 'sum'"),
        ({"num_items_in_batch": 3}, "divides by nothing; leave num_items_in_batch out"),
        ({"labels": None}, "needs labels"),
        ({"ignore_index": 5}, "has a loss of its own"),
    ],
)
def test_token_losses_that_cannot_be_told_are_refused(change: dict[str, Any], message: str) -> None:
    model = tiny_model("qwen3", layers=1)
    prepare(model)
    call = packed_call()
    with pytest.raises(ValueError, match=message):
        model(**{**call, "labels": call["input_ids"], "loss_reduction": "none", **change})


def test_hidden_states_are_recorded() -> None:
    model = tiny_model("qwen3_5")
    stock = copy.deepcopy(model)
    prepare(model)
    (tokens,) = documents([40])
    ours = model(tokens[None], output_hidden_states=True).hidden_states
    theirs = stock(tokens[None], output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_router_loss_counts() -> None:
    stock = tiny_model("qwen3_moe")
    model = copy.deepcopy(stock)
    prepare(model)
    (tokens,) = documents([40])
    call = {"input_ids": tokens[None], "labels": tokens[None], "output_router_logits": True}
    torch.testing.assert_close(model(**call).loss, stock(**call).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_use_cache_changes_nothing_with_padding(family: str) -> None:
    model = tiny_model(family).eval()
    prepare(model)
    call = packed_call()
    tokens = torch.nn.functional.pad(call["input_ids"], (0, 6))
    positions = torch.cat([call["sequences"].positions.long(), torch.arange(6)])[None]
    mask = (torch.arange(49) < 43).long()[None]
    logits = model(tokens, position_ids=positions, attention_mask=mask, use_cache=True).logits[:, :43]
    torch.testing.assert_close(logits, model(**call).logits, rtol=1e-4, atol=1e-5)


def test_use_cache_changes_no_loss() -> None:
    model = tiny_model("qwen3_5").eval()
    prepare(model)
    docs = documents([9, 4])
    tokens, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for row, doc in enumerate(docs):
        tokens[row, 9 - len(doc) :], mask[row, 9 - len(doc) :] = doc, 1
    call = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    assert torch.equal(model(**call, use_cache=True).loss, model(**call).loss)


def test_a_cache_with_packed_documents_is_refused() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    for extra in (packed_call(), {"position_ids": packed_call()["sequences"].positions.long()[None]}):
        call = {"input_ids": packed_call()["input_ids"], **extra}
        with pytest.raises(ValueError, match="past_key_values cannot hold packed documents"):
            model(**call, past_key_values=transformers.DynamicCache(config=model.config))


def test_three_rows_that_go_back_are_packed_whatever_the_mask_says() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    call = packed_call()
    positions = call["sequences"].positions.long().expand(3, 1, -1)
    mask = torch.ones_like(call["input_ids"])
    with pytest.raises(ValueError, match="hold no document boundaries"):
        model(call["input_ids"], position_ids=positions, attention_mask=mask)
    rising = torch.arange(43).expand(3, 1, -1)
    assert model(call["input_ids"], position_ids=rising, attention_mask=mask).logits.shape == (1, 43, 96)


def test_a_loss_of_ones_own_is_honoured_and_sees_no_target_across_documents() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    seen = []
    model.loss_function = lambda logits, labels, vocab_size, **_: seen.append(labels) or logits.sum() * 0 + 42
    call = packed_call(labels=packed_call()["input_ids"])
    assert float(model(**call).loss) == 42
    starts = call["sequences"].positions[None] == 0
    assert bool((seen[0][starts] == -100).all())
    assert torch.equal(seen[0][~starts], call["labels"][~starts])


@pytest.mark.parametrize("own_loss", [False, True])
def test_shifted_labels_see_no_target_across_documents(own_loss: bool) -> None:
    model = tiny_model("qwen3_5")
    stock = copy.deepcopy(model)
    prepare(model)
    seen = []
    if own_loss:
        model.loss_function = lambda logits, labels=None, shift_labels=None, **_: (
            seen.append(shift_labels)
            or F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), ignore_index=-100)
        )
    call = packed_call()
    tokens = call["input_ids"]
    shifted = F.pad(tokens, (0, 1), value=-100)[:, 1:]  # the next document's first token included
    docs = tokens[0].split(LENGTHS)
    expected = sum(
        F.cross_entropy(stock(doc[None], use_cache=False).logits[0, :-1], doc[1:], reduction="sum") for doc in docs
    ) / sum(len(doc) - 1 for doc in docs)
    loss = model(**call, shift_labels=shifted, **({"labels": tokens} if own_loss else {})).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_shifted_labels_keep_the_target_at_the_end_of_a_row() -> None:
    model = tiny_model("qwen3")
    tokens = torch.stack(documents([12, 12]))
    inputs, shifted = tokens[:, :-1], tokens[:, 1:]
    expected = F.cross_entropy(model(inputs, use_cache=False).logits.flatten(0, 1), shifted.flatten())
    prepare(model)
    torch.testing.assert_close(model(inputs, shift_labels=shifted).loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe"])
@pytest.mark.parametrize("form", ["sequences", "position_ids", "attention_mask"])
def test_torchs_default_device_moves_no_bookkeeping(family: str, form: str) -> None:
    model = tiny_model(family).train()
    prepare(model)
    given = packed_call()
    described = {
        "sequences": lambda: Sequences.from_lengths(LENGTHS),
        "position_ids": lambda: given["sequences"].positions[None].long(),
        "attention_mask": lambda: torch.ones_like(given["input_ids"]),
    }[form]
    losses = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            losses.append(model(given["input_ids"], labels=given["input_ids"], **{form: described()}).loss)
            losses[-1].backward()
    assert torch.equal(*losses)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("form", ["sequences", "position_ids", "attention_mask"])
def test_a_packed_call_inside_a_cached_one_is_packed(family: str, form: str) -> None:
    model = tiny_model(family).eval()
    prepare(model)
    call = packed_call()
    sequences = call.pop("sequences")
    described = {
        "sequences": sequences,
        "position_ids": sequences.positions[None].long(),
        "attention_mask": 1 + (sequences.positions == 0).long().cumsum(0)[None],
    }[form]
    seen = []

    def call_anew(*_: Any) -> None:
        if not seen:
            seen.append(None)
            seen[0] = model(**call, **{form: described}, labels=call["input_ids"])

    with torch.no_grad():
        expected = model(**call, **{form: described}, labels=call["input_ids"])
        handle = model.model.layers[0].register_forward_hook(call_anew)
        model.generate(documents([6])[0][None], max_new_tokens=2, pad_token_id=0)
        handle.remove()
    torch.testing.assert_close(seen[0].loss, expected.loss)
    torch.testing.assert_close(seen[0].logits, expected.logits)


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1, 3, 1, 1]])
def test_documents_of_one_token_are_packed_whatever_use_cache_says(lengths: list[int]) -> None:
    model = tiny_model("qwen3").eval()
    docs = documents(lengths)
    with torch.no_grad():
        expected = torch.cat([model(doc[None], use_cache=False).logits for doc in docs], dim=1)
        prepare(model)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        found = model(torch.cat(docs)[None], position_ids=positions, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_see_integers_of_the_shape_alone() -> None:
    model = tiny_model("qwen3", layers=1)
    prepare(model)
    seen = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["sequences"]), with_kwargs=True)
    for lengths in ([43], [1] * 43, LENGTHS):
        model(packed_call()["input_ids"], sequences=Sequences.from_lengths(lengths))
    assert {(one.max_length, one.num_sequences) for one in seen} == {(43, 44)}


def test_the_text_model_takes_arguments_by_position() -> None:
    model = tiny_model("qwen3_5").model
    tokens, mask = torch.stack(documents([9, 9])), torch.ones(2, 9, dtype=torch.long)
    expected = model(tokens, mask).last_hidden_state
    prepare(model)
    torch.testing.assert_close(model(tokens, mask).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="exactly one of"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))
