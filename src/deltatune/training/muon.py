"""Muon for matrices and AdamW for everything else, as one optimizer with one state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MATRICES", "MuonWithAdamW"]

MATRICES = "matrices"
"""The key of a parameter group that says whether its parameters are stepped by Muon."""


class MuonWithAdamW(Optimizer):
    """``torch.optim.Muon`` steps the groups that say ``matrices: True``, ``torch.optim.AdamW`` the others.

    A matrix ``W [A, B]`` moves by ``0.2 sqrt(max(A, B)) lr O`` along the orthogonalised momentum ``O``, which makes a
    step's root mean square that of AdamW's, so that one learning rate and one weight decay fit both (Moonshot's
    scaling, ``adjust_lr_fn="match_rms_adamw"``).

    Args:
        params: groups with the key ``matrices``; the learning rate and weight decay of each are its own.
        lr: of groups that have none.
        betas, eps: AdamW's.

    Raises:
        ValueError: no group of matrices, or one with a parameter of other than two dimensions.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        groups = list(params)
        matrices = [group for group in groups if group[MATRICES]]
        others = [group for group in groups if not group[MATRICES]]
        if not matrices:
            raise ValueError("Muon steps matrices of hidden layers, and none of them trains; take another optimizer")
        self._parts: list[Optimizer] = [Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
        if others:
            self._parts.append(AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True))
        self._sizes = [len(part.param_groups) for part in self._parts]
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Groups and state are the same objects here and in both parts: schedules and checkpoints see one optimizer."""
        begin = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.state = self.state
            part.param_groups = self.param_groups[begin : begin + size]
            begin += size

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss
