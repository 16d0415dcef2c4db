"""Arithmetic of steps on 8, 64 and 1024 GPUs: sizes, bytes that are sent, and seconds at stated rates.

Nothing is timed. Collectives are rings, as NCCL makes them where machines have a link for each GPU: a ring enters and
leaves every machine once, and as many rings as there are links share the bytes.
"""

# S ranks that hold one copy of the weights, R copies, M machines of G GPUs; W weights, t of them trained

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import torch

from benchmarks.parallel.figures import scalings
from benchmarks.records import load_records
from benchmarks.shapes import Shape, shape_named
from deltatune.config.schema import Recipe
from deltatune.parallel.heads import check_sequence_size
from deltatune.parallel.sizes import Sizes, choose_sizes
from deltatune.training.adapters import adapt_by_recipe
from deltatune.training.checkpoint import empty_model
from deltatune.training.planned import estimate_step, prepare_by_recipe

__all__ = [
    "PROCESSES", "Plan", "Traffic", "Weights", "copies", "exchanged", "measured", "plan_of", "sequences", "steps",
    "traffic",
]  # fmt: skip

MODELS: Final = ("qwen3.5-2b", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b")
PROCESSES: Final = (8, 64, 1024)
#: What trains -> a recipe's section ``lora``.
TRAINS: Final[Mapping[str, Any]] = {
    "LoRA": {"target_modules": "all-linear"},
    "LoRA, experts too": {"target_modules": "all-linear", "target_parameters": "all-experts"},
    "all": None,
}
TOKENS: Final = 16384  # of a rank
MACHINE: Final = 8  # G
#: Bytes a second: of a GPU to the others of its machine, and of one link between machines.
INSIDE: Final = 350e9
LINK: Final = 45e9
#: FLOP a second of large products, and of attention.
PRODUCTS: Final = 700e12
ATTENTION: Final = 260e12
DEVICE_GIB: Final = 140
#: What of it a step may take, as ``parallel: auto`` says.
ROOM: Final = 0.9
_NARROW: Final = 2  # bytes of what is gathered and exchanged, bfloat16
_WIDE: Final = 4  # bytes of gradients, float32


class Weights(NamedTuple):
    """Of a model, by what a token does with them."""

    total: int  # W
    trained: int  # t
    used: float  # whose products one token takes part in

    def product_flops(self, tokens: int, *, recomputed: bool) -> float:
        """``2 W x`` forward, as much for gradients of inputs, as much for those of weights, forward again."""
        passes = 2 + (self.trained / self.total > 0.5) + recomputed
        return passes * 2 * self.used * tokens


class Traffic(NamedTuple):
    """Bytes that a rank sends in a step of one pack, and of them those that leave its machine by one of its links."""

    gathered: float  # weights, before forward and before backward
    scattered: float  # gradients, to those that hold the same copy
    reduced: float  # gradients, to those that hold other copies
    shards_leave: float  # of the first two
    replicas_leave: float  # of the third

    def seconds(self, *, links: int = MACHINE) -> float:
        """At ``INSIDE`` and ``LINK``, with so many links a machine; a ring is as slow as its slowest hop."""
        between = MACHINE / links / LINK
        shards = max((self.gathered + self.scattered) / INSIDE, self.shards_leave * between)
        return shards + max(self.reduced / INSIDE, self.replicas_leave * between)


def traffic(weights: Weights, *, shard: int, replicate: int) -> Traffic:
    """Of FSDP2 over ``shard`` neighbours and an all-reduce over ``replicate`` copies, machines filled one by one.

    ``2 (S - 1) / S * 2 W``, ``(S - 1) / S * 4 t``, ``2 (R - 1) / R * 4 t / S``. A machine holds ``G / S`` ranks of each
    ring of replicas, so a link carries the ``G / S``-th part of what a rank sends.
    """
    S, R = shard, replicate
    gathered = 2 * (S - 1) / S * _NARROW * weights.total
    scattered = (S - 1) / S * _WIDE * weights.trained
    reduced = 2 * (R - 1) / R * _WIDE * weights.trained / S
    shards_leave = (gathered + scattered) / MACHINE if S > MACHINE else 0.0
    replicas_leave = reduced * min(S, MACHINE) / MACHINE if S * R > MACHINE else 0.0
    return Traffic(gathered, scattered, reduced, shards_leave, replicas_leave)


def exchanged(shape: Shape, *, size: int, tokens: int = TOKENS) -> float:
    """Bytes that a rank of ``size`` that hold a pack sends in a step: into heads and back, forward and backward.

    Of a token ``2 H K + 2 G V + 2 G`` numbers in a Gated DeltaNet layer; in attention q and output, and k and v, once
    for each rank where there are fewer heads of them.
    """
    v = shape.values
    keys = v["linear_num_key_heads"] * v["linear_key_head_dim"]
    heads = v["linear_num_value_heads"]
    recurrent = 2 * keys + 2 * heads * v["linear_value_head_dim"] + 2 * heads
    attention = 2 * (v["num_attention_heads"] + max(v["num_key_value_heads"], size)) * v["head_dim"]
    kinds = shape.config().layer_types
    numbers: int = sum(recurrent if kind == "linear_attention" else attention for kind in kinds)
    return 2 * (size - 1) / size * tokens * numbers * _NARROW


@dataclass(frozen=True)
class Plan:
    """What a plan says of a recipe where every GPU has ``DEVICE_GIB``.

    Attributes:
        weights: of the model as it trains.
        sizes: by number of processes, ``parallel: auto``.
        checkpointing: ``"none"`` where a step fits with it, else ``"layer"``.
        gib: the estimate of a step.
    """

    weights: Weights
    sizes: dict[int, Sizes]
    checkpointing: str
    gib: float

    @property
    def compute(self) -> float:
        """Seconds of the products of weights alone, for ``TOKENS``."""
        return self.weights.product_flops(TOKENS, recomputed=self.checkpointing == "layer") / PRODUCTS

    def traffic(self, processes: int) -> Traffic:
        """Of a step on so many."""
        sizes = self.sizes[processes]
        return traffic(self.weights, shard=sizes.shard, replicate=sizes.replicate)


@cache
def plan_of(name: str, trains: str) -> Plan:
    """Of ``TOKENS`` a rank; ``trains`` is of ``TRAINS``: adapters over a bfloat16 base, or all weights in float32."""
    shape = shape_named(name)
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": name, "dtype": "float32" if TRAINS[trains] is None else "bfloat16"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "packing": {"tokens_per_batch": TOKENS},
            "lora": TRAINS[trains],
            "compile": True,
            "checkpointing": "layer",
            "training": {"output_dir": "outputs", "bf16": True},
        }
    )
    model = adapt_by_recipe(empty_model(recipe.model, shape.config()), recipe)
    prepare_by_recipe(recipe, model, device=torch.device("cpu"))

    @cache
    def gib(checkpointing: str, shard: int) -> float:
        return estimate_step(recipe, model, checkpointing, shard=shard).total / 2**30

    def fits(shard: int, _: int) -> bool:
        return gib("layer", shard) <= ROOM * DEVICE_GIB

    sizes = {count: choose_sizes(count, replicate=None, shard=None, fits=fits) for count in PROCESSES}
    shards = sizes[PROCESSES[0]].shard
    checkpointing = "none" if gib("none", shards) <= ROOM * DEVICE_GIB else "layer"
    return Plan(_weights(model, shape), sizes, checkpointing, gib(checkpointing, shards))


