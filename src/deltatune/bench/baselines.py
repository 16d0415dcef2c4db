"""What deltatune is compared with, pinned: stock transformers modules made leak-free, as shipped, and in float32."""

# T tokens of a pack, N query heads, M key-value heads, D head dim, C channels

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bench.models import copy_of, with_functions

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

_ATTENTION: Final = "deltatune_bench_varlen"
_CONVOLUTION, _DELTA_RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"

#: ``(hidden [T, E], head weight [V, E], targets [T], -100 ignored) -> mean loss``
LossOfHidden = Callable[[Tensor, Tensor, Tensor], Tensor]


def leak_free(base: Any) -> Any:
    """A copy of a stock model that keeps packed documents apart: ``LEAK_FREE``.

    On the CPU, where none of these libraries runs, the same stock functions run document by document.
    """
    model = copy_of(base)
    _attend_by_documents(model)
    if model.device.type == "cuda":
        with_functions(model, {_CONVOLUTION: _fla_convolution})
    else:
        with_functions(model, {_CONVOLUTION: _convolve_each, **_scan_of(model)})
    return model


def shipped(base: Any) -> Any:
    """A copy as a user of transformers gets it without causal-conv1d: its torch convolution knows no documents."""
    model = copy_of(base)
    _attend_by_documents(model)
    if model.device.type != "cuda":
        with_functions(model, _scan_of(model))
    return model


def liger_patched(base: Any) -> Any:
    """The leak-free copy with Liger's norms and MLPs on top, the classes of transformers' files as they were.

    Raises:
        ValueError: Liger is missing, or has no patch for this model.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("Liger is not installed: pip install liger-kernel")
    from liger_kernel.transformers import monkey_patch

    kind = str(base.config.model_type)
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if apply is None:
        raise ValueError(f"Liger {_version('liger-kernel')} has no patch for {kind}")
    model = leak_free(base)
    with _unchanged_file(type(base)):
        # its fused loss comes with every baseline here
        apply(rope=False, fused_linear_cross_entropy=False, model=model)
    return model


def reference(base: Any) -> Any:
    """A float32 copy of the stock model, its own weights: the truth for one document at a time, unpacked."""
    model = copy_of(base, own_weights=True).float()
    model.config._attn_implementation = "sdpa"
    functions = {name: function for name in (_CONVOLUTION, _DELTA_RULE) if (function := _stock_function(model, name))}
    with_functions(model, functions)
    return model


def fused_loss(device: torch.device) -> tuple[str, LossOfHidden]:
    """``(name, loss)``: Liger's fused linear cross-entropy, or on the CPU cross-entropy over whole logits."""
    if device.type != "cuda":
        return "F.cross_entropy over whole logits", _plain_loss
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    liger: Any = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="mean")
    return "Liger's fused linear cross-entropy", lambda hidden, weight, targets: liger(weight, hidden, targets)


def _plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets, ignore_index=-100)


def _attend_by_documents(model: Any) -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if _ATTENTION not in AttentionInterface().valid_keys():
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
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(-1, 0), **grouped)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


@functools.cache
def _takes_enable_gqa() -> bool:
    import inspect

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

    out, _ = causal_conv1d(
        hidden_states.transpose(1, 2), weight, bias, activation=activation, cu_seqlens=cu_seq_lens_q, backend="triton"
    )
    assert isinstance(out, Tensor)
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


def _stock_function(model: nn.Module, name: str) -> Callable[..., Any] | None:
    """transformers' own torch implementation behind a name that the modules' file may have given to a library."""
    for module in model.modules():
        function = _globals_of(module).get(name)
        if function is not None:
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            found: Callable[..., Any] = function
            return found
    return None


def _globals_of(module: nn.Module) -> dict[str, Any]:
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    scope: dict[str, Any] = getattr(forward, "__globals__", {})
    return scope


def _spans(cu_seqlens: Tensor | None, tokens: int) -> Iterator[slice]:
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        if end > start:
            yield slice(start, end)


@contextmanager
def _unchanged_file(stock: type[nn.Module]) -> Iterator[None]:
    """Puts back what a patch changes in the file a class comes from: models made later are stock again."""
    import sys

    file = sys.modules[stock.__module__]
    before = dict(vars(file))
    forward = stock.forward
    try:
        yield
    finally:
        stock.forward = forward
        for name, value in before.items():
            if vars(file).get(name) is not value:
                setattr(file, name, value)


def _version(name: str) -> str:
    from importlib import metadata

    return metadata.version(name)
