"""LoRA by PEFT, with every name in the recipe checked against the model: nothing that matches nothing is ignored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn

from deltatune.config.rules import adapter_errors, start_errors
from deltatune.config.schema import LoraSection, Recipe
from deltatune.errors import UserError, nearest, one_line
from deltatune.hf import model as hf_model
from deltatune.hf.experts import experts_layout
from deltatune.hf.peft import taken_for_experts, targeted_parameters
from deltatune.hf.units import trained_beside_text
from deltatune.subclass import stock_class
from deltatune.training.checkpoint import load_tokenizer
from deltatune.training.continuing import continued
from deltatune.training.layer_names import NAMED_EXPERTS, check_layer_numbers, nearest_layers
from deltatune.training.quantized_weights import check_frozen
from deltatune.training.starts import begins_in_base, is_variant, refuse_tied
from deltatune.training.tokenizer_files import grows
from deltatune.training.tokens import check_new_rows_train, resize_embeddings, token_rows
from deltatune.training.unfrozen import freeze_others, whole_modules

__all__ = ["adapt", "adapt_by_recipe"]


def adapt_by_recipe(model: nn.Module, recipe: Recipe, *, revision: str | None = None) -> nn.Module:
    """``adapt`` with all that a recipe says of what trains, after embeddings have grown for its tokens."""
    new_tokens: Sequence[int] = ()
    if grows(recipe):
        tokenizer = load_tokenizer(recipe.model)
        resize_embeddings(model, tokenizer)
        new_tokens = tokenizer.convert_tokens_to_ids(list(recipe.model.added_tokens or ()))
    adapted = adapt(model, recipe.lora, recipe.training.unfrozen_parameters, new_tokens, revision=revision)
    check_frozen(adapted)
    return adapted


def adapt(
    model: nn.Module,
    section: LoraSection | None,
    unfrozen: Sequence[str] | None = None,
    new_tokens: Sequence[int] = (),
    *,
    revision: str | None = None,
) -> nn.Module:
    """The model as a recipe trains it: with LoRA adapters and everything else frozen, or, without a section, whole.

    ``unfrozen`` are regular expressions over names of parameters: these train beside adapters, or in place of all. The
    rows of ``new_tokens`` train in any case.

    Towers for images and sound are frozen: text gives them no gradient, and a report should not say they train. So
    ``all-linear`` and other targets mean modules of the text model, unless ``exclude_modules`` says which do not. With
    ``name_or_path`` adapters are built as that one's, for ``load_adapter``, and those of a tower stay as they are.
    Adapters are kept in float32, or in the base weights' dtype with ``adapter_dtype: model``. ``revision`` of the base
    model is recorded with them.

    Raises:
        UserError: a target, a pattern or a module to save that matches nothing (with the nearest names) or is a
            tower's, a layer index out of range, or a combination that PEFT refuses.
    """
    towers = _towers(model)
    for name in towers:
        model.get_submodule(name).requires_grad_(False)
    if section is None:
        if unfrozen is not None:
            freeze_others(model, unfrozen)
        if new_tokens:
            check_new_rows_train(model)
        return model
    if errors := list(adapter_errors(section)):
        raise UserError("; also: ".join(errors))
    if section.name_or_path is not None:
        as_before = continued(model, section, new_tokens)
        for name in trained_beside_text(as_before):
            as_before.get_parameter(name).requires_grad_(False)
        return as_before
    import peft

    arguments = section.peft_arguments() | _targets(model, section, towers)
    if unfrozen is not None:
        arguments["modules_to_save"] = [*(section.modules_to_save or ()), *whole_modules(model, unfrozen)]
    if new_tokens:
        saved = section.model_copy(update={"modules_to_save": arguments.get("modules_to_save")})
        arguments["trainable_token_indices"] = token_rows(model, new_tokens, saved) or None
    if errors := list(start_errors(section)):
        raise UserError(errors[0])
    # weights that are not there cannot be taken apart; shapes do not depend on it, but what trains may
    empty = hf_model.text_model(model).get_input_embeddings().weight.is_meta
    variant = is_variant(section.init_lora_weights)
    if empty and not variant:
        arguments["init_lora_weights"] = True
    try:
        config = peft.LoraConfig(revision=revision, **_base(model), **arguments)
        with torch.device("meta") if empty else nullcontext():  # adapters of any rank cost nothing there
            adapted: nn.Module = peft.get_peft_model(
                model,
                config,
                autocast_adapter_dtype=section.adapter_dtype == "float32",
                low_cpu_mem_usage=empty and variant,
            )
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {one_line(error)}") from error
    if empty and section.adapter_dtype == "model":
        _cast_to_base(adapted)
    if begins_in_base(section.init_lora_weights):
        refuse_tied(adapted)
    _check_patterns(section, cast("Any", adapted).base_model)
    if added := set(config.target_parameters or ()) - set(arguments["target_parameters"] or ()):
        raise UserError(_taken(model, section.target_modules, added))
    names = trained_beside_text(adapted)
    if section.bias == "all":  # those of towers too, which PEFT unfreezes
        for name in [name for name in names if name.endswith(".bias") and ".modules_to_save." not in name]:
            adapted.get_parameter(name).requires_grad_(False)
            names.remove(name)
    if names:
        raise UserError(
            f"lora: {names[0].removeprefix('base_model.model.')} would train, of a tower that text gives no gradient; "
            "leave it out of target_modules and modules_to_save, or name it in exclude_modules"
        )
    return adapted


def _base(model: nn.Module) -> dict[str, Any]:
    """What names the base model's class; PEFT records its path.

    Without a task PEFT's ``AutoPeftModel...`` classes load the class that is named here. With CAUSAL_LM they take
    AutoModelForCausalLM, whose class for a checkpoint of a model with images has other names, and no adapter fits them.
    """
    cls = stock_class(model)
    plain = cls.__name__.endswith("ForCausalLM") or not cls.__module__.startswith("transformers.")
    return {
        "task_type": "CAUSAL_LM" if plain else None,
        "auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__},
    }


def _targets(model: nn.Module, section: LoraSection, towers: list[str]) -> dict[str, Any]:
    """PEFT's ``target_modules``, ``target_parameters`` and ``exclude_modules``.

    ``all-linear`` is every linear layer of the text model, also where PEFT would take some of their names for experts:
    the weights of those are named as Parameters, with the same files.
    """
    modules: Any = section.target_modules
    excluded, decoder = section.exclude_modules, hf_model.text_model(model)
    given = () if modules is None or isinstance(modules, str) else modules
    layers = {id(module) for module in decoder.modules()}
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in layers]
    taken = taken_for_experts(model, {name.rpartition(".")[2] for name in (*linear, *given)})
    if wrong := [name for name in given if name.rpartition(".")[2] in taken]:
        raise UserError(_taken(model, modules, wrong))
    _check_names(model, section)
    if taken and isinstance(modules, str) and modules != "all-linear":
        # of an expression PEFT takes the last parts of what it matches, and adapts everything of these names
        modules = [name for name, _ in model.named_modules() if re.fullmatch(modules, name)]
        if any_taken := taken & {name.rpartition(".")[2] for name in modules}:
            raise UserError(_taken(model, section.target_modules, any_taken))
    if section.target_parameters == "all-experts":
        parameters = _expert_weights(model, decoder, excluded)
    else:
        parameters = list(section.target_parameters or ())
    if modules is not None and towers and excluded is None:
        excluded = rf"(?:{'|'.join(map(re.escape, towers))})\..*"
    if modules == "all-linear" and (taken or section.layers_to_transform):  # PEFT takes layers with names alone
        kept = [name for name in linear if not _excluded(name, excluded)]
        endings = dict.fromkeys(".".join(name.split(".")[-2:]) for name in kept)
        modules = [name for name in endings if name.rpartition(".")[2] not in taken]
        # PEFT excludes no Parameters
        named = endings if section.exclude_modules is None else kept
        parameters += [f"{name}.weight" for name in named if name.rpartition(".")[2] in taken]
    _check_parameters(section, parameters)
    if parameters and (towers or section.layers_to_transform):
        parameters = _full_names(model, decoder, parameters, section.layers_to_transform)
    return {
        "target_modules": [] if modules is None else modules,
        "target_parameters": parameters or None,
        "exclude_modules": excluded,
        "rank_pattern": _patterns(model, section.rank_pattern, parameters),
        "alpha_pattern": _patterns(model, section.alpha_pattern, parameters),
    }


def _patterns(model: nn.Module, given: Mapping[str, int], parameters: list[str]) -> dict[str, int]:
    """Patterns as PEFT reads them, with the name of a layer's weight where that is named as a Parameter.

    PEFT holds them against ``mlp.gate.weight`` there; in a recipe ``mlp.gate`` names the same adapter.
    """
    layers = [path for path, names in targeted_parameters(model, parameters).items() if "weight" in names]
    found = {}
    for pattern, value in given.items():
        found[pattern] = value
        if any(_matches(pattern, path) for path in layers):
            found[rf"({pattern})\.weight"] = value
    return found


def _matches(pattern: str, name: str) -> bool:
    """As PEFT reads ``rank_pattern`` and ``alpha_pattern``."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_parameters(section: LoraSection, names: list[str]) -> None:
    """What PEFT cannot do with Parameters."""
    if names and section.lora_dropout:
        raise UserError(
            f"lora.lora_dropout: {section.lora_dropout:g} cannot act on {', '.join(names)}, which PEFT can adapt as "
            "Parameters alone; set it to 0, or leave them out"
        )
    start = section.init_lora_weights
    # every other start begins with a module's own ``weight``
    others = [name for name in names if name.rpartition(".")[2] != "weight"]
    if others and isinstance(start, str) and start.lower() != "gaussian":
        raise UserError(
            f"lora.init_lora_weights: {start} cannot act on {', '.join(others)}: adapters of routed experts start at "
            "true (the base model exactly), gaussian (likewise, A normal) or false (A and B random)"
        )


