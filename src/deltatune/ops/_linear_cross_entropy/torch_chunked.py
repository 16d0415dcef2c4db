"""``torch.nn.functional.linear_cross_entropy`` of torch 2.13: the one place that knows its options."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.ops._numerics import accumulation_dtype

__all__ = ["loss", "missing", "rounds_loss"]

_dual = cast("Any", forward_ad.unpack_dual)
_function = getattr(F, "linear_cross_entropy", None)
_options_type = getattr(nn, "LinearCrossEntropyOptions", None)
# Without options it builds all the logits; without allow_retain_graph its warning breaks a compiled graph.
_options = None if _options_type is None else _options_type(allow_retain_graph=True)


def missing() -> str | None:
    """Why this torch cannot run it, with the remedy; None where it can."""
    if _function is None or _options is None:
        return f"torch {torch.__version__} has no chunked F.linear_cross_entropy; install torch >= 2.13"
    return None


def rounds_loss(dtype: torch.dtype) -> bool:
    """It sums the loss in the dtype of its input: in bf16, 0.8% off on packs of 1024 tokens, where fp32 is 1e-7 off."""
    return dtype in (torch.float16, torch.bfloat16)


def loss(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The loss of ``hidden`` ``[S, E]``, ``"sum"`` or ``"none"``, rounded to its dtype before it is widened.

    Raises:
        NotImplementedError: forward-mode differentiation, for which it would give no tangent.
    """
    assert _function is not None
    if not torch.compiler.is_compiling() and any(_dual(x).tangent is not None for x in (hidden, weight)):
        raise NotImplementedError("linear_cross_entropy has no forward-mode derivative; differentiate backward")
    loss: Tensor = _function(hidden, weight, labels, reduction=reduction, ignore_index=ignore_index, options=_options)
    return loss.to(accumulation_dtype(loss))
