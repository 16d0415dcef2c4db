"""The comparison is fair: same documents, and the same loss for the same weights."""

from __future__ import annotations

import copy

import numpy as np
import torch

from deltatune import PackedCollator, prepare
from deltatune.demo.speed import compare, padded_batch, shuffled_batches
from deltatune.packing.sample import Sample
from deltatune.training.batches import PACK_COUNTS
from tiny import tiny_model


def sample(length: int, seed: int) -> Sample:
    ids = np.random.default_rng(seed).integers(1, 96, length)
    return Sample(ids, np.where(np.arange(length) >= length // 2, ids, -100))


def test_padding_is_masked_and_never_trains() -> None:
    batch = padded_batch([sample(3, 0), sample(5, 1)], pad_token_id=7)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][0, 3:].tolist() == [7, 7]
    assert batch["labels"][0].tolist() == [-100, *batch["input_ids"][0, 1:3].tolist(), -100, -100]


def test_shuffling_keeps_every_document_and_mixes_packs() -> None:
    packs = [[sample(2 + number, 10 * number + index) for index in range(4)] for number in range(5)]
    batches = shuffled_batches(packs)
    assert sorted(id(s) for batch in batches for s in batch) == sorted(id(s) for pack in packs for s in pack)
    assert [len(batch) for batch in batches] == [4] * 5
    assert all(len({len(s) for s in batch}) > 1 for batch in batches)


def test_both_ways_train_on_the_same_documents() -> None:
    stock = tiny_model("qwen3_5")
    prepared = copy.deepcopy(stock)
    prepare(prepared)
    packs = [[sample(5, 0), sample(11, 1), sample(1 + step, 2 + step)] for step in range(1, 4)]
    packed, padded = compare(prepared, stock, packs, tokens_per_batch=24, pad_token_id=0, learning_rate=1e-3, warm_up=1)
    assert min(packed.seconds, padded.seconds) > 0
    assert packed.counts.tokens == padded.counts.tokens == 2 * 16 + 3 + 4
    assert packed.counts.trained == padded.counts.trained == 2 * (3 + 6) + 2 + 2
    assert packed.counts.capacity == 2 * 24
    assert packed.counts.tokens < padded.counts.capacity <= 2 * 3 * 11


def test_a_pack_and_its_padded_rows_have_one_loss() -> None:
    stock = tiny_model("qwen3_5")
    prepared = copy.deepcopy(stock)
    prepare(prepared)
    samples = [sample(5, 0), sample(11, 1), sample(3, 2)]
    packed = PackedCollator(tokens_per_batch=24, pad_token_id=0)(samples)
    padded = padded_batch(samples, 0)
    assert padded.pop(PACK_COUNTS).capacity == 3 * 11
    expected = stock(**padded, use_cache=False).loss
    torch.testing.assert_close(prepared(**packed, use_cache=False).loss, expected, rtol=1e-5, atol=0)
