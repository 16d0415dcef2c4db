from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune import Sequences
from deltatune.packing.group import SequenceGroup
from deltatune.packing.metadata import resolve_metadata
from deltatune.parallel.slice import cut_batch


def _positions(lengths: list[int]) -> list[int]:
    return [offset for length in lengths for offset in range(length)]


def _check(sequences: Sequences, lengths: list[int]) -> None:
    """Every field, against the lengths they describe."""
    total = sum(lengths)
    boundaries = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert sequences.lengths == lengths
    assert sequences.num_sequences == len(lengths)
    assert sequences.total == total
    assert sequences.cu_seqlens.dtype == sequences.cu_seqlens_cpu.dtype == sequences.positions.dtype == torch.int32
    assert sequences.cu_seqlens.tolist() == boundaries + [total] * (sequences.cu_seqlens.numel() - len(boundaries))
    assert torch.equal(sequences.cu_seqlens.cpu(), sequences.cu_seqlens_cpu)
    assert sequences.positions.tolist() == _positions(lengths)
    assert sequences.max_length >= max(lengths, default=0)


@pytest.mark.parametrize("lengths", [[5], [5, 1, 70, 7], [0, 3, 0, 0, 2], [1] * 9, []])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_from_lengths(lengths: list[int], as_tensor: bool) -> None:
    _check(Sequences.from_lengths(torch.tensor(lengths, dtype=torch.long) if as_tensor else lengths), lengths)


def test_padding_is_a_document_of_its_own() -> None:
    _check(Sequences.from_lengths([3, 2], total=9), [3, 2, 4])
    _check(Sequences.from_lengths([3, 2], total=5), [3, 2])
    _check(Sequences.from_lengths([], total=4), [4])


def test_shapes_depend_on_the_total_alone() -> None:
    few, many = Sequences.from_lengths([12]), Sequences.from_lengths([1] * 12)
    assert few.cu_seqlens.shape == many.cu_seqlens.shape == (14,)
    assert Sequences.from_document_ids(torch.ones(2, 6, dtype=torch.long)).cu_seqlens.shape == (14,)
    assert Sequences.from_position_ids(torch.arange(12)).cu_seqlens.shape == (14,)
    assert Sequences.from_cu_seqlens(torch.tensor([0, 5, 12])).cu_seqlens.shape == (14,)


def test_capacity() -> None:
    sequences = Sequences.from_lengths([2, 3], capacity=4)
    _check(sequences, [2, 3])
    assert sequences.cu_seqlens.tolist() == [0, 2, 5, 5, 5]
    _check(Sequences.from_lengths([2, 0, 0, 0, 0, 0, 1], capacity=7), [2, 0, 0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="2 documents exceed the capacity of 1; pass capacity=2"):
        Sequences.from_lengths([2, 3], capacity=1)
    crowded = Sequences.from_lengths([0, 0, 0, 1])  # more documents than tokens: the empty ones are left out
    _check(crowded, [1])
    assert crowded.cu_seqlens.shape == Sequences.from_lengths([1]).cu_seqlens.shape
    with pytest.raises(ValueError, match="whole numbers"):
        Sequences.from_lengths([2.5])


@pytest.mark.parametrize(
    ("lengths", "total", "message"),
    [
        ([3, -1], None, "must be >= 0, got -1"),
        ([3, 2], 4, "5 tokens, more than total=4"),
        (torch.ones(2, 2, dtype=torch.long), None, "one-dimensional"),
    ],
)
def test_from_lengths_refuses(lengths: list[int] | Tensor, total: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences.from_lengths(lengths, total=total)


def test_from_position_ids() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2]])
    _check(Sequences.from_position_ids(positions), [3, 2, 1, 2, 1, 3])
    _check(Sequences.from_position_ids(positions[0]), [3, 2, 1])
    # a document may begin at any position, and padding may repeat one
    _check(Sequences.from_position_ids(torch.tensor([[4, 5, 6, 1, 1, 1]])), [3, 1, 1, 1])
    # rows are apart even where the second goes on counting
    _check(Sequences.from_position_ids(torch.arange(6).view(2, 3)), [3, 3])


def test_from_mrope_positions() -> None:
    text = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    images = torch.zeros(3, 2, 5, dtype=torch.long)
    _check(Sequences.from_position_ids(torch.cat([text[None], images])), [3, 2, 1, 4])
    with pytest.raises(ValueError, match=r"\[3, B, T\] hold no document boundaries.*sequences="):
        Sequences.from_position_ids(images)


@pytest.mark.parametrize("shape", [(2, 2, 5), (4, 1, 2, 5)])
def test_positions_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sequences.from_position_ids(torch.zeros(shape, dtype=torch.long))


def test_from_cu_seqlens() -> None:
    _check(Sequences.from_cu_seqlens(torch.tensor([0, 3, 5], dtype=torch.int32), total=5), [3, 2])
    _check(Sequences.from_cu_seqlens(torch.tensor([0, 3, 3, 5])), [3, 0, 2])
    # a repeated tail holds no documents
    _check(Sequences.from_cu_seqlens(torch.tensor([0, 3, 5, 5, 5])), [3, 2])
    once = Sequences.from_lengths([4, 1, 2])
    _check(Sequences.from_cu_seqlens(once.cu_seqlens), [4, 1, 2])


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        (torch.tensor([1, 3]), "start at 0, got 1"),
        (torch.tensor([0, 3, 2, 8]), "must not decrease"),
        (torch.tensor([0, 3, 7]), "expected 8, got 7; describe padding as a document of its own"),
        (torch.tensor([0, 3, 9]), "expected 8, got 9"),
        (torch.tensor([0.0, 8.0]), "float32"),
        (torch.tensor([[0, 8]]), r"shape \(1, 2\)"),
        (torch.tensor([0]), "at least two entries"),
    ],
)
def test_from_cu_seqlens_refuses(boundaries: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences.from_cu_seqlens(boundaries, total=8)


def test_from_document_ids_restart_in_every_row_and_never_merge() -> None:
    ids = torch.tensor([[1, 1, 2, 2], [2, 1, 1, 0], [1, 1, 1, 1]])
    _check(Sequences.from_document_ids(ids), [2, 2, 1, 2, 1, 4])
    _check(Sequences.from_document_ids(ids.bool()), [4, 3, 1, 4])
    # padding on either side
    _check(Sequences.from_document_ids(torch.tensor([[0, 0, 1, 2, 2, 0]])), [2, 1, 2, 1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.ones(4, dtype=torch.long), r"\[B, T\]"),
        (torch.ones(1, 4), "float32"),
        (torch.tensor([[1, -1]]), "must be >= 0 .0 is padding., got -1"),
    ],
)
def test_from_document_ids_refuses(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences.from_document_ids(ids)


def test_moving_keeps_the_copy_on_the_cpu() -> None:
    sequences = Sequences.from_lengths([3, 2], total=6)
    moved = sequences.to("meta", non_blocking=True)
    assert moved.cu_seqlens.device.type == moved.positions.device.type == "meta"
    assert moved.cu_seqlens_cpu is sequences.cu_seqlens_cpu
    assert (moved.max_length, moved.num_sequences, moved.lengths) == (3, 3, [3, 2, 1])
    created = Sequences.from_lengths([3, 2], device="meta")
    assert created.cu_seqlens.device.type == "meta"
    assert created.lengths == [3, 2]


def test_moving_ignores_a_dtype() -> None:
    sequences = Sequences.from_lengths([3, 2])
    assert sequences.to("cpu") is sequences
    assert sequences.to(torch.float16) is sequences
    assert sequences.to("meta", torch.float16).cu_seqlens.dtype == torch.int32


def test_pinning_leaves_the_copy_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = Sequences.from_lengths([3, 2])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert sequences.pin_memory() is sequences
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self.numel()) or self.clone())
    sequences = Sequences.from_lengths([3, 2])
    result = sequences.pin_memory()
    assert sorted(pinned) == [5, 7]
    assert result.cu_seqlens_cpu is sequences.cu_seqlens_cpu
    assert result.cu_seqlens is not result.cu_seqlens_cpu
    _check(result, [3, 2])
    away = sequences.to("meta")
    assert away.pin_memory() is away


