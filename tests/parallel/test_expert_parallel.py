"""Experts that ranks hold together: losses, gradients, norms and files are those of one process with all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune import CompileOptions, Sequences, parallelize, prepare
from deltatune.layers.experts import Experts
from deltatune.parallel.experts import norm_of
from deltatune.parallel.parallelize import Parallel
from forked import free_port, run_ranks
from tiny import documents, tiny_model

TRACED = CompileOptions(backend="aot_eager")
ADAPTERS = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
BOTH = {**ADAPTERS, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
SHALLOW = {"layers": 1}
IN_SEQUENCE = {"sequence": 2, "expert": 2, "expert_capacity": 2.0}
ONE = {"num_experts_per_tok": 1, "num_experts": 8}


@dataclass(frozen=True)
class Case:
    """A model, how it is prepared and divided, and where its routers send tokens."""

    family: str = "qwen3_moe"
    model: dict[str, Any] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: {"expert": 2, "expert_capacity": 2.0})
    lora: dict[str, Any] | None = None
    call: dict[str, Any] = field(default_factory=dict)
    routers: float | None = None  # what their weights are multiplied with
    padding: bool = False  # the last rank has no document
    passes: int = 1  # backwards before the optimizer would step
    counted: bool = False  # how often it exchanges


CASES: dict[str, tuple[tuple[int, ...], Case]] = {
    "full": ((2,), Case()),
    "hybrid, full": ((2,), Case(family="qwen3_5_moe", call={"output_router_logits": True})),
    "biases, transposed": ((2,), Case(family="gpt_oss")),
    "adapters": ((2,), Case(lora=BOTH)),
    "adapters of a transposed one": ((2,), Case(family="gpt_oss", lora=BOTH)),
    "adapters of one weight": ((2,), Case(lora={**ADAPTERS, "target_parameters": ["experts.down_proj"]})),
    "adapters of experts alone": ((2,), Case(lora={**BOTH, "target_modules": []})),
    "frozen experts": ((2,), Case(family="qwen3_5_moe", lora=ADAPTERS)),
    "skewed": ((2,), Case(routers=5.0)),
    "one expert": ((2,), Case(model=ONE, routers=0.0)),
    "a rank of padding": ((2,), Case(padding=True)),
    "less room than tokens": ((2,), Case(sizes={"expert": 2, "expert_capacity": 1.4})),
    "accumulated": ((2,), Case(passes=2)),
    "checkpointed": ((2,), Case(model=SHALLOW, prepared={"checkpointing": "layer"}, counted=True)),
    "compiled": ((2,), Case(model=SHALLOW, prepared={"compile": CompileOptions()})),
    "compiled, checkpointed": (
        (2,),
        Case(model=SHALLOW, prepared={"compile": TRACED, "checkpointing": "layer"}, counted=True),
    ),
    "compiled, nothing may stay": (
        (2,),
        Case(model=SHALLOW, lora=BOTH, prepared={"compile": TRACED, "checkpointing": 0.0}, counted=True),
    ),
    "sharded": ((2,), Case(sizes={"expert": 2, "shard": 2, "expert_capacity": 2.0})),
    "sharded, adapters": ((2,), Case(lora=BOTH, sizes={"expert": 2, "shard": 2, "expert_capacity": 2.0})),
    "two groups": ((4,), Case(sizes={"expert": 2, "expert_capacity": 2.0})),
    "two groups, sharded": ((4,), Case(sizes={"expert": 2, "shard": 2, "expert_capacity": 2.0})),
    "shared packs": (
        (2, 4),
        Case(family="qwen3_5_moe", sizes=IN_SEQUENCE, lora=BOTH, call={"output_router_logits": True}),
    ),
    "shared packs, states": ((2,), Case(family="qwen3_5_moe", sizes={**IN_SEQUENCE, "recurrent": "state"})),
    "shared packs, sharded": ((4,), Case(family="qwen3_5_moe", sizes={**IN_SEQUENCE, "shard": 4}, lora=BOTH)),
    "packs shared by fewer than hold experts": ((4,), Case(sizes={**IN_SEQUENCE, "expert": 4})),
    "packs shared by more than hold experts": ((4,), Case(sizes={**IN_SEQUENCE, "sequence": 4})),
    "shared packs, compiled": (
        (2,),
        Case(model=SHALLOW, lora=BOTH, sizes=IN_SEQUENCE, prepared={"compile": TRACED, "checkpointing": "layer"}),
    ),
    # fewer places than tokens on the way
    "four ranks, one expert a token": ((4,), Case(model=ONE, sizes={"expert": 4, "expert_capacity": 3.5})),
}
#: what is compiled has processes of its own, but for one
SLOW = ("compiled", "compiled, nothing may stay", "shared packs, compiled")


def marks(name: str) -> Any:
    return pytest.mark.slow if name in SLOW else ()


BY_RANKS = [pytest.param(name, ranks, marks=marks(name)) for name, (sizes, _) in CASES.items() for ranks in sizes]


def build(case: Case) -> Any:
    model = tiny_model(case.family, **case.model)
    if case.routers is not None:
        for name, weight in model.named_parameters():
            if "gate.weight" in name and weight.shape[0] == model.config.num_experts:
                weight.data.mul_(case.routers)
    if case.lora is not None:
        model = peft.get_peft_model(model, peft.LoraConfig(**case.lora))
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.train()


def loss_of(
    model: Any, case: Case, rank: int, *, padding: bool, part: Callable[..., Mapping[str, Any]] = dict
) -> torch.Tensor:
    """Of the pack of a data rank, or of a part of it."""
    lengths = [20, 12, 32]
    tokens = torch.cat(documents(lengths, seed=rank))[None]
    labels = tokens
    if padding:
        lengths, tokens = [64], torch.zeros_like(tokens)
        labels = tokens - 100
    batch = {"input_ids": tokens, "labels": labels, "sequences": Sequences.from_lengths(lengths)}
    loss: torch.Tensor = model(**part(batch), num_items_in_batch=100, **case.call).loss
    return loss


def whole_gradients(parallel: Parallel) -> dict[str, torch.Tensor]:
    found = {}
    assert parallel.experts is not None
    for name, weight in parallel.prepared.model.named_parameters():
        if (grad := weight.grad) is None:
            continue
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        elif (division := parallel.experts.parameters.get(weight)) is not None:
            parts = [torch.empty_like(grad) for _ in range(parallel.experts.group.size())]
            dist.all_gather(parts, grad.contiguous(), group=parallel.experts.group)
            grad = division.whole(parts)
        found[name] = grad.detach().clone()
    return found


def together(case: Case, rank: int, ranks: int) -> dict[str, Any]:
    prepared = prepare(build(case), **case.prepared)
    parallel = parallelize(prepared, **case.sizes)
    mesh = parallel.mesh
    padding = case.padding and mesh.data_rank == mesh.data_size - 1
    for _ in range(case.passes):
        loss = loss_of(parallel.model, case, mesh.data_rank, padding=padding, part=parallel.part) * mesh.size
        loss.backward()
    found = whole_gradients(parallel)
    dist.all_reduce(loss := loss.detach())
    report = prepared.compile_report
    return {
        "loss": loss / mesh.size,
        **found,
        "norm": parallel.clip_grad_norm_(0.01).detach(),
        "clipped": {name: grad.norm() for name, grad in whole_gradients(parallel).items()},
        "needed": parallel.check(),
        "exchanges": exchanges(parallel.model, case) if case.counted else [],
        "report": {} if report is None else report.to_dict(),
    }


def exchanges(model: Any, case: Case) -> list[int]:
    """All-to-alls of a forward and of its backward."""
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        loss = loss_of(model, case, 0, padding=False)
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        loss.backward()
    return [
        sum(event.count for event in run.key_averages() if event.key == "_c10d_functional::all_to_all_single")
        for run in (forward, backward)
    ]


def alone(case: Case, ranks: int) -> dict[str, Any]:
    model = build(case)
    prepare(model)
    packs = ranks // case.sizes.get("sequence", 1)
    losses = [loss_of(model, case, rank, padding=case.padding and rank == packs - 1) for rank in range(packs)]
    loss = sum(losses, torch.zeros(()))
    (loss * case.passes).backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    clipped = {name: weight.grad.norm() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), **found, "norm": norm, "clipped": clipped}


def rank_main(rank: int, ranks: int, slow: bool, port: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    made: dict[str, Any] = {}
    for name, (sizes, case) in CASES.items():
        if ranks in sizes and (name in SLOW) == slow:
            made[name] = together(case, rank, ranks)
    extra = {} if slow else EXTRA[ranks]
    made |= {name: run() for name, run in extra.items()}
    torch.save(made, Path(path) / f"rank{rank}.pt")


def refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "done"


def overflowing() -> dict[str, Any]:
    """All tokens on one rank, where there is room for a part of them."""
    case = Case(model=ONE, routers=0.0)
    parallel = parallelize(prepare(build(case)), expert=2, expert_capacity=1.5)
    loss_of(parallel.model, case, dist.get_rank(), padding=False).backward()
    return {
        "message": refusal(parallel.check),
        "next": parallel.check(),
        "finite": all(p.grad.isfinite().all() for p in parallel.model.parameters()),
    }


def overflowing_on_the_way() -> dict[str, Any]:
    case = Case(model=ONE, routers=0.0)
    parallel = parallelize(prepare(build(case)), expert=4)
    loss_of(parallel.model, case, dist.get_rank(), padding=False).backward()
    return {"message": refusal(parallel.check)}


def saved() -> dict[str, Any]:
    """Names and values of rank 0, and after they were read back over others."""
    found = {}
    for name, case in {"full": Case(family="gpt_oss"), "adapters": Case(lora=BOTH)}.items():
        for shard in (1, 2):
            parallel = parallelize(prepare(build(case)), shard=shard, expert=2)
            expected = build(case).state_dict()
            first = parallel.state_dict()
            with torch.no_grad():
                for weight in parallel.model.parameters():
                    weight.zero_()
            parallel.load_state_dict(expected)
            again = parallel.state_dict()
            if dist.get_rank() == 0:
                same = [
                    state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
                    for state in (first, again)
                ]
                found[f"{name} {shard}"] = same
            else:
                found[f"{name} {shard}"] = [first == {}, again == {}]
    return found


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def operators() -> dict[str, Any]:
    """What a layer's forward and backward call, and how often it exchanges."""
    model = build(Case())
    parallelize(prepare(model), expert=2)
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    hidden = torch.randn(64, 32, requires_grad=True)
    index = torch.randint(0, 4, (64, 2))
    weights = torch.rand(64, 2, requires_grad=True)
    with _Names() as names:
        experts(hidden, index, weights).sum().backward()
    return {"names": names.seen}


