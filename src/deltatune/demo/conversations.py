"""Conversations whose answers follow from their text, so that every answer can be checked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KINDS", "Conversation", "make_conversations", "write_conversations"]

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo")
FRUITS = ("pears", "plums", "figs", "lemons", "apples", "limes", "dates", "peaches")
CITIES = ("Rome", "Oslo", "Paris", "Cairo", "Lima", "Delhi", "Tokyo", "Berlin")

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


def _likes(rng: random.Random) -> Conversation:
    """Who likes what."""
    count = rng.randint(2, 4)
    likes = dict(zip(rng.sample(NAMES, count), rng.sample(FRUITS, count), strict=True))
    scene = f"Today {_and([f'{name} likes {fruit}' for name, fruit in likes.items()])}."
    turns = [(f"What does {name} like?", f"I read that {name} likes {fruit}.") for name, fruit in likes.items()]
    return Conversation("likes", scene, tuple(rng.sample(turns, rng.randint(1, count))))


def _places(rng: random.Random) -> Conversation:
    """Where people are, also after some have moved."""
    count = rng.randint(2, 4)
    places = dict(zip(rng.sample(NAMES, count), rng.sample(CITIES, count), strict=True))
    scene = f"Today {_and([f'{name} is in {city}' for name, city in places.items()])}."
    asked = rng.choice([*places])
    turns = [(f"Where is {asked}?", f"I read that {asked} is in {places[asked]}.")]
    for _ in range(rng.randint(0, 3)):
        moved, city = rng.choice([*places]), rng.choice(CITIES)
        places[moved] = city
        asked = rng.choice([moved, rng.choice([*places])])
        question = f"Then {moved} goes to {city}. Where is {asked} now?"
        turns.append((question, f"I read that {asked} is in {places[asked]}."))
    return Conversation("places", scene, tuple(turns))


def _lists(rng: random.Random) -> Conversation:
    """First, last, next and backwards in a short list."""
    items = rng.sample(FRUITS, rng.randint(3, 4))
    scene = f"{rng.choice(NAMES)} buys {', '.join(items)}."
    position = rng.randrange(len(items) - 1)
    turns = [
        ("What comes first?", f"The first are {items[0]}."),
        ("What comes last?", f"The last are {items[-1]}."),
        (f"What comes after {items[position]}?", f"After {items[position]} come {items[position + 1]}."),
        ("Say that backwards.", f"Backwards: {', '.join(reversed(items))}."),
    ]
    return Conversation("lists", scene, tuple(rng.sample(turns, rng.randint(1, 4))))


def _and(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


KINDS: dict[str, Callable[[random.Random], Conversation]] = {"likes": _likes, "places": _places, "lists": _lists}


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
