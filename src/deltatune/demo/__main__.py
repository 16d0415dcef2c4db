"""``python -m deltatune.demo``: make a model and data, train, and show what changed and how it ran."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from deltatune.commands.quiet import quiet_libraries
from deltatune.config.load import load_recipe
from deltatune.config.schema import Recipe
from deltatune.demo.checkpoint import save_checkpoint
from deltatune.demo.conversations import KINDS, Conversation, ask, exact_match, make_conversations, write_conversations
from deltatune.demo.speed import compare
from deltatune.errors import UserError
from deltatune.preparation import prepare
from deltatune.report import table
from deltatune.training.beginning import MARKERS
from deltatune.training.checkpoint import load_tokenizer
from deltatune.training.packs import load_data, padding_token
from deltatune.training.planned import prepare_by_recipe
from deltatune.training.run import train
from deltatune.verification import verify

__all__ = ["main", "make_files", "run"]

RECIPE = Path("recipes/demo.yaml")
HELD_OUT_FILE = "held_out.jsonl"
NUM_TRAIN, NUM_HELD_OUT = 8000, 200
NUM_TIMED, NUM_WARM_UP = 30, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo from the folder that holds ``recipes/``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deltatune.demo", description="Train a small model and ask it.")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="the recipe to train by (%(default)s)")
    what = "make checkpoint and data, for `deltatune train RECIPE`"
    parser.add_argument("--prepare-only", action="store_true", help=what)
    what = "change a key of the recipe"
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=what)
    args = parser.parse_args(argv)
    console = Console()
    try:
        recipe = load_recipe(args.recipe, args.overrides).recipe
        with quiet_libraries():
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
    checkpoint, data = Path(recipe.model.name_or_path), Path(recipe.data.train[0].path)
    held_out = make_conversations(NUM_HELD_OUT, seed=1)
    conversations = make_conversations(num_train, seed=0, exclude=held_out)
    write_conversations(data, conversations)
    write_conversations(data.with_name(HELD_OUT_FILE), held_out)
    save_checkpoint(checkpoint, conversations)
    words = len(load_tokenizer(recipe.model))
    _show(
        console,
        "A model and data, made here",
        f"{checkpoint}: a Qwen3.5-architecture model, randomly initialised, and its tokenizer of {words} tokens",
        f"{data}: {len(conversations):,} conversations to train on",
        f"{data.with_name(HELD_OUT_FILE)}: {len(held_out):,} held out; no training scene reads the same",
    )
    return held_out


def run(recipe: Recipe, console: Console, *, num_train: int = NUM_TRAIN) -> list[str]:
    """The demo from beginning to end; returns the trained model's answers to the held-out questions."""
    began = time.perf_counter()
    held_out = make_files(recipe, console, num_train=num_train)
    _show(console, "Asking it", f"{len(held_out)} held-out questions, answered greedily by the untrained model")
    before = _ask(recipe.model.name_or_path, held_out)
    _show(console, "Training it", "as `deltatune train` does it: packed, compiled, every weight")
    for name in MARKERS:  # made anew, as checkpoint and data are
        (Path(recipe.training.output_dir) / name).unlink(missing_ok=True)
    result = train(recipe, console=console)
    trained = str(result.output_dir)
    after = _ask(trained, held_out)
    _show(
        console,
        "Asking it again",
        f"the same questions, to the model that was saved to {trained}",
        "",
        *_answers(held_out, before, after),
        *_scores(held_out, before, after),
    )
    probed = AutoModelForCausalLM.from_pretrained(trained)
    prepare(probed)
    _show(console, "Are documents independent?", "the probe on the trained weights", "", str(verify(probed)))
    _show(console, "How it ran", *_figures(result.metrics["leg"]))
    _show(
        console,
        "Against the stock model",
        f"{NUM_TIMED} training steps of each in turn, after {NUM_WARM_UP} to warm up: forward, backward and AdamW.",
        "Both see the same documents: one model as packs, the other in shuffled batches, each padded to its longest.",
        "This compares reference code on a CPU: what kernels gain shows on a GPU.",
        "",
        *_speed(recipe),
    )
    _show(console, f"{time.perf_counter() - began:.0f} s in all")
    return after


