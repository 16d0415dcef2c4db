"""Which rows of a source a recipe reads, and how."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.config.schema import Recipe, Source
from deltatune.data.formats import Layout, resolve_format
from deltatune.data.rows import Rows
from deltatune.data.unpacked import default_cache
from deltatune.errors import UserError, user_path

if TYPE_CHECKING:
    from deltatune.data.stream import RowStream

__all__ = ["cache_folder", "check_kind", "layout_of", "reading_of"]


def reading_of(source: Source, recipe: Recipe) -> dict[str, Any]:
    """Which rows of a source are read, as ``load_rows`` takes it."""
    return {
        "split": source.split,
        "name": source.name,
        "revision": source.revision,
        "limit": source.limit,
        "needed": source.columns.values(),
        "cache_dir": cache_folder(recipe),
    }


def layout_of(source: Source, rows: Rows | RowStream, recipe: Recipe) -> Layout:
    """How the rows of a source are read.

    Raises:
        DataError: columns that fit no format, or not the one that was asked for.
    """
    return resolve_format(
        source.format,
        rows.columns,
        dict(source.columns.items()),
        source.path,
        roles=dict(recipe.data.roles.items()),
        message_fields=dict(source.message_fields.items()),
        columnar=rows.columnar,
    )


def check_kind(source: Source, layout: Layout, recipe: Recipe) -> None:
    """Pairs of answers train by their own loss, other rows by the usual one.

    Raises:
        UserError: rows of the other kind than the recipe is for.
    """
    if layout.format == "preference" and recipe.preference is None:
        raise UserError(
            f"{source.path} holds pairs of answers (chosen and rejected): add preference: {{}} to train on them by "
            "DPO, or train on the chosen ones alone with format: prompt_completion and columns: {completion: chosen}"
        )
    if layout.format != "preference" and recipe.preference is not None:
        raise UserError(
            f"preference needs pairs of answers, and {source.path} has no columns chosen and rejected (it was read as "
            f"format: {layout.format}); name them under columns, or leave the section out"
        )


def cache_folder(recipe: Recipe) -> Path:
    """Where tokenised data is kept: ``data.cache_dir``, or a folder in the cache of the ``datasets`` package."""
    if recipe.data.cache_dir is not None:
        return user_path(recipe.data.cache_dir)
    return default_cache()
