"""What a division must show before it is timed: losses and gradients of one process, within rounding."""

# N ranks

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.checks import ALLOWED, APART, Check
from benchmarks.parallel.meeting import Meeting
from benchmarks.parallel.model import Trained, built, num_targets, shallow_shape, through
from benchmarks.parallel.spec import Spec
from benchmarks.parallel.systems import System
from benchmarks.systems import Packs, draw_lengths, moved
from deltatune import prepare
from deltatune.errors import UserError

__all__ = ["check", "room_for_experts", "whole_step"]

#: Rounding of float32 through some layers, forward and backward.
LEAST: Final = 1e-5
#: Two losses that are each a mean of many tokens' bfloat16 arithmetic: one unit of its rounding apart at most.
LOSS_APART: Final = 2.0**-8
#: Gradient norms at full depth: no missing rank, factor or weight is as small, bfloat16's rounding is far below.
NORM_APART: Final = 2.0**-4

Seen = tuple[float, Mapping[str, Tensor]]
"""A loss and its gradients."""


def check(spec: Spec, system: System, device: torch.device, meeting: Meeting) -> list[Check]:
    """Four layers of the model, eager, a small vocabulary, short packs: N ranks against one process.

    Rank 0 computes the same packs in float32 by the reference implementations, which are the truth, and in the dtype
    that is timed. The ranks may be ``ALLOWED`` times as far from the truth as one process is, ``APART`` times for each
    weight by itself; in float32 one process is the truth, and the limit is ``LEAST``. Every rank calls this; rank 0 has
    the checks.
    """
    shape = shallow_shape(spec)
    packs = Packs(_lengths(spec, system, meeting.world), int(shape.values["vocab_size"]), spec.seed)
    true: Seen = (0.0, {})
    one: Seen = (0.0, {})
    if meeting.rank == 0:
        true = _one_process(spec, system, device, packs, meeting.world, exact=True)
        one = _one_process(spec, system, device, packs, meeting.world, exact=False)
    meeting.gather()
    trained = Trained(
        spec, system, built(spec, system, device, shape=shape), meeting.rank, meeting.world, compiled=False
    )
    loss = trained.backward(trained.batch(packs, 0), trained.targets(packs))
    gradients = trained.gradients()
    losses = meeting.gather(float(loss))
    room = [room_for_experts(trained)] if system.experts else []
    if meeting.rank:
        return []
    return [*room, *_compared(system.name, (sum(losses), gradients), one, true, spec.dtype)]


def room_for_experts(trained: Trained) -> Check:
    """Whether every visit of a token to an expert had room since the last check; every rank calls it and has it."""
    name = "room for every visit to experts"
    try:
        needed = trained.parts.check()
    except UserError as error:
        return Check(name, trained.system.name, ok=False, detail=str(error))
    return Check(name, trained.system.name, ok=True, detail=f"{needed:.3f} of an even share was needed")


def _lengths(spec: Spec, system: System, world: int) -> tuple[int, ...]:
    """Of each rank's pack; of the pack that all share: short documents, and one that lies on several ranks."""
    if not system.shares_pack or system.short:
        tokens = spec.check_tokens * (world if system.shares_pack else 1)
        return tuple(system.lengths(tokens, world, spec.seed))
    short = spec.check_tokens // 2
    return (*draw_lengths(short, seed=spec.seed), world * spec.check_tokens - short)


def _one_process(spec: Spec, system: System, device: torch.device, packs: Packs, world: int, *, exact: bool) -> Seen:
    model: Any = built(spec, system, device, shape=shallow_shape(spec))
    if exact:
        model = model.float()
    prepared = prepare(model)
    if exact:
        ops = [row.op for row in prepared.report.kernels]
        prepared = prepare(model, kernels=dict.fromkeys(ops, "reference"))
    elif system.full:
        through(prepared, getattr(torch, spec.dtype))
    count = 1 if system.shares_pack else world
    loss, found = 0.0, dict[str, Tensor]()
    for number in range(count):
        call = moved(packs.batch(number), device)
        names = ("input_ids", "position_ids", "sequences", "labels")
        part = model(**{n: call[n] for n in names}, num_items_in_batch=count * num_targets(packs)).loss
        torch.autograd.backward(part)
        loss += float(part.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                key = name.replace(".default", "")
                gradient = parameter.grad.float()
                found[key] = found[key] + gradient if key in found else gradient
                parameter.grad = None
    return loss, found


def _compared(subject: str, ours: Seen, one: Seen, true: Seen, dtype: str) -> list[Check]:
    apart = abs(ours[0] - one[0]) / max(abs(one[0]), 1e-30)
    loss_limit = LEAST if dtype == "float32" else LOSS_APART
    found = [Check("loss against one process", subject, apart <= loss_limit, apart, loss_limit)]
    missing = sorted(ours[1].keys() ^ true[1].keys())
    if missing:
        detail = f"on one side alone: {missing[0]}"
        return [*found, Check("gradients against one process", subject, ok=False, detail=detail)]
    errors = {n: (_squares(ours[1][n] - t), _squares(one[1][n] - t), _squares(t)) for n, t in true[1].items()}
    sums = [math.fsum(each) for each in zip(*errors.values(), strict=True)]
    all_ours, all_one = (math.sqrt(part / sums[2]) for part in sums[:2])
    limit = max(ALLOWED * all_one, LEAST)
    detail = f"of float32, {len(errors)} weights; one process {all_one:.2e}"
    found.append(Check("gradients against one process", subject, all_ours <= limit, all_ours, limit, detail))
    relative = {n: (math.sqrt(a / t), math.sqrt(b / t)) for n, (a, b, t) in errors.items() if t > 0}
    typical = math.sqrt(math.fsum(b * b for _, b in relative.values()) / len(relative))
    limits = {n: max(APART * max(b, typical), LEAST) for n, (_, b) in relative.items()}
    worst = max(limits, key=lambda n: _share(relative[n][0], limits[n]))
    held = _share(relative[worst][0], limits[worst]) <= 1
    found.append(Check("gradient of each weight", subject, held, relative[worst][0], limits[worst], worst))
    return found


def _squares(value: Tensor) -> float:
    return float(value.double().square().sum())


def _share(error: float, limit: float) -> float:
    return math.inf if math.isnan(error) else error / limit


def whole_step(one: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Check]:
    """The step that is timed, whole and compiled: its loss and gradient norm, on N ranks and on one GPU.

    Both saw the same packs: one GPU one after the other.
    """
    if one.get("one_gpu_tokens", one["tokens"]) != one["tokens"]:
        return []
    number = 0 if len(one["first_losses"]) == 1 else ours["gpus"] - 1
    found = []
    for name, key, limit in (("loss", "first_losses", LOSS_APART), ("gradient norm", "first_norms", NORM_APART)):
        expected, got = one[key][number], ours[key][0]
        apart = abs(got - expected) / max(abs(expected), 1e-30)
        held = not math.isnan(apart) and apart <= limit
        detail = f"{got:.6g} on {ours['gpus']} GPUs, {expected:.6g} on one"
        found.append(Check(f"{name} of the timed step", ours["name"], held, apart, limit, detail))
    return found