def _expert_weights(model: nn.Module, decoder: Any, excluded: str | tuple[str, ...] | None) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    found = [
        f"{path if excluded is None else names[module]}.{weight}"
        for layer in decoder.layers
        for path, module in layer.named_modules()
        if (layout := experts_layout(module)) is not None and not _excluded(names[module], excluded)
        for weight in (layout.up, "down_proj")
    ]
    if not found:
        raise UserError(
            "lora.target_parameters: all-experts matches nothing: the model has no routed experts with fused weights"
        )
    return list(dict.fromkeys(found))


def _full_names(model: nn.Module, decoder: Any, endings: list[str], layers: tuple[int, ...] | None) -> list[str]:
    """Of the text model's layers: PEFT knows neither towers nor ``layers_to_transform`` where it names Parameters."""
    chosen = [
        parameter
        for index, layer in enumerate(decoder.layers)
        if layers is None or index in layers
        for parameter in layer.parameters()
    ]
    wanted = {id(parameter) for parameter in chosen}
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in wanted and any(name == ending or name.endswith(f".{ending}") for ending in endings)
    ]


def _excluded(name: str, excluded: str | tuple[str, ...] | None) -> bool:
    """As PEFT reads ``exclude_modules``."""
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in excluded or ())


def _taken(model: nn.Module, modules: object, names: Iterable[str]) -> str:
    kind = hf_model.text_config(model).model_type
    given = modules if isinstance(modules, str) else ", ".join(cast("Iterable[str]", modules))
    return (
        f"lora.target_modules: {given}: PEFT takes {', '.join(sorted(names))} for the routed experts of a {kind} and "
        "drops linear layers of these names; for the experts write target_parameters: all-experts, for others their "
        "weights, as in target_parameters: [shared_expert.gate_proj.weight]"
    )