def _weights(model: Any, shape: Shape) -> Weights:
    named = dict(model.named_parameters())
    total = sum(weight.numel() for weight in named.values())
    trained = sum(weight.numel() for weight in named.values() if weight.requires_grad)
    used = float(total)
    if "num_experts" in shape.values:
        routed = sum(weight.numel() for name, weight in named.items() if ".mlp.experts." in name)
        used -= routed * (1 - shape.values["num_experts_per_tok"] / shape.values["num_experts"])
    if not shape.values["tie_word_embeddings"]:  # looked up, not multiplied
        used -= shape.values["vocab_size"] * shape.values["hidden_size"]
    return Weights(total, trained, used)


def measured() -> list[str]:
    """How much of this was measured, by the committed records."""
    if not any(True for _ in scalings([record for record in load_records() if record.device != "cpu"])):
        return ["No step on more than one GPU has been measured."]
    return ["What was measured on several GPUs stands under [Measured](#measured); all that follows is arithmetic."]


def steps() -> list[str]:
    """The tables of sizes and of what they send, as lines of Markdown."""
    sizes, sent = list[list[str]](), list[list[str]]()
    for trains, name in ((trains, name) for trains in TRAINS for name in MODELS):
        if "experts" in trains and "num_experts" not in shape_named(name).values:
            continue
        plan = plan_of(name, trains)
        what = [name, trains]
        shards = {found.shard for found in plan.sizes.values()}
        assert len(shards) == 1, "the fewest that fit divide all three"
        copies = ", ".join(str(plan.sizes[count].replicate) for count in PROCESSES)
        sizes.append([*what, str(shards.pop()), copies, f"`{plan.checkpointing}`", f"{plan.gib:.0f}"])
        sent.append([*what, *_sent(plan)])
    first = ("model", "trains", "`shard`", "`replicate` on 8, 64, 1024", "`checkpointing`", "GiB a GPU")
    second = (
        "model", "trains", "gathered and scattered, GB", "reduced, GB", "out of the machine by a link, GB",
        "products, ms", "sending on 8, ms", "on 64", "on 1024", "on 64, one link a machine",
    )  # fmt: skip
    return [*_table(first, sizes), "", *_table(second, sent)]


