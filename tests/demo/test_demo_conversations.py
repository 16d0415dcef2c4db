"""The demo's data can be checked: by rules of its own here, since the answers come from the code under test."""

from __future__ import annotations

import json
import re

import pytest

from deltatune.demo.conversations import (
    CITIES,
    FRUITS,
    KINDS,
    NAMES,
    Conversation,
    make_conversations,
    write_conversations,
)

CONVERSATIONS = make_conversations(300, seed=3)


def of_kind(kind: str) -> list[Conversation]:
    return [conversation for conversation in CONVERSATIONS if conversation.kind == kind]


def names_in(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in NAMES]


def test_every_kind_is_made_equally_often() -> None:
    assert {kind: len(of_kind(kind)) for kind in KINDS} == dict.fromkeys(KINDS, 100)


def test_the_same_seed_gives_the_same_conversations() -> None:
    assert make_conversations(60, seed=3) == CONVERSATIONS[:60]
    assert make_conversations(60, seed=4) != CONVERSATIONS[:60]


def test_held_out_scenes_do_not_occur_in_training() -> None:
    held_out = make_conversations(50, seed=1)
    train = make_conversations(1000, seed=1, exclude=held_out)
    scenes = {conversation.scene for conversation in held_out}
    assert not scenes & {conversation.scene for conversation in train}
    # without the exclusion the same seed begins with the same scenes, so the test can fail
    assert scenes & {conversation.scene for conversation in make_conversations(1000, seed=1)}


def test_no_scene_occurs_twice() -> None:
    assert len({conversation.scene for conversation in CONVERSATIONS}) == len(CONVERSATIONS)


def test_turns_alternate_and_the_scene_comes_first() -> None:
    for conversation in CONVERSATIONS:
        messages = conversation.messages
        assert [message["role"] for message in messages] == ["user", "assistant"] * len(conversation.turns)
        assert messages[0]["content"].startswith(f"{conversation.scene} ")
        assert messages[-1]["content"] == conversation.turns[-1][1]


def test_likes_are_those_of_the_scene() -> None:
    for conversation in of_kind("likes"):
        for question, answer in conversation.turns:
            (name,) = names_in(question)
            (fruit,) = re.findall(rf"{name} likes (\w+)", conversation.scene)
            assert fruit in FRUITS
            assert answer == f"I read that {name} likes {fruit}."


def test_places_are_the_last_ones_told() -> None:
    moves = 0
    for conversation in of_kind("places"):
        told = conversation.scene
        for question, answer in conversation.turns:
            told += " " + question
            name = names_in(question)[-1]
            city = re.findall(rf"{name} (?:is in|goes to) (\w+)", told)[-1]
            assert city in CITIES
            assert answer == f"I read that {name} is in {city}."
            moves += f"{name} goes to" in question
    assert moves > 20


def test_lists_are_answered_from_the_scene() -> None:
    for conversation in of_kind("lists"):
        items = re.findall(r"\w+", conversation.scene)[2:]
        for question, answer in conversation.turns:
            if question == "What comes first?":
                assert answer == f"The first are {items[0]}."
            elif question == "What comes last?":
                assert answer == f"The last are {items[-1]}."
            elif question == "Say that backwards.":
                assert re.findall(r"\w+", answer)[1:] == items[::-1]
            else:
                before = question.removeprefix("What comes after ").removesuffix("?")
                assert answer == f"After {before} come {items[items.index(before) + 1]}."


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_one_conversation_a_line(kind, tmp_path) -> None:
    path = tmp_path / "new" / "data.jsonl"
    write_conversations(path, of_kind(kind))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["messages"] for row in rows] == [conversation.messages for conversation in of_kind(kind)]
    assert {row["kind"] for row in rows} == {kind}
