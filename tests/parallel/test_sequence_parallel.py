"""The ranks of a sequence group train on one pack as one process does: losses, gradients, documents, exchanges."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from sequence_cases import ODD, THREE, TRACED, Case, alone, build, join, pack, step, targets_of, together
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from deltatune import CompileOptions, prepare
from deltatune.layers.exchange import exchange
from deltatune.packing.group import Recurrent
from deltatune.parallel.sequence import shard_sequence
from deltatune.parallel.slice import cut_batch
from forked import free_port, run_ranks

ROUTED = {"output_router_logits": True}
#: in parts of 32 and of 64 tokens
APART = [20, 12, 32, 5, 27, 32]
WHOLE = CompileOptions(scope="model", backend="aot_eager")
THREE_HEADS = {"linear_num_value_heads": 3, "linear_num_key_heads": 3}
FEW = {"num_key_value_heads": 1, "linear_num_key_heads": 1}


def traced(checkpointing: str | float) -> dict[str, Any]:
    return {"compile": TRACED, "checkpointing": checkpointing}


CASES: dict[str, tuple[tuple[int, ...], Case]] = {
    "documents of any length": (
        (2, 4),
        Case((THREE, ODD, [513, 511], [514, 510], [257, 255, 257, 255], [401], [1, 1, 1])),
    ),
    "ranks of padding alone": ((2, 4), Case(([30, 2],), total=128)),
    "labels": ((2, 4), Case((THREE, ODD), labels=True, counted=False)),
    "labels of a wrapped model": ((2,), Case((THREE,), family="qwen3", labels=True, wrapped=True)),
    "fewer heads": ((2,), Case((THREE,), model=FEW, labels=True)),
    "text of a model with images": ((2,), Case((THREE,), images=True)),
    "tied": ((2,), Case((THREE,), model={"tie_word_embeddings": True}, exchanges=True)),
    "adapters": ((4,), Case((THREE,), lora=True)),
    "checkpointed": ((2,), Case((THREE,), prepared={"checkpointing": "layer"}, exchanges=True)),
    "dense": ((2, 4), Case((THREE, ODD), family="qwen3")),
    "windows and sinks": ((2,), Case((THREE,), family="gpt_oss", call=ROUTED)),
    "experts": ((2, 4), Case((THREE,), family="qwen3_5_moe", call=ROUTED)),
    # padding counts in the router's loss, so it is there on one process too
    "interleaved": ((2, 4), Case((ODD,), family="qwen3_next", total=92, call=ROUTED)),
    # the other boundaries in a pack of as many tokens take the same graphs; no document of APART lies on two ranks
    "traced": ((2,), Case((THREE, APART, [13, 1, 2, 3, 109], [128]), layers=1, prepared=traced(0.0), exchanges=True)),
    "traced, routed": (
        (2,),
        Case((THREE,), family="qwen3_moe", layers=1, call=ROUTED, prepared=traced(0.5), exchanges=True),
    ),
    "traced, whole": ((2,), Case((APART, THREE), family="qwen3", layers=1, prepared={"compile": WHOLE})),
    "traced, adapters": (
        (2,),
        Case((THREE,), family="qwen3", layers=1, lora=True, prepared=traced("layer"), exchanges=True),
    ),
    # no document lies on two ranks in the first pack
    "whole documents": ((2, 4), Case((APART, THREE, [13, 1, 2, 3, 109]))),
    "whole documents, checkpointed": (
        (2,),
        Case((APART, THREE), labels=True, counted=False, lora=True, prepared={"checkpointing": "layer"}),
    ),
    "whole documents, experts": ((2, 4), Case((APART, THREE), family="qwen3_5_moe", call=ROUTED)),
    "whole documents, windows and sinks": ((2,), Case((APART,), family="gpt_oss", call=ROUTED)),
    "whole documents, states": ((2, 4), Case((APART, THREE), prepared={"checkpointing": "layer"}, recurrent="state")),
    "states": (
        (2, 4),
        Case((THREE, ODD, [513, 511], [514, 510], [257, 255, 257, 255], [401], [7], [1, 1, 1]), recurrent="state"),
    ),
    "states, ranks of padding alone": ((2, 4), Case(([30, 2],), total=128, recurrent="state")),
    "states of heads that do not divide": ((2, 4), Case((THREE,), model=THREE_HEADS, recurrent="state")),
    "states, interleaved": ((2, 4), Case((ODD,), family="qwen3_next", total=92, call=ROUTED, recurrent="state")),
    "states, experts": ((2,), Case((THREE,), family="qwen3_5_moe", call=ROUTED, recurrent="state")),
    "states, text of a model with images": ((2,), Case((THREE,), images=True, recurrent="state")),
    "states, adapters": (
        (2, 4),
        Case((THREE,), lora=True, prepared={"checkpointing": "layer"}, recurrent="state", exchanges=True),
    ),
    "states, traced": (
        (2,),
        Case(
            (THREE, APART, [13, 1, 2, 3, 109], [128]), layers=1, prepared=traced(0.0), recurrent="state", exchanges=True
        ),
    ),
    "compiled": ((2,), Case((THREE,), family="qwen3", layers=1, prepared={"compile": CompileOptions()})),
}
#: what is compiled has processes of its own, but for one
SLOW = ("traced", "traced, routed", "traced, whole", "states, traced", "compiled")


def marks(name: str, ranks: int = 2) -> Any:
    return pytest.mark.slow if name in SLOW or ranks > 2 else ()


BY_RANKS = [
    pytest.param(name, ranks, marks=marks(name, ranks)) for name, (sizes, _) in CASES.items() for ranks in sizes
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What ranks made of every case, by the number of them; they are started once for all cases."""
    made: dict[tuple[int, bool], Any] = {}

    def of(ranks: int, slow: bool = False) -> Any:
        if (ranks, slow) not in made:
            path = tmp_path_factory.mktemp(f"ranks{ranks}")
            run_ranks(rank_main, ranks, slow, free_port(), str(path), count=ranks)
            made[ranks, slow] = torch.load(path / "found.pt", weights_only=True)
        return made[ranks, slow]

    return of