def _cast_to_base(model: nn.Module) -> None:
    """Gives adapters the dtypes of what they adapt: PEFT does so where adapters have storage."""
    for module in model.modules():
        if not (hasattr(module, "adapter_layer_names") and hasattr(module, "get_base_layer")):
            continue
        layer: Any = module
        wraps = hasattr(module, "parameter_name")
        weight: Any = layer.get_param() if wraps else getattr(layer.get_base_layer(), "weight", None)
        if weight is not None and weight.is_floating_point():
            for name in layer.adapter_layer_names:
                getattr(layer, name).to(weight.dtype)


def _check_patterns(section: LoraSection, tuner: Any) -> None:
    """Each pattern acts on something that PEFT has adapted, by the names that PEFT matches; it ignores others."""
    modules, parameters = tuner.targeted_module_names, tuner.targeted_parameter_names
    names = [*modules, *parameters, *(name.removesuffix(".weight") for name in parameters)]
    for field, patterns in (("rank_pattern", section.rank_pattern), ("alpha_pattern", section.alpha_pattern)):
        for pattern in patterns:
            if not any(_matches(pattern, name) for name in names):
                endings = [name.rpartition(".")[2] for name in modules]
                endings += [".".join(name.split(".")[-2:]) for name in parameters]
                adapted = ", ".join(dict.fromkeys(endings))
                raise UserError(f"lora.{field}: {pattern!r} matches nothing that is adapted: {adapted}")


def _check_names(model: nn.Module, section: LoraSection) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = getattr(section, field)
        if wanted is not None and wanted != "all-linear":
            _each_matches(f"lora.{field}", wanted, names, model)
    if isinstance(section.target_parameters, tuple):
        weights = [name for name, _ in model.named_parameters()]
        for ending in section.target_parameters:
            if not any(name == ending or name.endswith(f".{ending}") for name in weights):
                close = nearest(ending, {".".join(name.split(".")[-n:]) for name in weights for n in (2, 3)})
                raise UserError(f"lora.target_parameters: {ending!r} matches no parameter{close}")
    check_layer_numbers(section, int(hf_model.text_config(model).num_hidden_layers))


def _each_matches(field: str, wanted: str | tuple[str, ...], names: list[str], model: nn.Module) -> None:
    """As PEFT reads them: one string is a regular expression over full names, and of several each is the end of one."""
    for entry in (wanted,) if isinstance(wanted, str) else wanted:
        expression = entry if isinstance(wanted, str) else rf"(.*\.)?{re.escape(entry)}"
        try:
            found = any(re.fullmatch(expression, name) for name in names)
        except re.error as error:
            raise UserError(f"{field}: {entry!r} is no regular expression: {error}") from error
        if not found:
            raise UserError(f"{field}: {entry!r} matches no module{_nearest(entry, model)}")


def _are_experts(entry: str, model: nn.Module) -> bool:
    return NAMED_EXPERTS.search(entry) is not None and any(
        experts_layout(module) is not None for module in model.modules()
    )


def _nearest(entry: str, model: nn.Module) -> str:
    if _are_experts(entry, model):
        return "; routed experts are Parameters: target_parameters: all-experts"
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return nearest_layers(entry, names)


def _towers(model: nn.Module) -> list[str]:
    """Names of the outermost modules outside the text model that hold linear layers, the head aside."""
    decoder = hf_model.text_model(model)
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    head = hf_model.head_of(model)
    outside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and prefix and not name.startswith(f"{prefix}.")
    ]
    depth = prefix.count(".") + 1
    return list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in outside))
