"""A run from a recipe to a trained model: build, check, train, save."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from traceback import format_exception
from typing import Any

from rich.console import Console
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers import TrainingArguments

from deltatune import __version__
from deltatune.config.load import dump_recipe
from deltatune.config.rules import check_recipe
from deltatune.config.schema import Recipe
from deltatune.data.stream import PackStream
from deltatune.errors import InterruptedRunError, RankFailedError, UserError, first_line, one_line, user_path
from deltatune.parallel.mesh import Mesh
from deltatune.parallel.sequence import apart
from deltatune.parallel.state import SHARDS, Parts
from deltatune.phases import phase, shown_by
from deltatune.runs.card import model_card
from deltatune.runs.folder import read_run
from deltatune.signals import noted
from deltatune.training.arguments import training_arguments
from deltatune.training.base_identity import base_identity
from deltatune.training.beginning import begin, check_nothing_saved, saved_so_far
from deltatune.training.building import Described, Run, build, describe, load, report_of
from deltatune.training.changes import Change
from deltatune.training.checkpoint import load_config
from deltatune.training.console import RunConsole, Screen
from deltatune.training.continuing import adapter_record
from deltatune.training.early_stopping import EarlyStopping
from deltatune.training.ending import ending, ending_lines, evaluation_of_weights
from deltatune.training.export import save_trained, write_json, write_text
from deltatune.training.finishing import METRICS_FILE, REPORT_FILE, TrainResult, check_finite, metrics_of
from deltatune.training.interruption import told_before_training, told_of_memory, told_what_is_kept
from deltatune.training.layout import check_experts, shard_by_recipe
from deltatune.training.lock import locked
from deltatune.training.optimizers import OptimizerSettings
from deltatune.training.pack_ranks import check_sequence
from deltatune.training.packs import padding_token
from deltatune.training.preference_trainer import trainer_for
from deltatune.training.preflight import preflight
from deltatune.training.probing import first_layers, probe
from deltatune.training.process_group import own_process_group
from deltatune.training.prompts import prompts_of
from deltatune.training.ranks import RankWatch, explained, watched
from deltatune.training.record import RunRecord
from deltatune.training.resuming import decided_by_rank_0, found_by_rank_0, no_step_left, state_of, step_of
from deltatune.training.samples import Samples
from deltatune.training.sharded_files import save_weights
from deltatune.training.signals import StopAfterStep, caught_signals
from deltatune.training.since import (
    PACKS_PER_STEP,
    change_lines,
    changed_data,
    changed_settings,
    changed_steps,
    evaluates_otherwise,
    place_of,
)
from deltatune.training.trainer import PackedTrainer
from deltatune.training.untouched import final_metrics, read_metrics
from deltatune.training.weights_digest import digests_of
from deltatune.verification import VerifyReport

__all__ = ["Run", "TrainResult", "build", "train"]

_NOTHING_LEFT = "nothing was left to train; training.max_steps or num_train_epochs say how far to go"


def train(
    recipe: Recipe,
    *,
    resume: str | Path | bool | None = None,
    allow_change: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Runs a recipe: loads and prepares the model, packs the data, probes for leaks, trains, saves.

    Nothing is written before recipe, data and model have been checked. Afterwards ``training.output_dir`` holds the
    recipe with its defaults (``config.yaml``), what was done to the model (``report.json``), checkpoints, the trained
    adapter or model with its tokenizer, and ``metrics.json``.

    Args:
        recipe: the run.
        resume: a checkpoint folder, ``True`` for the last whole one in ``training.output_dir``, or ``"auto"`` for the
            same where there is one. A resumed run continues as if it had never stopped: weights, optimizer, random
            state, and the place in the data. Settings that were changed since act from there on, or are refused.
        allow_change: go on with other data, packs or seeds than the checkpoint was trained with.
        console: where to report; the standard output by default.

    Raises:
        UserError: a recipe, a model or a setting that cannot run, with the remedy; or a leak found by the probe.
        DataError: data that cannot be trained on, with the place.
    """
    warnings = check_recipe(recipe)
    preflight(recipe, resume)
    if recipe.parallel.sequence not in (1, "auto"):
        check_sequence(recipe, load_config(recipe.model))
    check_experts(recipe, int(os.environ.get("WORLD_SIZE", "1")))  # a launcher's word, before they meet
    with told_before_training(), own_process_group():
        arguments = training_arguments(recipe.training)
        screen = Console(quiet=True) if arguments.process_index else console or Screen()
        log = RunConsole(screen, moving=not arguments.disable_tqdm)
        watching = watched(recipe, arguments.process_index, arguments.world_size)
        with shown_by(log.phase), watching as watch, told_before_training():
            return _train(recipe, arguments, log, warnings, resume, allow_change, watch)


