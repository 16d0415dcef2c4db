"""A field of a section against its default."""

from __future__ import annotations

from pydantic import BaseModel

__all__ = ["default_of", "differs"]


def differs(section: BaseModel, name: str) -> bool:
    """Compared with the default, not with what was written: a resolved recipe writes everything and stays valid."""
    return bool(getattr(section, name) != default_of(section, name))


def default_of(section: BaseModel, name: str) -> object:
    """The default of a field."""
    default: object = type(section).model_fields[name].get_default(call_default_factory=True, validated_data={})
    return default
