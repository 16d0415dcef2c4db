"""What one field says about another: each rule is a small function of the whole recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from pydantic import BaseModel

from deltatune.config.inductor import INDUCTOR_OPTIONS
from deltatune.config.refused import refusal
from deltatune.config.schema import Recipe, Source, TrainingSection
from deltatune.errors import UserError, nearest

__all__ = ["ERROR_RULES", "WARNING_RULES", "check_recipe", "check_training_names"]

Rule = Callable[[Recipe], str | None]


def checkpointing_share_needs_compile(recipe: Recipe) -> str | None:
    """The share is spent by the compiler's partitioner, which an eager model does not have."""
    if isinstance(recipe.checkpointing, float) and recipe.compile is None:
        return (
            f"checkpointing: {recipe.checkpointing:g} is a share that the compiler spends, and compile is off; "
            "set compile: true, or checkpointing to none, layer or auto"
        )
    return None


def inductor_options_are_known(recipe: Recipe) -> str | None:
    """Only settings that change speed and memory, never results or other models."""
    options = {} if recipe.compile is None else recipe.compile.options
    for name in options:
        if name not in INDUCTOR_OPTIONS:
            return (
                f"compile.options.{name}: unknown{nearest(name, INDUCTOR_OPTIONS)}; "
                f"expected one of {', '.join(INDUCTOR_OPTIONS)}"
            )
    return None


def training_names_can_act(recipe: Recipe) -> str | None:
    """Names with another home in the recipe, or none at all."""
    for name, value in (recipe.training.model_extra or {}).items():
        reason = refusal(name, value)
        if reason is not None:
            return f"training.{name}: {json.dumps(value, default=str)} cannot act here; {reason}"
    return None


def evaluation_needs_data(recipe: Recipe) -> str | None:
    """An evaluation of nothing."""
    if recipe.training.eval_strategy != "no" and not recipe.data.eval:
        return (
            f"training.eval_strategy: {recipe.training.eval_strategy} needs data.eval; add a source to it, "
            "or set training.eval_strategy to no"
        )
    return None


def steps_need_their_strategy(recipe: Recipe) -> str | None:
    """``eval_steps`` and ``save_steps`` act with the strategy ``steps`` alone."""
    for kind in ("eval", "save"):
        strategy = getattr(recipe.training, f"{kind}_strategy")
        if _differs(recipe.training, f"{kind}_steps") and strategy != "steps":
            return (
                f"training.{kind}_steps cannot act with training.{kind}_strategy: {strategy}; "
                f"set {kind}_strategy to steps, or leave {kind}_steps out"
            )
    return None


def length_of_training_is_said_once(recipe: Recipe) -> str | None:
    """``max_steps`` overrides ``num_train_epochs``."""
    if recipe.training.max_steps > 0 and _differs(recipe.training, "num_train_epochs"):
        return (
            f"training.max_steps: {recipe.training.max_steps} makes training.num_train_epochs: "
            f"{recipe.training.num_train_epochs:g} meaningless; leave one of them out"
        )
    return None


def max_steps_is_a_count(recipe: Recipe) -> str | None:
    """-1 is transformers' way to say: count epochs."""
    if recipe.training.max_steps == 0 or recipe.training.max_steps < -1:
        return f"training.max_steps must be at least 1, or -1 to count epochs; got {recipe.training.max_steps}"
    return None


def one_autocast_dtype(recipe: Recipe) -> str | None:
    """bf16 and fp16 exclude each other."""
    if recipe.training.bf16 and recipe.training.fp16:
        return "training.bf16 and training.fp16 exclude each other; keep one"
    return None


def loss_scaler_needs_full_precision_weights(recipe: Recipe) -> str | None:
    """The loss scaler refuses to unscale float16 gradients."""
    if recipe.training.fp16 and recipe.model.dtype == "float16" and recipe.lora is None:
        return "training.fp16 scales the gradients of float32 weights; set model.dtype to float32 (or training.bf16)"
    return None


def best_checkpoint_needs_evaluation(recipe: Recipe) -> str | None:
    """The best by what measure."""
    training = recipe.training
    wants_best = training.load_best_model_at_end or training.save_strategy == "best"
    if wants_best and training.eval_strategy == "no":
        what = "load_best_model_at_end" if training.load_best_model_at_end else "save_strategy: best"
        return f"training.{what} needs evaluations; set data.eval and training.eval_strategy"
    return None


def dora_runs_on_stock_layers(recipe: Recipe) -> str | None:
    """DoRA rescales the sum of base and adapter, which one product cannot do."""
    if recipe.lora is not None and recipe.lora.use_dora and recipe.lora.impl == "fused":
        return "lora.use_dora cannot run in lora.impl: fused; set lora.impl to auto or stock"
    return None


def chat_settings_need_chat_data(recipe: Recipe) -> str | None:
    """A template that nothing is rendered with."""
    if any(source.format != "text" for source in (*recipe.data.train, *recipe.data.eval)):
        return None
    for section, names in ((recipe.data, ("chat_template_kwargs", "train_on")), (recipe.model, ("chat_template",))):
        for name in names:
            if _differs(section, name):
                where = "data" if section is recipe.data else "model"
                return f"{where}.{name} cannot act: every source has format: text, where all tokens train; leave it out"
    return None


