"""deltatune plan: what a run would do, from the configuration and the data alone.

The modules of models, PEFT and the Trainer take seconds to import, so they come after everything that can be found
wrong without them.
"""

from __future__ import annotations

import argparse
import importlib

from deltatune.commands.quiet import quiet_libraries
from deltatune.config.schema import Recipe
from deltatune.training.checkpoint import load_config, load_tokenizer
from deltatune.training.packs import load_data
from deltatune.training.prompts import samples_lines

__all__ = ["run"]


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Prints every swap, kernel, trainable module, the packs, the steps and the memory; loads no weights."""
    recipe: Recipe = args.recipe
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    samples_lines(recipe, tokenizer)  # a prompt that the template refuses costs no reading of rows
    data = load_data(recipe, tokenizer)
    planning = importlib.import_module("deltatune.commands.planning")
    planning.show(recipe, args.warnings, config, tokenizer, data, nproc=args.nproc)
    return 0
