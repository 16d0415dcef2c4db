"""The sizes that ``auto`` takes for a recipe."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import make_recipe, save_checkpoint

from deltatune import ops, preparation, report
from deltatune.compile.memory import estimate_memory
from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.training import layout
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.arguments import autocast_dtype, training_arguments
from deltatune.training.checkpoint import empty_model
from deltatune.training.planned import estimate_step, prepare_by_recipe
from tiny import tiny_model


def test_states_need_recurrent_layers_whatever_auto_would_take(tmp_path: Path) -> None:
    for family, refused in (("qwen3", True), ("qwen3_5", False)):
        model = tiny_model(family)
        recipe = make_recipe(tmp_path, save_checkpoint(tmp_path / family, model), parallel={"recurrent": "state"})
        with pytest.raises(UserError) if refused else nullcontext() as raised:
            layout.sizes_of(recipe, model, training_arguments(recipe.training), 2)
        if refused:
            line = "parallel.recurrent: state cannot act: qwen3 has no recurrent layer whose state could be passed on"
            assert str(raised.value) == f"{line}; leave it out"


@pytest.mark.parametrize("sizes", [{"shard": 2, "sequence": 2}, {"shard": 1, "sequence": 2}])
def test_a_step_that_passes_states_on_is_estimated_before_ranks_meet(tmp_path: Path, sizes: dict[str, int]) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", tiny_model("qwen3_5"))
    total = {}
    for recurrent in ("heads", "state"):
        recipe = make_recipe(tmp_path, checkpoint, parallel={"sequence": 2, "recurrent": recurrent})
        model = empty_model(recipe.model)
        prepare_by_recipe(recipe, model, device=torch.device("cpu"), **sizes)
        part = recipe.packing.tokens_per_batch // 2
        given: Any = {"tokens_per_batch": part, "compute_dtype": autocast_dtype(recipe.training), **sizes}
        given |= {"optimizer": recipe.training.optim, "recurrent": recurrent}
        total[recurrent] = estimate_step(recipe, model, "none", **sizes).total
        assert total[recurrent] == estimate_memory(model, **given).total
    assert total["heads"] < total["state"]


def test_a_pack_is_divided_beside_experts_where_a_step_fits_so_alone(tmp_path: Path, monkeypatch: Any) -> None:
    """Two processes that hold experts together, and whole weights of all else."""
    recipe = make_recipe(
        tmp_path,
        save_checkpoint(tmp_path / "checkpoint", tiny_model("qwen3_moe")),
        packing={"tokens_per_batch": 2048},
        parallel={"shard": 1, "expert": 2},
        checkpointing="layer",
    )
    arguments = training_arguments(recipe.training)
    prepared = empty_model(recipe.model)
    prepare_by_recipe(recipe, prepared, device=arguments.device)
    whole, half = (estimate_step(recipe, prepared, "layer", sequence=size).total for size in (1, 2))
    assert half < whole
    for room, sequence in ((whole + 1, 1), (whole - 1, 2)):
        monkeypatch.setattr(layout, "device_memory", lambda _, room=room: room / layout._ROOM)
        found = layout.sizes_of(recipe, empty_model(recipe.model), arguments, 2)
        assert (found.shard, found.sequence, found.expert) == (1, sequence, 2)


@pytest.mark.parametrize(
    ("optim", "sizes", "expected"), [("adamw_torch", {}, (2, 1)), ("muon", {}, (1, 2)), ("muon", {"sequence": 1}, None)]
)
def test_shards_are_no_choice_where_they_cannot_act(
    tmp_path: Path, monkeypatch: Any, optim: str, sizes: dict[str, int], expected: tuple[int, int] | None
) -> None:
    """Two processes for a step that fits with two shards, or with packs in two parts, but not whole."""
    recipe = make_recipe(
        tmp_path,
        save_checkpoint(tmp_path / "checkpoint"),
        lora=None,
        packing={"tokens_per_batch": 2048},
        training={"optim": optim},
        parallel=sizes,
        checkpointing="layer",
    )
    arguments = training_arguments(recipe.training)
    prepared = empty_model(recipe.model)
    prepare_by_recipe(recipe, prepared, device=arguments.device)
    total = {
        pair: estimate_step(recipe, prepared, "layer", shard=pair[0], sequence=pair[1]).total
        for pair in ((1, 1), (2, 1), (1, 2))
    }
    room = max(total[2, 1], total[1, 2])
    assert room < total[1, 1]
    monkeypatch.setattr(layout, "device_memory", lambda _: (room + total[1, 1]) / 2 / layout._ROOM)
    if expected is None:
        with pytest.raises(UserError, match="muon"):
            layout.sizes_of(recipe, empty_model(recipe.model), arguments, 2)
    else:
        found = layout.sizes_of(recipe, empty_model(recipe.model), arguments, 2)
        assert (found.shard, found.sequence) == expected


@pytest.mark.parametrize(
    ("shard", "bf16", "mode", "reason"),
    [
        (2, True, "fused", "one product for base and adapter"),
        (2, False, "stock", "the base weights are float32"),
        (1, True, "stock", "the base weights are float32"),
    ],
)
def test_a_plan_says_how_adapters_run_in_the_dtype_of_shards(
    tmp_path: Path, monkeypatch: Any, shard: int, bf16: bool, mode: str, reason: str
) -> None:
    """Of float32 weights, for a GPU."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", tiny_model("qwen3_5"))
    recipe = make_recipe(tmp_path, checkpoint, training={"bf16": bf16})
    monkeypatch.setattr(hf_model, "device_of", lambda _: torch.device("cuda"))
    dtypes = set()

    def choose(spec: Any, _: str) -> ops.Choice:
        dtypes.add(spec.dtype)
        return ops.Choice("known", "")

    monkeypatch.setattr(report.ops, "choose", choose)
    monkeypatch.setattr(preparation, "choose", choose)
    model = adapt_by_recipe(empty_model(recipe.model), recipe)
    prepared = prepare_by_recipe(recipe, model, device=torch.device("cuda"), shard=shard)
    dtypes.clear()
    assert {(row.mode, row.reason) for row in prepared.report.lora_rows} == {(mode, reason)}
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.parametrize("expert", ["auto", 1])
def test_a_plan_says_that_auto_divides_no_experts(tmp_path: Path, expert: Any) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", tiny_model("qwen3_moe"))
    recipe = make_recipe(tmp_path, checkpoint, parallel={"expert": expert})
    sizes = layout.sizes_of(recipe, empty_model(recipe.model), training_arguments(recipe.training), 2)
    assert sizes.expert == 1
    said = [
        line for line in layout.sizes_lines(recipe, sizes) if line.startswith("parallel: expert 1 (auto divides none")
    ]
    assert len(said) == (expert == "auto")