def columns_fit_the_format(recipe: Recipe) -> str | None:
    """A column for a role that the format does not have."""
    roles: dict[str, tuple[str, ...]] = {
        "chat": ("messages", "tools"),
        "prompt_completion": ("prompt", "completion", "tools"),
        "text": ("text",),
    }
    for where, source in _sources(recipe):
        for role in source.columns:
            if source.format in roles and role not in roles[source.format]:
                expected = ", ".join(roles[source.format])
                return f"{where}.columns.{role} cannot act with format: {source.format}; expected {expected}"
    return None


def hub_settings_need_the_hub(recipe: Recipe) -> str | None:
    """A file has no splits and no configurations."""
    for where, source in _sources(recipe):
        if source.path.endswith((".jsonl", ".ndjson", ".json", ".parquet")):
            for name in ("split", "name"):
                if _differs(source, name):
                    return f"{where}.{name} cannot act on a file ({source.path}); leave it out"
    return None


def probe_settings_need_the_probe(recipe: Recipe) -> str | None:
    """Settings of a probe that is off."""
    given = [name for name in ("lengths", "tolerance") if _differs(recipe.verify, name)]
    if not recipe.verify.enabled and given:
        return f"verify.{given[0]} cannot act while verify.enabled is false; leave one of them out"
    return None


def cudagraphs_copy_boundaries(recipe: Recipe) -> str | None:
    """CUDA graphs replay fixed addresses, and every pack brings new boundaries."""
    if recipe.compile is not None and recipe.compile.options.get("triton.cudagraphs"):
        return (
            "compile.options.triton.cudagraphs with packing: every pack brings new boundaries, which the attention and "
            "delta rule ops read on the host, so a recorded graph cannot be replayed and Inductor skips it"
        )
    return None


def search_directions_need_the_search(recipe: Recipe) -> str | None:
    """A setting of a search that is off."""
    options = {} if recipe.compile is None else recipe.compile.options
    if options.get("coordinate_descent_check_all_directions") and not options.get("coordinate_descent_tuning"):
        return (
            "compile.options.coordinate_descent_check_all_directions changes nothing without coordinate_descent_tuning"
        )
    return None


def packs_fill_whole_chunks(recipe: Recipe) -> str | None:
    """The delta rule works in chunks of 64 tokens."""
    tokens = recipe.packing.tokens_per_batch
    if tokens % 64:
        return f"packing.tokens_per_batch: {tokens} is no multiple of 64, so kernels run a partial last chunk"
    return None


def low_precision_weights_train_in_place(recipe: Recipe) -> str | None:
    """A step below half a unit in the last place is rounded away."""
    if recipe.lora is None and recipe.model.dtype in ("bfloat16", "float16"):
        return (
            f"every weight trains in {recipe.model.dtype}: small updates round away; "
            "model.dtype: float32 with training.bf16 keeps them, for twice the memory of weights and optimizer"
        )
    return None


def evaluation_data_is_held_out(recipe: Recipe) -> str | None:
    """The same rows on both sides."""
    trained = {(source.path, source.name, source.split) for source in recipe.data.train}
    for source in recipe.data.eval:
        if (source.path, source.name, source.split) in trained:
            return f"data.eval uses {source.path}, which data.train uses as well: the evaluation is not held out"
    return None


ERROR_RULES: tuple[Rule, ...] = (
    checkpointing_share_needs_compile,
    inductor_options_are_known,
    training_names_can_act,
    evaluation_needs_data,
    steps_need_their_strategy,
    length_of_training_is_said_once,
    max_steps_is_a_count,
    one_autocast_dtype,
    loss_scaler_needs_full_precision_weights,
    best_checkpoint_needs_evaluation,
    dora_runs_on_stock_layers,
    chat_settings_need_chat_data,
    columns_fit_the_format,
    hub_settings_need_the_hub,
    probe_settings_need_the_probe,
)
WARNING_RULES: tuple[Rule, ...] = (
    cudagraphs_copy_boundaries,
    search_directions_need_the_search,
    packs_fill_whole_chunks,
    low_precision_weights_train_in_place,
    evaluation_data_is_held_out,
)


def check_recipe(recipe: Recipe) -> list[str]:
    """The warnings of a recipe that may run.

    Raises:
        UserError: all violated rules, in one line.
    """
    errors = [message for rule in ERROR_RULES if (message := rule(recipe)) is not None]
    if errors:
        raise UserError("; also: ".join(errors))
    return [message for rule in WARNING_RULES if (message := rule(recipe)) is not None]


def check_training_names(training: TrainingSection, known: Iterable[str]) -> None:
    """Checks names beyond the section's own fields against TrainingArguments' names, which the caller supplies.

    Args:
        training: the section.
        known: the field names of the installed ``transformers.TrainingArguments``.

    Raises:
        UserError: a name that is none, with the nearest one.
    """
    names = set(known)
    for name in training.model_extra or {}:
        if name not in names:
            raise UserError(
                f"training.{name}: unknown{nearest(name, sorted(names))}; expected a field of TrainingArguments"
            )


def _differs(section: BaseModel, name: str) -> bool:
    """Compared with the default, not with what was written: a resolved recipe writes everything and stays valid."""
    default: object = type(section).model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(section, name) != default)


def _sources(recipe: Recipe) -> list[tuple[str, Source]]:
    return [
        (f"data.{part}.{index}", source)
        for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval))
        for index, source in enumerate(sources)
    ]