def _sent(plan: Plan) -> Iterator[str]:
    on_64 = plan.traffic(64)
    for amount in (on_64.gathered + on_64.scattered, on_64.reduced, on_64.shards_leave + on_64.replicas_leave):
        yield _gb(amount)
    yield f"{1e3 * plan.compute:,.0f}"
    for seconds in (*(plan.traffic(count).seconds() for count in PROCESSES), on_64.seconds(links=1)):
        yield f"{1e3 * seconds:,.0f} ({seconds / plan.compute:.0%})"


def copies() -> list[str]:
    """A model of 9B on 64 GPUs, its copies in parts of a machine, one machine, or all, as lines of Markdown."""
    rows = []
    for trains, shard in ((trains, shard) for trains in ("LoRA", "all") for shard in (1, 2, 8, 64)):
        plan = plan_of("qwen3.5-9b", trains)
        if shard < plan.sizes[64].shard:  # does not fit
            continue
        found = traffic(plan.weights, shard=shard, replicate=64 // shard)
        sent = found.gathered + found.scattered + found.reduced
        times = (f"{1e3 * found.seconds(links=links):,.0f}" for links in (MACHINE, 1))
        left = _gb(found.shards_leave + found.replicas_leave)
        rows.append([trains, str(shard), str(64 // shard), _gb(sent), left, *times])
    header = ("trains", "`shard`", "`replicate`", "sent by a GPU, GB", "out of the machine by a link, GB", "ms",
              "one link a machine, ms")  # fmt: skip
    return _table(header, rows)


def sequences(size: int = MACHINE) -> list[str]:
    """What ranks that hold one document together send to each other, as lines of Markdown."""
    whole = size * TOKENS
    rows = []
    for name in MODELS:
        shape, plan = shape_named(name), plan_of(name, "LoRA")
        check_sequence_size(shape.config(), size)
        amount = exchanged(shape, size=size)
        products = plan.weights.product_flops(TOKENS, recomputed=True) / PRODUCTS
        attention = _attention_flops(shape, whole) / size / ATTENTION
        seconds = amount / INSIDE
        times = (f"{1e3 * each:,.0f}" for each in (seconds, products, attention))
        rows.append([name, _gb(amount), *times, f"{seconds / (products + attention):.0%}"])
    header = ("model", "sent by a GPU, GB", "ms", "products, ms", "attention, ms", "sending / both")
    return _table(header, rows)


def _attention_flops(shape: Shape, tokens: int) -> float:
    """Of one document: two products over half of all pairs forward, five backward."""
    layers: int = shape.config().layer_types.count("full_attention")
    return float(layers * (2 + 5) * 2 * shape.values["num_attention_heads"] * shape.values["head_dim"] * tokens**2 / 2)


def _gb(amount: float) -> str:
    if amount == 0:
        return "0"
    return f"{amount / 1e9:.2f}" if amount < 1e9 else f"{amount / 1e9:.0f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
