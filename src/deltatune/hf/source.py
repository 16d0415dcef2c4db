"""What the installed transformers calls things, read from its source: importing it costs seconds.

A name that is not found where it is looked for is unknown, not absent: every reader here then says None, and whoever
asks leaves the check to transformers itself.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "annotated_fields",
    "conversion_text",
    "enum_values",
    "mapping_keys",
    "model_types",
    "modeling_text",
    "schedule_arguments",
]


def enum_values(file: str, name: str) -> tuple[str, ...] | None:
    """The values of an enum of strings, in their order.

    >>> "linear" in enum_values("trainer_utils.py", "SchedulerType")
    True
    """
    members = _members(file, name)
    return None if members is None else tuple(members.values())


def annotated_fields(file: str, name: str) -> dict[str, str] | None:
    """The fields of a dataclass, as far as the class itself annotates them, with their annotations."""
    found = _class(file, name)
    if found is None:
        return None
    lines = [line for line in found.body if isinstance(line, ast.AnnAssign) and not _is_class_variable(line)]
    return {line.target.id: ast.unparse(line.annotation) for line in lines if isinstance(line.target, ast.Name)}


def mapping_keys(file: str, name: str) -> tuple[str, ...] | None:
    """The keys of a mapping from strings that a module assigns to ``name``."""
    mapping = _mapping(file, name)
    if mapping is None:
        return None
    return tuple(key.value for key in mapping.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def schedule_arguments(schedule: str) -> tuple[dict[str, str], list[str]] | None:
    """What a learning-rate schedule takes beside the optimizer and numbers of steps: all of it with its type
    (an empty text where none is known), and what it must have.

    None for one that hands everything on to torch.
    """
    mapping, members = _mapping("optimization.py", "TYPE_TO_SCHEDULER_FUNCTION"), _members(*_SCHEDULES)
    if mapping is None or members is None:
        return None
    makers = {
        members[key.attr]: value.id
        for key, value in zip(mapping.keys, mapping.values, strict=True)
        if isinstance(key, ast.Attribute) and key.attr in members and isinstance(value, ast.Name)
    }
    functions = {part.name: part for part in _tree("optimization.py") if isinstance(part, ast.FunctionDef)}
    maker = functions.get(makers.get(schedule, ""))
    if maker is None or maker.args.kwarg is not None:
        return None
    given = ("optimizer", "num_warmup_steps", "num_training_steps")
    names = [argument.arg for argument in maker.args.args]
    required = names[: len(names) - len(maker.args.defaults)]
    defaults = dict(zip(names[len(required) :], maker.args.defaults, strict=True))
    taken = {
        argument.arg: _type_of(argument.annotation, defaults.get(argument.arg))
        for argument in maker.args.args
        if argument.arg not in given
    }
    return taken, [name for name in required if name not in given]


def _type_of(annotation: ast.expr | None, default: ast.expr | None) -> str:
    """As annotated, or as a number's default is; an empty text where neither says it."""
    if annotation is not None:
        return ast.unparse(annotation)
    value = default.value if isinstance(default, ast.Constant) else None
    return type(value).__name__ if isinstance(value, int | float) else ""


def modeling_text(model_type: str) -> str | None:
    """The source of a family's modules; None where transformers has no folder of that name."""
    root = _root()
    folder = None if root is None or not model_type.isidentifier() else root / "models" / model_type
    files = [] if folder is None else sorted(folder.glob("modeling_*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files) or None


def model_types() -> frozenset[str] | None:
    """All that may be the type of a model: the strings of the modules that map them to classes; None without these."""
    root = _root()
    folder = None if root is None else root / "models" / "auto"
    files = [] if folder is None else [folder / name for name in ("auto_mappings.py", "configuration_auto.py")]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return frozenset(re.findall(r"""["']([\w.-]+)["']""", " ".join(texts))) or None


def conversion_text() -> str | None:
    """The source of what renames a checkpoint's weights as it is loaded."""
    file = None if (root := _root()) is None else root / "conversion_mapping.py"
    return file.read_text(encoding="utf-8") if file is not None and file.is_file() else None


_SCHEDULES = ("trainer_utils.py", "SchedulerType")


@cache
def _root() -> Path | None:
    spec = find_spec("transformers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@cache
def _tree(file: str) -> tuple[ast.stmt, ...]:
    path = None if (root := _root()) is None else root / file
    if path is None or not path.is_file():
        return ()
    return tuple(ast.parse(path.read_text(encoding="utf-8")).body)


def _class(file: str, name: str) -> ast.ClassDef | None:
    return next((part for part in _tree(file) if isinstance(part, ast.ClassDef) and part.name == name), None)


def _mapping(file: str, name: str) -> ast.Dict | None:
    for part in _tree(file):
        targets = part.targets if isinstance(part, ast.Assign) else ()
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(part, ast.Assign)
            return part.value if isinstance(part.value, ast.Dict) else None
    return None


def _members(file: str, name: str) -> dict[str, str] | None:
    found = _class(file, name)
    if found is None:
        return None
    return {
        target.id: line.value.value
        for line in found.body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
        for target in line.targets
        if isinstance(target, ast.Name)
    }


def _is_class_variable(line: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.unparse(line.annotation)
