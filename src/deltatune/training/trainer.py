"""transformers.Trainer on packs: one loss for all devices and micro-batches, evaluation by tokens, exact resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainingArguments

from deltatune.compile.offloading import offload_activations
from deltatune.data.dataset import PackedDataset
from deltatune.data.stream import PackStream
from deltatune.errors import UserError
from deltatune.hf.model import compute_dtype
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.slice import batch_of_rank
from deltatune.parallel.state import SHARDS, Parts
from deltatune.parallel.whole_documents import whole_documents
from deltatune.phases import phase
from deltatune.training.arguments import autocast_dtype
from deltatune.training.batches import (
    PACK_COUNTS,
    PACK_ORIGINS,
    STREAMED,
    CountingCollator,
    PackCounts,
    PackOrder,
    PackOrigins,
    pack_loader,
)
from deltatune.training.console import RunConsole, Screen
from deltatune.training.early_stopping import EarlyStopping
from deltatune.training.metrics import Meter
from deltatune.training.muon import MuonWithAdamW
from deltatune.training.nonfinite import MOST_SKIPPED, Finding, FiniteWatch, OnNonFinite, dump_step
from deltatune.training.optimizers import TRANSFORMERS_GROUPS, OptimizerSettings, parameter_groups
from deltatune.training.progress import ProgressBar
from deltatune.training.sealed_trainer import SealedTrainer

__all__ = ["PackedTrainer"]

Batch = dict[str, Any]


class PackedTrainer(SealedTrainer):
    """A ``SealedTrainer`` whose batches are packs, for a prepared model.

    The loss of an optimizer step is ``sum(nll) / n``, with ``n`` the trained tokens of all its micro-batches on all
    ranks: the same documents in one pack, in four accumulated ones, or on four ranks give the same loss and gradients.
    Ranks of a sequence group read the same packs; each calls the model with its part of them, and their losses add up.
    The auxiliary loss of a router, where the model returns one, is the mean of the packs' weighted by their trained
    tokens. Evaluation is ``sum(nll) / trained tokens`` over the whole set, the router's share as in training. No step
    waits for the device; log lines do (``on_nonfinite``: ``skip`` and ``dump`` at every step).

    Args:
        model: a prepared model, with or without PEFT adapters.
        args: as ``deltatune.training.arguments.training_arguments`` builds them.
        train_dataset, eval_dataset: packs, each a list of samples.
        tokens_per_batch: tokens of a pack, >= the longest pack.
        pad_token_id: fills the rest of a pack.
        processing_class: the tokenizer, saved with every checkpoint.
        recompiles: counts graphs compiled after the first ones; None where nothing is compiled.
        console: where progress is drawn; the standard output by default.
        about, first, early_stopping, forgets_best, mesh, parts: as ``SealedTrainer`` takes them.
        optimizer: learning rates by pattern, LoRA+ and Muon.
        on_nonfinite: what becomes of a step whose loss or gradient norm is no number; see the recipe's key.
        offloading: the device whose activations training steps keep in the host's memory; see ``offload_activations``.

    Attributes:
        skipped: the steps whose update was left out.
        on_skip: called with each of them.
    """

    counted: ClassVar[str] = "trained_tokens"
    """What losses are averaged over, by the name that an evaluation gives their number."""

    figures: ClassVar[tuple[str, ...]] = ("loss",)
    """What an evaluation averages over them."""

    collator: ClassVar[type[CountingCollator]] = CountingCollator

    in_order: ClassVar[bool] = False
    """Whether the documents of a pack have an order that means something, such as answers of a pair."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: PackedDataset | PackStream,
        eval_dataset: PackedDataset | None = None,
        tokens_per_batch: int,
        pad_token_id: int,
        processing_class: PreTrainedTokenizerBase | None = None,
        recompiles: Callable[[], int] | None = None,
        first: dict[str, Tensor] | None = None,
        console: RunConsole | None = None,
        about: Mapping[str, Any] | None = None,
        on_nonfinite: OnNonFinite = "stop",
        early_stopping: EarlyStopping | None = None,
        forgets_best: bool = False,
        optimizer: OptimizerSettings = TRANSFORMERS_GROUPS,
        offloading: torch.device | None = None,
        mesh: Mesh | None = None,
        parts: Parts = SHARDS,
    ) -> None:
        mesh = Mesh.of(args) if mesh is None else mesh
        self._evaluated = torch.zeros(len(self.figures))
        self._num_evaluated = self._evaluated_packs = 0
        self._optimizer_settings = optimizer
        self._offloading = offloading
        self._console = console or RunConsole(Screen(), moving=not args.disable_tqdm)
        self._on_nonfinite = on_nonfinite
        self._finite = FiniteWatch(mesh, train_dataset.where)
        self._batches: list[Batch] = []  # of this step, where they may have to be written
        self._packs: list[PackOrigins] = []  # of this step
        self._loss_before: Tensor | None = None  # the sum since the last log line, before this step
        self._save_is_due = False  # once the evaluation of this step is made
        self._logged_step = 0  # the last step before those of the next log line
        self.skipped: list[Finding] = []
        self.on_skip: Callable[[Finding], None] = lambda _: None
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator(
                tokens_per_batch=tokens_per_batch,
                pad_token_id=pad_token_id,
                whole=None if self.in_order else whole_documents(model, mesh),
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            about=about,
            first=first,
            early_stopping=early_stopping,
            forgets_best=forgets_best,
            mesh=mesh,
            parts=parts,
        )
        # the loss comes back divided by num_items_in_batch: the Trainer must not divide it by micro-batches as well
        self.model_accepts_loss_kwargs = True
        self.meter = Meter(
            model,
            device=args.device,
            dtype=autocast_dtype(args) or compute_dtype(model),
            recompiles=recompiles,
            mesh=self._mesh,
        )
        self.add_callback(self.meter)
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        self._bar = ProgressBar(self._console)
        self.add_callback(self._bar)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer, with a bar that goes whatever happens."""
        self._save_is_due = False
        try:
            result = super().train(*args, **kwargs)
            return result._replace(training_loss=result.metrics.get("train_loss", float("nan")))
        finally:
            self._bar.close()

    # Batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's packs in the order of seed and epoch; see ``PackOrder``."""
        in_order = getattr(self.args, "train_sampling_strategy", "random") == "sequential"
        in_order |= isinstance(self.train_dataset, PackStream)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = PackOrder(
            len(self.train_dataset),
            seed=None if in_order else seed,
            mesh=self._mesh,
            drop_last=self.args.dataloader_drop_last,
            packs=self.train_dataset.epochs,
            per_step=self._mesh.data_size * self.args.gradient_accumulation_steps,
            costs=None if isinstance(self.train_dataset, PackStream) else self.train_dataset.squares,
        )
        return pack_loader(self.train_dataset, order, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: PackedDataset | None = None) -> DataLoader[Any]:
        """This rank's packs of an evaluation set, in their own order."""
        source = self.eval_dataset if eval_dataset is None else eval_dataset
        if source is None:
            raise ValueError("evaluation needs an eval_dataset, got None")
        return pack_loader(source, PackOrder(len(source), mesh=self._mesh), self.data_collator, self.args)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimizer step and what losses are averaged over in them, on all ranks."""
        batches = list(islice(epoch_iterator, num_batches))
        self._packs = [batch.pop(PACK_ORIGINS) for batch in batches]
        self._batches = batches if self._on_nonfinite == "dump" else []
        self._finite.begin(self.state.global_step + 1, self._packs)
        counts = sum((batch.pop(PACK_COUNTS) for batch in batches), PackCounts())
        self.meter.add(counts)
        for news in (batch.pop(STREAMED) for batch in batches if STREAMED in batch):
            self._place = news.place or self._place
            for line in news.remarks:
                self._console.out(line, highlight=False)
        # the counts are known on the CPU, so the device fills in a number and nobody waits
        number = self._mesh.sum_over_data(torch.full((), self._count(counts), dtype=torch.int64, device=device))
        # a step of padding alone has loss 0 and no gradient, rather than 0 / 0
        return batches, number.clamp(min=1)

    def _count(self, counts: PackCounts) -> int:
        """What losses are averaged over, in these batches."""
        return counts.trained

    # Loss

    def compute_loss_context_manager(self) -> ExitStack:
        """The Trainer's, and around a training step's forward the offloading of activations."""
        stack: ExitStack = super().compute_loss_context_manager()
        if self._offloading is not None and self.model.training and torch.is_grad_enabled():
            stack.enter_context(offload_activations(self.model, device=self._offloading))
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the ranks that DDP and FSDP average over."""
        with self.meter.forward():
            outputs = model(**batch_of_rank(inputs, self._mesh), num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * self._mesh.size
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Batch) -> float:
        """Model FLOPs of this rank's matrices, for the Trainer's ``total_flos``; no walk over the model per step."""
        return self.meter.flops.per_token * float(inputs["input_ids"].numel() // self._mesh.sequence_size)

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """The Trainer's optimizer, over groups of our own where the recipe asks for any."""
        settings = self._optimizer_settings
        found: tuple[Any, Any] = super().get_optimizer_cls_and_kwargs(args, model)
        if not settings.act:
            return found
        cls, options = found
        if settings.muon:
            cls, options = MuonWithAdamW, {name: options[name] for name in ("lr", "betas", "eps")}
        groups = parameter_groups(
            self.model if model is None else model,
            settings,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
        )
        return cls, {**options, "params": groups}

    # Losses and gradients that are no numbers

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of a micro-batch; its loss is watched."""
        if self._on_nonfinite == "skip" and not self._finite.has_losses:
            self._loss_before = self._tr_loss.clone()
        if self._sharded and isinstance(model, FSDPModule):
            # parts are summed at once, which keeps them small; between replicas, with the last micro-batch
            model.set_requires_all_reduce(self.accelerator.sync_gradients)
        if isinstance(model, DistributedDataParallel) and not self.args.ddp_broadcast_buffers:
            # no layer writes a buffer: sending them out before each step would be one more time that all ranks wait
            model.broadcast_buffers = False  # an argument of this name warns in torch 2.13, and 2.11 knows no other
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._finite.add_loss(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, between backward and update: the place where a step can still be left out."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # a loss scaler looks for its scale by norms that are not finite, and leaves those steps out by itself
        if self.accelerator.scaler is None:
            self._finite.add_norm(norm)
        if self._on_nonfinite == "stop" or (found := self._finite.read()) is None:
            return norm
        if self._on_nonfinite == "dump":
            self._dump(found)
        self._leave_out(found)
        return None

    def _leave_out(self, found: Finding) -> None:
        """Makes the optimizer's next call do nothing; the Trainer then clears the gradients."""
        self.accelerator.gradient_state._set_sync_gradients(False)
        assert self._loss_before is not None
        self._tr_loss.copy_(self._loss_before)
        self.skipped.append(found)
        self._console.out(f"{found}; its update is left out", highlight=False)
        self.on_skip(found)
        latest = [skipped.step for skipped in self.skipped[-MOST_SKIPPED:]]
        if latest == list(range(found.step + 1 - MOST_SKIPPED, found.step + 1)):
            raise UserError(
                f"{found}, the {MOST_SKIPPED}th step in a row whose update was left out; go on from a checkpoint "
                "before with a lower training.learning_rate, or look at the rows"
            )

    def _dump(self, found: Finding) -> None:
        rank = f"-rank-{self._mesh.rank}" if self._mesh.size > 1 else ""
        folder = Path(self.args.output_dir) / f"nonfinite-step-{found.step}{rank}"
        dump_step(folder, found, self._batches, [self._finite.rows_of([pack]) for pack in self._packs])
        raise UserError(f"{found}; its update is not made, and its packs are in {folder}")

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Adds the batch's sums to the evaluation; returns its mean loss."""
        del prediction_loss_only, ignore_keys
        number = self._count(inputs.pop(PACK_COUNTS))
        inputs.pop(PACK_ORIGINS, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self._summed_figures(model, inputs)
        self._evaluated = self._evaluated + sums.double()
        self._num_evaluated += number
        self._evaluated_packs += 1
        self._advance(self._evaluated_packs)
        return sums[0] / max(number, 1), None, None

    def _summed_figures(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The sums of ``figures`` over a batch, fp32, the loss first; of ranks that share it, this one's part."""
        one = torch.ones((), device=self.args.device)
        inputs = {**batch_of_rank(inputs, self._mesh)}
        loss: Tensor = model(**inputs, num_items_in_batch=one, output_logits=False).loss
        return loss.float().unsqueeze(0)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The Trainer's loop; its mean of batch means becomes ``sum(nll) / trained tokens`` over all ranks."""
        self._evaluated = torch.zeros(len(self.figures), dtype=torch.float64, device=self.args.device)
        self._num_evaluated = self._evaluated_packs = 0
        with self.meter.paused(), phase("evaluating", len(dataloader)) as self._advance:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self.check_experts()
        *sums, number = self._summed_over_ranks(self._evaluated, self._num_evaluated)
        for name, value in zip(self.figures, sums, strict=True):
            output.metrics[f"{metric_key_prefix}_{name}"] = value / number if number else float("nan")
        output.metrics[f"{metric_key_prefix}_{self.counted}"] = int(number)
        return output

    def _summed_over_ranks(self, sums: Tensor, number: int) -> list[float]:
        """Shares of sums, and the number of a data rank, fp64, over all ranks; waits for the device."""
        counted = number if self._mesh.sequence_rank == 0 else 0
        both: list[float] = self._mesh.sum_over_ranks(torch.cat([sums, sums.new_full((1,), counted)])).tolist()
        return both

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the meter's window to training log lines, and drops rates that call a pack a sample."""
        if "loss" in logs:
            logs.update(self.meter.window())
            self._leave_skipped_out(logs)
        if "train_loss" in logs:
            self._of_this_leg(logs)
        for name in [name for name in logs if name.endswith("_samples_per_second")]:
            del logs[name]
        super().log(logs, start_time)

    def _of_this_leg(self, logs: dict[str, float]) -> None:
        """Makes the mean loss and the rate those of this process's steps; transformers < 5.19 divides by all legs'."""
        steps = self.meter.steps
        mean = self._total_loss_scalar / max(steps, 1)
        del logs["train_loss"]
        logs |= _over_taken(mean, steps, len(self.skipped), "train_loss")
        if "train_steps_per_second" in logs:
            logs["train_steps_per_second"] = round(steps / logs["train_runtime"], 3)

    def _leave_skipped_out(self, logs: dict[str, float]) -> None:
        """Makes the loss, a mean over all steps since the last line, one over those whose update was made."""
        skipped = sum(found.step > self._logged_step for found in self.skipped)
        if skipped:
            logs["skipped_steps"] = skipped
            steps = self.state.global_step - self._logged_step
            logs |= _over_taken(logs.pop("loss"), steps, skipped, "loss")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._logged_step = self._globalstep_last_logged
        self._save_after_evaluation()
        # the Trainer logs the last step only where logging_steps divides it: a short run would never say its loss
        if self.control.should_training_stop and self.args.logging_strategy != "no":
            self.control.should_log = True
        if self._waits():
            self.check_experts()
        found = self._finite.read() if self._waits() else None
        if found is None:
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        self.control.should_save = self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        raise UserError(
            f"{found}; nothing after the last checkpoint is saved; lower training.learning_rate, look at the rows, or "
            "set training.on_nonfinite to skip or dump"
        )

    def _save_after_evaluation(self) -> None:
        """Leaves the checkpoint of an epoch's last step to the epoch's end, where its evaluation comes before it.

        So the checkpoint knows that evaluation, as do those that go on from it. What a signal asks for is saved first.
        """
        control, state = self.control, self.state
        is_last = state.global_step >= state.max_steps
        ends = is_last or (not control.should_training_stop and state.epoch is not None and state.epoch % 1 == 0)
        if self._save_is_due:
            control.should_save, self._save_is_due = True, False
        elif control.should_save and not control.should_evaluate and ends and self.args.eval_strategy == "epoch":
            control.should_save, self._save_is_due = False, True

    def _waits(self) -> bool:
        """Whether the Trainer is about to wait for the device, or what is kept unread grows too long."""
        control = self.control
        waits = control.should_log or control.should_save or control.should_evaluate or control.should_training_stop
        return waits or self._finite.is_full


def _over_taken(mean: float, steps: int, skipped: int, name: str) -> dict[str, float]:
    """A mean over all steps, to which skipped ones added nothing, as one over those taken; nothing where none was."""
    taken = steps - skipped
    return {name: mean * steps / taken if skipped else mean} if taken > 0 or not skipped else {}
