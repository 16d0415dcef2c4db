"""Conversations whose answers follow from their text: made, asked, and counted where they are right to the letter."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["KINDS", "Conversation", "ask", "exact_match", "make_conversations", "write_conversations"]

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo")
FRUITS = ("pears", "plums", "figs", "lemons", "apples", "limes", "dates", "peaches")
CITIES = ("Rome", "Oslo", "Paris", "Cairo", "Lima", "Delhi", "Tokyo", "Berlin")

# longer than any right answer, so that a model which never ends its turn is cut off soon
_MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Conversation:
    """Questions about one scene, each with the one right answer."""

    kind: str  # the task, a key of KINDS
    scene: str  # what the first message says before it asks; no two conversations share one
    turns: tuple[tuple[str, str], ...]  # questions and answers; the scene stands before the first question

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages."""
        messages = []
        for number, (question, answer) in enumerate(self.turns):
            content = question if number else f"{self.scene} {question}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return messages


Scene = tuple[str, list[tuple[str, str]]]


def _likes(rng: random.Random) -> Scene:
    """Who likes what."""
    count = rng.randint(2, 4)
    likes = dict(zip(rng.sample(NAMES, count), rng.sample(FRUITS, count), strict=True))
    turns = [(f"What does {name} like?", f"I read that {name} likes {fruit}.") for name, fruit in likes.items()]
    return _today(f"{name} likes {fruit}" for name, fruit in likes.items()), rng.sample(turns, rng.randint(1, count))


def _places(rng: random.Random) -> Scene:
    """Where people are, also after some have moved."""
    count = rng.randint(2, 4)
    places = dict(zip(rng.sample(NAMES, count), rng.sample(CITIES, count), strict=True))
    scene = _today(f"{name} is in {city}" for name, city in places.items())
    asked = rng.choice([*places])
    turns = [(f"Where is {asked}?", f"I read that {asked} is in {places[asked]}.")]
    for _ in range(rng.randint(0, 3)):
        moved, city = rng.choice([*places]), rng.choice(CITIES)
        places[moved] = city
        asked = rng.choice([moved, rng.choice([*places])])
        question = f"Then {moved} goes to {city}. Where is {asked} now?"
        turns.append((question, f"I read that {asked} is in {places[asked]}."))
    return scene, turns


def _lists(rng: random.Random) -> Scene:
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
    return scene, rng.sample(turns, rng.randint(1, 4))


def _today(facts: Iterable[str]) -> str:
    *first, last = facts
    return f"Today {', '.join(first)} and {last}."


KINDS: dict[str, Callable[[random.Random], Scene]] = {"likes": _likes, "places": _places, "lists": _lists}


def make_conversations(count: int, *, seed: int, exclude: Iterable[Conversation] = ()) -> list[Conversation]:
    """Conversations of all kinds in turn, no scene twice and none of ``exclude``'s.

    A function of its arguments alone: the same ones give the same conversations.
    """
    rng = random.Random(seed)
    seen = {conversation.scene for conversation in exclude}
    kinds = list(KINDS)
    made: list[Conversation] = []
    while len(made) < count:
        kind = kinds[len(made) % len(kinds)]
        scene, turns = KINDS[kind](rng)
        if scene not in seen:
            seen.add(scene)
            made.append(Conversation(kind, scene, tuple(turns)))
    return made


def write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """One JSON object a line: ``kind``, ``scene`` and ``messages``, of which training reads the messages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in conversations:
            file.write(json.dumps({"kind": item.kind, "scene": item.scene, "messages": item.messages}) + "\n")


def ask(model: Any, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[str]:
    """The greedy answers to the last question of each conversation, the turns before it given, all in one batch.

    The model, stock or prepared, generates with its cache and is left in evaluation mode.
    """
    model.eval()
    batch: Any = tokenizer.apply_chat_template(
        [conversation.messages[:-1] for conversation in conversations],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    answers: list[str] = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    return answers


def exact_match(conversations: Sequence[Conversation], answers: Sequence[str]) -> dict[str, float]:
    """The share of answers equal to the right ones, spaces around them aside: by kind of conversation, and ``all``."""
    kinds: dict[str, list[bool]] = {}
    for conversation, answer in zip(conversations, answers, strict=True):
        for kind in (conversation.kind, "all"):
            kinds.setdefault(kind, []).append(answer.strip() == conversation.turns[-1][1])
    return {kind: sum(right) / len(right) for kind, right in kinds.items()}
