"""The page on several processes says what the code does, and its arithmetic is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.shapes import shape_named
from deltatune.config import rules
from deltatune.config.schema import ParallelSection
from deltatune.hf.model import base_model
from deltatune.hf.units import gathered_units
from deltatune.parallel import sharding
from deltatune.training import layout
from tools import scale
from tools.capabilities import AXES, NEEDS, Axis, Need, cell
from tools.parallelism_page import PAGE, rendered
from tools.scale import Weights, exchanged, plan_of, traffic

NAMES = {need.name: need for need in NEEDS}
COLUMNS = {axis.name: axis for axis in AXES}
MIB = 2**20


@pytest.mark.slow
def test_the_page_is_what_the_code_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page, "make docs makes it"


def test_rows_have_names_of_their_own() -> None:
    assert len(NAMES) == len(NEEDS)


@pytest.mark.parametrize(
    ("need", "axis", "text", "reason"),
    [
        ("LoRA", "`shard`", "yes", None),
        ("LoRA, `impl: fused`", "`shard`", "yes", None),
        ("LoRA with `use_dora`", "`shard`", "yes", "rank 0 loads the whole model"),
        ("`optim: muon`", "`shard`", "no", "training.optim needs whole matrices"),
        ("`optim: muon`", "`replicate`", "yes", None),
        ("images in some ranks' calls, for a frozen tower", "`sequence`, heads", "no", "holds text alone"),
        ("images in some ranks' calls, for a frozen tower", "`shard`", "library", None),
        ("images in some ranks' calls, for a tower that trains", "`shard`", "no", "trains outside of the text model"),
        ("dense hybrids (Qwen3.5)", "`expert`", "no", "it has no experts"),
        ("families of attention alone (Qwen3)", "`sequence`, states", "no", "no recurrent layer"),
        ("beside `expert`", "`sequence`, heads", "yes", None),
    ],
)
def test_what_is_refused_is_known_from_what_refuses_it(need: str, axis: str, text: str, reason: str | None) -> None:
    found, why = cell(NAMES[need], COLUMNS[axis])
    assert found == text
    assert (why is None) if reason is None else (why is not None and reason in why)


def test_a_unit_that_images_alone_gather_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_tower(model: Any) -> Iterator[Any]:
        yield from gathered_units(model)
        yield base_model(model).model.visual

    monkeypatch.setattr(sharding, "gathered_units", with_tower)
    found, why = cell(NAMES["images in some ranks' calls, for a frozen tower"], COLUMNS["`shard`"])
    assert (found, why) == ("no", "a rank whose call brings images waits for the others, whose calls bring none")


def test_a_rule_that_changes_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    need = NAMES["`optim: sgd`"]
    assert cell(need, COLUMNS["`shard`"])[0] == "yes"
    monkeypatch.setattr(rules, "SHARDED_OPTIMIZERS", ("adamw_torch",))
    assert cell(need, COLUMNS["`shard`"])[0] == "no"


def test_a_key_that_recipes_get_or_lose_changes_its_column(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = COLUMNS["`sequence`, heads"]
    unknown = replace(heads, section={**heads.section, "not_a_key": 1})
    assert [cell(NAMES["LoRA"], axis)[0] for axis in (heads, unknown)] == ["yes", "library"]
    assert cell(NAMES["`training.bf16`"], unknown) == ("-", None)
    assert COLUMNS["`expert`"].in_recipes == ("expert" in ParallelSection.model_fields)


def test_a_fault_is_no_refusal() -> None:
    with pytest.raises(TypeError):
        cell(Need("a fault", {"lora": {"impl": "stock"}}), Axis("no size", {"shard": 2}, {"no_size": 2}))


def hops_out(shard: int, replicate: int, *, replicas: bool) -> int:
    """Of a machine, over all rings of shards or of copies: ranks whose next in the ring is on another machine."""
    size = shard * replicate

    def following(rank: int) -> int:
        if replicas:
            return (rank + shard) % size
        return rank // shard * shard + (rank + 1) % shard

    return sum(following(rank) // 8 != 0 for rank in range(8))


@pytest.mark.parametrize(("shard", "replicate"), [(1, 64), (2, 32), (4, 16), (8, 8), (16, 4), (64, 1), (8, 1), (2, 4)])
def test_what_leaves_a_machine_is_what_its_rings_send_out(shard: int, replicate: int) -> None:
    found = traffic(Weights(8 * 10**9, 10**9, 0), shard=shard, replicate=replicate)
    shards, copies = (hops_out(shard, replicate, replicas=replicas) for replicas in (False, True))
    # links share what the machine sends
    assert found.shards_leave == pytest.approx(shards * (found.gathered + found.scattered) / 8)
    assert found.replicas_leave == pytest.approx(copies * found.reduced / 8)


def test_bytes_and_seconds_by_hand() -> None:
    found = traffic(Weights(8 * 10**9, 4 * 10**9, 0), shard=8, replicate=8)
    assert found == pytest.approx((28e9, 14e9, 3.5e9, 0, 3.5e9))
    assert found.seconds() == pytest.approx(42 / 350 + 3.5 / 45)
    assert found.seconds(links=1) == pytest.approx(42 / 350 + 8 * 3.5 / 45)
    alone = traffic(Weights(8 * 10**9, 4 * 10**9, 0), shard=1, replicate=1)
    assert alone.seconds() == 0


def test_exchanges_of_a_sequence_by_hand() -> None:
    t = 16384
    # q and output of 8 heads, k and v of one head for each of 8 ranks; q, k of 16 heads, v and output of 16, gates
    attention, recurrent = 4 * 8 * 256, 4 * 16 * 128 + 2 * 16
    expected = 2 * 7 / 8 * t * 2 * (6 * attention + 18 * recurrent)
    assert exchanged(shape_named("qwen3.5-2b"), size=8) == pytest.approx(expected)
    # forward, the column of heads for a document of 131072 tokens on 8 ranks
    assert round(7 / 8 * t * recurrent * 2 / MIB) == 225


@pytest.mark.parametrize("name", scale.MODELS)
def test_plans_hold_their_processes_in_machines(name: str) -> None:
    for trains in ("LoRA", "all"):
        plan: Any = plan_of(name, trains)
        assert plan.gib <= scale.ROOM * scale.DEVICE_GIB
        for processes, sizes in plan.sizes.items():
            assert sizes.replicate * sizes.shard == processes
            assert scale.MACHINE % sizes.shard == 0
    assert plan_of(name, "LoRA").weights.trained < 0.02 * plan_of(name, "all").weights.trained


def test_auto_leaves_as_much_room_as_a_run_does() -> None:
    assert layout._ROOM == scale.ROOM


def test_experts_that_a_token_does_not_visit_are_not_computed() -> None:
    weights = plan_of("qwen3.5-35b-a3b", "all").weights
    assert weights.total == pytest.approx(34.7e9, rel=0.01)
    # 3B active, by the model's name, and without the embedding, which is looked up
    assert weights.used == pytest.approx(3e9, rel=0.05)
