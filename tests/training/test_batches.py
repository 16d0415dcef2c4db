"""Who gets which pack, and what a batch says about itself."""

from __future__ import annotations

import pytest
import torch
from training_cases import TOKENS, Packs

from deltatune.packing.sample import IGNORE_INDEX
from deltatune.parallel.mesh import Mesh
from deltatune.training.batches import PACK_COUNTS, CountingCollator, PackCounts, PackOrder


@pytest.mark.parametrize("num_packs", [1, 4, 5, 11])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_every_pack_once_in_equally_many_batches(num_packs: int, num_ranks: int) -> None:
    orders = [PackOrder(num_packs, seed=1, mesh=Mesh(num_ranks, rank)) for rank in range(num_ranks)]
    batches = [list(order) for order in orders]
    assert {len(of_rank) for of_rank in batches} == {len(orders[0])}
    assert sorted(index for of_rank in batches for batch in of_rank for index in batch) == list(range(num_packs))
    assert max(len(batch) for of_rank in batches for batch in of_rank) == 1


def test_a_ragged_round_can_be_left_out() -> None:
    orders = [PackOrder(7, seed=1, mesh=Mesh(2, rank), drop_last=True) for rank in (0, 1)]
    batches = [list(order) for order in orders]
    assert [len(of_rank) for of_rank in batches] == [3, 3] == [len(order) for order in orders]
    assert all(len(batch) == 1 for of_rank in batches for batch in of_rank)


def test_two_ranks_see_the_packs_of_one_process_in_turn() -> None:
    alone = list(PackOrder(5, seed=4))
    first, second = (list(PackOrder(5, seed=4, mesh=Mesh(2, rank))) for rank in (0, 1))
    assert [batch for both in zip(first, second, strict=True) for batch in both] == [*alone, []]


def test_the_permutation_is_that_of_seed_plus_epoch() -> None:
    order, other = PackOrder(20, seed=3), PackOrder(20, seed=4)
    first = list(order)
    order.set_epoch(1)
    assert list(order) == list(other) != first


def test_without_a_seed_packs_come_in_their_own_order() -> None:
    assert list(PackOrder(3)) == [[0], [1], [2]]


def test_counts_are_those_of_the_batch() -> None:
    pack = Packs(1).packs[0]
    batch = CountingCollator(tokens_per_batch=TOKENS, pad_token_id=0)([pack])
    counts = batch[PACK_COUNTS]
    assert counts == PackCounts(
        trained=sum(sample.num_trained for sample in pack),
        tokens=sum(len(sample) for sample in pack),
        capacity=TOKENS,
        squares=sum(len(sample) ** 2 for sample in pack),
        packs=1,
        documents=len(pack),
    )
    labels = batch["labels"]
    assert isinstance(labels, torch.Tensor)
    assert counts.trained == int((labels[:, 1:] != IGNORE_INDEX).sum())


def test_no_pack_is_a_row_of_padding() -> None:
    collator = CountingCollator(tokens_per_batch=TOKENS, pad_token_id=7)
    full, empty = collator(Packs(1).packs), collator([])
    assert full["input_ids"].shape == empty["input_ids"].shape == (1, TOKENS)
    assert empty[PACK_COUNTS] == PackCounts(capacity=TOKENS)
    assert bool((empty["labels"] == IGNORE_INDEX).all())
    assert bool((empty["input_ids"] == 7).all())
