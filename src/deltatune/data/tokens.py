"""Rows that are tokenised already: the columns that Axolotl and TRL write, as a sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltatune.data.formats import Layout, Row
from deltatune.data.json_values import shown
from deltatune.errors import DataError
from deltatune.packing.sample import IGNORE_INDEX, Sample

__all__ = ["read_tokens"]

Integers = NDArray[np.int64]


def read_tokens(row: Row, layout: Layout, vocab_size: int, where: str) -> Sample:
    """The sample of a row with ``input_ids`` and what says which of them train.

    ``labels`` (the token itself, or -100) say it; without them ``assistant_masks`` and ``completion_mask`` (0 or 1), a
    token training where all that are there agree; without those all tokens train. Padding, which ``attention_mask``
    marks with 0 at either end, is cut off.

    Args:
        vocab_size: every id lies below it.

    Raises:
        DataError: values that are no such integers, columns of different lengths, labels that are other tokens
            (shifted ones too), a gap in ``attention_mask``, several documents in one row.
    """
    ids = _integers(row, layout, "input_ids", where)
    if ids is None or ids.size == 0:
        raise DataError(f"{where} has no {layout.column('input_ids')}; remove the row")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise DataError(
            f"{where}: {layout.column('input_ids')} holds {wrong}; the tokenizer's ids are 0 to {vocab_size - 1}, so "
            "the rows are another tokenizer's"
        )
    trained = _trained(row, layout, ids, where)
    document = _document(row, layout, ids.size, where)
    ids, trained = ids[document], trained[document]
    return Sample(ids, np.where(trained, ids, IGNORE_INDEX))


def _trained(row: Row, layout: Layout, ids: Integers, where: str) -> NDArray[np.bool_]:
    labels = _integers(row, layout, "labels", where, length=ids.size)
    if labels is None:
        trained = np.ones(ids.size, dtype=bool)
        for role in ("assistant_masks", "completion_mask"):
            mask = _integers(row, layout, role, where, length=ids.size, allowed=(0, 1))
            trained &= True if mask is None else mask == 1
        return trained
    trained = np.asarray(labels != IGNORE_INDEX)
    wrong = np.flatnonzero(trained & (labels != ids))
    if wrong.size:
        at = int(wrong[0])
        raise DataError(
            f"{where}: {layout.column('labels')}[{at}] is {labels[at]} and input_ids[{at}] is {ids[at]}; a label is "
            f"the token at its own place (labels are not shifted), or {IGNORE_INDEX} for no target"
        )
    return trained


def _document(row: Row, layout: Layout, num_tokens: int, where: str) -> slice:
    """Where the row's one document lies, without padding."""
    start, end = 0, num_tokens
    attended = _integers(row, layout, "attention_mask", where, length=num_tokens, allowed=(0, 1))
    if attended is not None:
        places = np.flatnonzero(attended)
        if not places.size or places.size != places[-1] - places[0] + 1:
            raise DataError(
                f"{where}: {layout.column('attention_mask')} must be 1 on one stretch of tokens, with 0 for padding "
                "before or after it"
            )
        start, end = int(places[0]), int(places[-1]) + 1
    positions = _integers(row, layout, "position_ids", where, length=num_tokens)
    lengths = _integers(row, layout, "seq_lengths", where)
    restarts = positions is not None and not np.array_equal(positions[start:end], np.arange(end - start))
    if restarts or (lengths is not None and lengths.size != 1):
        what = layout.column("position_ids" if restarts else "seq_lengths")
        raise DataError(
            f"{where} is a pack of several documents ({what} says so); give each document a row of its own, packs are "
            "made here"
        )
    return slice(start, end)


def _integers(
    row: Row, layout: Layout, role: str, where: str, *, length: int | None = None, allowed: tuple[int, ...] = ()
) -> Integers | None:
    column = layout.column(role)
    value = row.get(column)
    if value is None:
        return None
    what = f"{where}: {column}"
    kinds = {int, bool} if allowed else {int}
    if not isinstance(value, list) or not set(map(type, value)) <= kinds:
        wrong = next(item for item in value if type(item) not in kinds) if isinstance(value, list) else value
        raise DataError(f"{what} must be a list of whole numbers, got {shown(wrong)}")
    if value and not -(2**31) <= min(value) <= max(value) < 2**31:
        raise DataError(f"{what} holds a number beyond 32 bits, which no token is")
    array = np.asarray(value, dtype=np.int64)
    if length is not None and array.size != length:
        raise DataError(f"{what} has {array.size} entries for {length} input_ids; they must be equally long")
    if allowed and not np.isin(array, allowed).all():
        other = array[~np.isin(array, allowed)][0]
        raise DataError(f"{what} must hold {' or '.join(map(str, allowed))}, got {other}")
    return array
