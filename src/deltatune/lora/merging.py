"""PEFT's layers that add their adapters to the base weights, which no backward of an earlier forward may read then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import increment_version

from deltatune.quantization.tensor import QuantizedTensor
from deltatune.subclass import Swapped, stock_class

__all__ = ["Merging"]


class Merging(Swapped):
    """Torch does not see what PEFT writes (``weight.data += ...``), and would take gradients of weights that are gone.

    So merging and unmerging count as writes in place: the backward of a forward before them is refused. A weight in few
    bits becomes one of its values first, in its dtype, and stays one.
    """

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As the stock layer."""
        for module, name in self._merged_into():
            weight = getattr(module, name, None)
            if isinstance(weight, QuantizedTensor):
                module.register_parameter(name, nn.Parameter(weight.decoded().contiguous(), requires_grad=False))
        stock: Any = stock_class(self)
        stock.merge(self, *args, **kwargs)
        self._note_write()

    def unmerge(self) -> None:
        """As the stock layer."""
        stock: Any = stock_class(self)
        stock.unmerge(self)
        self._note_write()

    def _note_write(self) -> None:
        weights = [getattr(module, name, None) for module, name in self._merged_into()]
        increment_version([weight for weight in weights if isinstance(weight, Tensor)])

    def _merged_into(self) -> Iterable[tuple[Any, str]]:
        """Modules, and the names of their Parameters that PEFT writes to."""
        raise NotImplementedError