def refusals() -> dict[str, str]:
    divided = prepare(build(Case()))
    parallelize(divided, expert=2)
    adapted = prepare(build(Case(lora=BOTH)))
    parallelize(adapted, expert=2)
    frozen = prepare(build(Case(lora=BOTH)).requires_grad_(False))
    thawed = parallelize(frozen, expert=2)
    frozen.model.requires_grad_(True)
    few = prepare(build(Case(model={"num_experts": 3})))
    cached = {"input_ids": torch.ones(1, 4, dtype=torch.long), "use_cache": True}
    return {
        "twice": refusal(lambda: parallelize(divided, expert=2)),
        "again": refusal(lambda: prepare(divided.model)),
        "reverted": refusal(divided.revert),
        "cached": refusal(lambda: divided.model.eval()(**cached)),
        "cached, adapters": refusal(lambda: adapted.model.eval()(**cached)),
        "thawed": refusal(lambda: thawed.clip_grad_norm_(1.0)),
        "saved alone": refusal(divided.model.state_dict),
        "saved alone, adapters": refusal(lambda: peft.get_peft_model_state_dict(adapted.model)),
        "unknown": refusal(lambda: thawed.load_state_dict({"nothing": torch.zeros(1)})),
        "processes": refusal(lambda: parallelize(few, expert=3)),
    }


