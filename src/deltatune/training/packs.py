"""The recipe's data as packs: sources to documents to packs, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltatune.config.schema import DataSection, Recipe, Source
from deltatune.data.chat import Renderer
from deltatune.data.dataset import PackedDataset, pack_documents
from deltatune.data.documents import Documents, tokenize
from deltatune.data.formats import Layout, unused_columns
from deltatune.data.held_out import held_out
from deltatune.data.mixture import Shares
from deltatune.data.report import counted
from deltatune.data.row_streams import open_stream
from deltatune.data.sources import load_rows
from deltatune.data.stream import BLOCK_ROWS, PackStream, StreamSource
from deltatune.errors import UserError, user_path
from deltatune.parallel.mesh import ALONE, Mesh
from deltatune.phases import phase
from deltatune.training.recipe_rows import cache_folder, check_kind, layout_of, reading_of
from deltatune.training.tokenizer_files import beyond_embeddings

__all__ = ["RecipeData", "load_data", "padding_token", "rows_digest"]


@dataclass(frozen=True)
class RecipeData:
    """The packs of a recipe."""

    train: PackedDataset | PackStream
    eval: PackedDataset | None  # of data.eval, or of what data.val_size keeps from data.train

    def identities(self) -> dict[str, str]:
        """The sources by name, with the digest of their rows; of a stream of the Hub, the commit that they are of.

        A name that stands for several, such as those of other limits, has all of theirs.
        """
        streams = self.train.sources if isinstance(self.train, PackStream) else []
        sets = [data for data in (self.train, self.eval) if isinstance(data, PackedDataset)]
        read = [(source.rows.name, source.rows.identity) for source in streams]
        read += [(each.source.name, each.source.identity) for data in sets for each in data.documents]
        found: dict[str, dict[str, None]] = {}
        for name, digest in read:
            found.setdefault(name, {})[digest] = None
        return {name: ", ".join(digests) for name, digests in found.items()}

    def digests(self, section: DataSection) -> dict[str, str]:
        """The same digests by the place of a source in the recipe, such as ``data.train.0``."""
        if isinstance(self.train, PackStream):
            parts = {"train": [source.rows.identity for source in self.train.sources]}
        else:
            parts = {"train": [documents.source.identity for documents in self.train.documents]}
        if self.eval is not None and section.eval:
            parts["eval"] = [documents.source.identity for documents in self.eval.documents]
        return {f"data.{part}.{number}": each for part, read in parts.items() for number, each in enumerate(read)}

    def check_tokens(self, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses tokens that an embedding of so many rows lacks: of the data, or of a stream the tokenizer's; padding.

        Raises:
            UserError: the largest of them, and what to change.
        """
        packed = [data for data in (self.train, self.eval) if isinstance(data, PackedDataset)]
        ids = [documents.largest_token for data in packed for documents in data.documents]
        largest = max([*ids, len(tokenizer) - 1] if isinstance(self.train, PackStream) else ids)
        for what, token in (("the data holds", largest), ("packs are filled with", padding_token(tokenizer))):
            if token >= rows:
                raise UserError(beyond_embeddings(what, token, rows, tokenizer.convert_ids_to_tokens(token)))

    def lines(self) -> list[str]:
        """What became of the rows, for people."""
        return [f"train: {self.train.report}", *([] if self.eval is None else [f"eval: {self.eval.report}"])]


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mesh: Mesh = ALONE) -> RecipeData:
    """Reads, tokenises (or takes from the cache) and packs ``recipe.data``; a stream of it is opened.

    ``mesh`` tells a stream which of the data-parallel ranks it is for.

    Raises:
        DataError: rows that cannot be read, rendered or trained on, named.
        UserError: a tokenizer that has no token to pad with.
    """
    padding_token(tokenizer)
    evaluation = _documents(recipe.data.eval, recipe, tokenizer)
    held_apart = _packed(evaluation, recipe, _remarks(evaluation), training=False) if evaluation else None
    if recipe.data.streaming:
        return RecipeData(_streamed(recipe, tokenizer, mesh), held_apart)
    train = _documents(recipe.data.train, recipe, tokenizer)
    remarks = _remarks(train)
    if recipe.data.val_size is None:
        return RecipeData(_packed(train, recipe, remarks, training=True), held_apart)
    held = held_out(train, recipe.data.val_size)
    return RecipeData(
        _packed(train, recipe, remarks, training=True, keep=[~chosen for chosen in held]),
        _packed(train, recipe, [], training=False, keep=held),
    )


