"""What a changed setting does to a run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.parallel.mesh import Mesh
from deltatune.training.changes import check_changes, find_changes, find_other_data
from deltatune.training.sealed import seal
from deltatune.training.since import PACKS_PER_STEP, changed_settings, changed_steps

BASE: dict[str, Any] = {
    "model": {"name_or_path": "m"},
    "data": {"train": [{"path": "a.jsonl"}]},
    "lora": {"r": 8},
    "training": {"learning_rate": 1e-4},
}


def changes(**sections: Any) -> Any:
    def dumped(values: dict[str, Any]) -> dict[str, Any]:
        return Recipe.model_validate(values).model_dump(mode="json")

    merged = {
        name: {**BASE.get(name, {}), **values} if isinstance(values, dict) else values
        for name, values in sections.items()
    }
    return find_changes(dumped(BASE), dumped({**BASE, **merged}))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, []),
        ({"training": {"learning_rate": 2e-4}}, [("training.learning_rate", "acts")]),
        (
            {"training": {"max_steps": 50, "save_steps": 5}},
            [("training.max_steps", "acts"), ("training.save_steps", "acts")],
        ),
        ({"training": {"optim": "sgd"}}, [("training.optim", "cannot")]),
        ({"training": {"unfrozen_parameters": ["a"]}}, [("training.unfrozen_parameters", "cannot")]),
        ({"lora": {"name_or_path": "a"}}, [("lora.name_or_path", "cannot")]),
        ({"training": {"loraplus_lr_ratio": 4.0}}, [("training.loraplus_lr_ratio", "cannot")]),
        ({"training": {"learning_rates": {"a.b": 2e-4}}}, [("training.learning_rates.a.b", "cannot")]),
        ({"training": {"early_stopping_patience": 3}}, [("training.early_stopping_patience", "acts")]),
        ({"training": {"metric_for_best_model": "eval_loss"}}, [("training.metric_for_best_model", "cannot")]),
        ({"training": {"greater_is_better": True}}, [("training.greater_is_better", "cannot")]),
        ({"training": {"seed": 1}}, [("training.seed", "asks")]),
        ({"lora": {"r": 16}}, [("lora.r", "cannot")]),
        ({"activation_offloading": True}, [("activation_offloading", "acts")]),
        ({"preference": {"beta": 0.2}}, [("preference", "asks")]),
        ({"lora": {"lora_dropout": 0.1}}, [("lora.lora_dropout", "acts")]),
        ({"model": {"dtype": "bfloat16"}}, [("model.dtype", "cannot")]),
        ({"data": {"train": [{"path": "b.jsonl"}]}}, [("data.train.0.path", "asks")]),
        ({"data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}}, [("data.train", "asks")]),
        ({"data": {"num_proc": 3, "eval": [{"path": "c.jsonl"}]}}, [("data.eval", "acts"), ("data.num_proc", "local")]),
        ({"training": {"output_dir": "other"}}, [("training.output_dir", "local")]),
        ({"packing": {"tokens_per_batch": 64}}, [("packing.tokens_per_batch", "asks")]),
    ],
)
def test_every_setting_has_a_verdict(sections: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert [(change.key, change.verdict) for change in changes(**sections)] == expected


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}


@pytest.mark.parametrize("name", ["learning_rate", "lr_scheduler_kwargs", "lr_scheduler_type"])
def test_a_schedule_by_evaluations_goes_on_as_it_was(name: str) -> None:
    others = {"learning_rate": 2e-4, "lr_scheduler_kwargs": {"factor": 0.5}, "lr_scheduler_type": "linear"}
    found = find_changes({"training": PLATEAU}, {"training": {**PLATEAU, name: others[name]}})
    assert [change.verdict for change in found] == ["cannot"]
    back = find_changes({"training": {**PLATEAU, name: others[name]}}, {"training": PLATEAU})
    assert [change.verdict for change in back] == ["cannot"]


@pytest.mark.parametrize(
    "compares",
    [{"load_best_model_at_end": True}, {"early_stopping_patience": 1}, {"save_strategy": "best"}, PLATEAU],
    ids=["best at the end", "early stopping", "best saved", "schedule"],
)
def test_held_out_data_stays_where_evaluations_are_compared(compares: dict[str, Any]) -> None:
    def recipe(path: str, **training: Any) -> dict[str, Any]:
        return {"data": {"eval": [{"path": path}]}, "training": training}

    evaluates = {"eval_strategy": "steps"}
    for more, verdict in ((compares, "cannot"), ({}, "acts")):
        found = find_changes(recipe("a", **{**evaluates, **more}), recipe("b", **{**evaluates, **more}))
        assert [(change.key, change.verdict) for change in found] == [("data.eval.0.path", verdict)]
    first = find_changes(recipe("a", eval_strategy="no"), recipe("b", **{**evaluates, "load_best_model_at_end": True}))
    assert ("data.eval.0.path", "acts") in [(change.key, change.verdict) for change in first], (
        "nothing was compared yet"
    )


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [(None, {}, "acts"), ({"a.b": 1.0}, {"a.b": 0.0}, "acts"), ({"a.b": 1.0}, {"b": 1.0}, "cannot")],
)
def test_rates_of_the_same_groups_act(before: Any, now: Any, verdict: str) -> None:
    found = find_changes({"training": {"learning_rates": before}}, {"training": {"learning_rates": now}})
    assert {change.verdict for change in found} == {verdict}


@pytest.mark.parametrize("section", sorted(Recipe.model_fields))
def test_no_section_is_without_one(section: str) -> None:
    assert find_changes({section: 1}, {section: 2})[0].verdict in ("acts", "asks", "cannot")


def test_rows_that_were_changed_are_told_by_their_digest() -> None:
    before = {"data.train.0": "1", "data.train.1": "2", "data.eval.0": "3", "data.eval.1": "3"}
    now = {"data.train.0": "1", "data.train.1": "4", "data.eval.0": "5", "data.train.2": "6"}
    paths = {"data.train.0": "a", "data.train.1": "b", "data.eval.1": "gone", "data.train.2": "new"}
    (found,) = find_other_data(before, now, paths)
    assert str(found) == 'rows of b: "2" -> "4"'
    with pytest.raises(UserError, match=r"rows of b: .* --allow-change"):
        check_changes([found], allow=False)


def test_what_cannot_act_is_refused_whatever_is_allowed() -> None:
    with pytest.raises(UserError, match=r"lora.r: 8 -> 16 cannot act on a run that goes on: .*; set it back"):
        check_changes(changes(lora={"r": 16}), allow=True)


def test_other_data_needs_a_word() -> None:
    found = changes(packing={"tokens_per_batch": 64})
    with pytest.raises(UserError, match=r"packing.tokens_per_batch: 4096 -> 64 makes the run go on .* --allow-change"):
        check_changes(found, allow=False)
    check_changes(found, allow=True)
    check_changes(changes(training={"learning_rate": 2e-4}), allow=False)


@pytest.mark.parametrize(
    ("mesh", "accumulation", "verdicts"),
    [
        (Mesh(2), 2, {}),
        (Mesh.at(4, 3, sequence=2), 2, {}),
        (Mesh(1), 4, {"training.gradient_accumulation_steps": "acts"}),
        (Mesh(4), 1, {"training.gradient_accumulation_steps": "acts"}),
        (Mesh(4), 2, {"packs of an optimizer step": "asks"}),
        (Mesh.at(2, 0, sequence=2), 2, {"packs of an optimizer step": "asks"}),
        (Mesh(2), 1, {"training.gradient_accumulation_steps": "acts", "packs of an optimizer step": "asks"}),
    ],
)
def test_other_processes_go_on_where_a_step_has_as_many_packs(
    tmp_path: Path, mesh: Mesh, accumulation: int, verdicts: dict[str, str]
) -> None:
    def recipe(accumulation: int) -> Recipe:
        return Recipe.model_validate({**BASE, "training": {"gradient_accumulation_steps": accumulation}})

    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    seal(tmp_path, {"recipe": recipe(2).model_dump(mode="json"), PACKS_PER_STEP: 4})
    found = changed_settings(recipe(accumulation), tmp_path, allow=True)
    found += changed_steps(recipe(accumulation), tmp_path, mesh, allow=True)
    assert {change.key: change.verdict for change in found} == verdicts
    if "asks" in verdicts.values():
        with pytest.raises(UserError, match=r"packs of an optimizer step: 4 -> .* --allow-change"):
            changed_steps(recipe(accumulation), tmp_path, mesh, allow=False)
