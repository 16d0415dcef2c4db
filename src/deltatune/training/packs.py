"""The recipe's data as packs: sources to documents to packs, for training and evaluation alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltatune.config.schema import Recipe, Source
from deltatune.data.chat import Renderer
from deltatune.data.dataset import PackedDataset, pack_documents
from deltatune.data.documents import tokenize
from deltatune.data.messages import resolve_format
from deltatune.data.sources import load_rows
from deltatune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Progress", "cache_folder", "load_packs", "padding_token", "renderer_of"]

Progress = Callable[[int, int], None]


def load_packs(
    sources: Sequence[Source],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Progress | None = None,
) -> PackedDataset:
    """Reads, tokenises (or takes from the cache) and packs ``recipe.data.train`` or ``recipe.data.eval``.

    Args:
        sources: the entries to read.
        recipe: says how: which tokens train, what to do with over-long documents, the capacity of a pack, the seed.
        tokenizer: with the chat template to use.
        progress: called with the rows done and the rows in all, source by source.

    Raises:
        DataError: rows that cannot be read, rendered or trained on, named.
    """
    renderer = renderer_of(recipe, tokenizer)
    documents = []
    for source in sources:
        rows = load_rows(source.path, split=source.split, name=source.name, limit=source.limit)
        layout = resolve_format(source.format, rows.columns, dict(source.columns.items()), source.path)
        documents.append(
            tokenize(
                rows,
                layout,
                renderer,
                num_proc=recipe.data.num_proc or 1,
                cache_dir=cache_folder(recipe),
                progress=progress,
            )
        )
    return pack_documents(
        documents,
        tokens_per_batch=recipe.packing.tokens_per_batch,
        overlong=recipe.data.overlong,
        seed=recipe.training.seed if recipe.training.data_seed is None else recipe.training.data_seed,
    )


def renderer_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """What turns rows into samples; the tokenizer already carries the recipe's template."""
    return Renderer(tokenizer, train_on=recipe.data.train_on, template_kwargs=recipe.data.chat_template_kwargs)


def cache_folder(recipe: Recipe) -> Path:
    """Where tokenised data is kept: ``data.cache_dir``, or a folder in the cache of the ``datasets`` package."""
    if recipe.data.cache_dir is not None:
        return Path(recipe.data.cache_dir).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets")) / "deltatune"


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after the last document of a pack: it is attended to by nothing and never trains."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError("the tokenizer has neither a padding nor an end token; set one and save it again")
