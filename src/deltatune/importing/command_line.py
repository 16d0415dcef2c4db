"""A ``trl sft`` or ``trl dpo`` command line, by itself or in a shell script, read from its text: nothing is run."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from deltatune.config.yaml_text import parse_document
from deltatune.errors import UserError
from deltatune.importing.values import NotLiteral

__all__ = ["settings_of_command"]

_ASSIGNED = re.compile(r"^\s*(?:export\s+)?(\w+)=(\"[^\"$`]*\"|'[^'$`]*'|[^\s$`\"';&|]*)\s*$", re.MULTILINE)
_ASSIGNS = re.compile(r"^\s*(?:export\s+)?(\w+)\+?=", re.MULTILINE)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
# TRL's own scripts and those made of them: sft.py, trl_sft.py, sft_gpt_oss.py, but not dpo_online.py
_SCRIPT = re.compile(r"(?:trl_)?(sft|dpo)(?:_(?!online)\w+)?\.py")
_MODULE = re.compile(r"trl\.scripts\.(sft|dpo)")
_NUMBERED = re.compile(r"(?<=\s)\d(?=>)")  # the 2 of 2>&1
_MARKS = frozenset(";&|<>")


def settings_of_command(path: Path, source: str) -> dict[str, Any]:
    """The flags of the first ``trl sft`` or ``trl dpo`` in a text: a value in YAML, a list where there are several.

    Further ones are kept under their names and numbers. A flag alone is true. A loss tells the two commands apart, so
    ``trl dpo`` has its default where no flag says one.
    Variables that the text gives one literal stand for it. Another that follows a flag and its value may hold flags of
    its own: it is kept under its name.

    Raises:
        UserError: no such command, quotes that do not end, or a word that belongs to no flag.
    """
    text = re.sub(r"\\\r?\n", " ", source)
    text = _substituted(re.sub(r"(?m)^\s*#.*$", "", text))
    lines = [_words(path, line) for line in text.splitlines()]
    found = [
        (kind, words[place + 1 :])
        for words in lines
        for place, word in enumerate(words)
        if (kind := _kind(word, words[:place])) is not None
    ]
    if not found:
        raise UserError(f"{path}: expected a command line with trl sft or trl dpo --model_name_or_path ...; found none")
    (kind, words), *others = found
    further = {
        f"trl {other} (command {number})": NotLiteral(" ".join(rest)) for number, (other, rest) in enumerate(others, 2)
    }
    return {**({"loss_type": "sigmoid"} if kind == "dpo" else {}), **_flags(path, words), **further}


def _substituted(text: str) -> str:
    """The text with what one assignment alone gives a literal, or made of such, in place of the variable."""
    times = Counter(_ASSIGNS.findall(text))
    given = {name: value.strip("\"'") for name, value in _ASSIGNED.findall(text) if times[name] == 1}
    found = _VARIABLE.sub(lambda match: given.get(match[1] or match[2], match[0]), text)
    return text if found == text else _substituted(found)


def _words(path: Path, line: str) -> list[str]:
    lexer = shlex.shlex(_NUMBERED.sub("", line), posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        return list(lexer)
    except ValueError as error:
        # prose around a command holds single quotes; the command itself must be whole
        if "trl sft" in line or "trl dpo" in line:
            raise UserError(f"{path}: a command line cannot be read: {error}") from error
        return []


def _kind(word: str, before: list[str]) -> str | None:
    """sft or dpo, where the word is what is run."""
    if word in ("sft", "dpo") and before and before[-1].rsplit("/", 1)[-1] == "trl":
        return word
    script = _SCRIPT.fullmatch(word.rsplit("/", 1)[-1]) or (_MODULE.fullmatch(word) if before[-1:] == ["-m"] else None)
    return None if script is None else script[1]


def _flags(path: Path, words: list[str]) -> dict[str, Any]:
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if _MARKS.issuperset(word):  # the command ends, or its output goes elsewhere
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif word.startswith("$") and (name is None or found[name]):
            found[word] = [word]
        elif name is None:
            raise UserError(f"{path}: expected a flag after the command, got {word}")
        else:
            found[name].append(word)
    return dict(_value(name, values) for name, values in found.items())


def _value(name: str, words: list[str]) -> tuple[str, Any]:
    if not words:
        return (name.removeprefix("no_"), False) if name.startswith("no_") else (name, True)
    if any("$" in word or "`" in word for word in words):
        return name, NotLiteral(" ".join(words))
    values = [parse_document(word, f"--{name}")[0] for word in words]
    return name, values[0] if len(values) == 1 else values
