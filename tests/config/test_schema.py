import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from deltatune.config.explain import known_keys
from deltatune.config.schema import (
    CompileSection,
    DataSection,
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
from tools.config_reference import reference_page

SECTIONS = [
    CompileSection,
    DataSection,
    LoraSection,
    ModelSection,
    PackingSection,
    ParallelSection,
    PreferenceSection,
    Recipe,
    SamplesSection,
    Source,
    TrainingSection,
    VerifySection,
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_is_documented(section) -> None:
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_never_change(section) -> None:
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == ("allow" if section is TrainingSection else "forbid")


def whole_numbers(schema: Any) -> Iterator[dict[str, Any]]:
    """The parts of a JSON schema that are whole numbers."""
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    if isinstance(schema, dict) and schema.get("type") == "integer":
        yield schema
    for part in parts:
        yield from whole_numbers(part)


def test_every_whole_number_has_an_end() -> None:
    """Tensors, counters and loops take none of a hundred digits."""
    found = list(whole_numbers(Recipe.model_json_schema()))
    assert len(found) > 30
    assert [each for each in found if not each.keys() & {"maximum", "exclusiveMaximum", "const", "enum"}] == []


def test_a_field_cannot_be_assigned() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        PackingSection().tokens_per_batch = 3  # type: ignore[misc]


def test_config_imports_no_torch() -> None:
    code = "import sys, deltatune.config.load; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_lora_arguments_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    section = LoraSection.model_validate({"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}})
    config = peft.LoraConfig(**section.peft_arguments())
    assert (config.r, config.target_modules, config.rank_pattern) == (4, {"q_proj"}, {"k_proj": 2})


def test_training_arguments_hold_names_beyond_the_section() -> None:
    section = TrainingSection.model_validate({"torch_empty_cache_steps": 4, "report_to": ["wandb"]})
    arguments = section.arguments()
    assert arguments["torch_empty_cache_steps"] == 4
    assert arguments["report_to"] == ["wandb"]
    assert None not in arguments.values()


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == reference_page(), "run python -m tools.config_reference > docs/config.md"


def test_the_reference_page_names_every_key() -> None:
    page = reference_page()
    for name in known_keys(()):
        keys = known_keys((name,))
        part = page.partition(f"\n## `{name}`\n")[2].partition("\n## ")[0]
        assert [key for key in keys if f"\n| `{key}` |" not in part] == [], name
    assert [name for name in Source.model_fields if f"\n| `{name}` |" not in page] == []
    assert "PydanticUndefined" not in page
