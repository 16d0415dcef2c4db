"""From another project's keys to a recipe that loads, and the table of what became of each key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from deltatune.config.idle import has_no_effect
from deltatune.config.load import parse_recipe
from deltatune.config.schema import Recipe
from deltatune.config.yaml_text import dump_yaml
from deltatune.errors import UserError, nearest
from deltatune.importing.read import Foreign
from deltatune.importing.rules import Outcome, Row, Verdict
from deltatune.importing.values import NotLiteral

__all__ = ["DATA", "MODEL", "Imported", "convert"]

#: What stands in a recipe where the file says nothing.
MODEL, DATA = "YOUR-MODEL", "YOUR-DATA.jsonl"
_MISSING = {"model.name_or_path": MODEL, "data.train.0.path": DATA}


@dataclass(frozen=True)
class Imported:
    """A recipe of ours, and what became of every key of theirs."""

    text: str  # YAML that load_recipe takes
    rows: list[Row]
    warnings: list[str]  # of our own loader, one line each


def convert(foreign: Foreign) -> Imported:
    """Turns a file into a recipe.

    What would not load is taken out, and its row says why.

    Raises:
        UserError: what is left does not load either.
    """
    rows = _without_conflicts([_without_urls(row) for row in _rows(foreign)])
    rows += _still_missing(rows)
    while True:
        text = dump_yaml(_nested(_writes(rows)))
        try:
            loaded = parse_recipe(text, "recipe")
        except UserError as error:
            rows = _without(rows, str(error))
        else:
            return Imported(text, rows, loaded.warnings)


def _rows(foreign: Foreign) -> Iterator[Row]:
    table = foreign.table
    defaults = {key: value for key, value in table.defaults(foreign.settings).items() if key not in foreign.settings}
    settings = {**defaults, **foreign.settings}
    for key, value in {**foreign.settings, **defaults}.items():
        given = key in foreign.settings
        if key in table.sections and value is not None:
            try:
                inner = table.sections[key](value, settings, foreign.path)
                yield from (replace(row, key=f"{key}.{row.key}".rstrip(".")) for row in inner)
            except UserError as error:
                yield Row(key, value, Outcome("not supported", why=str(error)))
        else:
            yield Row(key, value, _outcome(foreign, key, value, settings), given)


def _outcome(foreign: Foreign, key: str, value: Any, settings: Mapping[str, Any]) -> Outcome:
    table = foreign.table
    rule = table.rules.get(key) or next((r for p, r in table.patterns.items() if re.fullmatch(p, key)), None)
    if rule is None:
        if key in table.sections:
            return Outcome("no effect here", why="not set")
        return Outcome("unknown", why=f"no key of {table.name} that is known here{nearest(key, table.rules)}")
    try:
        outcome = rule(value, settings)
    except UserError as error:
        return Outcome("not supported", why=str(error))
    if any(isinstance(written, NotLiteral) for written in outcome.writes.values()):
        return Outcome("not supported", why=f"no literal: the script computes {value}")
    return outcome


def _without_urls(row: Row) -> Row:
    """Data is read from here or the Hub."""
    writes = row.outcome.writes
    urls = [key for key, value in writes.items() if key.endswith(".path") and "://" in str(value)]
    if not urls:
        return row
    kept = {key: value for key, value in writes.items() if key not in urls}
    return replace(row, outcome=Outcome("not supported", kept, "a URL: download it, and name the file"))


def _without_conflicts(rows: list[Row]) -> list[Row]:
    """Where two keys mean one of ours, what the file says wins over a default, then the first."""
    owner: dict[str, Row] = {}
    found: list[Row] = []
    for row in rows:  # defaults come last
        taken = {
            key: owner[key]
            for key, value in row.outcome.writes.items()
            if key in owner and owner[key].outcome.writes[key] != value
        }
        kept = {key: value for key, value in row.outcome.writes.items() if key not in taken}
        owner |= {key: row for key in kept if key not in owner}
        if taken and row.given:
            first = next(iter(taken))
            why = f"{taken[first].key} has set {first} to {taken[first].outcome.writes[first]} already"
            row = replace(row, outcome=Outcome("not supported", kept, why))
        elif taken:
            row = replace(row, outcome=replace(row.outcome, writes=kept))
        # a default that the file makes void is no row
        if row.given or row.outcome.writes:
            found.append(row)
    return found


def _still_missing(rows: list[Row]) -> list[Row]:
    given = _writes(rows)
    return [
        Row(key, None, Outcome("not supported", {key: value}, "nothing in the file says it: fill it in"), given=False)
        for key, value in _missing(given).items()
    ]


def _missing(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe cannot do without, a path for every source included."""
    sources = {key.rsplit(".path", 1)[0] for key in given if re.fullmatch(r"data\.(train|eval)\.\d+\.path", key)}
    named = {match[0] for key in given if (match := re.match(r"data\.(?:train|eval)\.\d+", key))}
    found = {key: value for key, value in _MISSING.items() if key not in given}
    return {**found, **{f"{source}.path": DATA for source in sorted(named - sources)}}


def _writes(rows: list[Row]) -> dict[str, Any]:
    return {key: value for row in rows for key, value in row.outcome.writes.items()}


def _nested(writes: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections, in the order of the schema; numbers in them are places in lists."""
    sections = list(Recipe.model_fields)
    nested: dict[str, Any] = {}
    for key in sorted(writes, key=lambda key: sections.index(key.split(".")[0])):
        parent, parts = nested, key.split(".")
        # a key of a mapping may hold dots itself
        depth = 2 if parts[:2] in (["data", "roles"], ["training", "learning_rates"]) else len(parts) - 1
        for part in parts[:depth]:
            parent = parent.setdefault(part, {})
        name = ".".join(parts[depth:])
        value = writes[key]
        parent[name] = {**parent.get(name, {})} if value == {} and key == "lora" else value
    for part in ("train", "eval"):
        listed = nested.get("data", {}).get(part)
        if isinstance(listed, dict):
            nested["data"][part] = [listed[place] for place in sorted(listed, key=int)]
    return nested


def _name(key: str) -> re.Pattern[str]:
    return re.compile(rf"(^|(?<=\s)){re.escape(key)}\b")


def _without(rows: list[Row], message: str) -> list[Row]:
    """Takes out what the first finding of our loader is about, and says so in its row."""
    finding = message.split("; also: ")[0]
    named = [(match.start(), -len(key), key) for key in _writes(rows) if (match := _name(key).search(finding))]
    # a finding begins with what it is about; of names that begin alike the longest is meant
    at_fault = min(named)[2] if named else None
    if at_fault is None or at_fault in _MISSING:
        raise UserError(f"what the file says makes no recipe: {message}")
    reason = finding[finding.index(at_fault) :]
    kept = []
    for row in rows:
        if at_fault in row.outcome.writes:
            writes = {key: value for key, value in row.outcome.writes.items() if key != at_fault}
            verdict: Verdict = "no effect here" if has_no_effect(finding) else "not supported"
            row = replace(row, outcome=Outcome(verdict, writes, f"taken out: {reason}"))
        kept.append(row)
    return kept
