"""The first rows of a recipe's files, read without a tokenizer: what is broken there is found before torch is imported.

What a chat template or a tokenizer makes of them, and all other rows, come later.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, NamedTuple

from deltatune.config.schema import Recipe
from deltatune.data.bad_rows import bad_rows, rows_read
from deltatune.data.contents import read_row, wanted_turns
from deltatune.data.files import data_suffix
from deltatune.data.formats import Layout, Row, check_row
from deltatune.data.json_rows import ROWS_FOR_COLUMNS
from deltatune.data.messages import Conversation
from deltatune.data.rows import BadRowError, Rows, read_on
from deltatune.data.sources import load_rows
from deltatune.data.tokens import read_tokens
from deltatune.errors import DataError, UserError, user_path
from deltatune.training.recipe_rows import check_kind, layout_of, reading_of
from deltatune.training.tokenizer_files import beyond_embeddings, rows_of_files, vocabulary_of_files

__all__ = ["check_first_rows"]

_LINES: Final = (".jsonl", ".ndjson")
_LARGEST_LIST_BYTES: Final = 2**26  # a list is read as a whole, and again when it is tokenised


class _Sizes(NamedTuple):
    """What token ids lie below, where that is known."""

    tokenizer: int | None
    embedding: int | None


def check_first_rows(recipe: Recipe) -> None:
    """The columns and the first rows of sources that are files of JSON.

    Raises:
        DataError: columns that fit no format; the rows that are broken, unless such rows are dropped.
        UserError: pairs without a section ``preference``, or other rows with one; a token beyond the embedding.
    """
    known = vocabulary_of_files(recipe.model)
    tokens = None if known is None else len(known) + len(recipe.model.added_tokens or ())
    sizes = _Sizes(tokens, rows_of_files(recipe))
    for source in (*recipe.data.train, *recipe.data.eval):
        if source.split is not None or not _is_quick(user_path(source.path)):
            continue
        limit = min(source.limit or ROWS_FOR_COLUMNS, ROWS_FOR_COLUMNS)
        rows = load_rows(source.path, **reading_of(source, recipe) | {"limit": limit})
        if len(rows) == limit and not set(source.columns.values()) <= set(rows.columns):
            continue  # a later row may have the column
        layout = layout_of(source, rows, recipe)
        check_kind(source, layout, recipe)
        if recipe.data.on_bad_row == "error":
            _check_rows(rows, layout, recipe, sizes, whole=len(rows) < ROWS_FOR_COLUMNS)


def _is_quick(file: Path) -> bool:
    """Whether the first rows of a file can be had without much of the rest."""
    if file.suffix.lower() == ".json":
        return file.is_file() and file.stat().st_size <= _LARGEST_LIST_BYTES
    return file.is_file() and file.suffix.lower() in _LINES and data_suffix(file) is not None


def _check_rows(rows: Rows, layout: Layout, recipe: Recipe, sizes: _Sizes, *, whole: bool) -> None:
    found = []
    for index, row in read_on(rows.read, 0, len(rows)):
        where = rows.where(index)
        try:
            if isinstance(row, BadRowError):
                raise row
            _check(row, layout, recipe, where, sizes)
        except DataError as error:
            found.append((where, str(error)))
    if found:
        raise bad_rows(rows.name, found, len(found), rows_read(len(rows), whole=whole))


def _check(row: Row, layout: Layout, recipe: Recipe, where: str, sizes: _Sizes) -> None:
    if layout.format == "tokens":
        check_row(row, layout, where)
        largest = int(read_tokens(row, layout, sizes.tokenizer or sys.maxsize, where).input_ids.max())
        if sizes.embedding is not None and largest >= sizes.embedding:
            raise UserError(beyond_embeddings(f"{where} holds", largest, sizes.embedding))
        return
    content = read_row(row, layout, where)
    if isinstance(content, Conversation) and recipe.data.train_on != "all":
        wanted_turns(content, recipe.data.train_on, where)
