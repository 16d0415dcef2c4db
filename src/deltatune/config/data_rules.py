"""What the data of a recipe rules out: formats against columns, pairs, mixtures, streams, samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from deltatune.config.defaults import differs
from deltatune.config.row_formats import columns_of
from deltatune.config.schema import Recipe, Source

__all__ = ["DATA_ERRORS"]

_DATA_FILE = re.compile(r"\.((jsonl|ndjson|json|csv|tsv|txt)(\.(gz|zst|xz|bz2))?|parquet|arrow)$", re.IGNORECASE)
# formats whose rows hold messages, or may hold them
_OF_MESSAGES = ("auto", "preference", "chat", "prompt_completion")
# formats whose rows say themselves which tokens train
_WITHOUT_TEMPLATE = ("text", "tokens")


def _data_errors(recipe: Recipe) -> Iterator[str]:
    if all(source.format in _WITHOUT_TEMPLATE for _, source in _sources(recipe)):
        settings = {
            "data.chat_template_kwargs": differs(recipe.data, "chat_template_kwargs"),
            "data.train_on": differs(recipe.data, "train_on"),
            "model.chat_template": differs(recipe.model, "chat_template"),
        }
        for name in (name for name, given in settings.items() if given):
            yield f"{name} cannot act: every source has format: text or tokens, without turns; leave it out"
    if recipe.data.roles and not any(source.format in _OF_MESSAGES for _, source in _sources(recipe)):
        yield "data.roles cannot act: no source has messages; leave it out"
    for where, source in _sources(recipe):
        for role in source.columns:
            if source.format != "auto" and role not in columns_of(source.format):
                expected = ", ".join(columns_of(source.format))
                yield f"{where}.columns.{role} cannot act with format: {source.format}; expected {expected}"
        if source.message_fields and source.format not in _OF_MESSAGES:
            yield f"{where}.message_fields cannot act with format: {source.format}, which has no messages; leave it out"
        if _DATA_FILE.search(source.path) and not Path(source.path).is_dir():
            for name in ("split", "name", "revision"):
                # a slice divides a file too
                if differs(source, name) and "[" not in getattr(source, name):
                    yield f"{where}.{name} cannot act on a file ({source.path}); leave it out"


def _preference_errors(recipe: Recipe) -> Iterator[str]:
    section, data = recipe.preference, recipe.data
    pairs = {source.format == "preference" for _, source in _sources(recipe) if source.format != "auto"}
    if section is None:
        if True in pairs:
            yield "format: preference needs a preference section; add preference: {}, which is DPO"
        return
    if False in pairs:
        yield "preference needs pairs in every source; set their format to preference, or leave the section out"
    for name, loss in (("gamma", "simpo"), ("label_smoothing", "dpo")):
        if differs(section, name) and section.loss != loss:
            yield f"preference.{name} cannot act with preference.loss: {section.loss}; it belongs to {loss}"
    if data.streaming:
        yield "data.streaming cannot act with preference: pairs are packed whole, beforehand; leave it out"
    if data.overlong == "split":
        yield "data.overlong: split cannot act with preference: a pair has no parts; choose truncate or drop"
    if data.train_on not in ("assistant", "last"):
        yield "data.train_on must be assistant or last with preference: losses compare answers alone"


def _mixture_errors(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.eval and data.val_size is not None:
        yield "data.val_size cannot act beside data.eval, which is evaluated on already; leave one of them out"
    weighted = [source.weight is not None for source in data.train]
    if any(weighted) and not all(weighted):
        yield f"data.train.{weighted.index(False)}.weight is missing: give every source a weight, or none"
    if data.weight_by != "tokens" and not any(weighted) and not data.streaming:
        yield f"data.weight_by: {data.weight_by} cannot act: no source has a weight"
    for index, source in enumerate(data.eval):
        for name in ("weight", "repeat"):
            if differs(source, name):
                yield f"data.eval.{index}.{name} cannot act: an evaluation sees every document once"
    if data.max_length is not None and data.max_length > recipe.packing.tokens_per_batch:
        yield (
            f"data.max_length: {data.max_length} cannot act above packing.tokens_per_batch: "
            f"{recipe.packing.tokens_per_batch}, since a document must fit a pack; raise that, or leave this out"
        )


def _streaming_errors(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if not data.streaming:
        return
    if recipe.training.max_steps < 1:
        yield "data.streaming needs training.max_steps, since a stream has no end"
    if data.val_size is not None:
        yield "data.val_size cannot act with data.streaming: rows are not known beforehand; use data.eval"
    if any(source.weight is not None for source in data.train) and data.weight_by == "tokens":
        yield "data.weight_by: tokens cannot act with data.streaming, where lengths are not known; set it to documents"
    for index, source in enumerate(data.train):
        if source.repeat != 1:
            yield f"data.train.{index}.repeat cannot act with data.streaming: a source that ends begins again"
    if recipe.training.dataloader_num_workers > 1:
        yield "training.dataloader_num_workers above 1 cannot act with data.streaming: one process reads the stream"


def _samples_errors(recipe: Recipe) -> Iterator[str]:
    section = recipe.samples
    if section is None:
        return
    if not section.prompts and not section.held_out:
        yield "samples has nothing to complete: give prompts, or held_out, or leave the section out"
    if differs(section, "chat") and not section.prompts:
        yield "samples.chat cannot act without samples.prompts: held-out documents begin as their rows do; leave it out"
    if not recipe.data.eval and recipe.data.val_size is None:
        yield "samples are made at evaluations, and there are none: add data.eval or data.val_size"


def _sources(recipe: Recipe) -> list[tuple[str, Source]]:
    return [
        (f"data.{part}.{index}", source)
        for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval))
        for index, source in enumerate(sources)
    ]


#: Each gives the errors of one kind.
DATA_ERRORS = (_data_errors, _preference_errors, _mixture_errors, _streaming_errors, _samples_errors)