def test_static_integers_depend_on_the_total_alone() -> None:
    packs = [Sequences.from_lengths(lengths, total=40) for lengths in ([40], [1] * 40, [3, 0, 7], [])]
    for pack in packs:
        static = pack.static()
        assert (static.max_length, static.num_sequences) == (40, 41)  # the total, and all that the shape has room for
        assert static.cu_seqlens.shape == (42,)
        for name in ("cu_seqlens", "cu_seqlens_cpu", "positions"):
            assert getattr(static, name) is getattr(pack, name)
        assert static.max_length >= pack.max_length
        assert [n for n in static.lengths if n] == [n for n in pack.lengths if n]


def test_copies_and_pickles() -> None:
    sequences = Sequences.from_lengths([3, 2], total=6)
    _check(copy.deepcopy(sequences), [3, 2, 1])
    _check(pickle.loads(pickle.dumps(sequences)), [3, 2, 1])


def test_it_prints_what_it_describes() -> None:
    assert repr(Sequences.from_lengths([3, 2])) == "Sequences(num_sequences=2, total=5, max_length=3, device=cpu)"


@pytest.mark.parametrize("constructor", ["from_position_ids", "from_document_ids", "from_cu_seqlens"])
def test_hundreds_of_documents(constructor: str) -> None:
    lengths = [1 + i % 4 for i in range(300)]
    reference = Sequences.from_lengths(lengths)
    source = {
        "from_position_ids": reference.positions.view(1, -1),
        "from_document_ids": torch.arange(1, 301).repeat_interleave(torch.tensor(lengths)).view(1, -1),
        "from_cu_seqlens": reference.cu_seqlens,
    }[constructor]
    _check(getattr(Sequences, constructor)(source), lengths)


class Copies(TorchDispatchMode):
    """Of tensors of the CPU to another device: where each lies, and whether it is left to run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = func is torch.ops.aten._to_copy.default and args[0].is_cpu
        if leaves and kwargs.get("device", args[0].device) != args[0].device:
            self.seen.append((args[0].data_ptr(), kwargs.get("non_blocking", False)))
        return func(*args, **kwargs)


META = torch.device("meta")


def in_group(sequences: Sequences, recurrent: Any) -> None:
    group = SequenceGroup("ranks", 2, 1, recurrent)
    resolve_metadata({"sequences": sequences}, rows=1, tokens=4, device=META, group=group)


def cut(sequences: Sequences, size: int) -> None:
    tokens = torch.zeros(1, 8, dtype=torch.long, device=META)
    cut_batch({"input_ids": tokens, "labels": tokens, "sequences": sequences}, rank=0, size=size)


@pytest.mark.parametrize(
    ("use", "copies"),
    [
        (lambda sequences: sequences.to(META, non_blocking=True), 2),
        (lambda _: Sequences.from_lengths([3, 5], device=META), 2),
        (lambda sequences: resolve_metadata({"sequences": sequences}, rows=1, tokens=8, device=META), 2),
        (lambda sequences: in_group(sequences, "heads"), 2),
        (lambda sequences: in_group(sequences, "state"), 4),
        (lambda sequences: in_group(sequences.to(META, non_blocking=True), "state"), 4),
        (lambda sequences: cut(sequences, 2), 2),
        (lambda sequences: cut(sequences, 3), 2),
        (lambda sequences: cut(sequences.to(META, non_blocking=True), 3), 4),
    ],
)
def test_boundaries_reach_a_device_without_waiting_for_it(
    use: Callable[[Sequences], object], copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[Tensor] = []

    def pin(self: Tensor) -> Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: META)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    sequences = Sequences.from_lengths([3, 5])
    with Copies() as found:
        use(sequences)
    assert found.seen == [(tensor.data_ptr(), True) for tensor in pinned]
    assert len(pinned) == copies


def test_on_the_cpu_nobody_asks_for_accelerators(monkeypatch):
    """As a process that loads data, forked from one that uses them, must not."""

    def asked() -> bool:
        raise AssertionError("asked for accelerators")

    monkeypatch.setattr(torch.accelerator, "is_available", asked)
    assert Sequences.from_lengths([2, 3]).to("cpu", non_blocking=True).total == 5
