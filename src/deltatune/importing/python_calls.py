"""The arguments of calls in a Python script or notebook, read from its text: nothing is run."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import UserError, one_line
from deltatune.importing.values import NotLiteral

__all__ = ["Call", "calls_in", "script_text"]


@dataclass(frozen=True)
class Call:
    """One call."""

    name: str  # the last part: from_pretrained of FastLanguageModel.from_pretrained
    owner: str  # the part before it, or ""
    line: int
    positional: tuple[Any, ...]
    named: dict[str, Any]  # what is no literal is a NotLiteral


def script_text(path: Path, text: str) -> str:
    """The Python of a script, or of a notebook's code cells, without lines for the shell.

    Raises:
        UserError: a notebook that is none.
    """
    if path.suffix == ".ipynb":
        try:
            cells = json.loads(text)["cells"]
            code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: expected a notebook, got other JSON or none ({one_line(error)})") from error
        # a cell for another interpreter is no Python at all
        text = "\n".join(cell for cell in code if not cell.lstrip().startswith("%%"))
    return "\n".join(_python(line) for line in text.splitlines())


def _python(line: str) -> str:
    """``!pip`` and ``%env`` as a statement that does nothing, since one may be all that a block holds."""
    start = line.lstrip()
    return line[: len(line) - len(start)] + "pass" if start.startswith(("!", "%")) else line


def calls_in(path: Path, text: str) -> list[Call]:
    """All calls of a script, in the order of its lines, but for those under ``if False``.

    A name that is given one literal in the whole script stands for it.

    Raises:
        UserError: broken Python.
    """
    try:
        tree = ast.parse(script_text(path, text))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: broken Python: {error.msg}") from error
    constants = _constants(tree)
    found = [_call(node, constants) for node in _walk(tree) if isinstance(node, ast.Call)]
    return sorted((call for call in found if call is not None), key=lambda call: call.line)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and child in node.body and _is_false(node.test):
            continue
        yield child
        yield from _walk(child)


def _is_false(test: ast.expr) -> bool:
    return isinstance(test, ast.Constant) and not test.value


def _constants(tree: ast.AST) -> dict[str, Any]:
    """Names that are given one literal, and nothing else."""
    given: dict[str, list[ast.expr | None]] = {}
    for node in _walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            given.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            given.setdefault(node.id, []).append(None)
        elif isinstance(node, ast.arg):
            given.setdefault(node.arg, []).append(None)
    found: dict[str, Any] = {}
    for name, values in given.items():
        # the name on the left of an assignment is walked as well
        assigned = [value for value in values if value is not None]
        if len(assigned) == 1 and len(values) == 2:
            value = _literal(assigned[0], {})
            if not isinstance(value, NotLiteral):
                found[name] = value
    return found


def _call(node: ast.Call, constants: dict[str, Any]) -> Call | None:
    if isinstance(node.func, ast.Attribute):
        name, owner = node.func.attr, ast.unparse(node.func.value).rsplit(".", 1)[-1]
    elif isinstance(node.func, ast.Name):
        name, owner = node.func.id, ""
    else:
        return None
    named: dict[str, Any] = {}
    for word in node.keywords:
        value = _literal(word.value, constants)
        if word.arg is not None:
            named[word.arg] = value
        elif isinstance(value, dict):
            named |= value
        else:
            named[f"**{value}"] = value
    return Call(name, owner, node.lineno, tuple(_literal(argument, constants) for argument in node.args), named)


def _literal(node: ast.expr, constants: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Subscript):
        whole, place = _literal(node.value, constants), _literal(node.slice, constants)
        if isinstance(whole, dict) and not isinstance(place, NotLiteral | dict | list) and place in whole:
            return whole[place]
    # a dtype is a name of torch's
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return NotLiteral(" ".join(ast.unparse(node).split()))
