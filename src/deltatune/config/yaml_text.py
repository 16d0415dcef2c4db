"""Reading YAML as people mean it: ``no`` is a word, ``1e-4`` a number, a key given twice an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

from deltatune.errors import UserError, one_line

__all__ = ["KeyPath", "dump_yaml", "parse_document"]

KeyPath = tuple[str | int, ...]

_DEEPEST = 64  # levels of lists and mappings; no recipe has ten
_MOST = 100_000  # keys and items
_TOO_DEEP = f"nested more than {_DEEPEST} levels deep"


class _Loader(yaml.SafeLoader):
    """Scalars by YAML 1.2's core schema: 1.1 turns ``no`` into false, ``1e-4`` into text and ``12:30`` into 750."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    # 0o17 and 0x1f name their base; a plain 010 is ten
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_document(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """The values of one YAML document, and the line (from 1) that each key stands on.

    Raises:
        UserError: broken YAML, with file and line; a key given twice; a key that is no text.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if node is None:
            return None, lines
        _index(node, (), lines, name)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{name}{line}: broken YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{name}: broken YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise UserError(f"{name}: {_TOO_DEEP}") from error


def dump_yaml(data: Any) -> str:
    """YAML that ``parse_document`` reads back as it was, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


_YAML_1_1 = yaml.SafeDumper.yaml_implicit_resolvers


class _Dumper(yaml.SafeDumper):
    """Quotes what this module's loader would read as something other than text."""


_Dumper.yaml_implicit_resolvers = {
    # plain text must be unambiguous to YAML 1.1 readers too
    first: [*_YAML_1_1.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*_YAML_1_1, *_Loader.yaml_implicit_resolvers}
}


def _index(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> None:
    # aliases that stand for what they are in, or for each other, have no end
    if len(path) > _DEEPEST:
        raise UserError(f"{name}:{node.start_mark.line + 1}: {_TOO_DEEP}")
    if len(lines) > _MOST:
        raise UserError(f"{name}: more than {_MOST:,} keys and items, with what aliases stand for")
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            lines[(*path, position)] = item.start_mark.line + 1
            _index(item, (*path, position), lines, name)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str) or key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise UserError(f"{name}:{line}: a key must be text, got {key}")
            if (*path, key) in lines:
                raise UserError(f"{name}:{line}: {'.'.join(map(str, (*path, key)))} is given twice")
            lines[(*path, key)] = line
            _index(value_node, (*path, key), lines, name)
