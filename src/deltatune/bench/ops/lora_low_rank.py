"""The products of one adapter beside those of its base layer: ours, which may read a gradient once for two, and PEFT's.

The kernel behind that is the one of adapters inside the base products too.
"""

# T tokens, E width of the residual stream, N output width, R rank

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.bench.ops.case import Case, Setting, Tensors, Variant, Work, compiled, normal
from deltatune.bench.ops.gate import errors, results
from deltatune.bench.shapes import Shape
from deltatune.lora.mode import BESIDE
from deltatune.ops._lora_linear.low_rank import low_rank

__all__ = ["IMPLEMENTATIONS", "case"]

IMPLEMENTATIONS = (BESIDE, "reference")
_SCALE: Final = 2.0
_TRAINED: Final = ("x", "a", "b")


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """``s (x A^T) B^T`` for x ``[T, E]``, ``A [R, E]`` and ``B [N, R]`` in float32; N of q or of the MLP, the wider."""
    values, rank = shape.values, setting.rank
    width, outer = values["hidden_size"], _widest(shape)

    def draw(seed: int) -> dict[str, Tensor]:
        generator = setting.generator(seed)
        return {
            "x": normal(generator, tokens, width, dtype=setting.dtype),
            "a": normal(generator, rank, width, dtype=torch.float32, scale=width**-0.5),
            "b": normal(generator, outer, rank, dtype=torch.float32, scale=rank**-0.5),
        }

    itemsize = setting.dtype.itemsize
    x, y = tokens * width * itemsize, tokens * outer * itemsize
    return Case(
        op="lora_low_rank",
        config=setting.config(shape, tokens, E=width, N=outer, R=rank, adapters="float32"),
        draw=draw,
        outputs=("y",),
        trained=_TRAINED,
        reference=_peft,
        variants=[
            Variant(BESIDE, "deltatune", lambda: _beside),
            compiled(_peft),
            Variant("reference", "stock", lambda: _peft),
        ],
        # reads x, writes y; reads x and dy, writes dx
        work=Work(x + y, 2 * x + y, copy_bytes=y, gemm=(tokens, width, outer)),
        auto=BESIDE,
        budget=_budget,
    )


def _widest(shape: Shape) -> int:
    """The output of the MLP's first layers, or of q with its gate; most layers of experts have no such MLP."""
    values = shape.values
    queries = values["num_attention_heads"] * values["head_dim"] * (2 if shape.hybrid else 1)
    return int(max(queries, values.get("intermediate_size", 0)))


def _beside(t: Tensors) -> Tensor:
    return low_rank(t["x"], t["a"], t["b"], _SCALE)


def _peft(t: Tensors) -> Tensor:
    """In the dtype of the adapters."""
    x, a, b = (t[name] for name in _TRAINED)
    return (F.linear(F.linear(x.to(a.dtype), a), b) * _SCALE).to(x.dtype)


def _budget(inputs: Tensors, exact: Tensors) -> dict[str, float]:
    """The reference's error with adapters in the dtype of x: layers compute products of 16 bits."""
    rounded = {name: tensor.to(inputs["x"].dtype) for name, tensor in inputs.items()}
    return errors(results(_peft, rounded, ("y",), _TRAINED), exact)