def _train(
    recipe: Recipe,
    arguments: TrainingArguments,
    log: RunConsole,
    warnings: list[str],
    resume: str | Path | bool | None,
    allow_change: bool,
    watch: RankWatch | None,
) -> TrainResult:
    for warning in warnings:
        log.out(f"warning: {warning}", highlight=False)
    checkpoint, passed_over = found_by_rank_0(lambda: begin(recipe, resume, clears=True), arguments)
    saved = saved_so_far(user_path(recipe.training.output_dir))
    settings, others = changed_settings(recipe, checkpoint, allow=allow_change), list[Change]()
    for line in [*passed_over, *change_lines(settings, checkpoint)]:
        log.out(line, highlight=False)

    def before_data(mesh: Mesh) -> None:
        of_steps = changed_steps(recipe, checkpoint, mesh, allow=allow_change)
        for line in change_lines(of_steps, checkpoint):
            log.out(line, highlight=False)
        others.extend(of_steps)

    with told_before_training(checkpoint), told_of_memory():
        described = describe(recipe, arguments, log, before_data)
        if checkpoint is not None and isinstance(described.data.train, PackStream):
            described.data.train.start = place_of(checkpoint, described.mesh)
        of_data = changed_data(recipe, described.data, checkpoint, allow=allow_change)
        for line in change_lines(of_data, checkpoint):
            log.out(line, highlight=False)
        others += of_data
        done = None
        if checkpoint is not None:
            log.out(f"going on from {checkpoint}", highlight=False)
            done = checkpoint if _is_done(described, checkpoint) else None
        if done is not None and (recorded := _recorded(described, done, others)) is not None:
            return _untouched(described, done, recorded)
        run = load(described)
        records = report_of(run, _verify(run))
        parts = shard_by_recipe(recipe, run.loaded, run.mesh, arguments)
    with locked(run.output_dir) if arguments.should_save else nullcontext(), ExitStack() as during_training:
        if arguments.should_save:
            check_nothing_saved(run.output_dir, saved)
        during_training.enter_context(_cache_setting_kept(run.model))
        return _fit(run, parts, records, checkpoint, done, settings + others, during_training, watch)


def _fit(
    run: Run,
    parts: Parts,
    records: dict[str, Any],
    checkpoint: Path | None,
    done: Path | None,
    changes: list[Change],
    during_training: ExitStack,
    watch: RankWatch | None,
) -> TrainResult:
    """Trains, evaluates and saves, and keeps the record of it; no step is left after the checkpoint ``done``."""
    otherwise = evaluates_otherwise(changes)
    with told_of_memory():
        trainer, record = _trainer(run, parts, otherwise), None
    step = 0 if checkpoint is None else step_of(checkpoint)
    if run.arguments.should_save:
        run.console.keep_in(run.output_dir)
        write_text(run.output_dir / "config.yaml", dump_recipe(run.recipe))
        write_json(run.output_dir / REPORT_FILE, records)
        about = {name: records[name] for name in ("versions", "device")} | {"data": run.data.identities()}
        about["processes"] = run.arguments.world_size
        if started_from := adapter_record(run.recipe.lora):
            about["adapter"] = started_from
        base = base_identity(run.recipe.model, run.model)
        said = [str(change) for change in changes]
        record = RunRecord(run.output_dir, about, model=base, changes=said, from_step=step, meter=trainer.meter)
        trainer.add_callback(record)
        trainer.on_skip = lambda found: record.add({"step": found.step, "skipped": str(found), "rows": found.rows})
    try:
        with explained(watch), told_what_is_kept(trainer, run.output_dir, checkpoint), ExitStack() as at_the_end:
            if record is not None and run.recipe.samples is not None:
                trainer.add_callback(_samples(run, trainer, from_step=step))
            if run.recipe.compile is not None:
                run.console.out("the first step compiles, which takes a while", highlight=False)
            _run_steps(trainer, checkpoint, done, run.console)
            evaluation = evaluation_of_weights(trainer, after=step if otherwise else -1)
            during_training.close()
            # the run is finished or it is not: files and records of both would be a mixture
            at_the_end.enter_context(_comes_to_its_end(run.console))
            result = _finish(run, trainer, evaluation, records)
            if record is not None:
                record.end("finished", trainer.state.global_step, None, ending(trainer))
    except BaseException as failure:
        status = "interrupted" if _is_interruption(failure) else "failed"
        run.console.keep(_said_of(failure, status))
        if record is not None:
            record.end(status, trainer.state.global_step, _reason(failure))
        raise
    return result