def rank_main(rank: int, ranks: int, slow: bool, port: int, path: str) -> None:
    join(port, rank, ranks)
    cases = {name: case for name, (sizes, case) in CASES.items() if ranks in sizes and (name in SLOW) == slow}
    made = {name: together(case, rank, ranks) for name, case in cases.items()}
    if ranks == 2 and not slow:
        made |= {
            "documents, heads": documents_main(rank, "heads"),
            "documents, state": documents_main(rank, "state"),
            "apart, heads": together(Case((APART,), exchanges=True), rank, 2)["exchanges"],
            "apart, state": together(Case((APART,), exchanges=True, recurrent="state"), rank, 2)["exchanges"],
            "sharded": sharded_main(rank),
            "undone": undone_main(rank),
            "exchange": exchange_main(rank),
        }
    if rank == 0:
        torch.save(made, Path(path) / "found.pt")


@pytest.mark.parametrize(("name", "ranks"), BY_RANKS)
def test_losses_and_gradients_are_those_of_one_process(name: str, ranks: int, found: Any) -> None:
    made = found(ranks, name in SLOW)[name]
    report = made["report"]
    for ours, theirs in zip(made["steps"], alone(CASES[name][1]), strict=True):
        assert ours.keys() == theirs.keys()
        for key, expected in theirs.items():
            assert (ours[key] - expected).norm() <= 1e-5 * expected.norm() + 1e-12, key
    if report:
        assert set(report["graphs"].values()) == {1}
        assert report["breaks"] == report["recompiles"] == []


def documents_main(rank: int, recurrent: Recurrent) -> dict[str, Any]:
    """Each token's loss before and after another document changes, and one document's gradient to all inputs."""
    model = build(Case(()))
    shard_sequence(prepare(model), dist.group.WORLD, recurrent=recurrent)
    batch = pack(THREE)
    changed = dict(batch)
    changed["input_ids"] = batch["input_ids"].clone()
    changed["input_ids"][0, 37:88] = batch["input_ids"][0, 37:88] % 95 + 1
    changed["labels"] = changed["input_ids"]

    def losses(of: dict[str, Any], **more: Any) -> torch.Tensor:
        part = cut_batch(of, rank=rank, size=2)
        part |= more and {"input_ids": None}
        result: torch.Tensor = model(**part, loss_reduction="none", **more).loss[0]
        return result

    embedded = model.get_input_embeddings()(cut_batch(batch, rank=rank, size=2)["input_ids"])
    embedded = embedded.detach().requires_grad_()
    inside = cut_batch(batch, rank=rank, size=2)["sequences"].positions.new_zeros(128)
    inside[37:88] = 1
    (losses(batch, inputs_embeds=embedded) * inside[rank * 64 : rank * 64 + 64]).sum().backward()
    assert embedded.grad is not None
    return {
        "before": gathered(losses(batch).detach()),
        "after": gathered(losses(changed).detach()),
        "gradient": gathered(embedded.grad[0]),
    }


