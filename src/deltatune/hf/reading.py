"""``from_pretrained`` without the data: a model with stand-ins for its weights, and these a few at a time.

transformers itself finds the files, the dtype, renamed keys and conversions, and says what is missing. Its loader is
called once with the headers of the files, and then with the few tensors of one module after another.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from deltatune.errors import first_line
from deltatune.hf.pieces import groups_of
from deltatune.hf.tensor_file import described_in

__all__ = ["Described", "NotInPiecesError", "Pieces", "load_described"]

_LOADER: Final = "_load_pretrained_model"
_ARGUMENTS: Final = ["model", "state_dict", "checkpoint_files", "load_config"]


#: Of the model, tensors by their names in the checkpoint, and the device for what they become.
_Load = Callable[[Any, Mapping[str, Any], str], Any]


class NotInPiecesError(Exception):
    """Why a checkpoint can be read whole alone."""


@dataclass(frozen=True)
class Described:
    """A model as ``from_pretrained`` returns it, but for the weights that ``pieces`` still holds.

    In their places are stand-ins: on the CPU, of the shape and dtype of the weight, and one number of memory, so that
    whatever is made beside a weight is made as beside the weight itself. The number is NaN (0 of integers), which all
    that is computed of it shows.
    """

    model: Any
    info: dict[str, Any]  # what ``output_loading_info`` gives
    pieces: Pieces


class Pieces:
    """The weights of a checkpoint by their names in the model, those of one module in host memory at a time.

    Args:
        empty: the model on the meta device, of its own.
        files: where each tensor of the checkpoint is.
        load: puts tensors of the checkpoint into ``empty``, on the device of this name; as many as it is given.
    """

    def __init__(self, empty: nn.Module, files: Mapping[str, Path], load: _Load) -> None:
        self._empty, self._files, self._load = empty, files, load
        self._places = {
            f"{path}.{name}".lstrip("."): (tensors, name, tensor)
            for path, module in empty.named_modules(remove_duplicate=False)
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and tensor.is_meta
        }
        self._groups: list[tuple[list[str], set[str]]] = []

    def divide(self, described: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        """Settles what is read at a time, by the headers.

        Args:
            described: the tensors of the checkpoint, on the meta device.
            whole: what they become in the model.

        Raises:
            ValueError: weights that are converted across layers.
        """
        groups = groups_of(described, whole, lambda names: self._loaded({n: described[n] for n in names}, "meta"))
        self._groups = [group for group in groups if group[1]]

    @property
    def names(self) -> set[str]:
        """Of all weights that are still here."""
        return {name for _, found in self._groups for name in found}

    def take(self, wanted: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights of these names, and those that are read with them; all by default. Each is given once.

        Raises:
            ValueError, SafetensorError, OSError: what a header promised cannot be read.
        """
        taken = [group for group in self._groups if wanted is None or group[1] & wanted]
        self._groups = [group for group in self._groups if group not in taken]
        for names, expected in taken:
            paths = sorted({self._files[name] for name in names})
            with ExitStack() as opened:  # what is mapped counts as memory of this process
                files = {path: opened.enter_context(safe_open(path, "pt")) for path in paths}
                found = self._loaded({name: files[self._files[name]].get_slice(name) for name in names}, "cpu")
                if found.keys() != expected:
                    raise ValueError(f"{min(expected ^ found.keys())} could not be read")
                while found:
                    yield found.popitem()

    def _loaded(self, tensors: Mapping[str, Any], device: str) -> dict[str, Tensor]:
        self._load(self._empty, tensors, device)
        found = {}
        for name, (held, key, before) in self._places.items():
            if (tensor := held[key]) is not before and tensor is not None:
                found[name], held[key] = tensor.detach(), before
        return found


def load_described(loader: Any, keep: Callable[[Any], set[str]], **arguments: Any) -> Described:
    """``loader.from_pretrained(**arguments)`` that reads no weights but those of the names that ``keep`` says.

    Weights that share a storage by the config and are there twice are read too: transformers ties what is equal.

    Args:
        loader: a model class of transformers.
        keep: given the model, the names of weights to have at once.
        arguments: its own; what it raises, this does.

    Raises:
        NotInPiecesError: no safetensors, a quantised model, or weights that are converted across layers, or
            in a way that cannot run on the meta device.
    """
    stock = getattr(loader, _LOADER, None)
    if stock is None or list(inspect.signature(stock).parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
        raise NotInPiecesError(f"{loader.__name__} loads in another way than transformers' models")
    caught: list[Pieces] = []

    def describe(model: Any, _: Any, checkpoint_files: Any, load_config: Any, *more: Any) -> Any:
        _refuse(checkpoint_files, load_config)
        where = {"cpu": load_config, "meta": dataclasses.replace(load_config, device_map={"": "meta"})}

        def load(into: Any, tensors: Mapping[str, Any], device: str) -> Any:
            with _no_bars():  # one for every module
                return stock(into, dict(tensors), None, where[device], *more)

        described, files = dict[str, Tensor](), dict[str, Path]()
        try:
            for path in map(Path, checkpoint_files):
                found = dict(described_in(path))
                described |= found
                files |= dict.fromkeys(found, path)
            pieces = Pieces(copy.deepcopy(model), files, load)
            result = load(model, described, "meta")
            if failed := result[0].conversion_errors:  # such as of one that looks at numbers
                raise NotInPiecesError(f"{min(failed)} is converted in a way that needs its numbers")
            if result[0].mismatched_keys:
                return result  # which transformers refuses
            whole = {name: t for name, t in model.state_dict().items() if name not in result[0].missing_keys}
            pieces.divide(described, whole)
        except (RuntimeError, TypeError, ValueError) as error:
            raise NotInPiecesError(first_line(error)) from error
        twice = {name for pair in model.all_tied_weights_keys.items() for name in pair if {*pair} <= whole.keys()}
        _put(model, ((name, _stand_in(tensor)) for name, tensor in whole.items()))
        _put(model, pieces.take(keep(model) | twice))
        caught.append(pieces)
        return result

    body: dict[str, Any] = {
        "__module__": loader.__module__,
        "__qualname__": loader.__qualname__,
        _LOADER: staticmethod(describe),
    }
    describing: Any = type(loader.__name__, (loader,), body)
    model, info = describing.from_pretrained(output_loading_info=True, **arguments)
    if not caught:
        raise NotInPiecesError("transformers reads its files in another way")
    model.__class__ = loader
    return Described(model, info, caught[0])


@contextmanager
def _no_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _refuse(files: Any, load_config: Any) -> None:
    if load_config.hf_quantizer is not None:
        raise NotInPiecesError("it is quantised")
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise NotInPiecesError("its weights are no safetensors")


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.tensor(float("nan") if tensor.is_floating_point() else 0).to(tensor.dtype).expand(tensor.shape)


def _put(model: Any, weights: Iterator[tuple[str, Tensor]]) -> None:
    for name, tensor in weights:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key not in module._buffers:
            tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(module, key, tensor)
