"""PEFT's layers that add their adapters to the base weights, which no backward of an earlier forward may read then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from deltatune.subclass import Swapped, stock_class

__all__ = ["Merging"]


class Merging(Swapped):
    """Torch does not see what PEFT writes (``weight.data += ...``), and would take gradients of weights that are gone.

    So merging and unmerging count as writes in place: the backward of a forward before them is refused.
    """

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As the stock layer."""
        stock: Any = stock_class(self)
        stock.merge(self, *args, **kwargs)
        increment_version([*self._merged_weights()])

    def unmerge(self) -> None:
        """As the stock layer."""
        stock: Any = stock_class(self)
        stock.unmerge(self)
        increment_version([*self._merged_weights()])

    def _merged_weights(self) -> Iterable[Tensor]:
        raise NotImplementedError
