"""Reading the recipe that a command was given."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from deltatune.config.load import LoadedRecipe, load_recipe

__all__ = ["print_warnings", "read_recipe"]


def read_recipe(args: argparse.Namespace) -> LoadedRecipe:
    """The recipe in ``args.recipe`` with ``args.overrides`` applied, its ``training`` names checked too.

    Raises:
        UserError: whatever is wrong with it, in one line.
    """
    from transformers import TrainingArguments

    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    return load_recipe(args.recipe, args.overrides, training_names=names)


def print_warnings(loaded: LoadedRecipe) -> None:
    """Each warning on a line of the standard output, where the report stands that it belongs to."""
    for warning in loaded.warnings:
        sys.stdout.write(f"warning: {warning}\n")
