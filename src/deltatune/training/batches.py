"""From packs to batches: the order of an epoch, which rank gets which pack, and what each batch holds."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from deltatune.data.dataset import PackedDataset
from deltatune.data.stream import PackStream, StreamedPack
from deltatune.packing.by_rank import WholeDocuments
from deltatune.packing.collate import PackedCollator
from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.parallel.mesh import ALONE, Mesh
from deltatune.signals import leave_signals_to_parent
from deltatune.training.rounds import steps_of_like_cost

__all__ = [
    "PACK_COUNTS",
    "PACK_ORIGINS",
    "STREAMED",
    "CountingCollator",
    "PackCounts",
    "PackOrder",
    "PackOrigins",
    "count_steps",
    "pack_loader",
    "place_file",
]

PACK_COUNTS = "pack_counts"
"""The key of a batch under which its ``PackCounts`` travel; the trainer takes it out before the model is called."""

PACK_ORIGINS = "pack_origins"
"""The key of a batch under which its ``PackOrigins`` travel; the trainer takes it out as well."""

STREAMED = "streamed"
"""The key of a batch of a stream under which its ``News`` travel; the trainer takes it out as well."""


@dataclass(frozen=True)
class PackCounts:
    """What a batch holds, counted on the CPU before it moves, so that no metric ever waits for the device."""

    trained: int = 0  # targets, that is labels other than -100 that the loss sees after its shift
    tokens: int = 0  # of documents, padding excluded
    capacity: int = 0  # token slots of the batch, padding included
    squares: int = 0  # sum of squared document lengths; attention's work is proportional to it
    packs: int = 0
    documents: int = 0

    def __add__(self, other: PackCounts) -> PackCounts:
        return PackCounts(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __sub__(self, other: PackCounts) -> PackCounts:
        return PackCounts(*map(operator.sub, dataclasses.astuple(self), dataclasses.astuple(other)))


@dataclass(frozen=True, eq=False)
class PackOrigins:
    """Which rows the documents of a batch come from, as the data set's ``where`` takes them."""

    documents: tuple[int | str | None, ...] = ()


class PackOrder(Sampler[list[Any]]):
    """One rank's packs, a pack a batch; a function of seed, epoch and rank alone.

    An epoch is cut into rounds of ``mesh.data_size`` packs and every rank takes its own of each round, so all ranks run
    the same number of batches and every pack is seen exactly once. In a ragged last round a rank may get none at all:
    an empty list, from which ``CountingCollator`` makes a batch without targets.

    Args:
        num_packs: packs of an epoch.
        seed: of the permutation; epoch ``e`` uses ``seed + e``. ``None`` keeps the order of the data set.
        mesh: the data-parallel ranks, and which of them this one is.
        drop_last: leave a ragged last round out.
        packs: the packs of an epoch, as the data set takes them; their indices by default.
        per_step: packs of an optimizer step on all ranks.
        costs: what the packs of an epoch cost, ``[num_packs]``: those of a step then cost about the same. A step holds
            the same packs however many ranks share them.
    """

    def __init__(
        self,
        num_packs: int,
        *,
        seed: int | None = None,
        mesh: Mesh = ALONE,
        drop_last: bool = False,
        packs: Callable[[int], Sequence[Any]] | None = None,
        per_step: int = 1,
        costs: Callable[[int], NDArray[np.integer]] | None = None,
    ) -> None:
        self.num_packs, self.seed, self.mesh = num_packs, seed, mesh
        self.per_step, self.costs = per_step, costs
        self.packs = packs or (lambda _: range(num_packs))
        self.num_rounds = num_packs // mesh.data_size if drop_last else -(-num_packs // mesh.data_size)
        self.epoch = 0
        # accelerate looks for set_epoch and batch_size on a wrapped batch sampler, as after skipping at a resume
        self.sampler: Any = self
        self.batch_size, self.drop_last = 1, drop_last

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rounds

    def __iter__(self) -> Iterator[list[Any]]:
        packs, order = self.packs(self.epoch), self._order()
        for number in range(self.num_rounds):
            place = number * self.mesh.data_size + self.mesh.data_rank
            yield [packs[index] for index in order[place : place + 1]]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(self.num_packs))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_packs, generator=generator).numpy()
        if self.costs is not None and self.per_step > 1:
            order = steps_of_like_cost(order, self.costs(self.epoch), self.per_step, generator)
        numbers: list[int] = order.tolist()
        return numbers


