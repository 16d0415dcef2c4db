"""``python -m deltatune.demo``: make a model and data, train, and show what changed and how it ran."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltatune.config.load import load_recipe
from deltatune.config.schema import Recipe
from deltatune.demo import show
from deltatune.demo.checkpoint import save_checkpoint
from deltatune.demo.conversations import Conversation, make_conversations, write_conversations
from deltatune.demo.scoring import Answer, ask
from deltatune.demo.speed import compare
from deltatune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from deltatune.data.dataset import PackedDataset
    from deltatune.packing.sample import Sample

__all__ = ["main", "make_files", "run"]

RECIPE = Path("recipes/demo.yaml")
HELD_OUT_FILE = "held_out.jsonl"
NUM_TRAIN, NUM_HELD_OUT, NUM_SHOWN = 8000, 200, 4
NUM_TIMED, NUM_WARM_UP = 30, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo from the folder that holds ``recipes/``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deltatune.demo", description="Train a small model and ask it.")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="the recipe to train by (%(default)s)")
    parser.add_argument(
        "--prepare-only", action="store_true", help="make checkpoint and data, for `deltatune train RECIPE`"
    )
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe"
    )
    args = parser.parse_args(argv)
    console = show.make_console()
    try:
        recipe = load_recipe(args.recipe, args.overrides).recipe
        with _one_thread(), _no_bars():
            if args.prepare_only:
                make_files(recipe, console)
            else:
                run(recipe, console)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def make_files(recipe: Recipe, console: Console, *, num_train: int = NUM_TRAIN) -> list[Conversation]:
    """Writes the checkpoint and the data where the recipe looks for them; returns the held-out conversations."""
    from deltatune.training.checkpoint import load_tokenizer

    checkpoint, data = Path(recipe.model.name_or_path), Path(recipe.data.train[0].path)
    show.heading(console, "A model and data, made here")
    held_out = make_conversations(NUM_HELD_OUT, seed=1)
    train = make_conversations(num_train, seed=0, exclude=held_out)
    write_conversations(data, train)
    write_conversations(data.with_name(HELD_OUT_FILE), held_out)
    save_checkpoint(checkpoint, train)
    words = len(load_tokenizer(recipe.model))
    console.print(
        f"{checkpoint}: a Qwen3.5-architecture model, randomly initialised, and its tokenizer of {words} tokens\n"
        f"{data}: {len(train):,} conversations to train on\n"
        f"{data.with_name(HELD_OUT_FILE)}: {len(held_out):,} held out; no training scene reads the same",
        markup=False,
    )
    return held_out


def run(recipe: Recipe, console: Console, *, num_train: int = NUM_TRAIN) -> list[Answer]:
    """The demo from beginning to end; returns the trained model's answers to the held-out questions."""
    from deltatune.training.run import train

    began = time.perf_counter()
    held_out = make_files(recipe, console, num_train=num_train)
    show.heading(console, "Asking it", f"{len(held_out)} held-out questions, answered greedily by the untrained model")
    before = _ask(recipe.model.name_or_path, held_out)
    show.heading(console, "Training it", "as `deltatune train` does it: packed, compiled, every weight")
    result = train(recipe, console=console)
    show.heading(console, "Asking it again", f"the same questions, to the model that was saved to {result.output_dir}")
    after = _ask(str(result.output_dir), held_out)
    shown = _one_of_each_kind(held_out)
    show.show_answers(console, [before[i] for i in shown], [after[i] for i in shown])
    show.show_scores(console, before, after)
    show.heading(console, "Are documents independent?", "the probe on the trained weights, packed against alone")
    _verify(str(result.output_dir), console)
    show.heading(console, "How it ran")
    show.show_run(console, result.metrics)
    _speed(recipe, console)
    console.print(f"\n{time.perf_counter() - began:.0f} s in all")
    return after


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads wait for each other at every small product: two crawl whenever something else has one of the cores.

    It also makes the run repeat itself bit for bit.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars for weights that load in an instant."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _errors_only() -> Iterator[None]:
    """No advice on kernels for other devices; not around training, whose progress bar goes by the same setting."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load(name: str) -> Any:
    """The model as stock transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name)


@_errors_only()
def _ask(name: str, conversations: Sequence[Conversation]) -> list[Answer]:
    from transformers import AutoTokenizer

    return ask(_load(name), AutoTokenizer.from_pretrained(name), conversations)


def _one_of_each_kind(conversations: Sequence[Conversation]) -> list[int]:
    first: dict[str, int] = {}
    for index, conversation in enumerate(conversations):
        first.setdefault(conversation.kind, index)
    return list(first.values())[:NUM_SHOWN]


@_errors_only()
def _verify(name: str, console: Console) -> None:
    from deltatune import prepare, verify

    model = _load(name)
    prepare(model)
    console.print(str(verify(model)), markup=False)


@_errors_only()
def _speed(recipe: Recipe, console: Console) -> None:
    from deltatune import prepare
    from deltatune.training.checkpoint import load_tokenizer
    from deltatune.training.packs import load_packs, padding_token
    from deltatune.training.run import compile_options

    name, tokenizer = recipe.model.name_or_path, load_tokenizer(recipe.model)
    packs = load_packs(recipe.data.train, recipe, tokenizer)
    prepared, stock = _load(name), _load(name)
    prepare(prepared, compile=compile_options(recipe))
    console.print(
        f"\nAgainst the stock model: {NUM_TIMED} training steps of each in turn, after {NUM_WARM_UP} to warm up.\n"
        "A step is forward, backward and AdamW on one thread; making the batch is not counted. Both see the same\n"
        "documents: one model as packs, the other in shuffled batches, each padded to its longest document.",
        markup=False,
    )
    packed, padded = compare(
        prepared,
        stock,
        _spread(packs, NUM_WARM_UP + NUM_TIMED),
        tokens_per_batch=recipe.packing.tokens_per_batch,
        pad_token_id=padding_token(tokenizer),
        learning_rate=recipe.training.learning_rate,
        warm_up=NUM_WARM_UP,
    )
    show.show_speed(console, packed, padded)


def _spread(packs: PackedDataset, count: int) -> list[list[Sample]]:
    """Packs from the whole list: it begins with those of the longest documents."""
    return [packs[number * len(packs) // count] for number in range(count)]


if __name__ == "__main__":
    sys.exit(main())
