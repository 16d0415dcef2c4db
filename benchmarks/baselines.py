"""What deltatune is compared with, pinned: stock transformers modules made leak-free, as shipped, and in float32.

Each changes the model it is given, and the functions that transformers' file of it calls: one system a process.
"""

# T tokens of a pack, N query heads, M key-value heads, D head dim, C channels

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LEAK_FREE", "LossOfHidden", "fused_loss", "leak_free", "liger_patched", "reference", "shipped"]

LEAK_FREE: Final = (
    "stock transformers modules; the delta rule by FLA as transformers calls it, on the backend FLA chooses "
    "(FlashQLA where it is installed); FLA's own variable-length Triton convolution called in place of transformers' "
    "torch one; torch.nn.attention.varlen through AttentionInterface with a mask function that builds nothing; "
    "Liger's fused linear cross-entropy; PEFT's LoRA layers; AdamW(fused=True); layer checkpointing by "
    "gradient_checkpointing_enable(use_reentrant=False), which also makes the embeddings require a gradient, so that "
    "every layer has a backward; or none"
)
"""The leak-free stock baseline in words, as records carry it."""

_ATTENTION: Final = "benchmarks_varlen"
_CONVOLUTION, _DELTA_RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"

#: ``(hidden [T, E], head weight [V, E], targets [T], -100 ignored) -> mean loss``
LossOfHidden = Callable[[Tensor, Tensor, Tensor], Tensor]


def leak_free(model: Any) -> None:
    """Keeps packed documents apart: ``LEAK_FREE``. On the CPU the same stock functions run document by document."""
    _attend_by_documents(model)
    if model.device.type == "cuda":
        _rebind(model, {_CONVOLUTION: _fla_convolution})
    else:
        _rebind(model, {_CONVOLUTION: _convolve_each, **_scan_of(model)})


def shipped(model: Any) -> None:
    """As a user of transformers gets it without causal-conv1d: its torch convolution knows no documents."""
    _attend_by_documents(model)
    if model.device.type != "cuda":
        _rebind(model, _scan_of(model))


def liger_patched(model: Any) -> None:
    """The leak-free model with Liger's norms and MLPs on top.

    Raises:
        ValueError: Liger is missing, or has no patch for this model.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("Liger is not installed: pip install liger-kernel")
    from liger_kernel.transformers import monkey_patch

    kind = str(model.config.model_type)
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if apply is None:
        raise ValueError(f"this version of Liger has no patch for {kind}")
    leak_free(model)
    # its fused loss comes with every baseline here
    apply(rope=False, fused_linear_cross_entropy=False, model=model)


def reference(model: Any) -> None:
    """In float32, stock torch functions alone: the truth for one document at a time, unpacked."""
    model.float()
    model.config._attn_implementation = "sdpa"
    found = {name: _stock_function(model, name) for name in (_CONVOLUTION, _DELTA_RULE)}
    _rebind(model, {name: function for name, function in found.items() if function is not None})


def fused_loss(device: torch.device) -> LossOfHidden:
    """Liger's fused linear cross-entropy; without a GPU, cross-entropy over whole logits."""
    if device.type != "cuda":
        return _plain_loss
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    liger: Any = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="mean")
    return lambda hidden, weight, targets: liger(weight, hidden, targets)


def _plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets, ignore_index=-100)


def _rebind(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Gives the file of every module that calls one of these functions another in its place."""
    for module in model.modules():
        forward = _innermost(type(module).forward)
        for name in set(functions) & set(forward.__code__.co_names):
            forward.__globals__[name] = functions[name]


def _stock_function(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """transformers' own torch implementation behind a name that the modules' file may have given to a library."""
    for module in model.modules():
        function = _innermost(type(module).forward).__globals__.get(name)
        if function is not None:
            found: Callable[..., Any] = _innermost(function)
            return found
    return None


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _attend_by_documents(model: Any) -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, _no_mask)
    model.config._attn_implementation = _ATTENTION


def _no_mask(*_: Any, **__: Any) -> None:
    """Boundaries travel as ``cu_seq_lens_*``; nothing of size T x T is built."""


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """``query [1, N, T, D]``, ``key``, ``value [1, M, T, D]`` -> ``[1, T, N, D]``; without boundaries one document."""
    assert attention_mask is None, f"{type(module).__name__} was given a mask that the baseline cannot honour"
    tokens = query.shape[2]
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = torch.tensor([0, tokens], dtype=torch.int32, device=query.device), tokens
    if query.device.type == "cuda":
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    each = [
        F.scaled_dot_product_attention(
            query[:, :, span], key[:, :, span], value[:, :, span], is_causal=True, scale=scaling, enable_gqa=True
        )
        for span in _spans(cu_seq_lens_q, tokens)
    ]
    return torch.cat(each, dim=2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    grouped: dict[str, Any] = {"enable_gqa": True} if _takes_enable_gqa() else {}
    attend: Any = varlen_attn
    out: Tensor = attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(-1, 0), **grouped)
    return out.unsqueeze(0)


@functools.cache
def _takes_enable_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _fla_convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """FLA's convolution where transformers calls its own, ``[1, C, T] -> [1, C, T]``: it takes ``[1, T, C]``."""
    from fla.modules.causal_conv1d import causal_conv1d

    out: Tensor = causal_conv1d(
        hidden_states.transpose(1, 2), weight, bias, activation=activation, cu_seqlens=cu_seq_lens_q, backend="triton"
    )[0]
    return out.transpose(1, 2)


def _convolve_each(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The same on the CPU, one document after the other."""
    assert activation in (None, "silu")
    width = weight.shape[-1]
    each = []
    for span in _spans(cu_seq_lens_q, hidden_states.shape[-1]):
        padded = F.pad(hidden_states[..., span], (width - 1, 0))
        each.append(F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0]))
    out = torch.cat(each, dim=-1)
    return F.silu(out) if activation else out


def _scan_of(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """transformers' torch delta rule on the CPU, one document after the other; nothing for a model without one."""
    stock = _stock_function(model, _DELTA_RULE)
    if stock is None:
        return {}

    def scan(query: Tensor, key: Tensor, value: Tensor, **call: Any) -> tuple[Tensor, None]:
        cu_seqlens, g, beta = call.pop("cu_seqlens", None), call.pop("g"), call.pop("beta")
        each = []
        for span in _spans(cu_seqlens, query.shape[1]):
            parts = (x[:, span] for x in (query, key, value))
            each.append(stock(*parts, g=g[:, span], beta=beta[:, span], use_qk_l2norm_in_kernel=True)[0])
        return torch.cat(each, dim=1), None

    return {_DELTA_RULE: scan}


def _spans(cu_seqlens: Tensor | None, tokens: int) -> Iterator[slice]:
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        if end > start:
            yield slice(start, end)
