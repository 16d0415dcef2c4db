"""What a system must show before it is timed: the losses and gradients of the truth, within rounding, and no leak."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.systems import Packs, System
from deltatune import verify

__all__ = [
    "Check",
    "Seen",
    "against_stock",
    "against_truth",
    "host_sync",
    "leak_check",
    "near_stock",
    "observe",
    "relative",
    "sample_documents",
    "stock_checks",
    "whole_graphs",
]

#: A system may be this many times as far from float32 as the stock path in the same dtype is.
ALLOWED: Final = 2.0
#: Two paths that are each within their bounds of the truth, 1 and ``ALLOWED``, are this far apart at most.
APART: Final = 1.0 + ALLOWED
#: What products in fp8 may cost: of a loss, and of the direction of gradients.
NEAR_LOSS: Final = 5e-3
NEAR_COSINE: Final = 1e-3
#: How far the stock path itself may be from float32 before nothing can be said: it is broken then, not rounded.
PLAUSIBLE: Final = 0.25
#: The rounding of the float32 truth itself: no limit is below it.
_LEAST: Final = 2.0**-18
_CHUNK: Final = 1024

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Check:
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
    figure: float | None = None
    limit: float | None = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As records carry it; what is not finite is null."""
        plain = asdict(self)
        finite = {key: plain[key] for key in ("figure", "limit") if plain[key] is not None}
        return plain | {key: value if math.isfinite(value) else None for key, value in finite.items()}


@dataclass(frozen=True)
class Seen:
    """What a system makes of pack 0.

    Attributes:
        tokens: sampled document -> the loss of each of its targets, from the model's logits.
        losses: sampled document -> the training loss of this document alone in the pack.
        gradients: sampled document -> the adapters' gradients of that loss.
        whole: the adapters' gradients of the whole pack's loss; empty for the truth, which has no pack.
    """

    tokens: Mapping[int, Tensor]
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


def observe(system: System, packs: Packs) -> Seen:
    """The sampled documents: each alone for the float32 reference, in their pack for all others."""
    tokens: dict[int, Tensor] = {}
    losses, gradients = {}, {}
    documents = sample_documents(packs.lengths)
    if system.setting.system == "reference":
        for document in documents:
            alone = packs.alone(document)
            length = packs.lengths[document]
            tokens |= _token_losses(system, alone, {document: slice(0, length)})
            losses[document], gradients[document] = system.loss_and_gradients(alone)
        return Seen(tokens, losses, gradients)
    for document in documents:
        losses[document], gradients[document] = system.loss_and_gradients(packs.only(document))
    pack = packs.batch(0)
    tokens = _token_losses(system, pack, {document: packs.span(document) for document in documents})
    return Seen(tokens, losses, gradients, system.loss_and_gradients(pack)[1])


def _token_losses(system: System, batch: Mapping[str, Any], spans: Mapping[int, slice]) -> dict[int, Tensor]:
    """Document -> ``[n - 1]`` on the CPU: the same logits as a caller gets, cross-entropy in float32."""
    found = {}
    logits = system.logits(batch, list(spans.values()))
    for (document, span), own in zip(spans.items(), logits, strict=True):
        targets = batch["input_ids"][0, span][1:].to(own.device)
        pairs = zip(torch.split(own[:-1], _CHUNK), torch.split(targets, _CHUNK), strict=True)
        found[document] = torch.cat([F.cross_entropy(x.float(), t, reduction="none") for x, t in pairs]).cpu()
    return found


def against_truth(subject: str, ours: Seen, stock: Seen, true: Seen) -> list[Check]:
    """Sampled documents: ours no further from float32 than ``ALLOWED`` times the stock path is.

    Token losses and gradients as ``||x - truth|| / ||truth||``. The loss itself is a mean of n token losses, so its
    error is at most their root mean square error; the stock path's bounds ours.
    """
    tokens, means, gradients = {}, {}, {}
    for d, losses in true.tokens.items():
        tokens[d] = _distance(ours.tokens[d], losses), _distance(stock.tokens[d], losses)
        spread = float((stock.tokens[d] - losses).double().square().mean().sqrt())
        means[d] = abs(ours.losses[d] - true.losses[d]), spread
        wanted = true.gradients[d]
        gradients[d] = relative(ours.gradients[d], wanted), relative(stock.gradients[d], wanted)
    return [
        _worst("token losses against float32", subject, tokens),
        _worst("document loss against float32", subject, means),
        _worst("adapter gradients against float32", subject, gradients),
    ]


