"""deltatune plan: what a run would do, from the configuration and the data alone.

The modules of models, PEFT and the Trainer take seconds to import, so they come after everything that can be found
wrong without them.
"""

from __future__ import annotations

import argparse
import importlib

from deltatune.commands.quiet import quiet_libraries
from deltatune.config.schema import Recipe
from deltatune.training.beginning import begin
from deltatune.training.checkpoint import load_config, load_tokenizer
from deltatune.training.packs import load_data
from deltatune.training.prompts import samples_lines
from deltatune.training.tokens import embedding_rows

__all__ = ["run"]


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Prints every swap, kernel, trainable module, the packs, the steps and the memory; loads no weights."""
    recipe: Recipe = args.recipe
    config = load_config(recipe.model)
    if recipe.parallel.sequence not in (1, "auto"):
        # by heads alone, and before the tokenizer and the rows
        importlib.import_module("deltatune.training.pack_ranks").check_sequence(recipe, config)
    tokenizer = load_tokenizer(recipe.model)
    checkpoint, said = begin(recipe, args.resume, clears=False)
    if checkpoint is not None:
        since = importlib.import_module("deltatune.training.since")
        changes = since.changed_settings(recipe, checkpoint, allow=args.allow_change)
        said += [f"goes on from {checkpoint}", *since.change_lines(changes, checkpoint)]
    samples_lines(recipe, tokenizer)  # a prompt that the template refuses costs no reading of rows
    data = load_data(recipe, tokenizer)
    if (rows := embedding_rows(config, tokenizer, recipe)) is not None:
        data.check_tokens(rows, tokenizer)
    planning = importlib.import_module("deltatune.commands.planning")
    going_on = planning.GoingOn(checkpoint, args.allow_change, said)
    planning.show(recipe, args.warnings, config, tokenizer, data, going_on, nproc=args.nproc)
    return 0