def _comes_to_its_end(console: RunConsole) -> AbstractContextManager[None]:
    """Within, the first signal ends nothing."""

    def say(number: int) -> None:
        name = signal.Signals(number).name
        console.out(f"{name}: the model is being saved, which ends the run; once more ends it at once")

    return noted(say)


def _is_interruption(failure: BaseException) -> bool:
    """Whether a signal has ended this run, also where it came to another rank."""
    of_rank = isinstance(failure, RankFailedError) and failure.is_interruption
    return of_rank or isinstance(failure, InterruptedRunError | KeyboardInterrupt)


def _is_done(described: Described, checkpoint: Path) -> bool:
    """Whether no step of a run is left after a checkpoint; on every rank."""
    stopping = EarlyStopping.of(described.recipe.training)
    return no_step_left(checkpoint, len(described.data.train), described.mesh, described.arguments, stopping)


def _recorded(described: Described, done: Path, others: list[Change]) -> dict[str, Any] | None:
    """The metrics of a run that finished at ``done`` and lacks nothing, so that it stays as it is; on every rank.

    ``others``: what no recipe says, and was changed since.
    """

    def find() -> dict[str, Any] | None:
        if others or done.resolve().parent != described.output_dir.resolve():
            return None
        return final_metrics(described.output_dir, recipe=described.recipe, step=step_of(done))

    return decided_by_rank_0(find, described.arguments)


def _untouched(described: Described, done: Path, recorded: Mapping[str, Any]) -> TrainResult:
    """What there is of a finished run; no weight is read and no file is written."""
    figures = [f"{name} {recorded[name]:.4f}" for name in ("loss", "eval_loss") if type(recorded.get(name)) is float]
    there = f"the weights of step {recorded.get('saved_step')} are in {described.output_dir}"
    for line in (
        "the run is finished under these settings, so its files stay as they are",
        _NOTHING_LEFT,
        ", ".join([there, *figures]),
    ):
        described.console.out(line, highlight=False)
    return TrainResult(described.output_dir, {**recorded, "leg": {"steps": 0}}, state_of(done).log_history)


def _reason(failure: BaseException) -> str:
    """In one line, without the traceback that another rank's failure carries."""
    return first_line(failure) if isinstance(failure, RankFailedError) else one_line(failure)


def _said_of(failure: BaseException, status: str) -> str:
    if isinstance(failure, RankFailedError):
        return f"{status}: {failure}"
    if isinstance(failure, UserError | InterruptedRunError | KeyboardInterrupt):
        return f"{status}: {one_line(failure)}"
    return "".join(format_exception(failure)).rstrip()


def _run_steps(trainer: PackedTrainer, checkpoint: Path | None, done: Path | None, console: RunConsole) -> None:
    """The steps that are left; none after the checkpoint ``done``.

    Raises:
        InterruptedRunError: a signal came before the last of them, or reached a compiler that a step waited for.
    """
    if done is not None:
        trainer.take_up_finished(done)
        return
    with ExitStack() as steps:
        stop = StopAfterStep(lambda: steps.enter_context(caught_signals(stop, console.out)))
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except TorchDynamoException as error:
            if stop.received is None:
                raise
            # a terminal and a launcher send signals to all of a group, and the C++ compiler does not wait
            if trainer.args.world_size > 1:  # the others do not know that this rank ends
                raise UserError(
                    f"{signal.Signals(stop.received).name}: a rank was stopped as it compiled; go on with --resume auto"
                ) from error
            raise InterruptedRunError(
                f"{signal.Signals(stop.received).name}: stopped within step {trainer.state.global_step + 1} of "
                f"{trainer.state.max_steps}, as it compiled; go on with --resume auto",
                128 + stop.received,
            ) from error
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        raise InterruptedRunError(
            f"{signal.Signals(stop.received).name}: stopped after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}, with a checkpoint; go on with --resume",
            128 + stop.received,
        )


