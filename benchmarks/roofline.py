"""What a training step cannot be faster than: the longer of its operations and its bytes, part by part.

From shapes and two measured rates alone: a large product's FLOP a second and a large copy's bytes a second. Every
product is booked where a step spends it, those of the head with the loss; elementwise work that one kernel can do is
one part, its inputs read once and its outputs written once. Only what gradients need is counted, nothing twice: no
recomputation, no backward in front of the first adapter.
"""

# T tokens of a pack, E width of the residual stream, V vocabulary, r rank; H key heads, G value heads of dims K and V
# in the delta rule, C = 2HK + GV channels; N query heads, M key-value heads of dim D in attention

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Part", "Step", "roofline"]

_F32: Final = 4
#: Tokens that the delta rule's kernels take at a time: their products inside a chunk grow with it.
_CHUNK: Final = 64
_QKVO: Final = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Part:
    """One line: FLOP and bytes of a step, and the ms that the longer of them takes."""

    name: str
    group: str
    flops: float
    num_bytes: float
    ms: float


@dataclass(frozen=True)
class Step:
    """What a step does.

    Attributes:
        values: of the text model's config, ``layer_types`` optional: hybrids have attention in every fourth layer.
        layers: decoder layers.
        lengths: tokens of the documents of a pack.
        targets: ``"qkvo"`` or ``"all"``.
        rank: of the adapters.
        item: bytes of an activation.
    """

    values: Mapping[str, Any]
    layers: int
    lengths: Sequence[int]
    targets: str = "qkvo"
    rank: int = 16
    item: int = 2

    @property
    def kinds(self) -> list[str]:
        """``"linear_attention"`` or ``"full_attention"`` of each layer."""
        if "linear_num_value_heads" not in self.values:
            return ["full_attention"] * self.layers
        return ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(self.layers)]

    @property
    def first_trained(self) -> int:
        """Index of the first layer with an adapter: none before it needs a backward."""
        return 0 if self.targets == "all" else self.kinds.index("full_attention")


def roofline(step: Step, *, flops_per_second: float, bytes_per_second: float) -> list[Part] | None:
    """The parts of a step; None for a model with experts, whose products depend on the routing.

    Their sum is a bound: a step may overlap parts of memory with parts of arithmetic, which ours does not.
    """
    if "num_experts" in step.values:
        return None
    found: dict[tuple[str, str], list[float]] = {}
    for name, group, flops, num_bytes in (*_products(step), *_cores(step), *_elementwise(step)):
        sums = found.setdefault((name, group), [0.0, 0.0, 0.0])
        ms = 1e3 * max(flops / flops_per_second, num_bytes / bytes_per_second)
        for index, value in enumerate((flops, num_bytes, ms)):
            sums[index] += value
    return [Part(name, group, *sums) for (name, group), sums in found.items()]


_Line = tuple[str, str, float, float]


def _linears(step: Step, kind: str) -> Iterator[tuple[str, int, int]]:
    """``(name, K, N)`` of the projections of a layer."""
    v = step.values
    E, inner = v["hidden_size"], v["intermediate_size"]
    if kind == "linear_attention":
        keys = v["linear_num_key_heads"] * v["linear_key_head_dim"]
        G, values = v["linear_num_value_heads"], v["linear_num_value_heads"] * v["linear_value_head_dim"]
        yield from (("in qkv", E, 2 * keys + values), ("in z", E, values), ("in a", E, G), ("in b", E, G))
        yield "out", values, E
    else:
        D = v["head_dim"]
        queries, keys = v["num_attention_heads"] * D, v["num_key_value_heads"] * D
        gated = 2 if "linear_num_value_heads" in v else 1
        yield from (("q", E, gated * queries), ("k", E, keys), ("v", E, keys), ("o", queries, E))
    yield from (("gate", E, inner), ("up", E, inner), ("down", inner, E))