def gathered(x: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@pytest.mark.parametrize("recurrent", get_args(Recurrent))
def test_no_document_reaches_another(recurrent: str, found: Any) -> None:
    made = found(2)[f"documents, {recurrent}"]
    same = made["before"] == made["after"]
    assert same[:37].all()
    assert same[88:].all()
    assert not same[37:87].any()
    gradient = made["gradient"].abs().sum(-1)
    assert torch.count_nonzero(gradient[:37]) == torch.count_nonzero(gradient[88:]) == 0
    assert (gradient[37:87] > 0).all(), "the document lies on both ranks"


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=marks(name)) for name, (_, case) in CASES.items() if case.exchanges]
)
def test_no_setting_exchanges_again_in_backward(setting: str, found: Any) -> None:
    twice = 2 * CASES[setting][1].layers
    assert found(2, setting in SLOW)[setting]["exchanges"] == [twice, twice]


@pytest.mark.parametrize("recurrent", get_args(Recurrent))
def test_ranks_that_hold_whole_documents_exchange_nothing(recurrent: Recurrent, found: Any) -> None:
    assert found(2)[f"apart, {recurrent}"] == [0, 0]


def exchange_main(rank: int) -> dict[str, torch.Tensor]:
    """What a rank gets of blocks that say whose they are and who they are for, and what comes back of it."""
    group = dist.group.WORLD
    assert group is not None
    blocks = torch.tensor([10.0 * rank, 10.0 * rank + 1]).view(2, 1).expand(2, 3).contiguous().requires_grad_()
    torch.library.opcheck(exchange, (blocks, 2, group.group_name))
    received = exchange(blocks, 2, group.group_name)
    (received * torch.tensor([[1.0], [2.0]]) * (rank + 1)).sum().backward()
    assert blocks.grad is not None
    return {"received": gathered(received.detach()), "gradient": gathered(blocks.grad)}


def test_blocks_go_to_their_rank_and_gradients_back(found: Any) -> None:
    made = found(2)["exchange"]
    assert made["received"][:, 0].tolist() == [0, 10, 1, 11]
    assert made["gradient"][:, 0].tolist() == [1, 2, 2, 4]


def sharded_main(rank: int) -> list[dict[str, torch.Tensor]]:
    """The ranks of the group are those that FSDP2 shards over: a loss times their number, gradients averaged."""
    case = Case((THREE,))
    model = build(case)
    shard_sequence(prepare(model), dist.group.WORLD)
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    batch = pack(THREE)
    part = cut_batch(batch, rank=rank, size=2)
    loss = model(**part, num_items_in_batch=targets_of(batch)).loss
    (loss * 2).backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if isinstance(p.grad, DTensor)}
    dist.all_reduce(loss.detach_())
    return [{"loss": loss, **gradients}]


def test_ranks_of_a_group_are_data_parallel_ranks_for_fsdp2(found: Any) -> None:
    (ours,), (theirs,) = found(2)["sharded"], alone(Case((THREE,)))
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert (ours[key] - expected).norm() <= 1e-5 * expected.norm(), key


def undone_main(rank: int) -> list[dict[str, torch.Tensor]]:
    """A second model beside one in a group, one that has left it, and one that was prepared again; whole packs each."""
    case = Case((THREE,), family="qwen3", layers=1)
    member, left, again = (build(case) for _ in range(3))
    prepare(member)
    shard_sequence(member, dist.group.WORLD)
    prepared = prepare(left, compile=TRACED)
    shard_sequence(prepared, dist.group.WORLD)
    step(left, case, 0, (rank, 2))
    shard_sequence(left, None)
    shard_sequence(prepare(again), dist.group.WORLD)
    prepare(again)
    second = build(case)
    prepare(second)
    steps = [step(model, case, 0) for model in (left, again, second)]
    report = prepared.compile_report
    assert report is not None
    assert list(report.graphs.values()) == [1]
    assert report.recompiles == [], "graphs of a group are not those of one process"
    return steps


def test_a_group_is_of_one_model_until_it_is_undone(found: Any) -> None:
    (expected,) = alone(Case((THREE,), family="qwen3", layers=1))
    for one in found(2)["undone"]:
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-7)
