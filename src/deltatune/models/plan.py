"""Which module of a model becomes which layer: found, counted, and reached by the modules that call it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltatune.hf.experts import experts_layout
from deltatune.hf.forwards import foreign_forward, named, runs_own_forward
from deltatune.hf.hooks import OFFLOADED
from deltatune.layers.causal_lm import CausalLM
from deltatune.layers.decoder import DecoderLayer, TextModel
from deltatune.layers.experts import Experts
from deltatune.layers.rotary import DocumentRotary, length_dependent_rotary
from deltatune.layers.router import Router, recorded_routers
from deltatune.models.family import Family
from deltatune.subclass import Swapped, stock_class

__all__ = ["Planned", "check_reached", "plan_swaps", "refuse_offload"]


@dataclass(frozen=True)
class Planned:
    """The instances of a stock class, what they become, and how many a config implies: None where any number is right.

    ``module`` is where the stock class is defined, for classes that a family names.
    """

    stock: str
    layer: type[Swapped]
    expected: int | None
    modules: tuple[nn.Module, ...]
    module: str = ""


def plan_swaps(base: nn.Module, text_model: Any, family: Family) -> list[Planned]:
    """Every module to swap, checked against what the config implies.

    Raises:
        ValueError: another number of modules than that.
    """
    plan = [*_of_family(base, text_model, family), *_by_class(DecoderLayer, text_model.layers, text_model.config)]
    plan += _by_class(Router, recorded_routers(text_model))
    if not family.swaps:
        plan += _by_class(Experts, (m for m in text_model.modules() if experts_layout(m) is not None))
    if family.final_norm is not None and (norms := _final_norms(text_model, family)):
        plan.append(Planned(type(norms[0]).__name__, family.final_norm, None, norms))
    plan.append(Planned(type(text_model).__name__, TextModel, 1, (text_model,)))
    if base is not text_model:
        plan.append(Planned(type(base).__name__, CausalLM, 1, (base,)))
    return [*plan, *_by_class(DocumentRotary, length_dependent_rotary(text_model))]


def _of_family(base: nn.Module, text_model: Any, family: Family) -> Iterator[Planned]:
    for declared in family.swaps:
        found = family.find(declared.stock, text_model)
        modules = tuple(module for _, module in found)
        # PEFT's modules_to_save keeps a trained copy next to the original
        places = sum(".modules_to_save." not in path for path, _ in found)
        expected = declared.expected(text_model.config)
        if places != expected:
            raise ValueError(
                f"{type(base).__name__}: expected {expected} {declared.stock} from its config, found {places}; "
                "modules that were replaced by other tools cannot be kept leak-free"
            )
        if declared.layer is Experts:
            modules = tuple(m for m in modules if not _of_another_layout(m, family))
        if modules:
            yield Planned(declared.stock, declared.layer, expected, modules, family.module)


def _of_another_layout(experts: nn.Module, family: Family) -> bool:
    """Whether a family's own experts, such as are spread over ranks, keep their forward, which is a token's own."""
    return stock_class(experts).__module__ == family.module and experts_layout(experts) is None


def _by_class(layer: type[Swapped], modules: Iterable[nn.Module], config: Any = None) -> Iterator[Planned]:
    found: dict[str, list[nn.Module]] = {}
    for module in modules:
        found.setdefault(type(module).__name__, []).append(module)
    for name, of_class in found.items():
        expected = int(config.num_hidden_layers) if config is not None and len(found) == 1 else None
        yield Planned(name, layer, expected, tuple(of_class))


def check_reached(base: nn.Module, plan: Iterable[Planned]) -> None:
    """Every module that keeps documents apart is reached when its parent calls it.

    A forward on the instance hides the class that the module becomes, unless it was put there when the module was ours
    already. The model with the head needs none: its text model resolves boundaries.

    Raises:
        ValueError: such a forward.
    """
    paths = {module: path for path, module in base.named_modules()}
    for planned in plan:
        for module in () if planned.layer is CausalLM else planned.modules:
            put = None if isinstance(module, Swapped) else _hidden_behind(module, planned)
            if put is not None:
                raise ValueError(
                    f"{paths[module]}: expected the forward of {planned.stock}, which prepare takes the place of, got "
                    f"{put}, which would keep documents together; take it off, or put it on the instance after prepare"
                )


def refuse_offload(text_model: Any) -> None:
    """Refuses accelerate's hooks inside the decoder layers, which no graph can hold.

    Raises:
        ValueError: such hooks.
    """
    if any(OFFLOADED in module.__dict__ for layer in text_model.layers for module in layer.modules()):
        raise ValueError(
            "accelerate moves weights or inputs inside the decoder layers (device_map, cpu_offload), which no graph "
            "can hold; load the model on one device, or prepare it without compile"
        )


def _hidden_behind(module: nn.Module, planned: Planned) -> str | None:
    put = foreign_forward(module)
    if put is not None or not planned.layer.replaces_forward:
        return put
    if planned.module and type(module).__module__ != planned.module:
        return named(type(module))
    return None if runs_own_forward(module) else named(type(module).forward)


def _final_norms(text_model: Any, family: Family) -> tuple[nn.Module, ...]:
    """The norm behind the last layer, and PEFT's trained copies of it; what another tool put there is left alone."""
    return tuple(
        module
        for module in text_model.norm.modules()
        if stock_class(module).__module__ == family.module and (isinstance(module, Swapped) or runs_own_forward(module))
    )
