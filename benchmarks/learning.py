"""What weights in few bits do to learning: losses and gradients on text, beside those on the same weights in 16 bits.

    python -m benchmarks.learning --model qwen3.5-0.8b --text README.md docs/*.md

A model with random weights first learns the text in full, so that its weights are no noise. From there adapters on all
linears train on each base, from the same values, on the same packs. A record holds every loss, and of each base its
largest distance from that on 16 bits at every tenth step and the cosines of the adapters' gradients on one pack; of
products in fp8 both beside products of the same weights in 16 bits too.
"""

# T tokens of a pack

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

import deltatune
from benchmarks.records import RECORDS, head, source_of, write_record
from benchmarks.shapes import BASES, SHAPES, adapters, build_model, shape_named, with_base, with_lora
from benchmarks.systems import Batch, draw_lengths, moved
from deltatune import CompileOptions, PackedCollator, prepare

__all__ = ["Course", "Text", "main", "trained_on"]

METHOD: Final = (
    "tokens are the text's bytes; the base learns every weight first (AdamW on float32 copies), then adapters on "
    "all linears train on it in each of the bases, from the same values, by torch.optim.AdamW, on the same packs; "
    "apart: the largest |loss / other loss - 1| of every tenth step, by the name of the other base; cosines: of the "
    "adapters' gradients on one pack to the other's, at the adapters' first values and at those that 16 bits end with"
)
_EVERY: Final = 10
_PLAIN: Final = "16-bit"


@dataclass(frozen=True)
class Text:
    """Packs of documents that are pieces of a text; its bytes are numbered from 1 on, and only those that it has."""

    content: bytes
    lengths: tuple[int, ...]
    seed: int = 0

    @functools.cached_property
    def tokens(self) -> Any:
        """All of it."""
        return np.unique(np.frombuffer(self.content, dtype=np.uint8), return_inverse=True)[1] + 1

    def batch(self, number: int) -> Batch:
        """The pack of a step, on the CPU: the lengths in another order, the pieces from other places."""
        generator = np.random.default_rng((self.seed, number))
        values = self.tokens
        order = [self.lengths[i] for i in generator.permutation(len(self.lengths))]
        starts = [generator.integers(0, len(values) - length) for length in order]
        rows = [
            {"input_ids": values[start : start + length], "labels": values[start : start + length]}
            for start, length in zip(starts, order, strict=True)
        ]
        return PackedCollator(tokens_per_batch=sum(order), pad_token_id=0)(rows)


@dataclass(frozen=True)
class Course:
    """How a model learns.

    Attributes:
        model: one of ``SHAPES``.
        layers: of it; None for all.
        pretraining: steps of every weight.
        steps: of the adapters.
        rank: of the adapters.
        learning_rates: of the two.
        backend: how steps are compiled; ``"none"``: not at all.
        device: where.
        seed: of weights and adapters.
    """

    model: str
    layers: int | None = None
    pretraining: int = 300
    steps: int = 300
    rank: int = 16
    learning_rates: tuple[float, float] = (5e-4, 2e-4)
    backend: str = "inductor"
    device: str = "cuda"
    seed: int = 0

    def blank(self) -> Any:
        """The model with random weights."""
        shape = shape_named(self.model)
        return build_model(shape, torch.device(self.device), layers=self.layers, seed=self.seed)

    def prepared(self, model: Any) -> Any:
        """A model, ready for packs."""
        options = {"none": None, "aot_eager": CompileOptions(backend="aot_eager")}
        prepare(model, compile=options.get(self.backend, CompileOptions()))
        return model

    def optimizer(self, parameters: Sequence[Tensor], which: int) -> torch.optim.Optimizer:
        """AdamW at one of the two rates."""
        return torch.optim.AdamW(parameters, lr=self.learning_rates[which], weight_decay=0.0)


def learnt_base(course: Course, text: Text) -> tuple[dict[str, Tensor], list[float]]:
    """Weights that have learnt the text, on the device, and the losses on the way."""
    model = course.prepared(course.blank())
    weights = [p for p in model.parameters() if p.requires_grad]
    wide = [p.detach().float() for p in weights]
    optimizer, losses = course.optimizer(wide, 0), []
    for number in range(course.pretraining):
        losses.append(_backward(model, text.batch(number)))
        for copy, weight in zip(wide, weights, strict=True):
            copy.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for copy, weight in zip(wide, weights, strict=True):
                weight.copy_(copy)
    return {name: p.detach().clone() for name, p in model.state_dict().items()}, _floats(losses)


