"""Packed batches of drawn lengths."""

import pytest
import torch

from deltatune.bench.workload import Workload, draw_lengths
from deltatune.errors import UserError


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tokens", [64, 200, 4096, 16384])
def test_lengths_fill_the_batch_within_their_bounds(tokens: int, seed: int) -> None:
    lengths = draw_lengths(tokens, shortest=64, longest=2048, seed=seed)
    assert sum(lengths) == tokens
    assert min(lengths) >= 64
    assert max(lengths) <= 2048


def test_one_document_as_long_as_the_batch() -> None:
    assert draw_lengths(131072, shortest=131072, longest=131072) == [131072]


def test_lengths_that_cannot_fill_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="cannot fill"):
        draw_lengths(10, shortest=64, longest=2048)


def test_batches_differ_in_order_and_tokens_but_not_in_work() -> None:
    workload = Workload((5, 9, 17, 3), vocab_size=50, seed=4)
    first, second, again = workload.batch(1), workload.batch(2), workload.batch(1)
    assert sorted(first.sequences.lengths) == sorted(second.sequences.lengths) == [3, 5, 9, 17]
    assert first.counts == second.counts
    assert not torch.equal(first.tensors["input_ids"], second.tensors["input_ids"])
    assert torch.equal(first.tensors["input_ids"], again.tensors["input_ids"])
    assert workload.batch(0).sequences.lengths == [5, 9, 17, 3]


def test_only_one_document_trains() -> None:
    batch = Workload((5, 9, 17), vocab_size=50).batch(0)
    trained = (batch.only(1).tensors["labels"][0] != -100).nonzero().flatten().tolist()
    assert trained == list(range(6, 14))
    assert torch.equal(batch.only(1).tensors["input_ids"], batch.tensors["input_ids"])


def test_a_document_alone_keeps_its_tokens() -> None:
    batch = Workload((5, 9, 17), vocab_size=50).batch(0)
    alone = batch.alone(1)
    assert torch.equal(alone.tensors["input_ids"], batch.tensors["input_ids"][:, 5:14])
    assert alone.counts.trained == 8