def stock_checks(subject: str, stock: Seen, true: Seen) -> list[Check]:
    """The stock path is near enough to float32 for its distance to be rounding."""
    tokens = max(_distance(stock.tokens[d], t) for d, t in true.tokens.items())
    gradients = max(relative(stock.gradients[d], true.gradients[d]) for d in true.gradients)
    return [
        Check("token losses against float32", subject, tokens <= PLAUSIBLE, tokens, PLAUSIBLE),
        Check("adapter gradients against float32", subject, gradients <= PLAUSIBLE, gradients, PLAUSIBLE),
    ]


def against_stock(subject: str, ours: Seen, stock: Seen, true: Seen) -> Check:
    """The whole pack's gradients: at most ``APART`` times the stock path's largest distance from float32 apart."""
    limit = max(APART * max(relative(stock.gradients[d], true.gradients[d]) for d in true.gradients), _LEAST)
    found = relative(ours.whole, stock.whole)
    return Check("adapter gradients of the pack against stock", subject, found <= limit, found, limit)


def near_stock(subject: str, ours: Seen, stock: Seen) -> list[Check]:
    """Of products in fp8: losses within ``NEAR_LOSS`` of the stock path's, gradients in its direction."""
    losses = max(abs(ours.losses[d] / loss - 1) for d, loss in stock.losses.items())
    apart = 1 - _cosine(ours.whole, stock.whole)
    return [
        Check("document losses against 16 bits", subject, losses <= NEAR_LOSS, losses, NEAR_LOSS),
        Check("1 - cosine of the pack's gradients to 16 bits", subject, apart <= NEAR_COSINE, apart, NEAR_COSINE),
    ]


def _cosine(found: Gradients, expected: Gradients) -> float:
    """Of all tensors as one vector, in float64; NaN where names differ."""
    if found.keys() != expected.keys():
        return math.nan
    pairs = [(found[name].double().flatten(), value.double().flatten()) for name, value in expected.items()]
    product, left, right = (
        sum(float(a @ b) for a, b in each) for each in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
    )
    return product / math.sqrt(left * right) if left and right else math.nan


def leak_check(system: System) -> Check:
    """``deltatune.verify`` on this very model."""
    report = verify(system.model)
    largest = max(row.cross_document_gradient for row in report.rows)
    failed = [row.name for row in report.rows if not row.ok]
    detail = "" if report.ok else f"not independent: {', '.join(failed)}"
    return Check("verify", system.setting.name, report.ok, largest, 0.0, detail)


def host_sync(system: System, packs: Packs) -> Check:
    """No step makes the host wait for the device once its batch is there; on the CPU there is nothing to wait for."""
    name, subject = "no host sync", system.setting.name
    if system.device.type != "cuda":
        return Check(name, subject, ok=True, detail="no device to wait for")
    batch = system.moved(packs.batch(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.backward(system.loss(batch))
        system.optimizer.step()
    except RuntimeError as error:
        return Check(name, subject, ok=False, detail=" ".join(str(error).split())[:500])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        system.optimizer.zero_grad(set_to_none=True)
    return Check(name, subject, ok=True)


def whole_graphs(system: System) -> Check:
    """The graphs are still the first ones, unbroken, after all steps."""
    compiled = system.prepared.compile_report if system.prepared is not None else None
    reasons = [*compiled.breaks, *compiled.recompiles] if compiled else []
    detail = "; ".join(map(str, reasons))[:500]
    return Check("no break, no recompile", system.setting.name, not reasons, detail=detail)


def relative(found: Gradients, expected: Gradients) -> float:
    """``||found - expected|| / ||expected||`` over all tensors as one vector, in float64; inf where names differ."""
    if found.keys() != expected.keys():
        return math.inf
    difference = size = 0.0
    for name, value in expected.items():
        difference += float((found[name].double() - value.double()).square().sum())
        size += float(value.double().square().sum())
    return math.sqrt(difference / size) if size else (0.0 if difference == 0 else math.inf)


def _distance(found: Tensor, expected: Tensor) -> float:
    return relative({"": found}, {"": expected})


def _worst(name: str, subject: str, errors: Mapping[int, tuple[float, float]]) -> Check:
    """The document where ours comes closest to its limit, or past it.

    The limit is ``ALLOWED`` times the stock path's error there or, where chance made that small, its root mean square
    over all documents.
    """
    typical = math.sqrt(sum(stock**2 for _, stock in errors.values()) / len(errors))
    limits = {d: max(ALLOWED * max(stock, typical), _LEAST) for d, (_, stock) in errors.items()}
    shares = {d: _share(errors[d][0], limit) for d, limit in limits.items()}
    worst = max(shares, key=lambda d: shares[d])
    detail = f"document {worst}; of {len(errors)}"
    return Check(name, subject, shares[worst] <= 1, errors[worst][0], limits[worst], detail)


def _share(error: float, limit: float) -> float:
    """Of the limit; inf for what is not a number."""
    if math.isnan(error) or math.isnan(limit):
        return math.inf
    return error / limit
