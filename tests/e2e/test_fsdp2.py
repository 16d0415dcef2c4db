"""Prepared and compiled models on two processes: sharded by FSDP2, or replicated, they train as one process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainer_cases import lora

from deltatune import CompileOptions, Sequences, prepare
from deltatune.layers import causal_lm
from forked import run_ranks
from tiny import documents, tiny_model

RANKS, STEPS, RATE, TOTAL = 2, 2, 0.01, 64
TRACED = CompileOptions(backend="aot_eager")
# a pack of every rank and step
PACKS = [[[30, 1, 9, 20], [7, 40, 3]], [[64], [5, 5, 5, 5, 12, 12]]]

PREPARATIONS: dict[str, dict[str, Any]] = {
    "eager": {},
    "sharded_head": {},
    "adapter": {"compile": TRACED, "checkpointing": "layer"},
    "replicated": {"compile": TRACED},
}


def build(case: str) -> Any:
    torch.manual_seed(0)
    # a graph of each type of layer is traced once: recurrent where there is an adapter, else attention
    family, layers = {"adapter": ("qwen3_5", 1), "replicated": ("qwen3", 2)}.get(case, ("qwen3_5", 2))
    model = tiny_model(family, layers=layers)
    return (peft.get_peft_model(model, lora(target_modules=["in_proj_qkv"])) if case == "adapter" else model).train()


def pack(step: int, rank: int) -> dict[str, Any]:
    lengths = PACKS[step][rank]
    tokens = torch.cat(documents(lengths, seed=10 * step + rank))
    tokens = nn.functional.pad(tokens, (0, TOTAL - len(tokens)))
    labels = tokens.masked_fill(torch.arange(TOTAL) >= sum(lengths), -100)
    sequences = Sequences.from_lengths(lengths, total=TOTAL)
    return {"input_ids": tokens[None], "labels": labels[None], "sequences": sequences}


def train(model: nn.Module, losses_of: Any) -> list[dict[str, torch.Tensor]]:
    """Losses and gradients of every step, and the weights at the end."""
    steps = []
    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        loss = losses_of(model, step)
        found = {"loss": loss.detach()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name.removeprefix("module.")] = whole(parameter.grad)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
        steps.append(found)
    return steps


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def shard(model: Any, *, head: bool = False) -> Any:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    for layer in base.get_decoder().layers:
        fully_shard(layer)
    if head:
        fully_shard(base.lm_head)
    return fully_shard(model)


def replicate(model: nn.Module) -> nn.Module:
    """Gradient buckets smaller than a layer, along which the compiler would cut its graph."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = bucket = 4096
    return DistributedDataParallel(model, bucket_cap_mb=bucket / 2**20)


def one_rank(model: nn.Module, step: int) -> torch.Tensor:
    """The loss of this process's pack; every process's share of the gradient is averaged in backward."""
    loss = model(**pack(step, dist.get_rank())).loss
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    return loss / RANKS


def every_rank(model: nn.Module, step: int) -> torch.Tensor:
    loss = torch.stack([model(**pack(step, rank)).loss for rank in range(RANKS)]).mean()
    loss.backward()
    return loss


def distributed(rank: int, folder: str) -> None:
    causal_lm._HEAD_CHUNK = 24  # several pieces of a pack
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    for case, arguments in PREPARATIONS.items():
        model = build(case)
        prepared = prepare(model, **arguments)
        model = replicate(model) if case == "replicated" else shard(model, head=case == "sharded_head")
        steps = train(model, one_rank)
        report = prepared.compile_report
        results[case] = {
            "steps": steps,
            "report": None if report is None else report.to_dict(),
            "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        }
    sharded = build("eager")
    prepared = prepare(sharded)
    shard(sharded)
    results["refusals"] = {
        "sharded": refusal(lambda: prepare(sharded)),
        "reverted": refusal(prepared.revert),
        "replicated": refusal(lambda: prepare(model)),
    }
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")


def refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "done"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(distributed, str(folder), count=RANKS)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("case", PREPARATIONS)
def test_two_processes_train_as_one(case: str, results: dict[str, Any]) -> None:
    model = build(case)
    prepare(model)
    assert results[case]["sharded"] == (case != "replicated")
    for ours, theirs in zip(results[case]["steps"], train(model, every_rank), strict=True):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert (ours[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("case", [case for case, arguments in PREPARATIONS.items() if arguments])
def test_one_graph_a_layer_type(case: str, results: dict[str, Any]) -> None:
    report = results[case]["report"]
    assert set(report["graphs"].values()) == {1}
    assert report["breaks"] == report["recompiles"] == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sharded", "prepare(model) comes before fully_shard"),
        ("reverted", "revert() comes before fully_shard"),
        ("replicated", "got DistributedDataParallel"),
    ],
)
def test_wrapping_comes_last(what: str, message: str, results: dict[str, Any]) -> None:
    assert message in results["refusals"][what]
