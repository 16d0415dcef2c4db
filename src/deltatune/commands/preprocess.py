"""deltatune preprocess: the recipe's data as it will be trained on."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice

from deltatune.commands.quiet import quiet_libraries
from deltatune.config.schema import Recipe
from deltatune.data.preview import preview
from deltatune.data.report import counted
from deltatune.training.checkpoint import load_tokenizer
from deltatune.training.names import check_names
from deltatune.training.packs import load_data
from deltatune.training.recipe_rows import cache_folder

__all__ = ["run"]


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Tokenises (which fills the cache that training reads), packs, reports, and shows samples."""
    recipe: Recipe = args.recipe
    check_names(recipe.training)
    tokenizer = load_tokenizer(recipe.model)
    data = load_data(recipe, tokenizer)
    sys.stdout.writelines(f"warning: {warning}\n" for warning in args.warnings)
    sys.stdout.writelines(f"{line}\n" for line in data.lines())
    sys.stdout.write(f"tokenised data is in {cache_folder(recipe)}\n")
    color = _wants_color(args.color)
    samples = (sample for index in range(len(data.train)) for sample in data.train[index])
    for number, sample in enumerate(islice(samples, args.show), start=1):
        trained = f"{sample.num_trained:,} of them trained"
        name = f"sample {number}" if recipe.preference is None else _side(number)
        sys.stdout.write(f"\n{name}: {counted(len(sample), 'token')}, {trained}\n")
        sys.stdout.write(f"{preview(sample, tokenizer, color=color)}\n")
    return 0


def _side(number: int) -> str:
    """What a sample is among pairs, of which each is two after one another."""
    return f"pair {(number + 1) // 2}, {'chosen' if number % 2 else 'rejected'}"


def _wants_color(choice: str) -> bool:
    if choice == "auto":
        # the conventions of no-color.org and force-color.org
        return not os.environ.get("NO_COLOR") and (sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR")))
    return choice == "always"
