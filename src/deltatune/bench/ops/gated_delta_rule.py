"""The gated delta rule: ours on each library, and the libraries called directly as stock models call them."""

# T tokens, H key heads, G value heads, K key dim, V value dim

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deltatune import ops
from deltatune.bench.ops.case import Case, Function, Setting, Tensors, Variant, Work, imported, normal, ours
from deltatune.bench.ops.gate import errors, gradient_weights
from deltatune.bench.shapes import Shape
from deltatune.ops._gated_delta_rule import reference
from deltatune.packing.sequences import Sequences

__all__ = ["IMPLEMENTATIONS", "case"]

IMPLEMENTATIONS = ("flash_qla", "fla", "reference")
_INPUTS = ("q", "k", "v", "g", "beta")
_GEMM = (8192, 8192, 8192)
# a state lives through hundreds of tokens: errors add up, and a leak between documents shows
_SLOW_DECAY = 0.05


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """Normalised q and k ``[1, T, H, K]``, v ``[1, T, G, V]``, the decay in fp32 as Qwen3-Next has it."""
    H, G, K, V = (
        shape.values[f"linear_{name}"]
        for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    )
    sequences = setting.sequences(tokens)
    choose = functools.partial(_choose, setting, (K, V))
    queries, values, gates = 2 * tokens * H * K, tokens * G * V, tokens * G
    size = setting.dtype.itemsize
    inputs = (queries + values + gates) * size + 4 * gates
    return Case(
        op="gated_delta_rule",
        config=setting.config(shape, tokens, H=H, G=G, K=K, V=V, g="float32", decay=f"-{_SLOW_DECAY}*sigmoid"),
        draw=lambda seed: _draw(setting, seed, tokens, (H, G, K, V)),
        outputs=("o",),
        trained=_INPUTS,
        reference=_call("reference", sequences),
        variants=[
            *ours(IMPLEMENTATIONS, choose, lambda impl: _call(impl, sequences)),
            Variant("FlashQLA called directly", "library", lambda: _flash_qla(sequences)),
            Variant("FLA called directly", "library", lambda: _fla(sequences)),
        ],
        # reads the inputs, writes o; reads them and do, writes their gradients
        work=Work(
            inputs + values * size,
            2 * inputs + values * size,
            copy_bytes=values * size,
            gemm=_GEMM if setting.device.type == "cuda" else (64, 64, 64),
        ),
        auto=choose("auto").impl,
        budget=functools.partial(_budget, sequences, K**-0.5),
    )


def _draw(setting: Setting, seed: int, tokens: int, sizes: tuple[int, int, int, int]) -> dict[str, Tensor]:
    (H, G, K, V), generator = sizes, setting.generator(seed)
    q, k = (normal(generator, 1, tokens, H, K, dtype=setting.dtype) for _ in range(2))
    v = normal(generator, 1, tokens, G, V, dtype=setting.dtype)
    g, beta = (normal(generator, 1, tokens, G, dtype=torch.float32).sigmoid() for _ in range(2))
    return {"q": q, "k": k, "v": v, "g": -_SLOW_DECAY * g, "beta": beta.to(setting.dtype)}


def _choose(setting: Setting, head_dims: tuple[int, int], impl: str) -> ops.Choice:
    return ops.choose_gated_delta_rule(setting.device, setting.dtype, head_dims=head_dims, impl=impl)


def _call(impl: str, sequences: Sequences) -> Function:
    return lambda t: ops.gated_delta_rule(*(t[name] for name in _INPUTS), sequences=sequences, impl=impl)


def _flash_qla(sequences: Sequences) -> Function:
    # the choice of context parallelism would read the boundaries from the device
    return _direct(imported("flash_qla", "chunk_gated_delta_rule"), sequences, auto_cp=False)


def _fla(sequences: Sequences) -> Function:
    """Its own choice of backend, FlashQLA's kernels included: what a stock model runs."""
    bounds = sequences.cu_seqlens_cpu[: sequences.num_sequences + 1].clone()
    return _direct(imported("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"), sequences, cu_seqlens_cpu=bounds)


def _direct(library: Callable[..., Any], sequences: Sequences, **options: object) -> Function:
    bounds = sequences.cu_seqlens[: sequences.num_sequences + 1].clone()  # both dislike empty documents

    def run(t: Tensors) -> Tensor:
        inputs = [t[name] for name in _INPUTS]
        o: Tensor = library(*inputs, use_qk_l2norm_in_kernel=True, cu_seqlens=bounds, **options)[0]
        return o

    return run


class _RoundedOperands(TorchFunctionMode):
    """Matrix products of operands rounded to 16 bits, accumulated in fp32, as matrix units compute them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = [x.to(self.dtype).to(x.dtype) for x in args]
        return func(*args, **(kwargs or {}))


def _budget(sequences: Sequences, scale: float, inputs: Tensors, exact: Tensors) -> dict[str, float]:
    """The errors of the chunked reference with 16-bit operands and fp32 accumulation."""
    q, k, v, g, beta = (inputs[name] for name in _INPUTS)
    bounds = sequences.cu_seqlens_cpu
    with _RoundedOperands(inputs["q"].dtype):  # an op would hide its products from the mode
        o = reference.forward(q, k, v, g, beta, bounds, scale=scale, qk_l2norm=True)
        (do,) = gradient_weights([o])
        grads = reference.backward(do, q, k, v, g, beta, bounds, scale=scale, qk_l2norm=True)
    return errors({"o": o} | {f"d{name}": grad for name, grad in zip(_INPUTS, grads, strict=True)}, exact)
