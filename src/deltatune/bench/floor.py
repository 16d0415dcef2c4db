"""The arithmetic floor of a training step without recomputation.

Every matrix product at the rate ``torch.mm`` reaches at its shape in this run, the delta rule and attention at their
kernels' own times on the same documents, everything else at copy bandwidth for its fewest bytes. Only what gradients
need is counted: nothing behind the first trained weight. Adapters' products are counted apart from the base's, as
PEFT runs them; folded into the base's they can take less than their lines here say.
"""

# T tokens of a batch, K width a product sums over, N its columns, r rank

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from deltatune import ops
from deltatune.bench.models import adapters
from deltatune.bench.protocol import between_ms, copy_rate, gemm_rate, laid_out, mark, measure, synchronize
from deltatune.bench.stages import elementwise_stages, optimizer_bytes_moved
from deltatune.packing.sequences import Sequences

__all__ = ["Floor", "Part", "Product", "arithmetic_floor", "first_trained_layer", "products"]

#: Rows of logits at a time: the head's product is measured at this many and counted for all.
_HEAD_ROWS: Final = 4096
#: A copy of this many bytes is past any cache and as long as a stage of a large model.
_COPY_BYTES: Final = 2**28
#: Over all products of a step: seconds in all, at the sizes of a 9B model and a 2B one.
_PASSES: Final = 5
#: Projections that come before everything else of a layer: in the first trained layer nothing wants their input's
#: gradient.
_FIRST_IN_LAYER: Final = ("q_proj", "k_proj", "v_proj", "in_proj")


@dataclass(frozen=True)
class Product:
    """A matrix product ``[m, k] @ [k, n]`` of the step, and how often the step does it."""

    name: str
    m: int
    k: int
    n: int
    layout: str
    count: int

    @property
    def flops(self) -> int:
        """Of one."""
        return 2 * self.m * self.k * self.n


@dataclass(frozen=True)
class Part:
    """One line of the floor.

    Attributes:
        name: what it is.
        group: of kernels, as a profile names it.
        ms: all of them in a step.
        count: how many.
        flops: of all, for products.
        bytes: of all, for elementwise stages.
        rate: FLOP or bytes a second that ``ms`` follows from; None for kernels at their own time.
    """

    name: str
    group: str
    ms: float
    count: int
    flops: float | None = None
    bytes: float | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Floor:
    """What a step cannot be faster than.

    Attributes:
        parts: its lines.
        first_trained_layer: how far back gradients had to go.
        copy_bytes_per_second: what elementwise stages go by.
        products_in_turn_ms: all of its matrix products one after another, after some passes of the same: what is left
            of their rates once the device has reached its power limit. No part of the floor.
    """

    parts: tuple[Part, ...]
    first_trained_layer: int
    copy_bytes_per_second: float
    products_in_turn_ms: float

    @property
    def total_ms(self) -> float:
        """The floor."""
        return sum(part.ms for part in self.parts)

    @property
    def groups(self) -> dict[str, float]:
        """Group of kernels -> ms."""
        totals: dict[str, float] = {}
        for part in self.parts:
            totals[part.group] = totals.get(part.group, 0.0) + part.ms
        return totals

    def to_dict(self) -> dict[str, Any]:
        """As records carry it."""
        return {
            "total_ms": self.total_ms,
            "first_trained_layer": self.first_trained_layer,
            "groups": self.groups,
            "products_in_turn_ms": self.products_in_turn_ms,
            "parts": [asdict(part) for part in self.parts],
        }


