"""A ``trl sft`` or ``trl dpo`` command line, by itself or in a shell script, read from its text: nothing is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from deltatune.config.yaml_text import parse_document
from deltatune.errors import UserError
from deltatune.importing.values import NotLiteral

__all__ = ["settings_of_command"]

_ASSIGNED = re.compile(r"^\s*(?:export\s+)?(\w+)=(\"[^\"$`]*\"|'[^']*'|[^\s$`\"';&|]*)\s*$", re.MULTILINE)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_NUMBERED = re.compile(r"(?<=\s)\d(?=>)")  # the 2 of 2>&1
_MARKS = frozenset(";&|<>")


def settings_of_command(path: Path, source: str) -> dict[str, Any]:
    """The flags of the first ``trl sft`` or ``trl dpo`` in a text: a value in YAML, a list where there are several.

    A flag alone is true. A loss tells the two commands apart, so ``trl dpo`` has its default where no flag says one.
    Variables that the text gives one literal stand for it.

    Raises:
        UserError: no such command, quotes that do not end, or a word that belongs to no flag.
    """
    text = re.sub(r"\\\r?\n", " ", source)
    text = _substituted(re.sub(r"(?m)^\s*#.*$", "", text))
    for line in text.splitlines():
        words = _words(path, line)
        start = _start(words)
        if start is not None:
            loss = {"loss_type": "sigmoid"} if words[start - 1].rsplit("/", 1)[-1] in ("dpo", "dpo.py") else {}
            return {**loss, **_flags(path, words[start:])}
    raise UserError(f"{path}: expected a command line with trl sft or trl dpo --model_name_or_path ...; found none")


def _substituted(text: str) -> str:
    given: dict[str, set[str]] = {}
    for name, value in _ASSIGNED.findall(text):
        given.setdefault(name, set()).add(value.strip("\"'"))

    def literal(match: re.Match[str]) -> str:
        values = given.get(match[1] or match[2], set())
        return next(iter(values)) if len(values) == 1 else match[0]

    return _VARIABLE.sub(literal, text)


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


def _start(words: list[str]) -> int | None:
    for index, word in enumerate(words):
        if word.rsplit("/", 1)[-1] == "trl" and words[index + 1 : index + 2] in (["sft"], ["dpo"]):
            return index + 2
        if word.rsplit("/", 1)[-1] in ("sft.py", "trl_sft.py", "dpo.py"):
            return index + 1
    return None


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
