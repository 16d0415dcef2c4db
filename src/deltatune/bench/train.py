"""``deltatune bench train``: a training step beside the pinned baselines, gates first, one record at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

import torch

from deltatune.bench.baselines import LEAK_FREE
from deltatune.bench.child import COMPILED
from deltatune.bench.protocol import copy_rate, gemm_rate, head, write_record
from deltatune.bench.session import Plan, Session
from deltatune.bench.shapes import shape_named
from deltatune.bench.systems import Adapters, Setting
from deltatune.bench.train_options import FRONTIER, add_arguments
from deltatune.bench.workload import draw_lengths
from deltatune.compile.graphs import CompileOptions
from deltatune.devices import usable_device
from deltatune.errors import UserError
from deltatune.training.flops import peak_flops

__all__ = ["add_arguments", "plan_of", "run"]

_METHOD: Final = (
    "a sample is the time between the ends of two training steps, by CUDA events (the wall clock on a CPU): the batch "
    "to the device, forward, loss, backward, AdamW(fused=True) with learning rate 0, gradients set to None; systems in "
    "turn over several rounds, the first step of a turn dropped, every step a pack of its own with the same lengths in "
    "another order; peak_bytes is weights, adapters and optimizer state (shared storage once) plus what a step "
    "allocates at its peak; timed after its gates: token losses, document losses and adapter gradients against "
    "float32 document by document, the whole pack against the stock path and against the same uncompiled, verify"
)
_SQUARE: Final = 8192
_COPY_BYTES: Final = 2**28
_CONFIG_VALUES: Final = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "vocab_size", "num_experts", "num_experts_per_tok",
    "tie_word_embeddings",
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measures, writes the record and prints a table; 1 when a gate was red."""
    plan = plan_of(args)
    ceilings = _ceilings(plan)  # while the device's memory is empty
    session = Session(plan)
    interrupted = True
    try:
        session.run()
        interrupted = False
    finally:
        # what has been measured is kept, whatever comes after it
        if session.results:
            record = _record(args, plan, session, ceilings) | ({"interrupted": True} if interrupted else {})
            path = write_record(record, args.records)
            sys.stdout.write(_summary(session) + f"\n{path}\n")
    return 0 if session.judge.ok else 1


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan of a command line.

    Raises:
        UserError: a setting that cannot act.
    """
    shape = shape_named(args.model)
    longest = args.tokens if args.one_document else args.longest
    shortest = args.tokens if args.one_document else args.shortest
    if args.steps < 1 or args.rounds < 1 or args.warmup < 1:
        raise UserError("--steps, --rounds and --warmup must be at least 1")
    layers = shape.config(args.layers).num_hidden_layers
    return Plan(
        shape=shape,
        layers=layers,
        lengths=tuple(draw_lengths(args.tokens, shortest=shortest, longest=longest, seed=args.seed)),
        settings=tuple(_settings(args)),
        lora=Adapters(args.rank, args.alpha, args.adapter_dtype),
        options=None if args.backend == "none" else CompileOptions(backend=args.backend),
        device=usable_device(args.device),
        dtype=getattr(torch, args.dtype),
        warmup=args.warmup,
        steps=args.steps,
        rounds=args.rounds,
        seed=args.seed,
        compile_limit_seconds=args.compile_limit,
        cold_layers=None if args.cold_start is None else args.cold_start or layers,
        floor=not args.no_floor,
        kernels=args.kernels,
    )


def _settings(args: argparse.Namespace) -> Iterable[Setting]:
    for system in args.baselines:
        if system == COMPILED:
            yield Setting(system, "none", args.targets[0])
            continue
        for checkpointing in args.baseline_checkpointing:
            yield Setting(system, checkpointing, args.targets[0])
    few = list(map(_checkpointing, args.checkpointing))
    for index, targets in enumerate(args.targets):
        for lora in args.lora:
            for checkpointing in FRONTIER if args.frontier and not index else few:
                yield Setting("deltatune", checkpointing, targets, lora)


def _checkpointing(text: str) -> str | float:
    if text in ("none", "layer", "auto"):
        return text
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--checkpointing takes none, layer, auto or a share from 0 to 1, got {text!r}")
    return share


def _record(args: argparse.Namespace, plan: Plan, session: Session, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    kind = "frontier" if args.frontier else "train"
    config: dict[str, Any] = {
        "config": _config(args, plan, session),
        "shapes": _shapes(session.base.config),
        "ceilings": ceilings,
        "gates": [gate.to_dict() for gate in session.judge.gates],
        "results": [*session.results, *([] if _is_deeper(plan) else session.cold_starts)],
        "floor": None if session.floor is None else {"targets": args.targets[0], **session.floor.to_dict()},
        "kernels": list(session.kernels.values()),
    }
    if session.no_floor is not None:
        config["floor_failure"] = session.no_floor
    if session.kernels_failure:
        config["kernels_failure"] = session.kernels_failure
    for result in session.results:
        if result.get("model_flops"):
            rate = result["model_flops"] / (result["median_ms"] / 1e3)
            result["mfu_measured"] = rate / ceilings["gemm_flops_per_second"]
    top = head(kind, plan.shape.name, _METHOD, plan.device, argv=args.argv, commit=args.commit)
    return top | {"ok": session.judge.ok, "configs": [config, *_cold_starts(config, plan, session)]}


def _is_deeper(plan: Plan) -> bool:
    """Whether new processes start a model of another depth, whose results are a configuration of their own."""
    return plan.cold_layers not in (None, plan.layers)


def _cold_starts(config: dict[str, Any], plan: Plan, session: Session) -> list[dict[str, Any]]:
    if not _is_deeper(plan):
        return []
    deeper = {**config["config"], "layers": plan.cold_layers}
    return [{**config, "config": deeper, "gates": [], "results": session.cold_starts, "floor": None, "kernels": []}]


def _config(args: argparse.Namespace, plan: Plan, session: Session) -> dict[str, Any]:
    return {
        "model": plan.shape.name,
        "layers": plan.layers,
        "full_layers": plan.shape.full_layers,
        "tokens": sum(plan.lengths),
        "documents": len(plan.lengths),
        "lengths": list(plan.lengths),
        "seed": plan.seed,
        "dtype": args.dtype,
        "lora_rank": plan.lora.rank,
        "lora_alpha": plan.lora.alpha,
        "adapter_dtype": plan.lora.dtype,
        "optimizer": "torch.optim.AdamW(fused=True)",
        "backend": args.backend,
        "loss": session.loss_name,
        "warmup": plan.warmup,
        "steps": plan.steps,
        "rounds": plan.rounds,
        "baseline": LEAK_FREE,
    }


def _shapes(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in _CONFIG_VALUES}
    return {name: value for name, value in found.items() if value is not None}


def _ceilings(plan: Plan) -> dict[str, Any]:
    cuda = plan.device.type == "cuda"
    side = _SQUARE if cuda else 256
    return {
        "copy_bytes_per_second": copy_rate(plan.device, _COPY_BYTES if cuda else 2**20),
        "gemm_flops_per_second": gemm_rate(plan.device, side, side, side, plan.dtype),
        "gemm_side": side,
        "peak_flops_per_second": peak_flops(plan.device, plan.dtype),
    }


def _summary(session: Session) -> str:
    lines = [
        f"{'':44}{'ms':>9}{'tok/s':>9}{'GiB':>8}{'floor':>7}{'MFU':>7}  first step",
        *(_line(result) for result in (*session.results, *session.cold_starts)),
    ]
    if session.floor is not None:
        parts = ", ".join(f"{name} {ms:.1f}" for name, ms in session.floor.groups.items())
        lines.append(f"floor {session.floor.total_ms:.1f} ms: {parts}")
    red = [gate for gate in session.judge.gates if not gate.ok]
    lines += [f"RED {g.subject}: {g.name}: {g.figure} > {g.limit} {g.detail}" for g in red]
    return "\n".join(lines)


def _line(result: Mapping[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['name']:44}{result['status']}: {result['reason']}"
    gib = result.get("peak_bytes")
    cells = [
        f"{result['median_ms']:9.1f}{result['tokens_per_second']:9.0f}",
        f"{gib / 2**30:8.1f}" if gib else " " * 8,
        _percent(result.get("of_floor")),
        _percent(result.get("mfu")),
        f"{cast('float', result['first_step_seconds']):8.1f} s",
    ]
    return f"{result['name']:44}{''.join(cells)}"


def _percent(share: float | None) -> str:
    return " " * 7 if share is None else f"{share:7.1%}"