class CountingCollator:
    """Packs to a batch: ``PackedCollator`` on their samples, plus the ``PackCounts`` of what it holds.

    ``whole`` lays documents out for the ranks that share packs. No pack at all becomes a row of padding, which adds
    nothing to the loss of a rank that has run out of packs.
    """

    def __init__(self, *, tokens_per_batch: int, pad_token_id: int, whole: WholeDocuments | None = None) -> None:
        self._collate = PackedCollator(tokens_per_batch=tokens_per_batch, pad_token_id=pad_token_id, whole=whole)
        nothing = Sample(np.array([pad_token_id]), np.array([IGNORE_INDEX]))
        self._padding = dataclasses.replace(self._collate, allow_unlabelled=True)([nothing])

    def __call__(self, packs: Sequence[Sequence[Sample]]) -> dict[str, object]:
        """The batch of these packs: what a prepared model takes, the counts and the origins."""
        samples = [sample for pack in packs for sample in pack]
        batch: dict[str, Any] = self._collate(samples) if samples else self._padding
        labels = batch["labels"]
        # only what a prepared model reads first: the stock names would be copied to the device for nothing
        kept = {name: batch[name] for name in ("input_ids", "labels", "position_ids", "sequences")}
        counts = PackCounts(
            trained=int((labels != IGNORE_INDEX).sum()),
            tokens=sum(len(sample) for sample in samples),
            capacity=labels.numel(),
            squares=sum(len(sample) ** 2 for sample in samples),
            packs=len(packs),
            documents=len(samples),
        )
        told = [pack.news for pack in packs if isinstance(pack, StreamedPack)]
        origins = PackOrigins(tuple(sample.origin for sample in samples))
        return {**kept, PACK_COUNTS: counts, PACK_ORIGINS: origins, **({STREAMED: told[-1]} if told else {})}


def place_file(checkpoint: Path, mesh: Mesh) -> Path:
    """Where a checkpoint keeps the place in a stream, for this rank."""
    return checkpoint / f"stream-{mesh.data_rank:05}-of-{mesh.data_size:05}.npz"


def count_steps(num_batches: int, arguments: TrainingArguments) -> tuple[int, int]:
    """Optimizer steps of an epoch of one rank's batches, and of the run, as transformers.Trainer counts them."""
    per_epoch = max(1, math.ceil(num_batches / arguments.gradient_accumulation_steps))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    return per_epoch, steps


def pack_loader(
    source: PackedDataset | PackStream, order: PackOrder, collator: CountingCollator, args: TrainingArguments
) -> DataLoader[Any]:
    """A loader of one rank's batches, on the rank's device.

    accelerate moves the batches and keeps its end-of-epoch books; it is told that there is one process, because
    ``order`` has already given every rank its packs: accelerate's own sharding repeats the first packs on a ragged
    epoch, and its dispatch would read everything on rank 0.
    """
    workers = args.dataloader_num_workers
    loader: DataLoader[Any] = DataLoader(
        source,  # type: ignore[arg-type]
        batch_sampler=order,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers > 0 else None,
        worker_init_fn=leave_signals_to_parent,
    )
    prepared: DataLoader[Any] = prepare_data_loader(
        loader,
        device=args.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        # pinned memory alone makes such a copy overlap with the step before it
        non_blocking=args.dataloader_pin_memory,
    )
    return prepared