def trained_on(course: Course, text: Text, weights: Mapping[str, Tensor], bases: Sequence[str]) -> list[dict[str, Any]]:
    """A result for 16 bits and for each of ``bases``, as records hold them."""
    found: list[dict[str, Any]] = []
    losses: dict[str, list[float]] = {}
    gradients: dict[str, list[Tensor]] = {}
    ends: dict[str, Tensor] = {}
    for base in ("", *bases):
        name = base or _PLAIN
        model = course.blank()
        model.load_state_dict(weights)
        if base:
            with_base(model, base, values=False)
        model = course.prepared(with_lora(model, "all", rank=course.rank, alpha=2 * course.rank, seed=course.seed))
        trained = adapters(model)
        first, on_the_way = _gradients(model, text), []
        optimizer = course.optimizer([p for _, p in trained], 1)
        for number in range(course.steps):
            on_the_way.append(_backward(model, text.batch(course.pretraining + number)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ends = ends or {path: p.detach().clone() for path, p in trained}
        with torch.no_grad():
            for path, p in trained:
                p.copy_(ends[path])
        losses[name], gradients[name] = _floats(on_the_way), [first, _gradients(model, text)]
        others = [_PLAIN, *(values for values in [base.partition("-")[0]] if values in losses and values != name)]
        found.append({
            "name": name,
            "losses": losses[name],
            "apart": {other: _apart(losses[name], losses[other]) for other in others},
            "cosines": {other: _cosines(gradients[name], gradients[other]) for other in others},
        })  # fmt: skip
        del model, trained, optimizer
    return found


def _backward(model: Any, batch: Batch) -> Tensor:
    batch = moved(batch, model.device)
    names = ("input_ids", "position_ids", "sequences", "labels")
    loss: Tensor = model(**{name: batch[name] for name in names}).loss
    torch.autograd.backward(loss)
    return loss.detach()


def _gradients(model: Any, text: Text) -> Tensor:
    """Of the adapters on a pack that no step takes, in one row."""
    _backward(model, text.batch(-1 % 2**32))
    found = torch.cat([p.grad.flatten().double() for _, p in adapters(model) if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def _cosines(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(found, expected, strict=True)]


def _apart(losses: Sequence[float], expected: Sequence[float]) -> float:
    """At every tenth step."""
    pairs = list(zip(losses, expected, strict=True))[_EVERY - 1 :: _EVERY]
    return max(abs(loss / other - 1) for loss, other in pairs)


def _floats(losses: Sequence[Tensor]) -> list[float]:
    found: list[float] = torch.stack(list(losses)).tolist()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints a line for each base and writes a record; 1 where a loss is not finite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="qwen3.5-0.8b", metavar="MODEL[:LAYERS]", help=f"shapes of {', '.join(SHAPES)}")
    add("--text", nargs="+", type=Path, required=True, metavar="FILE", help="what it learns")
    add("--base", nargs="*", default=list(BASES), choices=BASES, help="beside 16 bits; all of them by default")
    add("--tokens", type=int, default=8192, metavar="T", help="of a pack; 8192 by default")
    add("--pretraining", type=int, default=300, metavar="N", help="steps of every weight; 300 by default")
    add("--steps", type=int, default=300, metavar="N", help="steps of the adapters; 300 by default")
    add("--rank", type=int, default=16, metavar="R", help="of the adapters; 16 by default")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", default="inductor", choices=["inductor", "aot_eager", "none"], help="how steps are compiled")
    add("--seed", type=int, default=0, metavar="N", help="of weights, adapters and packs")
    add("--commit", metavar="HASH", help="of the source, where it lies without its history")
    add("--output", type=Path, default=RECORDS, metavar="DIR", help="where records go; benchmarks/records by default")
    args = parser.parse_args(argv)
    if args.pretraining < 1 or args.steps < _EVERY:
        raise SystemExit(f"--pretraining must be at least 1, and --steps at least {_EVERY}: every tenth is compared")
    name, _, layers = args.model.partition(":")
    course = Course(
        name, int(layers) if layers else None, args.pretraining, args.steps, args.rank,
        backend=args.backend, device=args.device, seed=args.seed,
    )  # fmt: skip
    content = b"".join(path.read_bytes() for path in args.text)
    text = Text(content, tuple(draw_lengths(args.tokens, seed=args.seed)), args.seed)
    if len(content) <= max(text.lengths):
        raise SystemExit(f"--text: {len(content)} bytes are fewer than a document of {max(text.lengths)} needs")
    vocabulary = shape_named(name).values["vocab_size"]
    if text.tokens.max() >= vocabulary:
        raise SystemExit(f"--text: {text.tokens.max()} different bytes, and {name} has a vocabulary of {vocabulary}")
    weights, before = learnt_base(course, text)
    results = trained_on(course, text, weights, args.base)
    finite = all(np.isfinite(result["losses"]).all() for result in results)
    cuda = course.device.startswith("cuda")
    record = head(
        "learning",
        name,
        METHOD,
        device=torch.cuda.get_device_name(course.device) if cuda else "cpu",
        source=source_of(Path(deltatune.__file__).parent, args.commit),
    )
    about = {
        **asdict(course),
        "tokens": args.tokens,
        "lengths": list(text.lengths),
        "text_bytes": len(content),
        "text_sha256": hashlib.sha256(content).hexdigest(),
        "pretraining_losses": before,
    }
    path = write_record({**record, "ok": finite, "configs": [{"config": about, "results": results}]}, args.output)
    rows = [f"{'base':16}{'first loss':>12}{'last loss':>12}{'beside':>10}{'apart':>10}{'cosine, first and last':>26}"]
    for r in results:
        for other, apart in r["apart"].items():
            cosines = " ".join(f"{cosine:.5f}" for cosine in r["cosines"][other])
            ends = "".join(f"{loss:12.4f}" for loss in (r["losses"][0], r["losses"][-1]))
            rows.append(f"{r['name']:16}{ends}{other:>10}{apart:10.4%}{cosines:>26}")
    sys.stdout.write("\n".join([*rows, str(path), ""]))
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
