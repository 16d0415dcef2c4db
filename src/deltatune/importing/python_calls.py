"""The arguments of calls in a Python script or notebook, read from its text: nothing is run."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import UserError, one_line
from deltatune.importing.values import NotLiteral

__all__ = ["Call", "calls_in", "script_text"]

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class Call:
    """One call."""

    name: str  # the last part: from_pretrained of FastLanguageModel.from_pretrained
    owner: str  # the part before it, or ""
    line: int
    in_function: bool  # which may run later, more than once, or never
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
        except (ValueError, LookupError, TypeError, RecursionError) as error:
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
        line = "" if error.lineno is None else f":{error.lineno}"
        raise UserError(f"{path}{line}: broken Python: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path}: an expression in it is too long to be read") from error
    constants = _constants(tree)
    inside = {node for function in _walk(tree) if isinstance(function, _FUNCTIONS) for node in _walk(function)}
    found = [_call(node, constants, node in inside) for node in _walk(tree) if isinstance(node, ast.Call)]
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


def _call(node: ast.Call, constants: dict[str, Any], in_function: bool) -> Call | None:
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
    positional = tuple(_literal(argument, constants) for argument in node.args)
    return Call(name, owner, node.lineno, in_function, positional, named)


def _literal(node: ast.expr, constants: dict[str, Any]) -> Any:
    try:
        return _value(node, constants)
    except (ValueError, TypeError, LookupError, ArithmeticError):
        return NotLiteral(" ".join(ast.unparse(node).split()))


def _value(node: ast.expr, constants: dict[str, Any]) -> Any:
    """A literal, with names that stand for one in it, and what two numbers come to; an error for all else."""
    match node:
        case ast.Name(id=name):
            return constants[name]
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return name  # a dtype is a name of torch's
        case ast.List(elts=elements):
            return [_value(element, constants) for element in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(element, constants) for element in elements)
        case ast.Dict(keys=keys, values=values):
            # literal_eval has the words for **
            names = [ast.literal_eval(node) if key is None else _value(key, constants) for key in keys]
            return dict(zip(names, (_value(value, constants) for value in values), strict=True))
        case ast.Subscript(value=whole, slice=place):
            return dict(_value(whole, constants))[_value(place, constants)]
        case ast.BinOp(left=left, op=operation, right=right):
            sides = [_value(side, constants) for side in (left, right)]
            if all(type(side) in (int, float) for side in sides):
                return _OPERATIONS[type(operation)](*sides)
    return ast.literal_eval(node)
