"""A model that is adapted while its weights are still in their files, and the weights in their places afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor, nn

from deltatune.hf.reading import NotInPiecesError, Pieces
from deltatune.parallel.filling import Piece

__all__ = ["Unread", "in_turn"]

#: PEFT's copy of a module that trains whole beside its adapters, and the module itself.
_COPY: Final = "modules_to_save"
_COPIED: Final = "original_module"


class Unread:
    """What the stand-ins in a model stand for.

    Args:
        model: as ``describe_checkpoint`` left it.
        pieces: its weights.
    """

    def __init__(self, model: Any, pieces: Pieces) -> None:
        self._pieces = pieces
        self._by_name: dict[str, Tensor] = {name: model.get_parameter_or_buffer(name) for name in pieces.names}

    def check(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Refuses an adapted model of which anything but a copy is computed of weights that are not there yet.

        Raises:
            NotInPiecesError: its weights must be read before it is adapted.
        """
        unread = {id(tensor) for tensor in self._by_name.values()}
        for name, tensor in tensors.items():
            if id(tensor) not in unread and _has_nan(tensor) and self._copied(model, name) is None:
                raise NotInPiecesError(f"{name} begins as its base weight says")

    def weights(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
        """What belongs in the places of a model's tensors: those that are there, then those that stand-ins stand for.

        Args:
            model: the one that was given, whatever it has been wrapped into since.
            tensors: some of its, by the names that the weights shall have.
        """
        names: dict[int, list[str]] = {}
        unread = {id(tensor): tensor for tensor in self._by_name.values()}
        for name, tensor in tensors.items():
            source = tensor if id(tensor) in unread or not _has_nan(tensor) else self._copied(model, name)
            if source is not None and id(source) in unread:
                names.setdefault(id(source), []).append(name)
            else:
                yield (name,), tensor
        for loaded, weight in self._pieces.take():
            if targets := names.pop(id(self._by_name[loaded]), ()):
                yield tuple(targets), weight

    @staticmethod
    def _copied(model: nn.Module, name: str) -> Tensor | None:
        """What a tensor of a module that trains whole is a copy of."""
        path, found, rest = name.partition(f".{_COPY}.")
        if not found:
            return None
        owner, _, key = rest.partition(".")[2].rpartition(".")
        module = model.get_submodule(".".join(filter(None, (path, _COPIED, owner))))
        source: Tensor | None = getattr(module, key, None)
        return source


def in_turn(tensors: dict[str, Tensor]) -> Iterator[Piece]:
    """Each of these tensors, which are let go on the way."""
    while tensors:
        name, tensor = tensors.popitem()
        yield (name,), tensor


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())
