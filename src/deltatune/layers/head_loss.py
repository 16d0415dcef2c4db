"""The loss of a head whose weights are gathered for a call alone: the loss is that call."""

from __future__ import annotations

from types import MethodType
from typing import Any, Final

from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from deltatune import ops
from deltatune.hf.peft import trained_copy

__all__ = ["own_loss", "with_loss_of_its_own"]

_NAME: Final = "_deltatune_loss"


def with_loss_of_its_own(head: FSDPModule) -> None:
    """Gives a sharded linear head a method that is its loss, around which it is gathered as around its forward."""
    module: Any = head
    setattr(module, _NAME, MethodType(_loss, module))
    register_fsdp_forward_method(module, _NAME)


def own_loss(head: Any, hidden: Tensor, targets: Tensor, **options: Any) -> Tensor | None:
    """``linear_cross_entropy`` of hidden states ``[N, E]`` by that method; None for a head without it."""
    method = getattr(head, _NAME, None)
    return None if method is None else method(hidden, targets, **options)


def _loss(head: Any, hidden: Tensor, targets: Tensor, **options: Any) -> Tensor:
    weight: Any = trained_copy(head).weight
    return ops.linear_cross_entropy(hidden, weight, targets, **options)