def rows_digest(source: Source, recipe: Recipe, *, streams: bool) -> str:
    """The digest of a source's rows, or the commit that they are of, as ``RecipeData.digests`` has it.

    Raises:
        DataError: rows that cannot be read.
    """
    with phase(f"reading {source.path}"):
        return (open_stream if streams else load_rows)(source.path, **reading_of(source, recipe)).identity


def _documents(sources: Sequence[Source], recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Documents]:
    renderer = _renderer(recipe, tokenizer)
    documents = []
    for source in sources:
        # a download has bars of its own
        reading = phase(f"reading {source.path}") if user_path(source.path).exists() else nullcontext()
        with reading:
            rows = load_rows(source.path, **reading_of(source, recipe))
        layout = layout_of(source, rows, recipe)
        check_kind(source, layout, recipe)
        documents.append(
            tokenize(
                rows,
                layout,
                renderer,
                num_proc=recipe.data.num_proc,
                cache_dir=cache_folder(recipe),
                on_bad_row=recipe.data.on_bad_row,
            )
        )
    return documents


def _packed(
    documents: Sequence[Documents],
    recipe: Recipe,
    remarks: Sequence[str],
    *,
    training: bool,
    keep: Sequence[NDArray[np.bool_]] | None = None,
) -> PackedDataset:
    return pack_documents(
        documents,
        tokens_per_batch=recipe.packing.tokens_per_batch,
        overlong=recipe.data.overlong,
        max_length=recipe.data.max_length,
        seed=_seed(recipe),
        shares=_shares(recipe) if training else None,
        keep=keep,
        remarks=remarks,
    )


def _streamed(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, mesh: Mesh) -> PackStream:
    shares = [source.weight or 1.0 for source in recipe.data.train]
    sources, remarks = [], []
    for source, share in zip(recipe.data.train, shares, strict=True):
        rows = open_stream(source.path, **reading_of(source, recipe))
        layout = layout_of(source, rows, recipe)
        check_kind(source, layout, recipe)
        sources.append(StreamSource(rows, layout, max(1, round(BLOCK_ROWS * share / sum(shares)))))
        remarks += _unused(source.path, layout, rows.columns)
    return PackStream(
        sources,
        _renderer(recipe, tokenizer),
        recipe.packing.tokens_per_batch,
        recipe.training.max_steps * recipe.training.gradient_accumulation_steps * mesh.data_size,
        overlong=recipe.data.overlong,
        max_length=recipe.data.max_length,
        on_bad_row=recipe.data.on_bad_row,
        seed=_seed(recipe),
        rank=mesh.data_rank,
        num_ranks=mesh.data_size,
        remarks=remarks,
    )


def _renderer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, train_on=recipe.data.train_on, template_kwargs=recipe.data.chat_template_kwargs)


def _seed(recipe: Recipe) -> int | None:
    """Of the order of documents; ``None`` keeps that of the sources."""
    settings = recipe.training
    if (settings.model_extra or {}).get("train_sampling_strategy") == "sequential":
        return None
    return settings.seed if settings.data_seed is None else settings.data_seed


def _shares(recipe: Recipe) -> Shares:
    sources = recipe.data.train
    weights = [source.weight for source in sources if source.weight is not None]
    return Shares(weights or None, [source.repeat for source in sources], recipe.data.weight_by)


def _remarks(sources: Sequence[Documents]) -> list[str]:
    """What is no error and should be known."""
    lines: list[str] = []
    for documents in sources:
        name = documents.source.name
        lines += _unused(name, documents.layout, documents.source.columns)
        lines += [f"{name}: {note}" for note in documents.notes]
        count, errors = documents.dropped
        if count:
            lines.append(f"{name}: {counted(count, 'row')} dropped{', the first' if count > len(errors) else ''}:")
            lines += [f"  {error}" for error in errors]
    return lines


def _unused(name: str, layout: Layout, columns: Iterable[str]) -> list[str]:
    unused = unused_columns(layout, columns)
    return [f"{name}: unused columns: {', '.join(unused)}"] if unused else []


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after the last document of a pack: it is attended to by nothing and never trains."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError("the tokenizer has neither a padding nor an end token; set one and save it again")
