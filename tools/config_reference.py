"""docs/config.md, generated from the schema: ``python -m tools.config_reference > docs/config.md``."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deltatune.config.inductor import INDUCTOR_OPTIONS
from deltatune.config.refused import REFUSED_TRAINING_NAMES
from deltatune.config.schema import (
    CompileSection,
    DataSection,
    Fp8Quantization,
    LoraSection,
    ModelSection,
    PackingSection,
    ParallelSection,
    PreferenceSection,
    Recipe,
    SamplesSection,
    Source,
    VerifySection,
)
from deltatune.config.training_section import TrainingSection

__all__ = ["reference_page"]

_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("model", ModelSection),
    ("model.quantization of type fp8", Fp8Quantization),
    ("data", DataSection),
    ("data.train[], data.eval[]", Source),
    ("packing", PackingSection),
    ("preference", PreferenceSection),
    ("lora", LoraSection),
    ("compile", CompileSection),
    ("training", TrainingSection),
    ("verify", VerifySection),
    ("parallel", ParallelSection),
    ("samples", SamplesSection),
)

_INTRODUCTION = """\
# Recipe reference

Generated from `deltatune.config.schema` by `python -m tools.config_reference`; do not edit.

A recipe is a YAML file. Unknown keys, wrong types, keys given twice and options that cannot act are errors. On the
command line `--set key=value` changes one key, such as `--set training.max_steps=100` or
`--set data.train.0.path=mine.jsonl`; the value is YAML.

A relative path begins in the folder that the command is called in, wherever the recipe lies; `~` is the home folder.
This holds for `name_or_path`, `tokenizer`, `chat_template`, `path`, `cache_dir` and `output_dir`. What exists there is
taken before a name on the Hub.
"""


def reference_page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_INTRODUCTION, *_section("Top level", Recipe), *_sections(), *_inductor(), *_refused()])


def _sections() -> Iterator[str]:
    for title, section in _SECTIONS:
        yield from _section(f"`{title}`", section)


def _section(title: str, section: type[BaseModel]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{_flat(section.__doc__ or '')}\n"
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        cells = (f"`{name}`", _type(field.annotation), _default(field), _flat(field.description or ""))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _inductor() -> Iterator[str]:
    yield "## `compile.options`\n"
    yield "| key | type | |"
    yield "|---|---|---|"
    for name, meaning in INDUCTOR_OPTIONS.items():
        yield f"| `{name}` | bool | {meaning} |"
    yield ""


def _refused() -> Iterator[str]:
    yield "## Names that `training` refuses\n"
    yield "| key | unless | instead |"
    yield "|---|---|---|"
    for name, (accepted, remedy) in REFUSED_TRAINING_NAMES.items():
        yield f"| `{name}` | {'' if accepted is None else f'`{json.dumps(accepted)}`'} | {remedy} |"
    yield ""


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(member) for member in arguments if member is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "source" if annotation is Source else "section"
    names: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}
    return names[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "as below"
    return f"`{json.dumps(value)}`" if value not in ((), {}) else "empty"


def _flat(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.stdout.write(reference_page())
