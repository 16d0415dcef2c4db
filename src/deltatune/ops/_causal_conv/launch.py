"""How the kernels are laid over the tokens and the parts of an output."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["BACKWARD", "BACKWARD_HEADS", "FORWARD", "FORWARD_HEADS", "WEIGHT_GRAD", "Parts", "Tile"]


class Tile(NamedTuple):
    """What a program computes, and with what."""

    rows: int  # tokens of a program
    unroll: int  # tokens loaded together
    registers: int | None = None  # of a thread at most: more programs at a time


# Timed at [16384, 6144] bf16, W = 4, in three parts, on an H200 that copied at 4.1 TB/s. One warp on 128 channels, four
# a thread: no form with more warps or wider loads was faster. Forward 110 us, 89% of that copy; with heads 121, and 136
# without the limit on registers. Backward 162 us, 91%, and with heads 194; 13% and 8% slower with every window tested.
_BLOCK = 128
FORWARD = Tile(rows=64, unroll=8)
FORWARD_HEADS = Tile(rows=64, unroll=8, registers=64)
BACKWARD = Tile(rows=64, unroll=4)
BACKWARD_HEADS = Tile(rows=128, unroll=4, registers=112)
# Longer: a program writes its sums once. The limit costs 16 bytes of spills at most, and none would cost a third of the
# programs at a time.
WEIGHT_GRAD = Tile(rows=128, unroll=4, registers=168)
_LIMITED_WIDTH = 4  # the limits are for windows up to this, in 16 bits, on blocks of 128


class Parts(NamedTuple):
    """Where each output begins in the channels of x, its width, its first block, and whether heads are normalised."""

    begins: tuple[int, ...]
    sizes: tuple[int, ...]
    firsts: tuple[int, ...]
    norms: tuple[bool, ...] | None
    num_blocks: int
    block: int

    @staticmethod
    @functools.cache
    def of(split: tuple[int, ...], l2norm: tuple[int, ...]) -> Parts:
        block = max(l2norm) or _BLOCK
        firsts = list(itertools.accumulate((-(-size // block) for size in split), initial=0))
        begins = tuple(itertools.accumulate(split[:-1], initial=0))
        norms = tuple(head > 0 for head in l2norm) if any(l2norm) else None
        return Parts(begins, split, tuple(firsts[:-1]), norms, firsts[-1], block)

    def launch(
        self, function: Any, tile: Tile, stream: Tensor, weight: Tensor, *args: object, options: tuple[bool, ...]
    ) -> None:
        """Runs ``function`` on every block of channels and every ``tile.rows`` tokens of ``stream`` ``[N, D]``."""
        width = weight.shape[1]
        programs = -(-len(stream) // tile.rows)
        if not programs or not self.num_blocks:
            return
        usual = self.block == _BLOCK and stream.element_size() == 2 and width <= _LIMITED_WIDTH
        limit = {"maxnreg": tile.registers} if usual and tile.registers is not None else {}
        with torch.cuda.device(stream.get_device()):
            function[(self.num_blocks * programs,)](
                *(stream, stream.stride(0), len(stream), weight.contiguous(), *args, *self[:4]),
                *(width, 1 << (width - 1).bit_length(), *options),
                *(tile.rows, tile.unroll, self.block, self.num_blocks),
                num_warps=max(1, self.block // 256),
                **limit,
            )
