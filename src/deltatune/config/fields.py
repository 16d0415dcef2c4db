"""What the recipe's sections are made of: their base, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

from deltatune.errors import UserError, user_path

__all__ = ["BEYOND", "Count", "Flag", "Integer", "PathText", "Ranks", "Section", "Seed", "Share", "Steps", "Text"]

BEYOND = 2**31
"""More than anything here counts: places in a pack are 32-bit integers."""

# YAML already gives types, so nothing is guessed: "true" in quotes is no flag, 1.0 no count, true no number
Flag = Annotated[bool, Strict()]
Integer = Annotated[int, Strict(), Field(ge=-BEYOND, lt=BEYOND)]
Count = Annotated[int, Strict(), Field(ge=1, lt=BEYOND)]
Ranks = Annotated[int, Strict(), Field(ge=1, le=2**20)]  # processes of a run
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]  # what numpy's generators take
Share = Annotated[float, Strict(), Field(ge=0.0, le=1.0)]
# transformers' own convention: a whole number of steps, or below 1 a share of them
Steps = Count | Annotated[float, Strict(), Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _has_home(path: str) -> str:
    try:
        user_path(path)
    except UserError as error:
        why = str(error).rpartition(": ")[2]
        raise PydanticCustomError("no_home", "a path ({why})", {"why": why}) from error
    return path


PathText = Annotated[Text, AfterValidator(_has_home)]  # or a name on the Hub; ``~`` stands for a home directory


class Section(BaseModel):
    """What all sections share: unknown keys are errors, values never change, docstrings are descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
