"""The recipe's data as packs: sources to documents to packs, for training and evaluation alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from deltatune.config.schema import Recipe, Source
from deltatune.data.chat import Renderer
from deltatune.data.dataset import PackedDataset, pack_documents
from deltatune.data.documents import tokenize
from deltatune.data.formats import resolve_format
from deltatune.data.sources import load_rows
from deltatune.errors import UserError

__all__ = ["cache_folder", "load_packs", "padding_token"]


def load_packs(sources: Sequence[Source], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PackedDataset:
    """Reads, tokenises (or takes from the cache) and packs ``recipe.data.train`` or ``recipe.data.eval``.
    The rest of the recipe says which tokens train, what becomes of over-long documents, and a pack's capacity and seed.

    Raises:
        DataError: rows that cannot be read, rendered or trained on, named.
    """
    renderer = Renderer(tokenizer, train_on=recipe.data.train_on, template_kwargs=recipe.data.chat_template_kwargs)
    documents = []
    for source in sources:
        rows = load_rows(source.path, split=source.split, name=source.name, limit=source.limit)
        layout = resolve_format(
            source.format,
            rows.columns,
            dict(source.columns.items()),
            source.path,
            roles=dict(recipe.data.roles.items()),
            message_fields=dict(source.message_fields.items()),
            columnar=rows.columnar,
        )
        documents.append(
            tokenize(rows, layout, renderer, num_proc=recipe.data.num_proc or 1, cache_dir=cache_folder(recipe))
        )
    return pack_documents(
        documents,
        tokens_per_batch=recipe.packing.tokens_per_batch,
        overlong=recipe.data.overlong,
        seed=recipe.training.seed if recipe.training.data_seed is None else recipe.training.data_seed,
    )


def cache_folder(recipe: Recipe) -> Path:
    """Where tokenised data is kept: ``data.cache_dir``, or a folder in the cache of the ``datasets`` package."""
    if recipe.data.cache_dir is not None:
        return Path(recipe.data.cache_dir).expanduser()
    return Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets")) / "deltatune"


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after the last document of a pack: it is attended to by nothing and never trains."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError("the tokenizer has neither a padding nor an end token; set one and save it again")
