"""LoRA layers that read one input: their bordered weights, kept in step with the adapters, and their joint call."""

# K input width, N output width, W border width, R rank

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.lora.border import give_back, is_inside, take_in
from deltatune.lora.mode import BESIDE, FUSED, active_adapters, form_of
from deltatune.ops._lora_linear.api import linear_with_lora
from deltatune.ops._lora_linear.gated import gated_linear_with_lora
from deltatune.ops._lora_linear.gated_act import WIDTHS
from deltatune.ops._lora_linear.layout import Layout, Operands, Slot, Target
from deltatune.ops._lora_linear.refresh import Refresh

__all__ = ["LoraGroup", "empty_operands", "layout_of", "take_in_all"]

# A border of W columns costs 2 M N W FLOPs, adding to what is there about 4 M N bytes, two thirds of them not hidden in
# the product (measured: 0.06 ms at M = 16384, 2048 to 6144, H200, bf16). At its 700 TFLOP/s and 4.2 TB/s the border is
# the cheaper one up to about 200 columns, whatever M, N and K.
_WIDEST_BORDER = 192
_PADDED_TO = 64
_RANK_PADDED_TO = 16


class LoraGroup:
    """One or several of PEFT's LoRA layers that read the same input.

    The operands are made when the group first runs fused, and again when what they were made from is gone: a moved,
    cast or copied weight, another adapter. Before every call outside a compiled graph they are written afresh from A
    and B, whatever changed those. They are plain attributes of a plain object, so saving, copying and sharding the
    model see the layers' Parameters alone.

    Attributes:
        layers: all of the layers.
        setting: ``prepare``'s ``lora``.
        fused: those whose weights lie in the operands, in the order of the layout's targets.
        layout: None while no layer is fused.
        operands: likewise.
        names: the adapter behind every slot of the layout.
    """

    layers: tuple[Any, ...]
    fused: tuple[Any, ...]
    layout: Layout | None
    operands: Operands | None
    names: tuple[str, ...]
    _scales: tuple[float, ...]
    _refresh: Refresh | None
    _seen: tuple[Any, ...]
    _made_for: tuple[Any, ...]

    def __init__(
        self, layers: Sequence[Any], setting: str, *, gated_input: bool = False, pointwise_gradients: bool = False
    ) -> None:
        """What is around the layers: ``act(gate) * up`` in front, or elementwise work that makes their gradients."""
        self.layers, self.setting = tuple(layers), setting
        self.gated_input, self.pointwise_gradients = gated_input, pointwise_gradients
        self._forget()
        for layer in self.layers:
            layer.__dict__["_lora_group"] = self

    def __getstate__(self) -> dict[str, Any]:
        kept = ("layers", "setting", "gated_input", "pointwise_gradients")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def sync(self) -> None:
        """Brings forms and operands in step with the layers; called outside compiled graphs, before the layers run."""
        seen = self._identities()
        if seen != self._seen:
            self._settle()
            self._seen = self._identities()
        if self._refresh is not None:
            self._refresh.run(*self._adapters(range(len(self.fused))), self._scales)

    def _identities(self) -> tuple[Any, ...]:
        """What forms and operands depend on; a deleted adapter counts even where another is active."""
        return (torch.is_grad_enabled(), *map(_identity, self.layers), self._adapters_are_there())

    def _adapters_are_there(self) -> bool:
        if self.layout is None:
            return True
        slots = zip(self.layout.slots, self.names, strict=True)
        return all(name in self.fused[slot.target].lora_A for slot, name in slots)

    def run(self, x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
        """The outputs of some of the fused layers, in the group's order, for one input ``[..., K]``."""
        assert self.layout is not None
        assert self.operands is not None
        numbers = tuple(layer._lora_number for layer in layers)
        down, up = self._adapters(numbers)
        return linear_with_lora(x, self.operands, self.layout, down, up, numbers=numbers)

    def takes_gated(self) -> bool:
        """Whether ``run_gated`` can compute the only layer as it is now."""
        layout = self.layout
        return layout is not None and len(layout.targets) == 1 and layout.forward_border and _fits(layout.used(0).stop)

    def run_gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The output of the only layer, for the input ``silu(gate) * up``."""
        assert self.layout is not None
        assert self.operands is not None
        return gated_linear_with_lora(gate, up, self.operands, self.layout, self._adapters((0,)))

    def release(self) -> None:
        """Gives every weight back as a plain contiguous tensor; the next call outside a graph takes them in again."""
        if self.operands is not None:
            for layer, buffer in zip(self.fused, self.operands.bordered, strict=True):
                give_back(layer.base_layer.weight, buffer)
        self._forget()

    def remove(self, layer: Any) -> None:
        """Goes on without a layer that left the model."""
        self.release()
        self.layers = tuple(other for other in self.layers if other is not layer)

    def drop_if_severed(self) -> None:
        """Frees the buffers where a move or a cast took a weight out of them."""
        if self.operands is not None and not self._serves():
            self._forget()

    def _forget(self) -> None:
        self.layout = self.operands = self._refresh = None
        self.fused = self.names = self._scales = self._seen = self._made_for = ()

    def _adapters(self, numbers: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """A and B of every slot of these targets."""
        assert self.layout is not None
        down, up = [], []
        for slot, name in zip(self.layout.slots, self.names, strict=True):
            if slot.target in numbers:
                layer = self.fused[slot.target]
                down.append(layer.lora_A[name].weight)
                up.append(layer.lora_B[name].weight)
        return down, up

    def _settle(self) -> None:
        forms = {layer: form_of(layer, self.setting).name for layer in self.layers}
        fused = tuple(layer for layer, form in forms.items() if form == FUSED)
        wanted = tuple((id(layer), layer.base_layer.weight.dtype, _ranks(layer)) for layer in fused)
        if self.operands is not None and not self._serves():
            self.release()
        if wanted and wanted != self._made_for:
            if self.operands is not None and not torch.is_grad_enabled():
                # another adapter for a while, such as a reference model's: the trained one keeps its border
                forms |= dict.fromkeys(fused, BESIDE)
            else:
                # new buffers: a forward that still waits for its backward keeps the old ones
                self.release()
                self._make(fused)
                self._made_for = wanted
        if self.layout is not None:
            pairs = zip(self.layout.slots, self.names, strict=True)
            self._scales = tuple(float(self.fused[slot.target].scaling[name]) for slot, name in pairs)
        for layer, form in forms.items():
            layer.__dict__.update(_lora_form=form, _lora_number=fused.index(layer) if form == FUSED else -1)

    def _make(self, fused: tuple[Any, ...]) -> None:
        weights = [layer.base_layer.weight for layer in fused]
        layout = layout_of(
            [tuple(weight.shape) for weight in weights],
            [[rank for _, rank in _ranks(layer)] for layer in fused],
            gated_input=self.gated_input,
            pointwise_gradients=self.pointwise_gradients,
        )
        buffers = take_in_all(layout, weights)
        self.operands = empty_operands(layout, buffers)
        self.fused, self.layout = fused, layout
        self.names = tuple(name for layer in fused for name, _ in _ranks(layer))
        self._refresh = Refresh(layout, self.operands)

    def _serves(self) -> bool:
        """Whether the operands still hold the weights of all they were made for, and the adapters are still there."""
        assert self.operands is not None
        assert self.layout is not None
        return (
            all(
                is_inside(layer.base_layer.weight, buffer)
                for layer, buffer in zip(self.fused, self.operands.bordered, strict=True)
            )
            and self._adapters_are_there()
        )


def layout_of(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[Sequence[int]],
    *,
    gated_input: bool,
    pointwise_gradients: bool,
    padded_to: int = _PADDED_TO,
) -> Layout:
    """The layout for weights ``[N, K]`` of one K with these ranks of their adapters, borders in whole ``padded_to``.

    A border extends what is contracted, so it copies the narrower side of a product unless that side is written in
    place; adding to what is there passes over the output twice. So forward has a border where the output is the wider
    side, the input is shared, or the kernel of a gated activation writes it; backward where the input is the wider one
    or the gradients are ``pointwise``.
    """
    targets, slots, place = [], [], 0
    for number, ((outer, _), of_layer) in enumerate(zip(shapes, ranks, strict=True)):
        first = place
        for rank in of_layer:
            slots.append(Slot(number, place, rank))
            place += rank
        place = _padded(place, _RANK_PADDED_TO)
        if len(shapes) == 1:
            place = _padded(place, padded_to)
        targets.append(Target(outer, first, place - first))
    width, inner, outer = _padded(place, padded_to), shapes[0][1], shapes[0][0]
    gated = gated_input and _fits(_padded(sum(ranks[0]), _RANK_PADDED_TO))
    alone = len(shapes) == 1
    return Layout(
        inner,
        width,
        forward_border=width <= _WIDEST_BORDER and (not alone or outer > inner or gated),
        backward_border=width <= _WIDEST_BORDER and (outer < inner if alone else pointwise_gradients),
        targets=tuple(targets),
        slots=tuple(slots),
    )


def take_in_all(layout: Layout, weights: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """The buffers of a layout, each around one of the weights, which becomes a view of it."""
    columns = layout.width if layout.forward_border else 0
    return [
        take_in(weight, rows=target.width if layout.backward_border else 0, columns=columns)
        for weight, target in zip(weights, layout.targets, strict=True)
    ]


def empty_operands(layout: Layout, buffers: Sequence[Tensor]) -> Operands:
    """Operands around these buffers, for a ``Refresh`` to write adapters into."""
    with torch.inference_mode(False):
        down = buffers[0].new_zeros(layout.inner, layout.width)
        return Operands(
            down=down,
            rows=torch.zeros_like(down.mT, memory_format=torch.contiguous_format),
            scale=torch.zeros(layout.width, dtype=torch.float32, device=down.device),
            bordered=tuple(buffers),
            up=tuple(_up(buffer, target, layout) for buffer, target in zip(buffers, layout.targets, strict=True)),
        )


def _up(buffer: Tensor, target: Target, layout: Layout) -> Tensor:
    """Where ``s B`` of a target lives: in the columns of its border, or by itself."""
    if not layout.forward_border:
        return buffer.new_zeros(target.outer, target.width)
    first = layout.inner + target.offset
    return buffer[: target.outer, first : first + target.width]


def _fits(used: int) -> bool:
    """Whether the kernel of a gated activation takes as many columns."""
    return used in WIDTHS


def _padded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _ranks(layer: Any) -> tuple[tuple[str, int], ...]:
    return tuple((name, layer.lora_A[name].weight.shape[0]) for name in active_adapters(layer))


def _identity(layer: Any) -> tuple[object, ...]:
    """What a layer's form and operands depend on; read from the modules' own dictionaries, before every call."""
    own, modules = layer.__dict__, layer._modules
    down, up, names = modules["lora_A"]._modules, modules["lora_B"]._modules, own["_active_adapter"]
    base = modules["base_layer"]
    found: list[object] = [id(base), *own["merged_adapters"], *_place(base)]
    for name in (names,) if isinstance(names, str) else names:
        if name in down:
            dropout = modules["lora_dropout"]._modules[name].__dict__.get("p")
            found += [name, own["scaling"][name], dropout, *_place(down[name]), *_place(up[name])]
    return tuple(found)


def _place(module: torch.nn.Module) -> tuple[object, ...]:
    """Where a linear module's weight is, and whether anything else was put around it."""
    own = module.__dict__
    weight = own["_parameters"].get("weight")
    around = (len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]), "forward" in own)
    if type(weight) is not torch.nn.Parameter:
        return id(weight), *around
    return id(weight), weight.data_ptr(), weight.dtype, weight.shape, weight.requires_grad, *around