def _verify(run: Run) -> VerifyReport | None:
    """The independence probe; a leak stops the run before its first step."""
    if not run.mesh.holds_parts:
        with apart(run.model):
            return probe(run.recipe, run.model, run.console)
    if not run.recipe.verify.enabled:
        return None
    run.console.out("probing the first layers with random weights: no process will hold the model", highlight=False)
    return probe(run.recipe, first_layers(run.recipe, run.arguments.device), run.console)


def _trainer(run: Run, parts: Parts = SHARDS, forgets_best: bool = False) -> PackedTrainer:
    def recompiles() -> int:
        report = run.prepared.compile_report
        return 0 if report is None else len(report.recompiles)

    return trainer_for(
        run.recipe,
        run.model,
        run.arguments,
        train_dataset=run.data.train,
        eval_dataset=run.data.eval,
        tokens_per_batch=run.recipe.packing.tokens_per_batch,
        pad_token_id=padding_token(run.tokenizer),
        processing_class=run.tokenizer,
        recompiles=recompiles,
        first=run.loaded.origin.first,
        console=run.console,
        about={
            "recipe": run.recipe.model_dump(mode="json"),
            "data": run.data.digests(run.recipe.data),
            "digests": digests_of(run.recipe),
            PACKS_PER_STEP: run.mesh.data_size * run.arguments.gradient_accumulation_steps,
            "deltatune": __version__,
        },
        on_nonfinite=run.recipe.training.on_nonfinite,
        early_stopping=EarlyStopping.of(run.recipe.training),
        forgets_best=forgets_best,
        optimizer=OptimizerSettings.of(run.recipe.training),
        offloading=run.arguments.device if run.recipe.activation_offloading else None,
        mesh=run.mesh,
        parts=parts,
    )


def _samples(run: Run, trainer: PackedTrainer, *, from_step: int) -> Samples:
    assert run.recipe.samples is not None
    return Samples(
        prompts_of(run.recipe, run.tokenizer, run.data.eval),
        run.tokenizer,
        max_new_tokens=run.recipe.samples.max_new_tokens,
        output_dir=run.output_dir,
        from_step=from_step,
        console=run.console,
        around=(trainer.meter.paused, trainer.compute_loss_context_manager),
    )


@contextmanager
def _cache_setting_kept(model: nn.Module) -> Iterator[None]:
    """The Trainer switches ``use_cache`` off for its own steps; the model that is saved shall generate with one."""
    config = vars(model.config)
    kept = {"use_cache": config["use_cache"]} if "use_cache" in config else {}
    try:
        yield
    finally:
        config.pop("use_cache", None)
        config.update(kept)


def _finish(run: Run, trainer: PackedTrainer, evaluation: Mapping[str, Any], records: dict[str, Any]) -> TrainResult:
    """Saves the model and the run's figures, in that order: figures without a model would look like a finished run."""
    metrics = metrics_of(run, trainer, evaluation)
    check_finite(run.model, run.mesh)
    trainer.check_experts()
    divided, whole = run.mesh.holds_parts, run.recipe.lora is None
    state = trainer.whole_state() if divided and not whole else None
    weights = partial(save_weights, run.model, parts=trainer.parts) if divided and whole else None
    if run.arguments.should_save:
        with phase("saving the model"):
            card = model_card(read_run(run.output_dir), metrics["saved_step"])
            said = save_trained(run.model, run.tokenizer, run.output_dir, run.loaded.origin, card, state, weights)
        for line in said:
            run.console.out(line, highlight=False)
        # the compiler's account is complete only now
        write_json(run.output_dir / REPORT_FILE, {**records, "prepare": run.prepared.report.to_dict()})
        # a finished run that is resumed has nothing to measure: the figures of its training stay
        before = {} if metrics["leg"]["steps"] else read_metrics(run.output_dir)
        write_json(run.output_dir / METRICS_FILE, {**metrics, "leg": before.get("leg", metrics["leg"])})
    elif weights is not None:
        weights(None)
    if not metrics["leg"]["steps"]:
        run.console.out(_NOTHING_LEFT)
    if trainer.skipped:
        steps = ", ".join(str(found.step) for found in trainer.skipped)
        run.console.out(f"updates that were left out, since a loss or gradient norm was no number: steps {steps}")
    for line in [*ending_lines(trainer), f"saved to {run.output_dir}"]:
        run.console.out(line, highlight=False)
    return TrainResult(run.output_dir, metrics, trainer.state.log_history)
