"""What is known of the families without torch is what they declare."""

from __future__ import annotations

from deltatune.models.names import FAMILY_NAMES
from deltatune.models.registry import FAMILIES


def test_names_are_those_of_the_families() -> None:
    assert {family.model_type: family.name for family in FAMILIES} == FAMILY_NAMES
