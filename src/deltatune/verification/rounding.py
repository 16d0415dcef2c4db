"""What rounding alone does to a run: every operand of every operation is changed by about its last place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["limits_of"]

#: A run, and figures of one against another.
Run = Callable[[], Any]
Differ = Callable[[Any, Any], Sequence[float]]

#: What is measured is one draw, and a long sum rounds by more than its operands' last place: packed and alone differed
#: by 4.7 times the measure in the input gradient of a head with 262,145 tokens (Gemma 3 of width 16, float32, CPU).
_MARGIN: Final = 16.0

#: None for operands of fewer bits than their sums: each is changed by twice what rounding changes.
_MARGIN_OF_NARROW: Final = 1.0

#: Without a margin one draw may be a small one, where a token goes to another expert above all: the largest of several.
_DRAWS_OF_NARROW: Final = 4

#: Last place of what products of float32 round their operands to, by torch's precision of matrix products.
_OF_PRODUCTS: Final = {"highest": torch.finfo(torch.float32).eps, "high": 2.0**-10, "medium": 2.0**-7}

#: No rounding raises a limit above these: outputs that differ by a quarter are no longer the same function, and a
#: tolerance that was given keeps a meaning.
_MOST: Final = 0.25
_TIMES_TOLERANCE: Final = 1e4

_ROUNDED: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def limits_of(
    figures: Sequence[float], tolerance: float, run: Run, differ: Differ, ours: Any = None, *, tf32: bool = False
) -> tuple[float, ...]:
    """Of each figure: the tolerance, or more where figures exceed it and rounding alone differs by that order.

    A sum taken in another order is the sum of operands that are off by about their last place, so the difference that
    this makes is the one that another arrangement of the same numbers can make, amplified as the model amplifies it.

    ``run`` runs as it is, and again with ``x (1 + eps s)``, s = +1 or -1 at random, in place of every floating operand
    x, in forward and in backward; of operands of few bits several times, while figures exceed the largest difference.
    ``differ`` gives the same figures of two runs. ``ours``: what ``run`` gave, if known.
    ``tf32``: whether it may run products of float32 in TF32, whatever precision torch is set to.
    """
    if not any(figure > tolerance for figure in figures):
        return (tolerance,) * len(figures)
    ours = run() if ours is None else ours
    nudged = _Nudged(_OF_PRODUCTS["high" if tf32 else torch.get_float32_matmul_precision()])
    most = min(_MOST, _TIMES_TOLERANCE * tolerance)
    limits = (tolerance,) * len(figures)
    for _ in range(_DRAWS_OF_NARROW):
        with nudged:
            other = run()
        margin = _MARGIN_OF_NARROW if nudged.narrow else _MARGIN
        limits = tuple(max(limit, min(margin * m, most)) for limit, m in zip(limits, differ(other, ours), strict=True))
        if not nudged.narrow or all(figure <= limit for figure, limit in zip(figures, limits, strict=True)):
            break
    return limits


class _Nudged(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Changes operands; ``narrow`` says whether any was changed by more than what its sums round to."""

    def __init__(self, eps_of_float32: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = {dtype: torch.finfo(dtype).eps for dtype in _ROUNDED} | {torch.float32: eps_of_float32}
        self.narrow = False
        self.seeds = itertools.count()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation on nudged operands; views and writes in place pass as they are."""
        if not getattr(func, "is_view", True) and not func._schema.is_mutable:
            args = self._nudge(args)
        return func(*args, **(kwargs or {}))

    def _nudge(self, x: Any) -> Any:
        if isinstance(x, tuple | list):
            return [self._nudge(each) for each in x]
        # whole numbers are counts, numbers of experts and masks, which no arrangement rounds
        if not isinstance(x, Tensor) or x.dtype not in _ROUNDED or not x.numel() or torch.equal(x, x.round()):
            return x
        eps = self.eps[x.dtype]
        self.narrow |= eps > _OF_PRODUCTS["highest"]
        generator = torch.Generator(x.device).manual_seed(next(self.seeds))
        factor = torch.randint(0, 2, x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return x * factor.mul_(2 * eps).add_(1 - eps)
