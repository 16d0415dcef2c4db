"""The ranks that hold one pack together, and the part of it that each has."""

# P ranks, T tokens of the pack, t = T / P tokens of a rank

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltatune.packing.sequences import Sequences

__all__ = ["Recurrent", "SequenceGroup", "exchanging"]

#: What a recurrent layer sends to other ranks: tokens, for heads of its own, or its state.
Recurrent = Literal["heads", "state"]


@dataclass(frozen=True)
class SequenceGroup:
    """A process group whose ranks hold consecutive, equal parts of one pack.

    Attributes:
        name: of the process group, as ``torch.distributed`` knows it in this process.
        size: P, its number of ranks.
        rank: of this process in it; it holds tokens ``rank * t`` up to ``(rank + 1) * t``.
        recurrent: ``"heads"``: in a recurrent layer a rank computes its heads for all tokens, as in attention;
            ``"state"``: all heads for its tokens, from the state that the ranks before it left.
    """

    name: str
    size: int
    rank: int
    recurrent: Recurrent = "heads"

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part ``[..., t]`` of something that a pack has for each token ``[..., T]``."""
        tokens = whole.shape[-1] // self.size
        return whole.narrow(-1, self.rank * tokens, tokens)

    def holds_whole(self, whole: Sequences) -> bool:
        """Whether every document of a pack, padding too, lies on one rank; of the CPU's boundaries, so all agree."""
        first = torch.arange(1, self.size, device="cpu") * (whole.total // self.size)
        return bool(torch.isin(first, whole.cu_seqlens_cpu[: whole.num_sequences + 1]).all())

    def part(self, whole: Sequences) -> Sequences:
        """The documents of a pack as this rank's tokens hold them ``[t]``: those it has a part of, cut to that part."""
        tokens = whole.total // self.size
        ends = torch.unique_consecutive((whole.cu_seqlens_cpu - self.rank * tokens).clamp(0, tokens))
        return Sequences.from_cu_seqlens(ends).to(whole.cu_seqlens.device, non_blocking=True)


def exchanging(group: SequenceGroup | None, sequences: Sequences, tokens: int) -> SequenceGroup | None:
    """The ranks that exchange in a layer's call of so many tokens: none where its boundaries are those of these alone.

    By shapes, so that a compiled layer has one graph for either.
    """
    return None if group is None or sequences.total == tokens else group
