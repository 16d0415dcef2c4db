"""``from_pretrained`` without the data: a model with stand-ins for its weights, and these a few at a time.

transformers itself finds the files, the dtype, renamed keys and conversions, and says what is missing. Its loader is
called once with the headers of the files, and then with the few tensors of one module after another.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from deltatune.errors import first_line, one_line
from deltatune.hf.components import Source, assembled, check_experts, split
from deltatune.hf.pieces import groups_of
from deltatune.hf.quantizable import has_transposed_experts, is_interleaved
from deltatune.hf.tensor_file import described_in
from deltatune.ops._dequantize.weight import BLOCK
from deltatune.quantization.blank import Encoding, blank_weight
from deltatune.quantization.released import is_component
from deltatune.quantization.tensor import QuantizedTensor

__all__ = ["Described", "NotInPiecesError", "Pieces", "load_described"]

_LOADER: Final = "_load_pretrained_model"
_ARGUMENTS: Final = ["model", "state_dict", "checkpoint_files", "load_config"]


#: Of the model, tensors by their names in the checkpoint, and the device for what they become.
_Load = Callable[[Any, Mapping[str, Any], str], Any]
_Become = Callable[[str, Tensor], Tensor]


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


@dataclass(frozen=True)
class _Alike:
    """Weights of a group that are held alike.

    Attributes:
        names: in the checkpoint, as of 16 bits.
        source: one of them.
        targets: what they become in the model, on the meta device.
    """

    names: list[str]
    source: Source
    targets: dict[str, QuantizedTensor]


@dataclass(frozen=True)
class _Group:
    """What is read at a time: names in the checkpoint, as of 16 bits, and in the model; those in few bits."""

    names: list[str]
    found: set[str]
    alike: list[_Alike]


class Pieces:
    """The weights of a checkpoint by their names in the model, those of one module in host memory at a time.

    Conversions between a checkpoint's names and a model's rename weights, stack them, and join them by rows. Weights in
    few bits are converted as weights of 16 bits are, first their codes, then their scales and their global scales.

    Args:
        empty: the model on the meta device, of its own.
        files: where each tensor of the checkpoint is.
        load: puts tensors of the checkpoint into ``empty``, on the device of this name; as many as it is given.
        sources: what the checkpoint holds in few bits, by the names that it has in 16 bits.
    """

    def __init__(
        self, empty: nn.Module, files: Mapping[str, Path], load: _Load, sources: Mapping[str, Source] | None = None
    ) -> None:
        self._empty, self._files, self._load, self._sources = empty, files, load, sources or {}
        self._places = {
            f"{path}.{name}".lstrip("."): (module, tensors, name, tensor)
            for path, module in empty.named_modules(remove_duplicate=False)
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None and tensor.is_meta
        }
        self._groups: list[_Group] = []

    def divide(self, described: Mapping[str, Tensor], whole: Mapping[str, Tensor], *, at_once: bool = False) -> None:
        """Settles what is read at a time, by the headers.

        Args:
            described: the tensors of the checkpoint, on the meta device, as of 16 bits.
            whole: what they become in the model.
            at_once: all of them, which is settled sooner.

        Raises:
            ValueError: weights that are converted across layers, or in a way that takes few bits apart.
        """
        if at_once:
            self._groups = [self._group([*described], {*whole}, described)]
            return
        groups = groups_of(described, whole, lambda names: self._loaded({n: described[n] for n in names}, "meta"))
        self._groups = [self._group(names, found, described) for names, found in groups if found]

    @property
    def names(self) -> set[str]:
        """Of all weights that are still here."""
        return {name for group in self._groups for name in group.found}

    @property
    def quantized(self) -> dict[str, QuantizedTensor]:
        """Of these, the ones in few bits, on the meta device."""
        return {
            name: target for group in self._groups for alike in group.alike for name, target in alike.targets.items()
        }

    def take(self, wanted: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights of these names, and those that are read with them; all by default. Each is given once.

        Raises:
            ValueError, SafetensorError, OSError: what a header promised cannot be read.
        """
        taken = [group for group in self._groups if wanted is None or group.found & wanted]
        self._groups = [group for group in self._groups if group not in taken]
        for group in taken:
            keys = {key for name in group.names for key in self._keys(name)}
            paths = sorted({self._files[key] for key in keys})
            with ExitStack() as opened:  # what is mapped counts as memory of this process
                files = {path: opened.enter_context(safe_open(path, "pt")) for path in paths}
                by_key = {key: files[self._files[key]] for key in keys}
                plain = [name for name in group.names if name not in self._sources]
                found = self._loaded({name: by_key[name].get_slice(name) for name in plain}, "cpu")
                for alike in group.alike:
                    found |= self._assembled(alike, by_key)
                if found.keys() != group.found:
                    raise ValueError(f"{min(group.found ^ found.keys())} could not be read")
                while found:
                    yield found.popitem()

    def _group(self, names: list[str], found: set[str], described: Mapping[str, Tensor]) -> _Group:
        kinds: dict[tuple[Encoding, bool] | None, list[str]] = {}
        for name in names:
            source = self._sources.get(name)
            kinds.setdefault(None if source is None else (source.encoding, source.transposed), []).append(name)
        if {*kinds} <= {None}:
            return _Group(names, found, [])
        become = {k: self._loaded({name: described[name] for name in some}, "meta") for k, some in kinds.items()}
        times = Counter(name for some in become.values() for name in some)
        if apart := [name for name in found if times[name] != 1]:
            raise ValueError(f"{min(apart)} is put together of parts in different formats")
        alike = [self._alike(kinds[kind], become[kind], *kind) for kind in kinds if kind is not None and become[kind]]
        return _Group(names, found, alike)

    def _keys(self, name: str) -> Iterable[str]:
        source = self._sources.get(name)
        return (name,) if source is None else source.keys.values()

    def _alike(self, names: list[str], become: Mapping[str, Tensor], encoding: Encoding, transposed: bool) -> _Alike:
        upright = {name: tensor.mT if transposed else tensor for name, tensor in become.items()}
        before = [self._sources[name].shape for name in names]
        if not _are_joined_by_rows(before, [tensor.shape for tensor in upright.values()], encoding):
            raise ValueError(
                f"{min(become)} is put together of parts in {encoding.format} whose scales are then not those of "
                f"neighbours; of blocks of {BLOCK} rows and columns, each part must be whole ones"
            )
        targets = {}
        for name, tensor in upright.items():
            weight = blank_weight(encoding, tensor.shape, "meta", global_scales=self._global_scales(name))
            targets[name] = QuantizedTensor(weight, tensor.dtype, transposed=transposed)
        return _Alike(names, self._sources[names[0]], targets)

    def _global_scales(self, name: str) -> int:
        """One of gate and one of up, where they are one weight."""
        module, _, key, _ = self._places[name]
        return 2 if is_interleaved(module, key) is False else 1

    def _assembled(self, alike: _Alike, files: Mapping[str, Any]) -> dict[str, Tensor]:
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in alike.targets}
        for part in alike.source.keys:
            keys = {name: self._sources[name].keys[part] for name in alike.names}
            tensors = {n: self._sources[n].part(part, files[key].get_tensor(key)) for n, key in keys.items()}
            shapes = {name: target.stored.shape for name, target in alike.targets.items()}
            stands = {name: alike.source.converted(part, shape) for name, shape in shapes.items()}
            for name, tensor in self._loaded(tensors, "cpu", stands).items():
                parts[name][part] = tensor
        found: dict[str, Tensor] = {}
        for name, target in alike.targets.items():
            try:
                found[name] = assembled(target, parts[name])
            except ValueError as error:
                raise ValueError(f"{name}: {one_line(error)}") from error
        return found

    def _loaded(
        self, tensors: Mapping[str, Any], device: str, stands: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What tensors become in the model; ``stands`` for parameters there, of other shapes and dtypes, meanwhile."""
        before = {name: tensor for name, (_, _, _, tensor) in self._places.items()}
        for name, tensor in (stands or {}).items():
            _, held, key, _ = self._places[name]
            held[key] = before[name] = nn.Parameter(tensor, requires_grad=False)
        self._load(self._empty, tensors, device)
        found = {}
        for name, (_, held, key, own) in self._places.items():
            if (tensor := held[key]) is not before[name] and tensor is not None:
                found[name] = tensor.detach()
            held[key] = own
        return found


def _are_joined_by_rows(before: list[torch.Size], after: list[torch.Size], encoding: Encoding) -> bool:
    """Whether matrices may have been stacked and joined by rows, where their scales allow it."""

    def rows(shapes: list[torch.Size]) -> Counter[int]:
        found: Counter[int] = Counter()
        for *lead, count, columns in shapes:
            found[columns] += math.prod(lead) * count
        return found

    def ragged(shapes: list[torch.Size]) -> Counter[tuple[int, int]]:
        found: Counter[tuple[int, int]] = Counter()
        for *lead, count, columns in shapes:
            if count % BLOCK:
                found[count, columns] += math.prod(lead)
        return found

    return rows(before) == rows(after) and (not encoding.blocks or ragged(before) == ragged(after))


def load_described(
    loader: Any,
    keep: Callable[[Any], set[str]] | None,
    *,
    few_bits: str | None = None,
    become: Callable[[Any], _Become] | None = None,
    **arguments: Any,
) -> Described:
    """``loader.from_pretrained(**arguments)`` that reads no weights but those of the names that ``keep`` says.

    Weights that share a storage by the config and are there twice are read too: transformers ties what is equal.

    Args:
        loader: a model class of transformers.
        keep: given the model, the names of weights to have at once; None where none will be read.
        few_bits: how the checkpoint holds weights in few bits, ``quant_method`` of its config; None where it holds
            none. The config that ``from_pretrained`` gets names none.
        become: given the model, what puts another tensor in the place of one that is read.
        arguments: its own; what it raises, this does.

    Raises:
        NotInPiecesError: no safetensors, a quantised model, or weights that are converted across layers, or
            in a way that cannot run on the meta device; or weights in few bits of which parts are missing, left over or
            of other shapes.
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

        described, files, sources = dict[str, Tensor](), dict[str, Path](), dict[str, Source]()
        parts: set[str] = set()  # names of weights in few bits that have no place, as the model would have them
        try:
            for path in map(Path, checkpoint_files):
                found = dict(described_in(path))
                described |= found
                files |= dict.fromkeys(found, path)
            if few_bits is not None:
                transposed = has_transposed_experts(model)
                sources, described = split(described, few_bits, transposed_experts=transposed)
                described |= {name: source.as_values(load_config.dtype) for name, source in sources.items()}
                alone = load(copy.deepcopy(model), {name: described[name] for name in sources}, "meta")
                parts = alone[0].unexpected_keys
            elif become is not None:
                check_experts({*described})
            pieces = Pieces(copy.deepcopy(model), files, load, sources)
            result = load(model, described, "meta")
            if failed := result[0].conversion_errors:  # such as of one that looks at numbers
                raise NotInPiecesError(f"{min(failed)} is converted in a way that needs its numbers")
            if result[0].mismatched_keys:
                if few_bits is not None:
                    name, got, expected = min(result[0].mismatched_keys)
                    raise ValueError(f"{name} is {list(got)}, and the model has {list(expected)}")
                return result  # which transformers refuses
            if few_bits is not None and (left := _left_over(model, result[0].unexpected_keys, parts)):
                raise ValueError(f"the model has no place for {len(left)} of its tensors, such as {min(left)}")
            whole = {name: t for name, t in model.state_dict().items() if name not in result[0].missing_keys}
            pieces.divide(described, whole, at_once=keep is None)
        except (RuntimeError, TypeError, ValueError) as error:
            raise NotInPiecesError(first_line(error)) from error
        twice = {name for pair in model.all_tied_weights_keys.items() for name in pair if {*pair} <= whole.keys()}
        _put(model, ((name, _stand_in(tensor)) for name, tensor in whole.items()))
        change = _as_it_is if become is None else become(model)
        if keep is not None:
            _put(model, ((name, change(name, tensor)) for name, tensor in pieces.take(keep(model) | twice)))
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


def _left_over(model: Any, unexpected: Iterable[str], parts: set[str]) -> set[str]:
    """Tensors without a place that a model's class does not declare to leave out, of weights in few bits or experts."""
    passed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return {
        name
        for name in unexpected
        if (name in parts or is_component(name) or ".experts." in name)
        and not any(pattern.search(name) for pattern in passed)
    }


def _as_it_is(_: str, tensor: Tensor) -> Tensor:
    return tensor


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
            trains = tensor.is_floating_point() and not isinstance(tensor, QuantizedTensor)
            tensor = nn.Parameter(tensor, requires_grad=trains)
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        setattr(module, key, tensor)
