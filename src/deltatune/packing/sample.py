"""One document: its tokens, and which of them train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["IGNORE_INDEX", "Sample", "as_sample"]

IGNORE_INDEX = -100

Tokens = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sample:
    """A document as the model sees it.

    Attributes:
        input_ids: int64 ``[T]``.
        labels: int64 ``[T]``, unshifted: the token itself where it trains, ``IGNORE_INDEX`` elsewhere.
        origin: the row that it comes from, as the data set's ``where`` takes it; None where nothing is known.
    """

    input_ids: Tokens
    labels: Tokens
    origin: int | str | None = None

    def __len__(self) -> int:
        return self.input_ids.size

    @property
    def num_trained(self) -> int:
        """Tokens that are the target of a token before them: a document's first token never is."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))


def as_sample(value: object, name: str) -> Sample:
    """A ``Sample`` from one, from a mapping, or from any object with ``input_ids`` and perhaps ``labels``.

    Lists, arrays and CPU tensors are taken; without labels every token trains. ``name`` names the value in errors.

    Raises:
        ValueError: no ``input_ids``, values that are not integers ``[T]``, no token, labels of another length.
    """
    ids, labels = (_field(value, field) for field in ("input_ids", "labels"))
    if ids is None:
        raise ValueError(
            f"{name} has no input_ids; expected {{'input_ids': [...], 'labels': [...]}}, got {_kind(value)}"
        )
    tokens = _integers(ids, f"{name}: input_ids")
    if tokens.size == 0:
        raise ValueError(f"{name} is empty; drop samples without tokens")
    targets = tokens if labels is None else _integers(labels, f"{name}: labels")
    if targets.size != tokens.size:
        raise ValueError(f"{name} has {tokens.size} input_ids but {targets.size} labels; they must be equally long")
    return Sample(tokens, targets)


def _field(value: object, field: str) -> object:
    return value.get(field) if isinstance(value, Mapping) else getattr(value, field, None)


def _integers(values: object, name: str) -> Tokens:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be one-dimensional integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64, copy=False)


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with {sorted(map(str, value))}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, Sequence) else "")
