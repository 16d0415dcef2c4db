"""What each rank of a sequence group gets of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltatune import PackedCollator, Sequences
from deltatune.parallel.slice import cut_batch, padded_total


def collated(lengths: list[int], total: int) -> dict[str, Any]:
    samples = [{"input_ids": list(range(10 * i + 1, 10 * i + 1 + n))} for i, n in enumerate(lengths)]
    batch = PackedCollator(tokens_per_batch=total, pad_token_id=0, allow_unlabelled=True)(samples)
    return batch | {"kept": "as it is", "pixels": torch.zeros(4, total)}


@pytest.mark.parametrize(("lengths", "total"), [([3, 2, 4], 9), ([3, 2], 6), ([7, 1], 8), ([1, 1, 1], 12)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_are_the_pack(lengths: list[int], total: int, size: int) -> None:
    batch = collated(lengths, total)
    parts = [cut_batch(batch, rank=rank, size=size, pad_token_id=77) for rank in range(size)]
    padded = padded_total(total, size)
    assert padded % size == 0
    assert total <= padded < total + size
    whole = {
        name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0] if name.endswith(("ids", "labels"))
    }
    assert {value.shape for value in whole.values()} == {(1, padded)}
    assert whole["input_ids"][0].tolist() == batch["input_ids"][0].tolist() + [77] * (padded - total)
    assert whole["position_ids"][0, :total].tolist() == batch["position_ids"][0].tolist()
    assert whole["position_ids"][0, total:].tolist() == list(range(padded - total))
    assert whole["labels"][0].tolist() == batch["labels"][0].tolist() + [-100] * (padded - total)
    assert whole["shift_labels"][0].tolist() == [*whole["labels"][0, 1:].tolist(), -100]
    for part in parts:
        assert part["sequences"].total == padded
        assert part["sequences"].lengths[: len(lengths)] == lengths
        assert part["kept"] == "as it is"
        assert part["pixels"] is batch["pixels"]
        assert part.keys() == {*whole, "sequences", "kept", "pixels"}


def test_the_target_of_a_rank_s_last_token_is_the_next_rank_s_first() -> None:
    first, second = (cut_batch(collated([8], 8), rank=rank, size=2) for rank in (0, 1))
    assert first["shift_labels"].tolist() == [[2, 3, 4, 5]]
    assert second["shift_labels"].tolist() == [[6, 7, 8, -100]]


def test_no_target_lies_across_a_cut_between_documents() -> None:
    batch = {
        "input_ids": torch.arange(8)[None],
        "labels": torch.arange(8)[None],
        "sequences": Sequences.from_lengths([4, 4]),
    }
    assert cut_batch(batch, rank=0, size=2)["shift_labels"].tolist() == [[1, 2, 3, -100]]


def test_a_batch_without_labels_has_none() -> None:
    batch = collated([5], 8)
    del batch["labels"]
    assert cut_batch(batch, rank=0, size=2).keys() == {"input_ids", "position_ids", "sequences", "kept", "pixels"}


@pytest.mark.parametrize(
    ("batch", "rank", "message"),
    [
        ({"input_ids": torch.zeros(1, 8)}, 0, "by its sequences"),
        ({"input_ids": torch.zeros(2, 4), "sequences": Sequences.from_lengths([4, 4])}, 0, r"\[1, 8\].*got \[2, 4\]"),
        ({"input_ids": torch.zeros(1, 8), "sequences": Sequences.from_lengths([4])}, 0, r"\[1, 4\].*got \[1, 8\]"),
        ({"input_ids": torch.zeros(1, 8), "sequences": Sequences.from_lengths([8])}, 2, "rank must be from 0 to 1"),
        (collated([5], 8) | {"token_type_ids": torch.zeros(1, 8)}, 0, r"token_type_ids \[1, 8\] has an entry for each"),
        (collated([5], 8) | {"inputs_embeds": torch.zeros(1, 8, 4)}, 0, r"leave inputs_embeds out of the batch"),
    ],
)
def test_what_cannot_be_cut_is_named(batch: dict[str, Any], rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_batch(batch, rank=rank, size=2)