def arithmetic_floor(model: Any, sequences: Sequences, *, dtype: torch.dtype = torch.bfloat16) -> Floor | None:
    """The floor of one step of a model with PEFT's adapters; None for experts, whose products are not counted yet.

    Args:
        model: stock, with adapters as PEFT adds them: its modules say which products there are.
        sequences: the documents of the batch, on the model's device.
        dtype: of activations.
    """
    base = model.get_base_model()
    config, device = base.config.get_text_config(), base.device
    if getattr(config, "num_experts", None):
        return None
    first = first_trained_layer(model)
    copy = copy_rate(device, _COPY_BYTES if device.type == "cuda" else _COPY_BYTES // 2**8)
    wanted = products(model, sequences.total)
    parts = [_gemm_part(product, device, dtype) for product in wanted]
    parts += _core_parts(config, sequences, first, dtype)
    for stage in elementwise_stages(config, first_trained=first, item=dtype.itemsize):
        parts += _stage_parts(stage, sequences.total, copy)
    trained = sum(parameter.numel() for _, parameter in adapters(model))
    moved = optimizer_bytes_moved(trained)
    parts.append(Part("AdamW", "optimizer", _ms(moved, copy), 1, bytes=moved, rate=copy))
    return Floor(tuple(parts), first, copy, _in_turn_ms(wanted, device, dtype))


def first_trained_layer(model: Any) -> int:
    """Index of the first decoder layer with a trained weight: none before it needs a backward."""
    for index, layer in enumerate(model.get_base_model().get_decoder().layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    raise ValueError("no decoder layer has a trained weight")


def products(model: Any, tokens: int) -> list[Product]:
    """Every matrix product of a step that adapters' gradients need, equal shapes counted together.

    A frozen weight ``[N, K]``: ``x W^T`` forward, ``dy W`` for its input. An adapter of rank r: ``u = x A^T``,
    ``u B^T``; ``du = dy B``, ``dB = dy^T u``, ``dA = du^T x``, and ``du A`` for its input. The head: logits, and the
    gradient of its input.
    """
    found: dict[tuple[str, int, int, int, str], int] = {}
    for product in _all_products(model, tokens):
        key = (product.name, product.m, product.k, product.n, product.layout)
        found[key] = found.get(key, 0) + product.count
    return [Product(*key, count) for key, count in found.items()]


def _all_products(model: Any, tokens: int) -> Iterator[Product]:
    base = model.get_base_model()
    first = first_trained_layer(model)
    for index, layer in enumerate(base.get_decoder().layers):
        for name, module in layer.named_modules():
            if _is_adapted(module) or (isinstance(module, nn.Linear) and not _inside_adapter(name)):
                wanted = index > first or (index == first and not _comes_first(name))
                yield from _linear_products(module, tokens, wanted)
    vocab, width = base.get_output_embeddings().weight.shape
    rows = min(tokens, _HEAD_ROWS)
    chunks = -(-tokens // rows)
    yield Product("head forward", rows, width, vocab, "NT", chunks)
    yield Product("head input gradient", rows, vocab, width, "NN", chunks)


def _linear_products(module: Any, tokens: int, wants_input_grad: bool) -> Iterator[Product]:
    weight = module.base_layer.weight if _is_adapted(module) else module.weight
    n, k = weight.shape
    yield Product("base forward", tokens, k, n, "NT", 1)
    if wants_input_grad:
        yield Product("base input gradient", tokens, n, k, "NN", 1)
    if not _is_adapted(module):
        return
    for lora in module.lora_A.values():
        r = lora.weight.shape[0]
        yield Product("adapter forward", tokens, k, r, "NT", 1)
        yield Product("adapter forward", tokens, r, n, "NT", 1)
        yield Product("adapter gradients", tokens, n, r, "NN", 1)
        yield Product("adapter gradients", n, tokens, r, "TN", 1)
        yield Product("adapter gradients", r, tokens, k, "TN", 1)
        if wants_input_grad:
            yield Product("adapter input gradient", tokens, r, k, "NN", 1)


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _inside_adapter(name: str) -> bool:
    return any(part in ("base_layer", "lora_A", "lora_B") for part in name.split("."))


def _comes_first(name: str) -> bool:
    return name.rpartition(".")[2].startswith(_FIRST_IN_LAYER)


def _gemm_part(product: Product, device: torch.device, dtype: torch.dtype) -> Part:
    rate = gemm_rate(device, product.m, product.k, product.n, dtype, product.layout)
    flops = product.count * product.flops
    name = f"{product.name} {product.m}x{product.k}x{product.n} {product.layout}"
    return Part(name, "GEMM", 1e3 * flops / rate, product.count, flops=flops, rate=rate)


def _in_turn_ms(wanted: Sequence[Product], device: torch.device, dtype: torch.dtype) -> float:
    # all of them in three buffers of the largest's size: a step has other things to keep
    sizes = [(p.m * p.k, p.k * p.n, p.m * p.n) for p in wanted]
    left, right, out = (torch.randn(max(size), device=device, dtype=dtype) for size in zip(*sizes, strict=True))
    marks = []
    for _ in range(_PASSES):
        for product in wanted:
            m, k, n = product.m, product.k, product.n
            pair = laid_out(left, m, k, product.layout[0]), laid_out(right, k, n, product.layout[1])
            for _ in range(product.count):
                torch.mm(*pair, out=out[: m * n].view(m, n))
        marks.append(mark(device))
    synchronize(device)
    return between_ms(marks[-2], marks[-1])


def _core_parts(config: Any, sequences: Sequences, first: int, dtype: torch.dtype) -> Iterator[Part]:
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    cores: dict[str, tuple[str, Callable[..., Callable[[int], tuple[Tensor, tuple[Tensor, ...]]]]]] = {
        "linear_attention": ("delta rule", _delta_rule),
        "full_attention": ("attention", _attention),
    }
    for kind, (group, make) in cores.items():
        count, trained = kinds.count(kind), kinds[first:].count(kind)
        if count:
            forward, backward = _core_times(make(config, sequences, dtype), sequences.cu_seqlens.device)
            yield Part(f"{group} forward", group, count * forward, count)
            yield Part(f"{group} backward", group, trained * backward, trained)


def _core_times(call: Callable[[int], tuple[Tensor, tuple[Tensor, ...]]], device: torch.device) -> tuple[float, float]:
    """Median ms forward (with what backward wants kept) and of backward."""
    out, _ = call(0)
    grads = [torch.randn_like(out) for _ in range(2)]
    graphs = [call(i) for i in range(2)]

    def backward(i: int) -> object:
        out, inputs = graphs[i % 2]
        return torch.autograd.grad(out, inputs, grads[i % 2], retain_graph=True)

    times = measure({"forward": call, "backward": backward}, device, rounds=6)
    return times["forward"].median_ms, times["backward"].median_ms


def _delta_rule(
    config: Any, sequences: Sequences, dtype: torch.dtype
) -> Callable[[int], tuple[Tensor, tuple[Tensor, ...]]]:
    """On normalised q and k: their l2norm is a stage of its own."""
    device, T = sequences.cu_seqlens.device, sequences.total
    H, G = config.linear_num_key_heads, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim
    sets = []
    for _ in range(2):
        q, k = (nn.functional.normalize(torch.randn(1, T, H, K, device=device), dim=-1).to(dtype) for _ in range(2))
        v = torch.randn(1, T, G, V, device=device).to(dtype)
        g = -0.05 * torch.rand(1, T, G, device=device)
        beta = torch.rand(1, T, G, device=device).to(dtype)
        sets.append(tuple(x.requires_grad_() for x in (q, k, v, g, beta)))

    def call(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v, g, beta = sets[i % 2]
        return ops.gated_delta_rule(q, k, v, g, beta, sequences=sequences, qk_l2norm=False), sets[i % 2]

    return call


def _attention(
    config: Any, sequences: Sequences, dtype: torch.dtype
) -> Callable[[int], tuple[Tensor, tuple[Tensor, ...]]]:
    device, T = sequences.cu_seqlens.device, sequences.total
    N, M = config.num_attention_heads, config.num_key_value_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // N
    sets = [
        tuple(torch.randn(1, T, heads, D, device=device).to(dtype).requires_grad_() for heads in (N, M, M))
        for _ in range(2)
    ]

    def call(i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = sets[i % 2]
        return ops.varlen_attention(q, k, v, sequences=sequences), sets[i % 2]

    return call


def _stage_parts(stage: Any, tokens: int, copy: float) -> Iterator[Part]:
    directions = (("forward", stage.forward, stage.forward_count), ("backward", stage.backward, stage.backward_count))
    for direction, bytes_a_token, count in directions:
        moved = tokens * bytes_a_token * count
        if moved:
            yield Part(f"{stage.name} {direction}", stage.group, _ms(moved, copy), count, bytes=moved, rate=copy)


def _ms(moved: float, bytes_per_second: float) -> float:
    return 1e3 * moved / bytes_per_second
