"""transformers.Trainer on packs: one loss for all devices and micro-batches, evaluation by tokens, exact resume."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from deltatune.data.dataset import PackedDataset
from deltatune.data.stream import PackStream, Place
from deltatune.errors import UserError
from deltatune.hf.model import compute_dtype
from deltatune.training.arguments import autocast_dtype
from deltatune.training.batches import (
    PACK_COUNTS,
    STREAMED,
    CountingCollator,
    PackCounts,
    PackOrder,
    count_steps,
    pack_loader,
    place_file,
)
from deltatune.training.checkpoint import reload_weights
from deltatune.training.export import readable
from deltatune.training.mesh import Mesh
from deltatune.training.metrics import Meter
from deltatune.training.progress import ProgressBar
from deltatune.training.resuming import restore_settings
from deltatune.training.sealed import CHECKPOINT, commit, rotate, seal, staged_checkpoint

__all__ = ["PackedTrainer"]

Batch = dict[str, Any]


class PackedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose batches are packs, for a prepared model.

    The loss of an optimizer step is ``sum(nll) / n``, with ``n`` the trained tokens of all its micro-batches on all
    ranks: the same documents in one pack, in four accumulated ones, or on four ranks give the same loss and gradients.
    The auxiliary loss of a router, where the model returns one, is the mean of the packs' weighted by their trained
    tokens. Evaluation is ``sum(nll) / trained tokens`` over the whole set, the router's share as in training. No step
    waits for the device; log lines do.

    Args:
        model: a prepared model, with or without PEFT adapters.
        args: as ``deltatune.training.arguments.training_arguments`` builds them.
        train_dataset, eval_dataset: packs, each a list of samples.
        tokens_per_batch: tokens of a pack, >= the longest pack.
        pad_token_id: fills the rest of a pack.
        processing_class: the tokenizer, saved with every checkpoint.
        recompiles: counts graphs compiled after the first ones; None where nothing is compiled.
        console: where progress is drawn; the standard output by default.
        about: JSON that every checkpoint's manifest holds, such as the recipe.
    """

    counted: ClassVar[str] = "trained_tokens"
    """What losses are averaged over, by the name that an evaluation gives their number."""

    figures: ClassVar[tuple[str, ...]] = ("loss",)
    """What an evaluation averages over them."""

    collator: ClassVar[type[CountingCollator]] = CountingCollator

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
        console: Console | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._mesh = Mesh.of(args)
        self._evaluated = torch.zeros(len(self.figures))
        self._num_evaluated = 0
        self._staging: Path | None = None  # where a checkpoint is written, while one is
        self._about = about or {}
        self._place: Place | None = None  # of a stream, where the block of the latest batch begins
        self._console = console or Console()
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator(tokens_per_batch=tokens_per_batch, pad_token_id=pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
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
        if not args.disable_tqdm:
            self.add_callback(ProgressBar(self._console))

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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the ranks that DDP and FSDP average over."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * self._mesh.data_size
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Batch) -> float:
        """Model FLOPs of the batch's matrices, for the Trainer's ``total_flos``; no walk over the model per step."""
        return self.meter.flops.per_token * float(inputs["input_ids"].numel())

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Adds the batch's sums to the evaluation; returns its mean loss."""
        del prediction_loss_only, ignore_keys
        number = self._count(inputs.pop(PACK_COUNTS))
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self._summed_figures(model, inputs)
        self._evaluated = self._evaluated + sums.double()
        self._num_evaluated += number
        return sums[0] / max(number, 1), None, None

    def _summed_figures(self, model: nn.Module, inputs: Batch) -> Tensor:
        """The sums of ``figures`` over a batch, fp32, the loss first."""
        one = torch.ones((), device=self.args.device)
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
        self._num_evaluated = 0
        with self.meter.paused():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        *sums, number = self._summed_over_ranks(self._evaluated, self._num_evaluated)
        for name, value in zip(self.figures, sums, strict=True):
            output.metrics[f"{metric_key_prefix}_{name}"] = value / number if number else float("nan")
        output.metrics[f"{metric_key_prefix}_{self.counted}"] = int(number)
        return output

    def _summed_over_ranks(self, sums: Tensor, number: int) -> list[float]:
        """Sums and their number, fp64, over all ranks; waits for the device."""
        both: list[float] = self._mesh.sum_over_data(torch.cat([sums, sums.new_full((1,), number)])).tolist()
        return both

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the meter's window to training log lines, and drops rates that call a pack a sample."""
        if "loss" in logs:
            logs.update(self.meter.window())
        for name in [name for name in logs if name.endswith("_samples_per_second")]:
            del logs[name]
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; nothing after the last checkpoint is "
                "saved; lower training.learning_rate, or look at the rows (training.logging_steps: 1 finds the step)"
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # the Trainer logs the last step only where logging_steps divides it: a short run would never say its loss
        if self.control.should_training_stop and self.args.logging_strategy != "no":
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's files, in a folder beside their place that is sealed and then renamed."""
        output_dir = Path(self.args.output_dir)
        step = self.state.global_step
        with self.meter.paused(), staged_checkpoint(output_dir, step) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._commit(staging / f"{CHECKPOINT}{step}", output_dir)
            self.accelerator.wait_for_everyone()

    def _commit(self, folder: Path, output_dir: Path) -> None:
        place = output_dir / folder.name
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(place)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        readable(folder)
        seal(folder, self._about)
        commit(folder, place)
        shutil.rmtree(folder.parent, ignore_errors=True)
        rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # here, since every rank comes by and the file that makes a checkpoint whole is still to be written
        if self._place is not None:
            self._place.save(place_file(Path(output_dir), self._mesh))

    def take_up_finished(self, checkpoint: Path) -> bool:
        """Takes up the weights and the state of a checkpoint, if no step of the run is left after it.

        The Trainer itself goes one step further where the last step lies within an epoch.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        _, steps = count_steps(len(self.get_train_dataloader()), self.args)
        if state.global_step < steps:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self._loads_as_stock(target):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            # the stock way loads tensors by the names on disk, which for some families are not the module's names,
            # and goes on without those it cannot place
            reload_weights(target, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Their states, under the settings that hold now: what a recipe changes acts from here on."""
        groups = [] if checkpoint is None else self.optimizer.param_groups
        given = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:
            return
        restore_settings(self.optimizer, self.lr_scheduler, given)

    def _load_best_model(self) -> None:
        if self._loads_as_stock(self.model):
            super()._load_best_model()
        else:
            reload_weights(self.model, Path(self.state.best_model_checkpoint))

    def _loads_as_stock(self, model: nn.Module) -> bool:
        return hasattr(model, "peft_config") or self.is_fsdp_enabled or self.is_deepspeed_enabled
