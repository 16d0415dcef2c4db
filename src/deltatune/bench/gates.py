"""What must hold before anything is timed: the same losses and gradients, document by document, and no leak."""

# T tokens of a pack, E width of the residual stream, V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.bench.models import adapters
from deltatune.bench.systems import System
from deltatune.bench.workload import Batch
from deltatune.verification import verify

__all__ = [
    "ALLOWED",
    "PLAUSIBLE",
    "Gate",
    "Gradients",
    "Observation",
    "against_stock",
    "against_truth",
    "bounds_from",
    "leak_gate",
    "loss_and_gradients",
    "observe",
    "relative",
    "sample_documents",
    "stock_gates",
    "truth",
]

#: Ours may be this many times as far from float32 as the stock path in the same dtype is.
ALLOWED: Final = 2.0
#: Two paths that are each within their bounds of the truth, 1 and ``ALLOWED``, are this far apart at most.
APART: Final = 1.0 + ALLOWED
#: How far the stock path itself may be from float32 before nothing can be said: it is broken then, not rounded.
PLAUSIBLE: Final = 0.25
_CHUNK: Final = 1024

Gradients = Mapping[str, Tensor]
#: place -> (our error, the stock path's)
_Errors = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Gate:
    """One check of one system.

    Attributes:
        name: what is checked.
        subject: the name of the result it belongs to.
        ok: whether it held.
        figure: the worst of what was measured; None where nothing could be.
        limit: what it may be at most.
        detail: where the worst was found, or what went wrong.
    """

    name: str
    subject: str
    ok: bool
    figure: float | None
    limit: float | None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As records carry it; what is not finite is null."""
        plain = asdict(self)
        for key in ("figure", "limit"):
            if plain[key] is not None and not math.isfinite(plain[key]):
                plain[key] = None
        return plain


@dataclass(frozen=True)
class Observation:
    """What a system makes of one batch.

    Attributes:
        token_losses: document -> the loss of each of its targets, from the last hidden state in float32.
        losses: sampled document -> the training loss of this document alone in the pack.
        gradients: sampled document -> the adapters' gradients of that loss.
        whole: the adapters' gradients of the whole batch's loss; empty for the truth, which has no pack.
    """

    token_losses: Mapping[int, Tensor]
    losses: Mapping[int, float] = field(default_factory=dict)
    gradients: Mapping[int, Gradients] = field(default_factory=dict)
    whole: Gradients = field(default_factory=dict)


def sample_documents(lengths: Sequence[int], *, budget: int = 3072, at_most: int = 3) -> list[int]:
    """Documents to hold to the truth: the last, the shortest, the median, and the longest that fit ``budget`` tokens.

    The first one, which sees nothing before it in any case, comes last.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], -i))
    wanted = [len(lengths) - 1, order[0], order[len(order) // 2], *reversed(order)]
    chosen: list[int] = []
    for index in (*(i for i in wanted if i), 0):
        fits = sum(lengths[i] for i in chosen) + lengths[index] <= budget
        if index not in chosen and (fits or not chosen) and len(chosen) < at_most:
            chosen.append(index)
    return sorted(chosen)


def truth(system: System, batch: Batch, documents: Iterable[int]) -> Observation:
    """Each document alone through the stock model in float32, matrix products in full precision."""
    token_losses, losses, gradients = {}, {}, {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for document in documents:
            alone = batch.alone(document)
            token_losses[document] = _token_losses(system, alone)[0]
            losses[document], gradients[document] = loss_and_gradients(system, alone)
    return Observation(token_losses, losses, gradients)


def observe(system: System, batch: Batch, documents: Iterable[int]) -> Observation:
    """The same of a pack: token losses of every document, losses and gradients of the sampled ones."""
    losses, gradients = {}, {}
    for document in documents:
        losses[document], gradients[document] = loss_and_gradients(system, batch.only(document))
    return Observation(_token_losses(system, batch), losses, gradients, loss_and_gradients(system, batch)[1])


def against_truth(subject: str, ours: Observation, stock: Observation, true: Observation) -> list[Gate]:
    """Sampled documents: ours no further from float32 than ``ALLOWED`` times the stock path is.

    Token losses and gradients as ``||x - truth|| / ||truth||``, gradients of all adapters as one vector and one by one.
    The loss itself is a mean of n token losses, so its
    error is at most their root mean square error; the stock path's bounds ours.
    """
    tokens: _Errors = {}
    means: _Errors = {}
    gradients: _Errors = {}
    each: _Errors = {}
    for d, losses in true.token_losses.items():
        where, theirs = f"document {d}", stock.token_losses[d]
        tokens[where] = _distance(ours.token_losses[d], losses), _distance(theirs, losses)
        spread = float((theirs - losses).double().square().mean().sqrt())
        means[where] = abs(ours.losses[d] - true.losses[d]), spread
        wanted = true.gradients[d]
        gradients[where] = relative(ours.gradients[d], wanted), relative(stock.gradients[d], wanted)
        for name in wanted:
            pair = [relative(_one(found.gradients[d], name), _one(wanted, name)) for found in (ours, stock)]
            each[f"{where}, {name}"] = pair[0], pair[1]
    return [
        _worst("token losses against float32", subject, tokens),
        _worst("document loss against float32", subject, means),
        _worst("adapter gradients against float32", subject, gradients),
        _worst("every adapter's gradient against float32", subject, each),
    ]


def stock_gates(subject: str, stock: Observation, true: Observation) -> list[Gate]:
    """The stock path is near enough to float32 for its distance to be rounding."""
    tokens = max(_distance(stock.token_losses[d], t) for d, t in true.token_losses.items())
    gradients = max(relative(stock.gradients[d], true.gradients[d]) for d in true.gradients)
    return [
        Gate("token losses against float32", subject, tokens <= PLAUSIBLE, tokens, PLAUSIBLE),
        Gate("adapter gradients against float32", subject, gradients <= PLAUSIBLE, gradients, PLAUSIBLE),
    ]


def against_stock(
    subject: str, ours: Observation, stock: Observation, bounds: tuple[float, float], label: str = "the stock path"
) -> list[Gate]:
    """Every document of the pack, and the whole pack's gradients: at most ``bounds`` apart.

    Args:
        subject: the result.
        ours: of it.
        stock: of what it is compared with on the same pack.
        bounds: ``(token losses, gradients)``, see ``bounds_from``.
        label: what it is compared with.
    """
    distances = {d: _distance(ours.token_losses[d], losses) for d, losses in stock.token_losses.items()}
    document = max(distances, key=lambda d: (math.isnan(distances[d]), distances[d]))
    worst, gradients = distances[document], relative(ours.whole, stock.whole)
    where = f"document {document} of {len(distances)}"
    return [
        Gate(f"token losses against {label}", subject, worst <= bounds[0], worst, bounds[0], where),
        Gate(f"adapter gradients against {label}", subject, gradients <= bounds[1], gradients, bounds[1], "whole pack"),
    ]


def bounds_from(stock: Observation, true: Observation) -> tuple[float, float]:
    """``(token losses, gradients)``: ``APART`` times the stock path's largest distance from float32."""
    tokens = max(_distance(stock.token_losses[d], t) for d, t in true.token_losses.items())
    gradients = max(relative(stock.gradients[d], true.gradients[d]) for d in true.gradients)
    return APART * tokens, APART * gradients


def leak_gate(system: System) -> Gate:
    """``deltatune.verify`` on this very model."""
    report = verify(system.model)
    largest = max(row.cross_document_gradient for row in report.rows)
    failed = [row.name for row in report.rows if not row.ok]
    detail = "" if report.ok else f"not independent: {', '.join(failed)}"
    return Gate("verify", system.setting.name, report.ok, largest, 0.0, detail)


def relative(found: Gradients, expected: Gradients) -> float:
    """``||found - expected|| / ||expected||`` over all tensors as one vector, in float64; inf where names differ."""
    if found.keys() != expected.keys():
        return math.inf
    difference = size = 0.0
    for name, value in expected.items():
        difference += float((found[name].double() - value.double()).square().sum())
        size += float(value.double().square().sum())
    return math.sqrt(difference / size) if size else (0.0 if difference == 0 else math.inf)


def _one(gradients: Gradients, name: str) -> Gradients:
    return {name: gradients[name]} if name in gradients else {}


def _distance(found: Tensor, expected: Tensor) -> float:
    return relative({"": found}, {"": expected})


def _worst(name: str, subject: str, errors: _Errors) -> Gate:
    """The place where ours comes closest to its limit, or past it.

    The limit is ``ALLOWED`` times the stock path's error there or, where chance made that small, its root mean square
    over all places.
    """
    typical = math.sqrt(sum(stock**2 for _, stock in errors.values()) / len(errors))
    limits = {where: ALLOWED * max(stock, typical) for where, (_, stock) in errors.items()}
    shares = {where: _share(errors[where][0], limit) for where, limit in limits.items()}
    worst = max(shares, key=lambda where: shares[where])
    return Gate(name, subject, shares[worst] <= 1, errors[worst][0], limits[worst], f"{worst}; of {len(errors)}")


def _share(error: float, limit: float) -> float:
    """Of the limit; inf for what is not a number."""
    if math.isnan(error) or math.isnan(limit):
        return math.inf
    return error / limit if limit else (0.0 if error == 0 else math.inf)


def loss_and_gradients(system: System, batch: Batch) -> tuple[float, Gradients]:
    """The training loss of a batch on the device, and the adapters' gradients by name."""
    loss = system.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        _plain(name): torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in adapters(system.model)
    }
    system.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def _token_losses(system: System, batch: Batch) -> dict[int, Tensor]:
    """Document -> ``[n - 1]``, from logits in float32, a chunk of them at a time."""
    # with a gradient to take, so that the graphs of training answer
    hidden = system.hidden(batch).detach()
    targets = F.pad(batch.tensors["labels"], (0, 1), value=-100)[..., 1:].flatten()
    head = system.head.detach().float()
    chunks = zip(torch.split(hidden, _CHUNK), torch.split(targets, _CHUNK), strict=True)
    losses = torch.cat([F.cross_entropy(h.float() @ head.t(), t, reduction="none") for h, t in chunks])
    ends = batch.sequences.cu_seqlens_cpu.tolist()
    return {d: losses[ends[d] : ends[d + 1] - 1] for d in range(batch.sequences.num_sequences)}


def _plain(name: str) -> str:
    """The adapter's place, whatever a system calls what is around it."""
    return name.replace(".default", "")
