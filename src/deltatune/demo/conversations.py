"""Conversations whose answers follow from their text, so that every answer can be checked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Conversation", "make_conversations", "read_conversations", "write_conversations"]

NAMES = (
    "Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kim", "Leo", "Mia", "Noah", "Olga", "Pia",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "pink", "brown", "grey", "purple")
THINGS = ("kite", "boat", "hat", "bike", "drum", "lamp", "cup", "coat", "ball", "bag", "chair", "book")
PLACES = ("kitchen", "garden", "attic", "cellar", "hall", "garage", "office", "barn", "library", "tower")
FRUITS = ("pears", "plums", "figs", "lemons", "apples", "limes", "dates", "peaches", "cherries", "melons")
NUMBERS = range(1, 21)

Turn = tuple[str, str]


@dataclass(frozen=True)
class Conversation:
    """Questions about one scene, each with the one right answer.

    Attributes:
        kind: the task, a key of ``KINDS``.
        scene: what the first message says before it asks; no two conversations share one.
        turns: questions and answers; the scene stands before the first question.
    """

    kind: str
    scene: str
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages."""
        messages = []
        for number, (question, answer) in enumerate(self.turns):
            content = question if number else f"{self.scene} {question}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return messages


def _recall(rng: random.Random) -> Conversation:
    """Who has which thing in which colour."""
    count = rng.randint(2, 4)
    rows = list(
        zip(rng.sample(NAMES, count), rng.sample(COLOURS, count), rng.sample(THINGS, count), strict=True)
    )
    scene = " ".join(f"{name} has a {colour} {thing}." for name, colour, thing in rows)
    turns = []
    for name, colour, thing in rng.sample(rows, rng.randint(1, count)):
        turns.append(
            rng.choice(
                [
                    (f"What colour is the {thing} of {name}?", f"The {thing} of {name} is {colour}."),
                    (f"Who has the {thing}?", f"The {thing} is with {name}."),
                    (f"What does {name} have?", f"{name} has a {colour} {thing}."),
                ]
            )
        )
    return Conversation("recall", scene, tuple(turns))


def _places(rng: random.Random) -> Conversation:
    """Where things are, also after one has been moved."""
    count = rng.randint(2, 4)
    things, places = rng.sample(THINGS, count), rng.sample(PLACES, count + 1)
    where = dict(zip(things, places, strict=False))
    scene = " ".join(f"The {thing} is in the {place}." for thing, place in where.items())
    turns = []
    asked = rng.choice(things)
    turns.append((f"Where is the {asked}?", f"The {asked} is in the {where[asked]}."))
    moved, name = rng.choice(things), rng.choice(NAMES)
    where[moved] = places[-1]
    asked = rng.choice([moved, rng.choice(things)])
    turns.append(
        (
            f"{name} takes the {moved} to the {places[-1]}. Where is the {asked} now?",
            f"The {asked} is in the {where[asked]}.",
        )
    )
    return Conversation("places", scene, tuple(turns[: rng.randint(1, 2)]))


def _list(rng: random.Random) -> Conversation:
    """First, last, next and backwards in a short list."""
    items = rng.sample(FRUITS, rng.randint(3, 5))
    scene = f"{rng.choice(NAMES)} buys {', '.join(items)}."
    position = rng.randrange(len(items) - 1)
    turns = [
        ("What comes first?", f"The first are {items[0]}."),
        ("What comes last?", f"The last are {items[-1]}."),
        (f"What comes after {items[position]}?", f"After {items[position]} come {items[position + 1]}."),
        ("Say that backwards.", f"Backwards: {', '.join(reversed(items))}."),
    ]
    return Conversation("list", scene, tuple(rng.sample(turns, rng.randint(1, 3))))


def _sort(rng: random.Random) -> Conversation:
    """Three or four numbers in order."""
    numbers = rng.sample(NUMBERS, rng.randint(3, 4))
    scene = f"The numbers are {', '.join(map(str, numbers))}."
    ordered = sorted(numbers)
    turns = [
        ("Sort them.", f"Sorted: {', '.join(map(str, ordered))}."),
        ("Which is the largest?", f"The largest is {ordered[-1]}."),
        ("Which is the smallest?", f"The smallest is {ordered[0]}."),
    ]
    return Conversation("sort", scene, tuple(rng.sample(turns, rng.randint(1, 2))))


def _sum(rng: random.Random) -> Conversation:
    """Adding and taking away small numbers."""
    name, fruit = rng.choice(NAMES), rng.choice(FRUITS)
    start, change = rng.randint(2, 9), rng.randint(1, 9)
    if rng.random() < 0.5:
        change = min(change, start - 1)
        scene, left = f"{name} has {start} {fruit} and eats {change} of them.", start - change
    else:
        scene, left = f"{name} has {start} {fruit} and picks {change} more.", start + change
    return Conversation("sum", scene, ((f"How many {fruit} does {name} have?", f"{name} has {left} {fruit}."),))


KINDS: dict[str, Callable[[random.Random], Conversation]] = {
    "recall": _recall,
    "places": _places,
    "list": _list,
    "sort": _sort,
    "sum": _sum,
}


def make_conversations(count: int, *, seed: int, exclude: Iterable[Conversation] = ()) -> list[Conversation]:
    """Conversations of all kinds in turn, no scene twice and none of ``exclude``'s.

    A function of its arguments alone: the same ones give the same conversations.
    """
    rng = random.Random(seed)
    seen = {conversation.scene for conversation in exclude}
    kinds = list(KINDS.values())
    made: list[Conversation] = []
    while len(made) < count:
        conversation = kinds[len(made) % len(kinds)](rng)
        if conversation.scene not in seen:
            seen.add(conversation.scene)
            made.append(conversation)
    return made


def write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """One JSON object a line: ``kind``, ``scene`` and ``messages``, of which training reads the messages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in conversations:
            file.write(json.dumps({"kind": item.kind, "scene": item.scene, "messages": item.messages}) + "\n")
