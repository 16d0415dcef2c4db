"""Launches of the kernels on the parts of an output. Imported only where they run."""

# B batch, T tokens, N = B T tokens of the stream, D channels, W width

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._causal_conv import kernel

__all__ = ["backward", "forward"]


class _Tile(NamedTuple):
    rows: int  # tokens of a program
    unroll: int  # tokens loaded together
    registers: int | None = None  # of a thread at most: more programs at a time


# Timed at [16384, 6144] bf16, W = 4, in three parts, on an H200 that copied at 4.1 TB/s. One warp on 128 channels, four
# a thread: no form with more warps or wider loads was faster. Forward 110 us, 89% of that copy; with heads 121, and 136
# without the limit on registers. Backward 162 us, 91%, and with heads 194; 13% and 8% slower with every window tested.
_BLOCK = 128
_FORWARD = _Tile(rows=64, unroll=8)
_FORWARD_HEADS = _Tile(rows=64, unroll=8, registers=64)
_BACKWARD = _Tile(rows=64, unroll=4)
_BACKWARD_HEADS = _Tile(rows=128, unroll=4, registers=112)
# Longer: a program writes its sums once. The limit costs 16 bytes of spills at most, and none would cost a third of the
# programs at a time.
_WEIGHT_GRAD = _Tile(rows=128, unroll=4, registers=168)
_LIMITED_WIDTH = 4  # the limits are for windows up to this, in 16 bits, on blocks of 128


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    split: Sequence[int],
    l2norm: Sequence[int],
    silu: bool,
) -> list[Tensor]:
    """The parts of the output, each contiguous ``[B, T, split[i]]``; see ``deltatune.ops.causal_conv``."""
    stream, parts = _stream(x), _Parts.of(tuple(split), tuple(l2norm))
    outs = [x.new_empty(*x.shape[:-1], size) for size in split]
    parts.launch(
        kernel.forward_kernel,
        _FORWARD_HEADS if any(l2norm) else _FORWARD,
        *(stream, weight.contiguous(), bias, positions, tuple(outs)),
        width=weight.shape[1],
        options=(silu,),
    )
    return outs


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    split: Sequence[int],
    l2norm: Sequence[int],
    silu: bool,
    *,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dx`` contiguous and, where wanted, ``dweight`` and ``dbias``, from the gradients of the parts."""
    stream, parts, width = _stream(x), _Parts.of(tuple(split), tuple(l2norm)), weight.shape[1]
    planes = width * weight_grad + bias_grad
    tile = _WEIGHT_GRAD if planes else _BACKWARD_HEADS if any(l2norm) else _BACKWARD
    # a gradient that is missing is one row of zeros, read again for every token
    given = [
        x.new_zeros(size).expand(len(stream), size) if grad is None else _stream(grad.to(x.dtype))
        for grad, size in zip(grads, split, strict=True)
    ]
    dx = x.new_empty(x.shape)
    sums = x.new_empty(-(-len(stream) // tile.rows), planes, x.shape[-1], dtype=torch.float32) if planes else None
    parts.launch(
        kernel.backward_kernel,
        tile,
        *(stream, weight.contiguous(), bias, positions, tuple(given), tuple(y.stride(0) for y in given), dx, sums),
        width=width,
        options=(silu, weight_grad, bias_grad),
    )
    if sums is None:
        return dx, None, None
    totals = sums.sum(0)  # in a fixed order, as each program added its own: the same bits every time
    return (
        dx,
        totals[:width].T.to(weight.dtype).contiguous() if weight_grad else None,
        totals[-1].to(bias.dtype, copy=True) if bias is not None and bias_grad else None,
    )


class _Parts(NamedTuple):
    """Where each output begins in the channels of x, its width, its first block, and whether heads are normalised."""

    begins: tuple[int, ...]
    sizes: tuple[int, ...]
    firsts: tuple[int, ...]
    norms: tuple[bool, ...] | None
    num_blocks: int
    block: int

    @staticmethod
    @functools.cache
    def of(split: tuple[int, ...], l2norm: tuple[int, ...]) -> _Parts:
        block = max(l2norm) or _BLOCK
        firsts = list(itertools.accumulate((-(-size // block) for size in split), initial=0))
        begins = tuple(itertools.accumulate(split[:-1], initial=0))
        norms = tuple(head > 0 for head in l2norm) if any(l2norm) else None
        return _Parts(begins, split, tuple(firsts[:-1]), norms, firsts[-1], block)

    def launch(
        self, function: Any, tile: _Tile, stream: Tensor, *args: object, width: int, options: tuple[bool, ...]
    ) -> None:
        """Runs ``function`` on every block of channels and every ``tile.rows`` tokens."""
        programs = -(-len(stream) // tile.rows)
        if not programs or not self.num_blocks:
            return
        usual = self.block == _BLOCK and stream.element_size() == 2 and width <= _LIMITED_WIDTH
        limit = {"maxnreg": tile.registers} if usual and tile.registers is not None else {}
        with torch.cuda.device(stream.get_device()):
            function[(self.num_blocks * programs,)](
                *(stream, stream.stride(0), len(stream), *args, *self[:4]),
                *(width, 1 << (width - 1).bit_length(), *options),
                *(tile.rows, tile.unroll, self.block, self.num_blocks),
                num_warps=max(1, self.block // 256),
                **limit,
            )


def _stream(x: Tensor) -> Tensor:
    """``[B, T, D]`` to ``[N, D]`` with channels side by side: a view wherever the rows are evenly spaced."""
    stream = x.flatten(0, 1)
    return stream if stream.stride(-1) == 1 else stream.contiguous()