def _products(step: Step) -> Iterator[_Line]:
    """A frozen weight: ``x W^T`` forward, ``dy W`` for its input. An adapter: see ``_adapter``. The head likewise."""
    T, item, v = sum(step.lengths), step.item, step.values
    for index, kind in enumerate(step.kinds):
        for name, K, N in _linears(step, kind):
            first = index == step.first_trained and name in ("q", "k", "v", "in qkv", "in z", "in a", "in b")
            wanted = index > step.first_trained or (index == step.first_trained and not first)
            moved = item * (T * K + K * N + T * N)
            yield "base products", "products", 2 * T * K * N * (1 + wanted), moved * (1 + wanted)
            if step.targets == "all" or name in _QKVO:
                yield from _adapter(step, K, N, wanted=wanted)
    E, V = v["hidden_size"], v["vocab_size"]
    # logits stay on chip at best: reads hidden and head twice, writes the gradient
    yield "head and loss", "head and loss", 4 * T * E * V, item * (3 * T * E + 2 * E * V)


def _adapter(step: Step, K: int, N: int, *, wanted: bool) -> Iterator[_Line]:
    """``u = x A^T``, ``u B^T``; ``du = dy B``, ``dB = dy^T u``, ``dA = du^T x``, and ``du A`` where wanted.

    Bytes of u and du alone: the wide operands are on chip for the wide products, at best.
    """
    T, r = sum(step.lengths), step.rank
    yield "adapter products", "products", 2 * T * r * (3 * K + 3 * N - (0 if wanted else K)), 4 * step.item * T * r


def _cores(step: Step) -> Iterator[_Line]:
    v, T, item = step.values, sum(step.lengths), step.item
    for index, kind in enumerate(step.kinds):
        trained = index >= step.first_trained
        if kind == "full_attention":
            N, M, D = v["num_attention_heads"], v["num_key_value_heads"], v["head_dim"]
            # two products forward over the causal half, five backward
            pairs = sum(n * (n + 1) / 2 for n in step.lengths)
            forward = 4 * N * D * pairs
            moved = item * T * D * (2 * N + 2 * M), item * T * D * (4 * N + 4 * M)
            yield "attention", "attention", forward, moved[0]
            if trained:
                yield "attention", "attention", 2.5 * forward, moved[1]
            continue
        H, G = v["linear_num_key_heads"], v["linear_num_value_heads"]
        K, V = v["linear_key_head_dim"], v["linear_value_head_dim"]
        # a token inside its chunk: k k^T and q k^T, the two triangular products with K and V columns, the outputs;
        # and with the state: read twice, written once
        forward = 2 * T * G * (_CHUNK / 2 * (3 * K + 2 * V) + 3 * K * V)
        streams = item * T * (2 * H * K + 2 * G * V) + T * G * (item + _F32)
        yield "delta rule", "delta rule", forward, streams
        if trained:
            yield "delta rule", "delta rule", 2 * forward, 2 * streams


def _elementwise(step: Step) -> Iterator[_Line]:
    """Bytes a token of what lies between products and cores."""
    v, T, item = step.values, sum(step.lengths), step.item
    E, inner = v["hidden_size"], v["intermediate_size"]
    layers, trained = step.layers, step.layers - step.first_trained
    name = "norms and elementwise"

    def part(forward: float, backward: float, count: int, needed: int, group: str = name) -> _Line:
        return group, group, 0.0, T * item * (forward * count + backward * needed)

    # the embedding's row, the residual stream and its norm; then x and a branch to their sum and its norm, and back
    yield part(3 * E, 0, 1, 0)
    yield part(4 * E, 4 * E, 2 * layers - 1, 2 * trained - 1)
    yield part(4 * E, 3 * E, 1, 1)
    # gate and up to their product; its gradient, gate and up to theirs
    yield part(3 * inner, 5 * inner, layers, trained)
    for kind in ("linear_attention", "full_attention"):
        count, needed = step.kinds.count(kind), step.kinds[step.first_trained :].count(kind)
        if kind == "linear_attention" and count:
            keys = v["linear_num_key_heads"] * v["linear_key_head_dim"]
            values = v["linear_num_value_heads"] * v["linear_value_head_dim"]
            C = 2 * keys + values
            yield part(2 * C, 3 * C, count, needed, "convolution")
            # o and the gate to the normalised product; its gradient, o and gate to theirs
            yield part(3 * values, 5 * values, count, needed)
        elif count:
            queries, keys = (v["head_dim"] * v[f"num_{of}_heads"] for of in ("attention", "key_value"))
            yield part(2 * (queries + keys), 3 * (queries + keys), count, needed)
            if "linear_num_value_heads" in v:
                yield part(3 * queries, 5 * queries, count, needed)
