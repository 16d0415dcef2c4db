"""The ranks that hold one pack together, and the part of it that each has."""

# P ranks, T tokens of the pack, t = T / P tokens of a rank

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["SequenceGroup"]


@dataclass(frozen=True)
class SequenceGroup:
    """A process group whose ranks hold consecutive, equal parts of one pack.

    Attributes:
        name: of the process group, as ``torch.distributed`` knows it in this process.
        size: P, its number of ranks.
        rank: of this process in it; it holds tokens ``rank * t`` up to ``(rank + 1) * t``.
    """

    name: str
    size: int
    rank: int

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part ``[..., t]`` of something that a pack has for each token ``[..., T]``."""
        tokens = whole.shape[-1] // self.size
        return whole.narrow(-1, self.rank * tokens, tokens)