def _show(console: Console, heading: str, *lines: str) -> None:
    console.print(f"\n{heading}", style="bold cyan", highlight=False)
    if lines:
        console.out("\n".join(lines), highlight=False)


def _ask(name: str, conversations: Sequence[Conversation]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(name)
    return ask(model, AutoTokenizer.from_pretrained(name), conversations)


def _answers(conversations: Sequence[Conversation], before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """The first conversation of each kind: what was asked, and both answers next to the right one."""
    for kind in KINDS:
        index = [conversation.kind for conversation in conversations].index(kind)
        lines = [(message["role"], message["content"]) for message in conversations[index].messages[:-1]]
        lines += [("before", before[index]), ("after", after[index]), ("right", conversations[index].turns[-1][1])]
        for name, text in lines:
            # an untrained model writes any bytes, those that drive a terminal included
            yield f"{name:>9}  " + "".join(letter if letter.isprintable() else "·" for letter in text.strip())
        yield ""


def _scores(conversations: Sequence[Conversation], before: Sequence[str], after: Sequence[str]) -> list[str]:
    old, new = exact_match(conversations, before), exact_match(conversations, after)
    rows = [(kind, f"{old[kind]:.1%}", f"{new[kind]:.1%}") for kind in (*KINDS, "all")]
    return table(("held-out questions", "right before", "right after"), rows)


def _figures(leg: dict[str, Any]) -> Iterator[str]:
    """Fill, rates and graphs of the training run."""
    yield f"packs: {leg['packs']:,} trained on, {leg['fill']:.1%} full"
    yield f"training: {leg['seconds']:.0f} s in all, compiling included"
    if "steady_tokens_per_second" in leg:
        rates = leg["steady_tokens_per_second"], leg["steady_trained_tokens_per_second"]
        yield "rate after the first steps: {:,.0f} tokens/s, {:,.0f} of them trained".format(*rates)
    if (compiled := leg["compile"]) is not None:
        yield "graphs: " + ", ".join(f"{name} {count}" for name, count in compiled["graphs"].items())
        yield f"graph breaks: {len(compiled['breaks'])}, recompiles: {len(compiled['recompiles'])}"
        yield f"compiling: {compiled['seconds']:.0f} s"


def _speed(recipe: Recipe) -> list[str]:
    tokenizer = load_tokenizer(recipe.model)
    packs = load_data(recipe, tokenizer).train
    prepared, stock = (AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path) for _ in range(2))
    prepare_by_recipe(recipe, prepared)
    count = NUM_WARM_UP + NUM_TIMED
    timings = compare(
        prepared,
        stock,
        # from the whole list: it begins with packs of the longest documents
        [packs[number * len(packs) // count] for number in range(count)],
        tokens_per_batch=recipe.packing.tokens_per_batch,
        pad_token_id=padding_token(tokenizer),
        learning_rate=recipe.training.learning_rate,
        warm_up=NUM_WARM_UP,
    )
    rows, rates = [], []
    for name, timing in zip(("packed, compiled (deltatune)", "padded, eager (stock)"), timings, strict=True):
        counts = timing.counts
        rates.append([count / timing.seconds for count in (counts.trained, counts.tokens, counts.capacity)])
        rows.append((name, f"{counts.tokens / counts.capacity:.1%}", *(f"{rate:,.0f}" for rate in rates[-1])))
    trained, _, slots = (ours / theirs for ours, theirs in zip(*rates, strict=True))
    return [
        *table(("the same documents", "fill", "trained tokens/s", "tokens/s", "slots/s"), rows),
        "",
        f"{trained:.2f} times the stock model's trained tokens per second; slot for slot, padding counted, {slots:.2f}",
    ]


if __name__ == "__main__":
    # threads wait for each other at every small product; one alone also repeats itself bit for bit
    torch.set_num_threads(1)
    # no advice on kernels for other devices
    logging.set_verbosity_error()
    sys.exit(main())
