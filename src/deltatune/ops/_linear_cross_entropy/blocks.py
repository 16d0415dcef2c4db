"""How much is held at once by the implementation in blocks: chunks of tokens by blocks of the vocabulary."""

# S tokens, V vocabulary, E width of hidden, C tokens of a chunk, N entries of a vocabulary block

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["Blocks", "slices", "softmax_blocks", "weight_blocks", "workspace_bytes"]

# Forward and backward on one H200 (torch 2.11, Triton 3.6, bf16, 16384 tokens, vocabulary 248320, frozen weight): ms,
# and peak MiB with inputs. Width 2048: 2048 x 4096 57.7, 1131; x 8192 54.1, 1147; x 12544 52.4, 1164; x 16896 52.0,
# 1181; 1024 x 16384 55.9, 1139; 4096 x 8192 53.5, 1195; 8192 x 4224 58.0, 1230. Width 4096: 2048 x 4096 107.0, 2245;
# x 8192 105.1, 2261; x 16896 101.3, 2295; 4096 x 8192 107.0, 2325. The least memory of all measured is that of
# cut-cross-entropy, 1099 and 2197 (in 145 and 287 ms): 4 E entries are the fastest within 5% of it at both widths.
# Below width 2048 blocks that small are done before the host has launched the next. Width 1024, ms and peak MiB beyond
# the inputs' 517: 2048 x 4096 62.7, 57; x 8192 31.7, 73, which is 7% above the least there; 4096 x 8192 28.0, 113.
_TOKENS: Final = 2048
_ENTRIES_PER_WIDTH: Final = 4
_FEWEST_ENTRIES: Final = 8192
# The same with a trained weight at widths 2048 and 4096: 4096 x 2048 110.9 to 113.6, 2164 and 218.6 to 220.3, 4312;
# 8192 x 2048 109.4, 2180 and 214.3, 4328; 8192 x 1024 113.0, 2156; 2048 x 4096 113.8, 2180 and 223.4, 4344.
# Cut-cross-entropy: 254, 2069 and 529, 4137.
_WEIGHT_TOKENS: Final = 4096
_WEIGHT_ENTRIES: Final = 2048
_ROW_TILE: Final = 128
_ENTRY_TILE: Final = 256


class Blocks(NamedTuple):
    """C and N."""

    tokens: int
    entries: int


def softmax_blocks(tokens: int, width: int, vocabulary: int) -> Blocks:
    """Of the loss and the gradient of ``hidden``; sums over a row of blocks take ``C E`` fp32 numbers more."""
    return _blocks(tokens, vocabulary, Blocks(_TOKENS, max(_ENTRIES_PER_WIDTH * width, _FEWEST_ENTRIES)))


def weight_blocks(tokens: int, vocabulary: int) -> Blocks:
    """Of the gradient of ``weight``; sums over a column of blocks take ``N E`` fp32 numbers more."""
    return _blocks(tokens, vocabulary, Blocks(_WEIGHT_TOKENS, _WEIGHT_ENTRIES))


def workspace_bytes(tokens: int, width: int, vocabulary: int, itemsize: int, *, weight_grad: bool) -> int:
    """The most bytes held besides inputs, loss and gradients, but for a few numbers a token.

    A block of exponentials in the dtype of the inputs and fp32 sums of products. Under a trained weight the larger of
    both passes; the second also holds ``hidden`` with its ignored tokens zeroed.
    """
    chunk, block = softmax_blocks(tokens, width, vocabulary)
    first = itemsize * chunk * block + 4 * chunk * width
    chunk, block = weight_blocks(tokens, vocabulary)
    second = itemsize * (chunk * block + tokens * width) + 4 * block * width
    return max(first, second if weight_grad else 0)


def _blocks(tokens: int, vocabulary: int, most: Blocks) -> Blocks:
    """Even parts of both, in whole tiles; few tokens make room for more entries."""
    chunk = _even_part(tokens, most.tokens, _ROW_TILE)
    return Blocks(chunk, _even_part(vocabulary, most.tokens * most.entries // chunk, _ENTRY_TILE))


def _even_part(total: int, most: int, tile: int) -> int:
    parts = max(-(-total // max(most, tile)), 1)
    return max(-(-total // (parts * tile)), 1) * tile


def slices(total: int, size: int) -> Iterator[slice]:
    """Of ``size`` each, the last one shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
