"""The head and its loss: ours, the stock head with whole logits (plain and compiled), Liger's, cut-cross-entropy's."""

# T tokens, E width of hidden, V vocabulary

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune import ops
from deltatune.bench.ops.case import Case, Function, Setting, Tensors, Variant, Work, imported, normal, ours
from deltatune.bench.ops.gate import errors, results
from deltatune.bench.shapes import Shape

__all__ = ["IMPLEMENTATIONS", "case"]

IMPLEMENTATIONS = ("triton", "torch", "reference")
_IGNORED = -100
_CHUNK = 1024
# rows of the product that measures the rate: the logits of all tokens at once would take 8 GiB
_GEMM_ROWS = 4096


def case(shape: Shape, tokens: int, setting: Setting) -> Case:
    """Hidden states ``[T, E]`` under a frozen head ``[V, E]``; the first token of every document has no label."""
    E, V = shape.values["hidden_size"], shape.values["vocab_size"]
    weight = normal(setting.generator(0), V, E, dtype=setting.dtype, scale=E**-0.5)
    ignored = setting.sequences(tokens).positions == 0
    choose = functools.partial(_choose, setting)

    def draw(seed: int) -> dict[str, Tensor]:
        generator = setting.generator(seed)
        labels = torch.randint(0, V, (tokens,), generator=generator, device=setting.device)
        hidden = normal(generator, tokens, E, dtype=setting.dtype)
        return {"hidden": hidden, "weight": weight, "labels": labels.masked_fill(ignored, _IGNORED)}

    stream = tokens * E * setting.dtype.itemsize
    return Case(
        op="linear_cross_entropy",
        config=setting.config(shape, tokens, E=E, V=V, weight="frozen"),
        draw=draw,
        outputs=("loss",),
        trained=("hidden",),
        reference=_call("reference"),
        variants=[
            *ours(IMPLEMENTATIONS, choose, _call),
            Variant("stock eager, whole logits", "stock", lambda: _stock),
            Variant("torch.compile(stock)", "compile", lambda: torch.compile(_stock, fullgraph=True, dynamic=False)),
            Variant("Liger", "library", _liger),
            Variant("cut-cross-entropy, filter_eps=None", "library", _cut_cross_entropy),
        ],
        # reads hidden and the head; both again, writes dhidden
        work=Work(
            stream + V * E * setting.dtype.itemsize,
            2 * stream + V * E * setting.dtype.itemsize,
            copy_bytes=stream,
            gemm=(min(tokens, _GEMM_ROWS), E, V),
        ),
        auto=choose("auto").impl,
        budget=_budget,
    )


def _choose(setting: Setting, impl: str) -> ops.Choice:
    return ops.choose_linear_cross_entropy(setting.device, setting.dtype, impl=impl)


def _call(impl: str) -> Function:
    return lambda t: ops.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], impl=impl)


def _stock(t: Tensors) -> Tensor:
    """The stock head and loss: logits in the dtype of the model, widened whole."""
    logits = F.linear(t["hidden"], t["weight"]).float()
    return F.cross_entropy(logits, t["labels"], reduction="sum")


def _liger() -> Function:
    fused = imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")

    def run(t: Tensors) -> Tensor:
        loss: Tensor = fused(t["hidden"], t["weight"], t["labels"], reduction="sum")
        return loss

    return run


def _cut_cross_entropy() -> Function:
    cut = imported("cut_cross_entropy", "linear_cross_entropy")

    def run(t: Tensors) -> Tensor:
        loss: Tensor = cut(t["hidden"], t["weight"], t["labels"], reduction="sum", filter_eps=None)
        return loss

    return run


def _budget(inputs: Tensors, exact: Tensors) -> dict[str, float]:
    """The reference's own for the gradient; for the loss, what logits in the dtype of the model make of it.

    A sum over thousands of tokens may be right by chance: its budget is the root of the summed squares of the tokens'
    errors, and one rounding of the fp32 sum itself.
    """
    found = errors(results(_call("reference"), inputs, ("loss",), ("hidden",)), exact)
    squares, head = 0.0, inputs["weight"].double()
    for start in range(0, len(inputs["hidden"]), _CHUNK):
        rows, labels = (inputs[name][start : start + _CHUNK] for name in ("hidden", "labels"))
        rounded = F.cross_entropy(F.linear(rows, inputs["weight"]).double(), labels, reduction="none")
        squares += (rounded - F.cross_entropy(rows.double() @ head.T, labels, reduction="none")).square().sum().item()
    rounding = torch.finfo(torch.float32).eps
    return found | {"loss": math.hypot(math.sqrt(squares) / exact["loss"].abs().item(), rounding)}
