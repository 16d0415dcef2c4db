"""Turning one instance of a stock module into one of ours, and back.

The stock object stays: Parameters, hooks, adapters and references to it notice nothing. Only its ``__class__`` becomes
a subclass of the stock class, made once for each pair of stock class and layer, so ``isinstance``, recorders and
``super().forward()`` keep working.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from deltatune.cost import Cost, ExpertSplit
from deltatune.ops import Spec
from deltatune.packing.group import Recurrent
from deltatune.state import State

__all__ = ["Swapped", "is_bound", "is_covered", "restore", "stock_class", "swap"]


class Swapped(nn.Module):
    """Base of every layer that ``swap`` puts in front of a stock class."""

    #: whether a copy of this module is a model of its own
    whole_model: ClassVar[bool] = False
    #: whether the layer computes in place of the stock forward, and so drops another that was put on the class
    replaces_forward: ClassVar[bool] = False
    #: the ops that the layer calls
    ops: ClassVar[tuple[str, ...]] = ()
    #: parameters that keep their dtype where the layer's others are computed with in a narrower one
    full_precision: ClassVar[tuple[str, ...]] = ()
    #: keyword arguments in addition to the stock signature, for a layer that takes any of its call by name
    extra_arguments: ClassVar[tuple[str, ...]] = ()

    _deltatune: State
    _swap_parts: ClassVar[tuple[type[Swapped], type[nn.Module]]]
    _own_forward: ClassVar[Callable[..., Any]]
    _takes_sequences: ClassVar[bool]  # whether it looks across tokens

    def _forward(self, call: dict[str, Any]) -> Any:
        """The forward of a layer with ``extra_arguments``; all arguments by name."""
        raise NotImplementedError

    @classmethod
    def op_specs(cls, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[Spec, ...]:
        """What the choice of an implementation goes by, for every op that this layer calls in front of ``module``.

        ``module`` may be swapped already; ``dtype`` is that of the activations.
        """
        del module, device, dtype
        return ()

    def cost(self, tokens: int, squares: int, *, recurrent: Recurrent = "heads") -> Cost:
        """Of a pack of so many tokens, whose documents have lengths that sum to ``squares`` when squared.

        ``recurrent`` is how ranks that hold it together divide recurrent layers; one process is counted as ``"heads"``.
        """
        del tokens, squares, recurrent
        return Cost()

    def exchanged(self, size: int, *, recurrent: Recurrent = "heads") -> float:
        """Elements for each token that a rank sends and gets where ``size`` ranks hold a pack together."""
        del size, recurrent
        return 0.0

    def dispatched(self, split: ExpertSplit) -> tuple[float, float]:
        """Elements for each token beyond ``cost`` where experts are divided: what other ranks send, and more kept."""
        del split
        return 0.0, 0.0

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the subclass lives in no module, so pickle and deepcopy rebuild it from its parts; a __deepcopy__ here would
        # be found on PEFT's models too, which pass on what they lack, and copy the model inside
        return _blank, self._swap_parts, self.__dict__.copy()


def _named_forward(stock: type[nn.Module], extra: tuple[str, ...]) -> Callable[..., Any]:
    """A forward with the stock signature and more keyword arguments, that calls ``self._forward(call)``.

    Trainers and PEFT inspect the signature, and callers may pass the stock arguments by position.
    """
    signature = inspect.signature(stock.forward)
    parameters = list(signature.parameters.values())
    position = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters[position:position] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in extra
    ]
    ours = signature.replace(parameters=parameters)
    rest = parameters[-1].name if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else ""

    @functools.wraps(stock.forward)
    def forward(self: Swapped, *args: Any, **kwargs: Any) -> Any:
        call = dict(ours.bind_partial(self, *args, **kwargs).arguments)
        del call["self"]
        call.update(call.pop(rest, {}))
        return self._forward(call)

    forward.__signature__ = ours  # type: ignore[attr-defined]
    return forward


def swap(module: nn.Module, layer: type[Swapped], state: State) -> None:
    """Makes ``module`` an instance of ``layer`` in front of its own class."""
    assert not isinstance(module, Swapped), f"{type(module).__name__} is swapped already"
    _set_class(module, _subclass(layer, type(module)))
    module.__dict__["_deltatune"] = state


def restore(module: nn.Module) -> None:
    """Gives ``module`` its stock class back."""
    if isinstance(module, Swapped):
        del module.__dict__["_deltatune"]
        _set_class(module, stock_class(module))


def is_covered(module: nn.Module) -> bool:
    """Whether the class that ``swap`` gave a module has become the base of another."""
    return isinstance(module, Swapped) and type(module) is not _subclass(*module._swap_parts)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class, and the forward where tools keep it as a bound method in the instance, as accelerate does."""
    kept = [name for name in ("forward", "_old_forward") if is_bound(module.__dict__.get(name), module)]
    module.__class__ = cls
    module.__dict__.update(dict.fromkeys(kept, types.MethodType(cls.forward, module)))


def is_bound(put: Any, module: nn.Module) -> bool:
    """Whether something is the bound method of the module's class, as its instance may hold it."""
    return isinstance(put, types.MethodType) and put.__self__ is module and put.__func__ is type(module).forward


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class a swapped module had, or the one a stock module has."""
    return module._swap_parts[1] if isinstance(module, Swapped) else type(module)


_subclasses: dict[tuple[type[Swapped], type[nn.Module]], type[nn.Module]] = {}


def _subclass(layer: type[Swapped], stock: type[nn.Module]) -> type[nn.Module]:
    if (layer, stock) not in _subclasses:
        # transformers keys its recorders and the saved config's architecture on the printed name of the class
        names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "_swap_parts": (layer, stock)}
        ours = _named_forward(stock, layer.extra_arguments) if layer.extra_arguments else layer.forward
        own = names | {"__new__": _makes_stock(stock), "forward": _usable_beyond_restore(ours, stock)}
        made: Any = type(stock.__name__, (layer, stock), own)
        # as the class has it: what it inherits from may wrap what its subclasses bring
        made._own_forward, made._takes_sequences = made.forward, "sequences" in inspect.signature(ours).parameters
        _subclasses[layer, stock] = made
    return _subclasses[layer, stock]


def _usable_beyond_restore(ours: Callable[..., Any], stock: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a subclass: a wrapper on the instance may keep it, and call it when the class is the stock one."""

    @functools.wraps(ours)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs) if isinstance(self, Swapped) else stock.forward(self, *args, **kwargs)

    return forward


def _makes_stock(stock: type[nn.Module]) -> Callable[..., nn.Module]:
    """The ``__new__`` of a subclass: ``type(model)(config)`` and ``type(model).from_pretrained`` make a stock module.

    Python runs no ``__init__`` on it, as it is no instance of the subclass. Without arguments, as pickle and
    DataParallel call it, it makes a blank one of the subclass.
    """

    @functools.wraps(stock.__init__)
    def new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        return stock(*args, **kwargs) if args or kwargs else object.__new__(cls)

    return new


def _blank(layer: type[Swapped], stock: type[nn.Module]) -> nn.Module:
    cls = _subclass(layer, stock)
    return cls.__new__(cls)
