"""What one field says about another: errors that stop a recipe, and warnings that do not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator

from deltatune.config.data_rules import DATA_ERRORS
from deltatune.config.defaults import differs
from deltatune.config.idle import idle_settings, is_off_on_purpose
from deltatune.config.inductor import INDUCTOR_OPTIONS
from deltatune.config.kernel_names import kernel_errors
from deltatune.config.moments import moment_errors
from deltatune.config.refused import PASSED_TRAINING_NAMES, REFUSED_TRAINING_NAMES, refusal
from deltatune.config.schema import Fp8Quantization, LoraSection, Recipe, Source
from deltatune.config.training_section import TrainingSection
from deltatune.errors import RecipeKeyError, UserError, nearest, user_path

__all__ = [
    "SHARDED_OPTIMIZERS",
    "adapter_errors",
    "check_recipe",
    "check_training_names",
    "quantization_errors",
    "recipe_errors",
    "sharding_errors",
    "start_errors",
]

_CHUNK = 64  # tokens that the delta rule works on at once

_NAMED_STARTS = ("gaussian", "orthogonal", "mica", "pissa", "pissa_niter_4", "olora")
_OF_BASE = re.compile(r"(?i:mica|olora)|pissa.*")
_STARTS = re.compile(r"(?i:gaussian|mica|olora)|orthogonal|pissa(_niter_\d+)?")
# PEFT's others, which it would ignore, or fail at, without what they begin from
_STARTS_FROM_DATA = {
    "eva": "begins from activations on data, which no recipe gives it",
    "corda": "begins from covariances of activations, which no recipe gives it",
    "lora_ga": "begins from gradients on data, which no recipe gives it",
    "loftq": "begins from what quantisation by bitsandbytes loses",
}


def _compile_errors(recipe: Recipe) -> Iterator[str]:
    # the share is spent by the compiler's partitioner, which an eager model does not have
    if isinstance(recipe.checkpointing, float) and recipe.compile is None:
        yield (
            f"checkpointing: {recipe.checkpointing:g} is a share that the compiler spends, and compile is off; "
            "set compile: true, or checkpointing to none, layer or auto"
        )
    for name in _inductor_options(recipe):
        if name not in INDUCTOR_OPTIONS:
            yield (
                f"compile.options.{name}: unknown{nearest(name, INDUCTOR_OPTIONS)}; "
                f"expected one of {', '.join(INDUCTOR_OPTIONS)}"
            )


def _offloading_errors(recipe: Recipe) -> Iterator[str]:
    against = {
        "checkpointing: auto, which predicts a peak without it; set checkpointing to layer or none": (
            recipe.checkpointing == "auto"
        ),
        "compile.scope: model, a graph that hands over all activations at its end; set it to layer": (
            recipe.compile is not None and recipe.compile.scope == "model"
        ),
        "training.use_cpu, since nothing is on a GPU; set it to false": recipe.training.use_cpu,
    }
    for reason in (reason for reason, given in against.items() if given and recipe.activation_offloading):
        yield f"activation_offloading: true cannot act with {reason}"


def _training_names(recipe: Recipe) -> Iterator[str]:
    """Names with another home in the recipe, or none at all, and values that packs leave no room for."""
    extra = recipe.training.model_extra or {}
    for name, value in extra.items():
        reason = refusal(name, value)
        if reason is not None:
            yield f"training.{name}: {json.dumps(value, default=str)} cannot act here; {reason}"
    order = extra.get("train_sampling_strategy", "random")
    if order not in ("random", "sequential"):
        yield (
            f"training.train_sampling_strategy: {order} cannot act here, since packs are all of one length; "
            "choose one of random, sequential"
        )
    sharding = extra.get("accelerator_config")
    for name in ("dispatch_batches", "split_batches", "even_batches", "use_seedable_sampler", "non_blocking"):
        if isinstance(sharding, dict) and sharding.get(name) is not None:
            yield f"training.accelerator_config.{name} cannot act here: every rank reads its own packs"
    yield from idle_settings(recipe)


def _schedule_errors(recipe: Recipe) -> Iterator[str]:
    training = recipe.training
    if training.eval_strategy != "no" and not recipe.data.eval and recipe.data.val_size is None:
        yield (
            f"training.eval_strategy: {training.eval_strategy} needs data.eval or data.val_size; add one, "
            "or set training.eval_strategy to no"
        )
    for kind in ("eval", "save"):
        strategy = getattr(training, f"{kind}_strategy")
        off = is_off_on_purpose(training, f"{kind}_strategy")
        if differs(training, f"{kind}_steps") and strategy != "steps" and not off:
            yield (
                f"training.{kind}_steps cannot act with training.{kind}_strategy: {strategy}; "
                f"set {kind}_strategy to steps, or leave {kind}_steps out"
            )
    if training.max_steps > 0 and differs(training, "num_train_epochs"):
        yield (
            f"training.max_steps: {training.max_steps} makes training.num_train_epochs: "
            f"{training.num_train_epochs:g} meaningless; leave one of them out"
        )
    if training.max_steps == 0 or training.max_steps < -1:
        yield f"training.max_steps must be at least 1, or -1 to count epochs; got {training.max_steps}"
    compares = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "save_strategy: best": training.save_strategy == "best",
        "early_stopping_patience": training.early_stopping_patience is not None,
    }
    for what in (what for what, given in compares.items() if given and training.eval_strategy == "no"):
        yield f"training.{what} needs evaluations; set data.eval and training.eval_strategy"
    if differs(training, "early_stopping_threshold") and training.early_stopping_patience is None:
        yield "training.early_stopping_threshold cannot act without early_stopping_patience; set it, or leave this out"


#: Optimizers that step each element by itself, and so each rank its own part of a weight.
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")

#: Parts of the names of optimizers that make groups of their own, or step while backward runs.
_OWN_GROUPS = ("galore", "apollo", "lomo")


def _optimizer_errors(recipe: Recipe) -> Iterator[str]:
    training, extra = recipe.training, recipe.training.model_extra or {}
    if training.loraplus_lr_ratio is not None and recipe.lora is None:
        yield "training.loraplus_lr_ratio cannot act without adapters; add a section lora, or leave it out"
    if differs(training, "loraplus_lr_embedding") and training.loraplus_lr_ratio is None:
        yield "training.loraplus_lr_embedding cannot act without loraplus_lr_ratio; set it, or leave this out"
    grouped = {"learning_rates": bool(training.learning_rates), "loraplus_lr_ratio": training.loraplus_lr_ratio}
    if any(part in training.optim for part in _OWN_GROUPS):
        for name in (name for name, given in grouped.items() if given):
            yield f"training.{name} cannot act with optim: {training.optim}, which groups parameters itself"
    if training.optim == "muon":
        for name in ("optim_args", "optim_target_modules"):
            if extra.get(name):
                yield f"training.{name} cannot act with optim: muon; leave it out"


def _model_errors(recipe: Recipe) -> Iterator[str]:
    continued = recipe.lora is not None and recipe.lora.name_or_path is not None
    if recipe.training.unfrozen_parameters is not None and continued:
        yield "training.unfrozen_parameters cannot act with lora.name_or_path: what trains whole is said by the adapter"
    if recipe.training.fp16 and recipe.training.use_cpu:
        yield "training.fp16 needs a GPU, and training.use_cpu stays on the CPU; set training.bf16, or neither"
    if recipe.training.bf16 and recipe.training.fp16:
        yield "training.bf16 and training.fp16 exclude each other; keep one"
    if recipe.training.on_nonfinite == "skip":
        for key, why in _takes_steps_itself(recipe.training):
            yield f"training.on_nonfinite: skip cannot act with training.{key}, {why}; set it to stop or dump"
    # the loss scaler refuses to unscale float16 gradients
    if recipe.training.fp16 and recipe.model.dtype == "float16" and recipe.lora is None:
        yield "training.fp16 scales the gradients of float32 weights; set model.dtype to float32 (or training.bf16)"
    # DoRA rescales the sum of base and adapter, which one product cannot do
    if recipe.lora is not None and recipe.lora.impl == "fused":
        for name in (name for name in ("use_dora", "lora_dropout") if getattr(recipe.lora, name)):
            yield f"lora.{name} cannot run in lora.impl: fused; set lora.impl to auto or stock"
    if recipe.lora is not None:
        yield from adapter_errors(recipe.lora)
        start = recipe.lora.name_or_path
        if start is not None and user_path(start) == user_path(recipe.training.output_dir):
            yield f"lora.name_or_path: {start} is training.output_dir as well; save this run in another folder"
    given = [name for name in ("lengths", "tolerance") if differs(recipe.verify, name)]
    if not recipe.verify.enabled and given:
        yield f"verify.{given[0]} cannot act while verify.enabled is false; leave one of them out"


def _pattern_errors(recipe: Recipe) -> Iterator[str]:
    training, lora = recipe.training, recipe.lora
    given = {
        "training.learning_rates": tuple(training.learning_rates),
        "training.unfrozen_parameters": training.unfrozen_parameters,
    }
    if lora is not None:
        given |= {f"lora.{name}": tuple(getattr(lora, name)) for name in ("rank_pattern", "alpha_pattern")}
        # of a list, each is the end of a name
        for name in ("target_modules", "exclude_modules"):
            value = getattr(lora, name)
            given[f"lora.{name}"] = (value,) if isinstance(value, str) else None
    for key, patterns in given.items():
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{key}: {pattern!r} is no regular expression: {error}"


def _takes_steps_itself(training: TrainingSection) -> Iterator[tuple[str, str]]:
    """What makes updates, or leaves them out, where the trainer has no say."""
    if training.fp16:
        yield "fp16", "whose loss scaler leaves updates out by itself"
    if "lomo" in training.optim:
        yield "optim", f"since {training.optim} makes the update within the backward"


def adapter_errors(lora: LoraSection) -> Iterator[str]:
    """What is wrong with the section whatever the model is, one line each."""
    if lora.target_modules is None and lora.target_parameters is None:
        yield "lora has nothing to adapt: give target_modules or target_parameters, or leave the section out"
    if isinstance(lora.target_parameters, str) and lora.target_parameters != "all-experts":
        yield f"lora.target_parameters: expected all-experts or a list of names, got {lora.target_parameters}"
    for name in ("lora_dropout", "use_dora") if lora.target_parameters is not None else ():
        if getattr(lora, name):
            yield f"lora.{name} cannot act on lora.target_parameters; leave one of them out"
    if lora.target_parameters is None:
        # which of them can begin at all, their shapes say
        yield from start_errors(lora)


def start_errors(lora: LoraSection) -> Iterator[str]:
    """An initialisation that PEFT does not know, or could not carry out."""
    start = lora.init_lora_weights
    if isinstance(start, str) and not _STARTS.fullmatch(start):
        why = _STARTS_FROM_DATA.get(
            start.lower(), f"is none of PEFT's that can act here{nearest(start, _NAMED_STARTS)}"
        )
        yield f"lora.init_lora_weights: {start} {why}; choose true, false or one of {', '.join(_NAMED_STARTS)}"


def quantization_errors(recipe: Recipe) -> Iterator[str]:
    """What a recipe asks for that cannot act on base weights in few bits, one line each."""
    lora = recipe.lora
    if lora is None:
        yield (
            "model.quantization: weights in few bits are frozen, and the recipe has no adapters; add a section lora, "
            "or train weights of 16 or 32 bits"
        )
        return
    if lora.use_dora:
        yield "lora.use_dora takes the norms of its weights at every step, and the base is in few bits; set it to false"
    start = lora.init_lora_weights
    if isinstance(start, str) and _OF_BASE.fullmatch(start):
        yield (
            f"lora.init_lora_weights: {start} is made of the base weights' numbers, and the base is in few bits; "
            "choose true, false, gaussian or orthogonal"
        )


def _quantization_errors(recipe: Recipe) -> Iterator[str]:
    # what is quantised without this section, the checkpoint says
    given = recipe.model.quantization
    if given is None:
        return
    yield from quantization_errors(recipe)
    if given.compute == "fp8" and given.type not in ("fp8", "auto"):
        yield (
            f"model.quantization.compute: fp8 multiplies the codes of weights in fp8, and these are in {given.type}, "
            "of which only the values can be multiplied; leave compute out, or take a checkpoint in 16 bits with "
            "model.quantization: {type: fp8, compute: fp8}"
        )
    lora = recipe.lora
    if given.compute == "fp8" and lora is not None and lora.impl == "stock" and lora.target_parameters:
        yield (
            "lora.impl: stock adds adapters of experts to the values of their weights in every call, and no product of "
            "values is in fp8; set it to auto, or leave model.quantization.compute out"
        )
    if given.compute == "fp8" and isinstance(given, Fp8Quantization) and given.blocks:
        yield (
            "model.quantization.blocks: true makes a scale for each 128x128 weights, and products in fp8 take one for "
            "each output channel; leave blocks or compute out"
        )


def sharding_errors(recipe: Recipe, *, few_bits: bool = False) -> Iterator[str]:
    """What a recipe asks for that cannot act on weights of which each rank holds a part, one line each.

    ``few_bits``: the checkpoint's are in few bits.
    """
    training = recipe.training
    if few_bits or recipe.model.quantization is not None:
        yield "model.quantization: weights in few bits are not divided among processes yet; use replicas alone"
    if training.optim not in SHARDED_OPTIMIZERS:
        yield (
            f"training.optim: {training.optim} needs whole matrices, or kernels that know no shards; choose one of "
            f"{', '.join(SHARDED_OPTIMIZERS)}"
        )
    if training.fp16:
        yield "training.fp16 scales losses by what one process finds; set training.bf16"
    if recipe.activation_offloading:
        yield "activation_offloading would take gathered weights for activations; set it to false"
    if recipe.samples is not None:
        yield "samples are completed by one process, which has no whole weights; leave the section samples out"
    if recipe.compile is not None and recipe.compile.scope == "model":
        yield "compile.scope: model puts all layers into one graph, and weights are gathered between layers; use layer"


def _expert_errors(recipe: Recipe) -> Iterator[str]:
    ranks = recipe.parallel.expert
    if ranks in (1, "auto"):
        if recipe.parallel.expert_capacity != type(recipe.parallel).model_fields["expert_capacity"].default:
            yield "parallel.expert_capacity cannot act with parallel.expert: 1, where every process has all experts"
        return
    yield from (f"parallel.expert: {ranks}: {error}" for error in sharding_errors(recipe))


def _shard_errors(recipe: Recipe) -> Iterator[str]:
    # what auto takes is known only where the processes and the device are
    if isinstance(recipe.parallel.shard, int) and recipe.parallel.shard > 1:
        yield from (f"parallel.shard: {recipe.parallel.shard}: {error}" for error in sharding_errors(recipe))


def _sequence_errors(recipe: Recipe) -> Iterator[str]:
    ranks, shard, tokens = recipe.parallel.sequence, recipe.parallel.shard, recipe.packing.tokens_per_batch
    if ranks == "auto":
        return
    if ranks == 1 and recipe.parallel.recurrent == "state":
        yield "parallel.recurrent: state cannot act with parallel.sequence: 1, where every process has packs of its own"
    if tokens % ranks:
        yield (
            f"packing.tokens_per_batch: {tokens} is no multiple of parallel.sequence: {ranks}, whose ranks hold equal "
            f"parts of a pack; set it to {tokens + -tokens % math.lcm(ranks, _CHUNK)}, the next such multiple that is "
            f"whole chunks of the delta rule as well, {_CHUNK} tokens each"
        )
    if shard != "auto" and shard > 1 and shard % ranks:
        yield (
            f"parallel.shard: {shard} is neither 1 nor a multiple of parallel.sequence: {ranks}, whose ranks lie "
            "within one copy of the weights; choose another of them"
        )


def _warnings(recipe: Recipe) -> Iterator[str]:
    options = _inductor_options(recipe)
    if options.get("triton.cudagraphs"):
        yield (
            "compile.options.triton.cudagraphs with packing: every pack brings new boundaries, which the attention and "
            "delta rule ops read on the host, so a recorded graph cannot be replayed and Inductor skips it"
        )
    several, search = "coordinate_descent_check_all_directions", "coordinate_descent_tuning"
    if options.get(several) and not options.get(search):
        yield f"compile.options.{several} changes nothing without {search}"
    if recipe.model.revision is not None and user_path(recipe.model.name_or_path).is_dir():
        yield (
            f"model.revision: {recipe.model.revision} does nothing beside {recipe.model.name_or_path}, a folder; it is "
            "of models on the Hub"
        )
    tokens = recipe.packing.tokens_per_batch
    if tokens % _CHUNK:
        yield f"packing.tokens_per_batch: {tokens} is no multiple of {_CHUNK}, so kernels run a partial last chunk"
    # a step below half a unit in the last place is rounded away
    if recipe.lora is None and recipe.model.dtype in ("bfloat16", "float16"):
        yield (
            f"every weight trains in {recipe.model.dtype}: small updates round away; "
            "model.dtype: float32 with training.bf16 keeps them, for twice the memory of weights and optimizer"
        )
    trained = {_origin(source) for source in recipe.data.train}
    for source in recipe.data.eval:
        if _origin(source) in trained:
            yield f"data.eval uses {source.path}, which data.train uses as well: the evaluation is not held out"


_ERRORS = (
    _compile_errors,
    _offloading_errors,
    _training_names,
    _schedule_errors,
    moment_errors,
    _optimizer_errors,
    _model_errors,
    _quantization_errors,
    _pattern_errors,
    *DATA_ERRORS,
    kernel_errors,
    _shard_errors,
    _sequence_errors,
    _expert_errors,
)


def check_recipe(recipe: Recipe) -> list[str]:
    """The warnings of a recipe that may run.

    Raises:
        UserError: all violated rules, in one line.
    """
    errors = recipe_errors(recipe)
    if errors:
        raise UserError("; also: ".join(errors))
    return list(_warnings(recipe))


def recipe_errors(recipe: Recipe) -> list[str]:
    """What rules a recipe violates, one line each."""
    return [message for rule in _ERRORS for message in rule(recipe)]


def check_training_names(training: TrainingSection, known: Iterable[str]) -> None:
    """Checks names beyond the section's own fields against TrainingArguments' names, which the caller supplies.

    Raises:
        UserError: a name that is none, with the nearest one; or one of a newer transformers, of which nobody has said
            what it does here.
    """
    names = set(known)
    for name in training.model_extra or {}:
        if name in names and name not in PASSED_TRAINING_NAMES and name not in REFUSED_TRAINING_NAMES:
            raise RecipeKeyError(
                ("training", name),
                f"training.{name} is newer than this deltatune, which does not know whether it acts here; leave it out",
            )
        if name not in names:
            close = nearest(name, sorted(names))
            raise RecipeKeyError(
                ("training", name), f"training.{name}: unknown{close}; expected a field of TrainingArguments"
            )


def _inductor_options(recipe: Recipe) -> dict[str, bool]:
    return {} if recipe.compile is None else recipe.compile.options


def _origin(source: Source) -> tuple[str | None, ...]:
    return source.path, source.name, source.split or "train", source.revision
