"""The packed trainer on pairs of answers: losses by pair, rewards in its logs, a reference where the loss has one."""

# P pairs of a pack, D = 2 P documents

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from deltatune.config.reference import start_is_reference
from deltatune.config.rewards import REWARDS
from deltatune.config.schema import PreferenceSection, Recipe
from deltatune.data.dataset import PackedDataset, ReferencedPack
from deltatune.hf.model import base_model, in_mode
from deltatune.layers.exchange import from_every_rank
from deltatune.layers.router_loss import router_loss
from deltatune.packing.bins import pack
from deltatune.packing.sample import Sample
from deltatune.parallel.sequence import sequence_group_of
from deltatune.parallel.slice import batch_of_rank
from deltatune.phases import phase
from deltatune.training.batches import PACK_COUNTS, CountingCollator, PackCounts, PackOrder, pack_loader
from deltatune.training.nonfinite import Finding
from deltatune.training.preference import AnswerLogProbs, answer_log_probs, as_reference, preference_losses
from deltatune.training.trainer import Batch, PackedTrainer

__all__ = ["PairCollator", "PreferenceTrainer", "trainer_for"]

_NUM_DOCUMENTS, _REFERENCE = "num_documents", "reference"


class PairCollator(CountingCollator):
    """Packs of pairs to a batch that tells how many documents it holds, and what the reference says, if known."""

    def __call__(self, packs: Sequence[Sequence[Sample]]) -> dict[str, object]:
        """The batch of ``CountingCollator``, with ``num_documents`` and perhaps ``reference`` ``[D]``."""
        batch: dict[str, Any] = super().__call__(packs)
        known = [torch.from_numpy(pack.reference) for pack in packs if isinstance(pack, ReferencedPack)]
        return {
            **batch,
            _NUM_DOCUMENTS: batch[PACK_COUNTS].documents,
            **({_REFERENCE: torch.cat(known)} if known else {}),
        }


