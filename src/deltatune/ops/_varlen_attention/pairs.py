"""Which queries meet which keys, as the op hands it to its implementations, and how many pairs that makes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Pairs"]


class Pairs(NamedTuple):
    """The pairs of a query and a key that are scored, and the scale of their products.

    Attributes:
        cu_seqlens: cumulative lengths of the queries' sequences.
        cu_seqlens_cpu: the same on the CPU.
        kv_cu_seqlens_cpu: those of the keys, whose sequence n meets sequence n of the queries; None: the same.
        scale: of ``q . k``.
        window: how many keys a query sees, itself included; None is all.
    """

    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    kv_cu_seqlens_cpu: Tensor | None
    scale: float
    window: int | None

    @property
    def keys(self) -> Tensor:
        """Cumulative lengths of the keys' sequences, on the CPU."""
        return self.cu_seqlens_cpu if self.kv_cu_seqlens_cpu is None else self.kv_cu_seqlens_cpu

    def visible(self, queries: int, keys: int) -> int:
        """How many: exact from real boundaries; while tracing, where only totals are known, those of one document."""
        if any(isinstance(x, FakeTensor) or x.is_meta for x in (self.cu_seqlens_cpu, self.keys)):
            lengths, key_lengths = torch.tensor([[queries], [keys]], device="cpu")
        else:
            lengths, key_lengths = self.cu_seqlens_cpu.diff().long(), self.keys.diff().long()
        shared = min(lengths.numel(), key_lengths.numel())  # what is longer ends in empty sequences
        lengths, key_lengths = lengths[:shared], key_lengths[:shared]
        # queries see one key more each, up to all keys of the last one
        seen = self._triangle(key_lengths) - self._triangle(key_lengths - lengths)
        return int(seen[lengths > 0].sum())

    def _triangle(self, keys: Tensor) -> Tensor:
        """Pairs of as many queries as keys: 1 + 2 + ... keys, each at most the window."""
        keys = keys.clamp(min=0)
        grown = keys if self.window is None else keys.clamp(max=self.window)
        return grown * (grown + 1) // 2 + (keys - grown) * grown
