"""deltatune preprocess: the recipe's data as it will be trained on."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from itertools import islice, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainingArguments

from deltatune.commands.quiet import quiet_libraries
from deltatune.config.rules import check_training_names
from deltatune.config.schema import Recipe
from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.training.checkpoint import load_tokenizer
from deltatune.training.packs import cache_folder, load_packs

__all__ = ["preview", "run"]

_GREEN, _DIM, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Tokenises (which fills the cache that training reads), packs, reports, and shows samples."""
    recipe: Recipe = args.recipe
    check_training_names(recipe.training, [field.name for field in dataclasses.fields(TrainingArguments)])
    tokenizer = load_tokenizer(recipe.model)
    parts = {"train": recipe.data.train, "eval": recipe.data.eval}
    packs = {name: load_packs(sources, recipe, tokenizer) for name, sources in parts.items() if sources}
    sys.stdout.writelines(f"warning: {warning}\n" for warning in args.warnings)
    for name, packed in packs.items():
        sys.stdout.write(f"{name}: {packed.report}\n")
    sys.stdout.write(f"tokenised data is in {cache_folder(recipe)}\n")
    color = _wants_color(args.color)
    samples = (sample for index in range(len(packs["train"])) for sample in packs["train"][index])
    for number, sample in enumerate(islice(samples, args.show), start=1):
        sys.stdout.write(f"\nsample {number}: {len(sample):,} tokens, {sample.num_trained:,} of them trained\n")
        sys.stdout.write(f"{preview(sample, tokenizer, color=color)}\n")
    return 0


def _wants_color(choice: str) -> bool:
    if choice == "auto":
        # the conventions of no-color.org and force-color.org
        return not os.environ.get("NO_COLOR") and (sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR")))
    return choice == "always"


def preview(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, color: bool = True) -> str:
    """The text of a sample, its trained stretches in green, or between « and » without ANSI colours.

    A document's first token counts as untrained, since nothing stands before it to predict it.
    """
    trained = sample.labels != IGNORE_INDEX
    trained[:1] = False
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(sample)]
    stretches = []
    for start, end in pairwise(edges):
        tokens = sample.input_ids[start:end].tolist()
        # stretches are decoded whole: a character may be spread over several tokens
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if color:
            # a colour that spans lines is lost in pagers
            style = _GREEN if trained[start] else _DIM
            text = "\n".join(f"{style}{line}{_RESET}" if line else line for line in text.split("\n"))
        elif trained[start]:
            text = f"«{text}»"
        stretches.append(text)
    return "".join(stretches)
