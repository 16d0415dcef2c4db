"""Variable-length attention as an entry of transformers' attention interface, for families without own layers."""

# B rows, T tokens a row, N query heads, M key-value heads, D head dim

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltatune import ops
from deltatune.hf.cached import check_boundaries
from deltatune.packing.sequences import Sequences

__all__ = ["exchange_configs", "install", "is_prepared", "uninstall"]

#: A config's own implementation, by the name that takes its place: one for each, so that the config needs no key of
#: ours, and the same in every process. Transformers reads a package or a repository out of some names: not of these.
_STOCK: dict[str, str] = {}

_WINDOW = "_deltatune_window"
_IMPL = "_deltatune_impl"
_CONFIG = "_deltatune_config"


class _Noted(NamedTuple):
    """What ``prepare`` was asked for, and what the config named; where it is unpickled, our entry is known."""

    impl: str
    stock: str | None

    def __reduce__(self) -> Any:
        return _noted, tuple(self)


def _noted(impl: str, stock: str | None) -> _Noted:
    if stock is not None:
        _entry(stock)
    return _Noted(impl, stock)


def install(text_model: Any, impl: str) -> None:
    """Gives a text model our attention, by configs that name it: one for each that its modules hold.

    The entries are new names, and other models may share the stock configs: they never see them. Noted on every module
    is its other config (see ``exchange_configs``) and what ``packed_attention`` reads there: which implementation
    ``prepare`` was asked for, and, on attention modules, whether the config gives the layer a sliding window. Decided
    here and not there: a layer index read while tracing would be a graph for each layer.
    """
    named: dict[int, Any] = {}
    for module in text_model.modules():
        config: Any = getattr(module, "config", None)
        module.__dict__[_IMPL] = _noted(impl, getattr(config, "_attn_implementation", None))
        if hasattr(config, "_attn_implementation"):
            ours = named.setdefault(id(config), copy.copy(config))
            ours._attn_implementation_internal = _entry(config._attn_implementation)
            module.config, module.__dict__[_CONFIG] = ours, config
            if isinstance(getattr(module, "layer_idx", None), int):
                module.__dict__[_WINDOW] = _has_window(config, module.layer_idx)


def uninstall(text_model: Any) -> None:
    """Undoes ``install``."""
    exchange_configs(text_model)
    for module in text_model.modules():
        for name in (_CONFIG, _WINDOW, _IMPL):
            module.__dict__.pop(name, None)


def exchange_configs(text_model: Any) -> None:
    """Stock configs in place of those that name our attention, or back; nothing on a family with layers of its own."""
    for module in text_model.modules():
        if _CONFIG in module.__dict__:
            module.config, module.__dict__[_CONFIG] = module.__dict__[_CONFIG], module.config


def is_prepared(module: nn.Module) -> bool:
    """Whether a module's config names our attention, and its stock one what that stands for; or none names any."""
    own: dict[str, Any] = module.__dict__
    if not hasattr(own.get("config"), "_attn_implementation"):
        return True
    ours, stock = (getattr(config, "_attn_implementation", None) for config in (own["config"], own.get(_CONFIG)))
    return _IMPL in own and ours in _STOCK and _STOCK[ours] == stock


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sequences: Sequences | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``query [B, N, T, D]``, ``key``, ``value [B, M, T, D]`` -> ``[B, T, N, D]``.

    Raises:
        ValueError: dropout, soft-capped logits, attention sinks, attention that is not causal, a mask or a window that
            variable-length attention would drop, or layers that do not hand boundaries on.
    """
    whole = key.shape[2]
    check_boundaries(module, sequences)
    if sequences is None:
        extra = {} if sliding_window is None else {"sliding_window": sliding_window}
        output: tuple[Tensor, Tensor | None] = _stock_attention(module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra, **kwargs
        )
        return output
    unsupported = {
        "attention dropout": dropout,
        "soft-capped attention logits": kwargs.get("softcap"),
        "attention sinks": kwargs.get("s_aux") is not None,
        "attention that is not causal": kwargs.get("is_causal", getattr(module, "is_causal", True)) is False,
        "a mask of the model's own making": attention_mask is not None and attention_mask.shape[-1] == whole > 1,
        "a sliding window that only a mask expresses": sliding_window is None and getattr(module, _WINDOW, False),
    }
    for feature, present in unsupported.items():
        if present:
            raise ValueError(f"{feature} cannot be honoured on packed documents; {type(module).__name__} asks for it")
    out = ops.varlen_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        sequences=sequences,
        scale=scaling,
        window=sliding_window,
        impl=getattr(module, _IMPL).impl,
    )
    return out, None


def _entry(stock: str) -> str:
    """The name of ours that stands for a stock implementation, known to transformers."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    found = f"deltatune_varlen_{stock.encode().hex()}"
    _STOCK[found] = stock
    AttentionInterface.register(found, packed_attention)
    AttentionMaskInterface.register(found, _stock_mask)
    return found


def _stock_attention(module: Any) -> Callable[..., Any]:
    """What a module calls without us, by what its forward sees: a cached call has its weights, and its rounding."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = inspect.unwrap(type(module).forward).__globals__
    known, eager = seen.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS), seen.get("eager_attention_forward")
    found: Callable[..., Any] = known.get_interface(
        _STOCK[module.config._attn_implementation], eager or sdpa_attention_forward
    )
    return found


def _stock_mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    """The mask that ``_stock_attention`` reads; none for an implementation that came without a kind of mask."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    make = ALL_MASK_ATTENTION_FUNCTIONS.get(_STOCK[config._attn_implementation])
    return None if make is None else make(*args, config=config, **kwargs)


def _has_window(config: Any, index: int) -> bool:
    types = getattr(config, "layer_types", None)
    if types:
        return index < len(types) and bool(types[index] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None and bool(getattr(config, "use_sliding_window", True))
