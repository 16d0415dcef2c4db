"""A Trainer whose checkpoints are whole or not there, and which goes on from them by the settings that hold now."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from deltatune.data.stream import Place
from deltatune.errors import UserError
from deltatune.hf.experts import has_divided_experts
from deltatune.hf.model import has_shards
from deltatune.parallel.experts import DividedExperts, replicate_beside
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.state import SHARDS, Parts, gathered_state, reshard
from deltatune.parallel.stepping import step_kinds_apart
from deltatune.phases import phase
from deltatune.quantization.tensor import QuantizedTensor
from deltatune.training.adapter_parts import load_adapter_parts, saved_names
from deltatune.training.arguments import autocast_dtype
from deltatune.training.batches import place_file
from deltatune.training.early_stopping import EarlyStopping
from deltatune.training.export import CARD_FILE, readable
from deltatune.training.metrics import Meter
from deltatune.training.optimizer_state import load_optimizer, save_parts
from deltatune.training.reloading import reload_weights
from deltatune.training.resuming import best_beside, make_valid_json, restore_settings, state_of
from deltatune.training.saving import trained_rows_alone
from deltatune.training.sealed import CHECKPOINT, ORDER, commit, next_place, rotate, seal, staged_checkpoint
from deltatune.training.sharded_files import save_weights
from deltatune.training.starts import load_plain, make_plain

__all__ = ["SealedTrainer"]


class SealedTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that seals what it saves, knows its best checkpoint, and takes up a run that ended.

    Args:
        args: as the Trainer takes them.
        about: JSON that every checkpoint's manifest holds, such as the recipe.
        first: the factors that adapters began with inside the base weights; see ``starts``.
        early_stopping: ends the run when evaluations get no better.
        forgets_best: whether what a checkpoint says of the best evaluation is of other data, and counts for nothing.
        mesh: the processes; replicas of the model by default. A model of which ranks hold parts is so already.
        parts: how they do; in shards by default.
        others: as the Trainer takes them.
    """

    meter: Meter

    def __init__(
        self,
        *,
        args: TrainingArguments,
        about: Mapping[str, Any] | None = None,
        first: dict[str, Tensor] | None = None,
        early_stopping: EarlyStopping | None = None,
        forgets_best: bool = False,
        mesh: Mesh | None = None,
        parts: Parts = SHARDS,
        model: nn.Module,
        **others: Any,
    ) -> None:
        self._mesh = Mesh.of(args) if mesh is None else mesh
        self.parts = parts
        self._sharded, experts = has_shards(model), parts if isinstance(parts, DividedExperts) else None
        if experts is None and has_divided_experts(model):
            raise ValueError("the model's experts are divided; give parts, what parallelize() calls experts")
        self._in_parts = self._sharded or experts is not None
        self._mixes = self._sharded and experts is not None  # shards beside weights that are none
        self._staging: Path | None = None  # where a checkpoint is written, while one is
        self._about = about or {}
        self._first = first
        self._forgets_best = forgets_best
        self._place: Place | None = None  # of a stream, where the block of the latest batch begins
        self.early_stopping = early_stopping
        callbacks = None if early_stopping is None else [early_stopping]
        super().__init__(model=model, args=args, callbacks=callbacks, **others)
        beside: set[nn.Parameter] = set() if experts is None else {*experts.parameters}
        # which are whole and alike on all ranks, and of which DDP would send values
        beside |= {weight for weight in model.parameters() if isinstance(weight, QuantizedTensor)}
        # accelerate is to wrap it in nothing, neither DDP nor autocast
        self._unwrapped = self._sharded or (bool(beside) and not replicate_beside(model, beside))
        if self._unwrapped:
            vars(model)["_is_accelerate_prepared"] = True

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self._in_parts and not _lies_on(model, device):  # parts lie where they train
            super()._move_model_to_device(model, device)

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, whose accelerator does not move a model either that lies where it trains.

        A move there and no further still makes other tensors of weights in few bits, which compiled graphs know.
        """
        super().create_accelerator_and_postprocess()
        prepare, device = self.accelerator.prepare_model, self.accelerator.device

        def prepare_model(
            model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
        ) -> nn.Module:
            moves = False if _lies_on(model, device) else device_placement
            found: nn.Module = prepare(model, device_placement=moves, evaluation_mode=evaluation_mode)
            return found

        self.accelerator.prepare_model = prepare_model

    def compute_loss_context_manager(self) -> ExitStack:
        """Around a model that accelerate leaves alone its autocast; none around shards, which are gathered narrow."""
        stack: ExitStack = super().compute_loss_context_manager()
        if self._unwrapped and not self._sharded and (dtype := autocast_dtype(self.args)) is not None:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=dtype))
        return stack

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, over the parameters as they are between steps."""
        reshard(self.model)
        made = self.optimizer is None  # the Trainer asks more than once
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self._mixes:
            step_kinds_apart(optimizer)
        return optimizer

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """The Trainer's, with its two groups where shards and experts train: it would make more, by how weights lie."""
        cls, options = super().get_optimizer_cls_and_kwargs(args, model)
        if not self._mixes:
            return cls, options
        decays = {*self.get_decay_parameter_names(self.model)}
        groups = [
            {
                "params": [w for n, w in self.model.named_parameters() if w.requires_grad and (n in decays) == decayed],
                "weight_decay": args.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        return cls, {**options, "params": groups}

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._in_parts:
            return super()._clip_grad_norm(model)
        return self.parts.clip_grad_norm_(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._in_parts and grad_norm is None:
            grad_norm = self.parts.clip_grad_norm_(model, float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def check_experts(self) -> float:
        """How many times their even share of visits ranks needed room for; every rank calls it, and waits.

        Raises:
            UserError: on every rank, where visits were left out since there was less room.
        """
        try:
            return self.parts.check("parallel.expert_capacity")
        except UserError as error:
            raise UserError(f"{error}; nothing after the last checkpoint is saved") from error

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Sees to it that what a run may return to, and where it stops early, is on the disk."""
        found = bool(super()._determine_best_metric(metrics, trial))
        returned_to = found and self.args.load_best_model_at_end
        if self.args.save_strategy != "no" and (returned_to or self.stopped_early):
            self.control.should_save = True
        return found

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its last step since evaluations got no better."""
        stops = self.early_stopping is not None and self.early_stopping.stops
        return stops and self.state.global_step < self.state.max_steps

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint had the best evaluation; None where none was compared and kept."""
        place = self.state.best_model_checkpoint
        return None if place is None else int(Path(place).name.removeprefix(CHECKPOINT))

    @property
    def weights_step(self) -> int:
        """The step that the model's weights are of, once training has ended."""
        best = self.best_step if self.args.load_best_model_at_end else None
        return int(self.state.global_step) if best is None else best

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's files, in a folder beside their place that is sealed and then renamed."""
        self.check_experts()
        output_dir = Path(self.args.output_dir)
        step = self.state.global_step
        saving = phase(f"saving {CHECKPOINT}{step}")
        with self.meter.paused(), saving, staged_checkpoint(output_dir, step) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_global_step == step:
                # every rank returns to it, and by then it is in its place
                self.state.best_model_checkpoint = str(output_dir / f"{CHECKPOINT}{step}")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._commit(staging / f"{CHECKPOINT}{step}", output_dir)
            self.accelerator.wait_for_everyone()

    def _commit(self, folder: Path, output_dir: Path) -> None:
        place = output_dir / folder.name
        if self.state.best_global_step == self.state.global_step:
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        make_valid_json(folder / TRAINER_STATE_NAME)
        (folder / CARD_FILE).unlink(missing_ok=True)  # PEFT's, which is empty
        readable(folder)
        seal(folder, {**self._about, ORDER: next_place(output_dir)})
        commit(folder, place)
        shutil.rmtree(folder.parent, ignore_errors=True)
        rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._in_parts and not hasattr(self.model, "peft_config"):
            self._save_whole_model(Path(self.args.output_dir if output_dir is None else output_dir))
            return
        state_dict = self.whole_state() if self._in_parts else state_dict
        if not self.args.should_save:
            return
        with trained_rows_alone(self.model):
            super()._save(output_dir, state_dict)
        if self._first is not None:
            make_plain(Path(self.args.output_dir if output_dir is None else output_dir), self._first)

    def _save_whole_model(self, folder: Path) -> None:
        writes = self.args.should_save
        if writes:
            super()._save(str(folder), {})  # all but the weights
        save_weights(self.model, folder if writes else None, parts=self.parts)

    def whole_state(self) -> dict[str, Tensor]:
        """What is saved of a divided model with adapters, by the names of its ``state_dict()``: on rank 0.

        Every rank calls it.
        """
        return gathered_state(self.model, saved_names(self.model).__contains__, self.parts)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._in_parts:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_parts(self.model, self.optimizer.optimizer, Path(output_dir), self.parts)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # here, since every rank comes by and the file that makes a checkpoint whole is still to be written
        if self._place is not None and self._mesh.sequence_rank == 0:
            self._place.save(place_file(Path(output_dir), self._mesh))

    def take_up_finished(self, checkpoint: Path) -> None:
        """Takes up the weights and the state of a checkpoint after which no step of the run is left.

        The Trainer itself goes one step further where the last step lies within an epoch.
        """
        self.state = state = state_of(checkpoint)
        if self.early_stopping is not None:
            self.early_stopping.restore(state)
        self._find_best(checkpoint)
        if self.args.should_save:
            # what the run would have removed, had it not been killed before
            rotate(Path(self.args.output_dir), self.args.save_total_limit, state.best_model_checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()

    def _find_best(self, checkpoint: Path) -> None:
        """Puts right what the state of a checkpoint says of the best one."""
        self.state.best_model_checkpoint = None if self._forgets_best else best_beside(checkpoint, self.args)
        if self._forgets_best:
            self.state.best_metric = self.state.best_global_step = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target, folder = self.model if model is None else model, Path(resume_from_checkpoint)
        with phase(f"restoring {folder.name}"):
            if not self._reload(target, folder):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _reload(self, model: nn.Module, folder: Path) -> bool:
        """Puts a checkpoint's weights into the model; False where the Trainer's own way does."""
        if self._first is not None:
            load_plain(model, folder, self._first, self.parts)
        elif hasattr(model, "peft_config"):
            if not self._in_parts:
                return False
            load_adapter_parts(model, folder, self.parts)
        else:
            # the stock way loads tensors by the names on disk, which for some families are not the module's names,
            # and goes on without those it cannot place
            reload_weights(model, folder, self.parts)
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Their states, under the settings that hold now: what a recipe changes acts from here on."""
        if checkpoint is None:
            return
        given = [{n: value for n, value in group.items() if n != "params"} for group in self.optimizer.param_groups]
        with phase(f"restoring the optimizer of {Path(checkpoint).name}"):
            load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint), self.parts)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        self._find_best(Path(checkpoint))
        restore_settings(self.optimizer, self.lr_scheduler, given)
        # the state brings back when the run before logged, saved and evaluated
        self.state.compute_steps(self.args, self.state.max_steps)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        with phase(f"restoring {best.name}, the best"):
            if not self._reload(self.model, best):
                super()._load_best_model()


def _lies_on(model: nn.Module, device: torch.device) -> bool:
    return all(tensor.device == device for tensor in (*model.parameters(), *model.buffers()))
