"""Which rows are kept from training for evaluation: by what they say, not by where they stand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deltatune.data.documents import Documents
from deltatune.errors import DataError

__all__ = ["held_out"]


def held_out(sources: Sequence[Documents], size: float) -> list[NDArray[np.bool_]]:
    """For each source, which of its documents are held out, ``[D]``.

    A row's digest, a uniform number of 64 bits, decides. So rows that say the same are never on both sides, and a row
    stays on its side when others are added, moved or removed; with a number of rows only those at the edge change.

    Args:
        sources: the documents of every source.
        size: a share of the rows, below 1; or a number of rows, of which equal ones count once.

    Raises:
        DataError: no row would be held out, or none would be left to train on.
    """
    contents = np.unique(np.concatenate([source.contents for source in sources]))
    setting = f"data.val_size={size:g} of {contents.size:,} different rows"
    if size < 1:
        limit = np.uint64(size * 2**64)
    elif size < contents.size:
        limit = contents[int(size)]
    else:
        raise DataError(f"{setting} leaves none to train on; lower it")
    held = [source.contents < limit for source in sources]
    if not any(chosen.any() for chosen in held):
        raise DataError(f"{setting} holds out none; raise it, or give a number of rows")
    if all(chosen.all() for chosen in held):
        raise DataError(f"{setting} leaves none to train on; lower it")
    return held