class PreferenceTrainer(PackedTrainer):
    """A ``PackedTrainer`` whose packs hold pairs of answers, for a prepared model.

    The loss of an optimizer step is ``sum_p loss_p / P``, with ``P`` the pairs of all its micro-batches on all ranks;
    an evaluation's is the same over the whole set. The auxiliary loss of a router is weighed by pairs too.

    The reference of a loss that has one is the model without its adapter, computed in every step, unless
    ``compute_reference`` is called first.

    Args:
        args, others: as ``PackedTrainer`` takes them.
        settings: which loss.
    """

    train_dataset: Any  # PackedDataset
    eval_dataset: Any  # PackedDataset or None

    counted: ClassVar[str] = "pairs"
    figures: ClassVar[tuple[str, ...]] = ("loss", *REWARDS)
    collator: ClassVar[type[CountingCollator]] = PairCollator
    in_order: ClassVar[bool] = True

    def __init__(self, *args: Any, settings: PreferenceSection, **others: Any) -> None:
        super().__init__(*args, **others)
        self._settings = settings
        self._reference_is_known = False
        # of the steps since the last log line, and before this one
        self._rewards = torch.zeros(len(REWARDS), dtype=torch.float64, device=self.args.device)
        self._num_rewarded = 0
        self._rewards_before = self._rewards, self._num_rewarded

    def compute_reference(self) -> None:
        """Takes the model as it is now for the reference: what it says of every pair is kept with the data."""
        self.train_dataset = self._with_reference(self.train_dataset)
        if self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset)
        self.check_experts()
        self._reference_is_known = True

    def _with_reference(self, data: PackedDataset) -> PackedDataset:
        packs = [np.array(members) for members in pack(data.member_lengths, data.report.tokens_per_batch)]
        order = PackOrder(len(packs), mesh=self._mesh, packs=lambda _: packs)
        loader = pack_loader(data, order, self.data_collator, self.args)
        mine = packs[self._mesh.data_rank :: self._mesh.data_size]
        nothing = np.array([], dtype=np.int64)
        sums = torch.zeros(data.lengths.size, dtype=torch.float64, device=self.args.device)
        with (
            phase("computing the reference", len(mine)) as advance,
            torch.no_grad(),
            self.compute_loss_context_manager(),
            in_mode(self.model, training=False),
        ):
            # in a ragged last round a rank may have a batch of padding alone, and runs it with the others
            for number, batch in enumerate(loader, start=1):
                members = mine[number - 1] if number <= len(mine) else nothing
                pieces = torch.from_numpy(data.pieces(members)).to(sums.device)
                sums[pieces] = self._answers(self.model, batch)[0].sums.double()
                advance(number)
        return replace(data, reference=self._mesh.sum_over_data(sums).float().cpu().numpy())

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimizer step and the pairs in them, on all ranks."""
        self._rewards_before = self._rewards.clone(), self._num_rewarded
        return super().get_batch_samples(*args)

    def _leave_out(self, found: Finding) -> None:
        self._rewards, self._num_rewarded = self._rewards_before
        super()._leave_out(found)

    def _count(self, counts: PackCounts) -> int:
        return counts.documents // 2

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the ranks that DDP and FSDP average over."""
        number = inputs[_NUM_DOCUMENTS] // 2
        with self.meter.forward():
            loss, rewards, outputs = self._sums(model, inputs)
        self._rewards += rewards
        self._num_rewarded += number
        loss = loss / (max(number, 1) if num_items_in_batch is None else num_items_in_batch) * self._mesh.size
        return (loss, outputs) if return_outputs else loss

    def _summed_figures(self, model: nn.Module, inputs: Batch) -> Tensor:
        loss, rewards, _ = self._sums(model, inputs)
        return torch.cat([loss.unsqueeze(0), rewards])

    def _sums(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor, Any]:
        """The loss of a batch's pairs, summed; the sums of ``REWARDS``, without a gradient; the model's output.

        Ranks that hold a pack together each know all of its pairs, and take equal shares of the sums.
        """
        reference, group = self._reference(inputs), sequence_group_of(self.model)
        policy, outputs = self._answers(model, inputs)
        losses, chosen, rejected = preference_losses(policy, self._settings, reference)
        total, pairs = losses.sum(), losses.new_full((1,), float(losses.numel()))
        of_router = router_loss(base_model(self.model), outputs, None, pairs, group)
        if of_router is not None:
            total = total + of_router.to(total.device)
        sums = policy.sums.detach()
        of_pairs = (chosen, rejected, chosen > rejected, chosen - rejected, sums[::2], sums[1::2])
        rewards = torch.stack([values.sum(dtype=torch.float32) for values in of_pairs])
        ranks = self._mesh.sequence_size
        return total / ranks, rewards / ranks, outputs

    def _reference(self, inputs: Batch) -> Tensor | None:
        """What the reference says of a batch's answers ``[D]``, for a loss that has one."""
        if not self._settings.has_reference:
            return None
        if self._reference_is_known:
            known: Tensor = inputs.get(_REFERENCE, torch.zeros(0, device=self.args.device))  # a batch of padding alone
            return known
        with as_reference(self.model):
            return self._answers(self.model, inputs)[0].sums

    def _answers(self, model: nn.Module, inputs: Batch) -> tuple[AnswerLogProbs, Any]:
        """What a model says of a batch's answers, and its output."""
        call = {name: inputs[name] for name in ("input_ids", "labels", "position_ids", "sequences")}
        outputs = model(**batch_of_rank(call, self._mesh), loss_reduction="none", output_logits=False)
        losses, group = outputs.loss, sequence_group_of(self.model)
        if group is not None:
            losses = from_every_rank(losses[0], group).view(1, -1)
        return answer_log_probs(losses, call["labels"], call["sequences"], inputs[_NUM_DOCUMENTS]), outputs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the rewards of the steps since the last training log line."""
        if "loss" in logs:
            *sums, number = self._summed_over_ranks(self._rewards, self._num_rewarded)
            logs.update({name: value / max(number, 1) for name, value in zip(REWARDS, sums, strict=True)})
            self._rewards.zero_()
            self._num_rewarded = 0
        super().log(logs, start_time)


def trainer_for(recipe: Recipe, model: nn.Module, args: TrainingArguments, **others: Any) -> PackedTrainer:
    """The trainer that a recipe asks for; a reference that is the model as it is now is computed.

    ``others``: as ``PackedTrainer`` takes them.
    """
    if recipe.preference is None:
        return PackedTrainer(model, args, **others)
    trainer = PreferenceTrainer(model, args, settings=recipe.preference, **others)
    if start_is_reference(recipe):
        trainer.compute_reference()
    return trainer