def narrowed() -> float:
    case = Case()
    parallel = parallelize(prepare(build(case)), shard=2, expert=2, expert_capacity=2.0, param_dtype=torch.bfloat16)
    loss = loss_of(parallel.model, case, dist.get_rank(), padding=False)
    loss.backward()
    grads = {p.grad.dtype for p in parallel.model.parameters() if p.grad is not None}
    assert grads == {torch.float32}
    dist.all_reduce(loss := loss.detach())
    return float(loss)


def cast() -> float:
    """Under autocast tokens travel in its dtype."""
    case = Case()
    parallel = parallelize(prepare(build(case)), expert=2, expert_capacity=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(parallel.model, case, dist.get_rank(), padding=False)
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    return float(loss)


EXTRA: dict[int, dict[str, Callable[[], Any]]] = {
    2: {
        "overflow": overflowing,
        "saved": saved,
        "operators": operators,
        "refusals": refusals,
        "narrowed": narrowed,
        "cast": cast,
    },
    4: {"overflow": overflowing_on_the_way},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[int, bool], Any] = {}

    def of(ranks: int, slow: bool = False) -> Any:
        if (ranks, slow) not in made:
            path = tmp_path_factory.mktemp(f"ranks{ranks}")
            run_ranks(rank_main, ranks, slow, free_port(), str(path), count=ranks)
            every = [torch.load(path / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
            made[ranks, slow] = every
        return made[ranks, slow]

    return of


@pytest.mark.parametrize(("name", "ranks"), BY_RANKS)
def test_losses_gradients_and_norms_are_those_of_one_process(name: str, ranks: int, found: Any) -> None:
    case = CASES[name][1]
    expected = alone(case, ranks)
    for rank in found(ranks, name in SLOW):
        ours = dict(rank[name])
        report, clipped = ours.pop("report"), ours.pop("clipped")
        del ours["needed"], ours["exchanges"]
        assert ours.keys() == expected.keys() - {"clipped"}
        for key, value in ours.items():
            assert (value - expected[key]).norm() <= 1e-5 * expected[key].norm() + 1e-9, key
        for key, value in expected["clipped"].items():
            assert (clipped[key] - value).abs() <= 1e-5 * value + 1e-9, key
        if report:
            assert set(report["graphs"].values()) == {1}
            assert report["breaks"] == report["recompiles"] == []


def test_what_is_needed_is_said_alike_on_all_ranks(found: Any) -> None:
    first, second = found(2)
    assert first["one expert"]["needed"] == second["one expert"]["needed"] == 2.0
    assert 1.0 < first["full"]["needed"] < first["skewed"]["needed"] < 2.0
    shallow = {made["needed"] for name, made in first.items() if name in CASES and CASES[name][1].model == SHALLOW}
    assert min(shallow) > 1.0, "graphs count too"


def test_visits_without_room_are_an_error_on_every_rank(found: Any) -> None:
    for rank in found(2):
        assert "mlp.experts: rank 0 needed room for 2.000 times its even share" in rank["overflow"]["message"]
        assert "set expert_capacity to 2, which is enough" in rank["overflow"]["message"]
        assert rank["overflow"]["finite"]
        assert rank["overflow"]["next"] == 0, "no call since"
    for rank in found(4):
        assert "needed room for 4.000 times its even share" in rank["overflow"]["message"]


def test_rank_0_gathers_every_name_and_all_read_them_back(found: Any) -> None:
    for rank in found(2):
        assert all(same == [True, True] for same in rank["saved"].values()), rank["saved"]


def test_a_step_waits_for_nothing(found: Any) -> None:
    for rank in found(2):
        names = rank["operators"]["names"]
        assert "deltatune.exchange.default" in names
        assert not {name for name in names if "_local_scalar_dense" in name or "nonzero" in name or "item" in name}


def test_a_norm_of_nothing_is_made_on_the_device() -> None:
    device = torch.device("meta")  # a copy to it is an operator, as it is to a GPU
    for grads in ([], [torch.ones(3, device=device)]):
        with _Names() as names:
            assert norm_of(grads, device).device == device
        assert not {name for name in names.seen if "copy" in name}


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=marks(name)) for name, (_, case) in CASES.items() if case.counted]
)
def test_no_setting_sends_tokens_again_in_backward(setting: str, found: Any) -> None:
    assert found(2, setting in SLOW)[0][setting]["exchanges"] == [3, 3]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("twice", "the model is sharded already"),
        ("again", "prepare(model) comes before parallelize(expert=): its experts lie on several ranks already"),
        ("reverted", "revert() comes before parallelize(expert=): its experts lie on several ranks already"),
        ("cached", "a call with a key-value cache is one rank's own, and its experts lie on several"),
        ("cached, adapters", "a call with a key-value cache is one rank's own, and its experts lie on several"),
        ("thawed", "weights of experts train that were frozen when they were divided; unfreeze before"),
        ("saved alone", "model.layers.0.mlp.experts lie on several ranks, so state_dict() would hold one rank's part"),
        ("saved alone, adapters", "lie on several ranks, so state_dict() would hold one rank's part of them; use"),
        ("unknown", "the model has no nothing"),
        ("processes", "expert=3 does not divide 2 processes; set expert to one of 1"),
    ],
)
def test_what_divided_experts_cannot_do_is_refused(what: str, message: str, found: Any) -> None:
    assert message in found(2)[0]["refusals"][what]


def test_experts_compute_in_the_dtype_of_the_weights_around_them_or_of_autocast(found: Any) -> None:
    case = Case()
    model = build(case)
    prepare(model)
    with torch.no_grad():
        expected = sum(float(loss_of(model, case, rank, padding=False)) for rank in range(2))
    assert found(2)[0]["narrowed"] == pytest.approx(expected, rel=1e-2)
    assert found(2)[0]["cast"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        ("qwen3_moe", {"expert": 3}, "expert=3 does not divide 4 experts; set expert to one of 1, 2, 4"),
        ("qwen3", {"expert": 2}, "expert=2: it has no experts; leave expert out"),
        ("qwen3_moe", {"expert": 2, "expert_capacity": 0.9}, "expert_capacity=0.9: a rank's even share is 1"),
    ],
)
def test_sizes_are_refused_before_ranks_meet(family: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallelize(prepare(tiny_model(family)), **asked)
