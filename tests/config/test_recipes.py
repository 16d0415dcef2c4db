"""Every recipe that ships is one that would run."""

from pathlib import Path

import pytest

from deltatune.config.load import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_any_file_may_take_the_place_of_the_training_data(path, tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    recipe = load_recipe(path, [f"data.train.0.path={rows}"]).recipe
    assert recipe.data.train[0].path == str(rows)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path) -> None:
    loaded = load_recipe(path)
    allowed = ["every weight trains in bfloat16"] if path.stem == "qwen3_5-9b-full" else []
    assert [warning for warning in loaded.warnings if not any(known in warning for known in allowed)] == []
