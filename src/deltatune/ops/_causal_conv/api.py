"""The short causal convolution of Gated DeltaNet layers, restarted at every document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack, overload

import torch
from torch import Tensor

from deltatune.ops._causal_conv import op, reference
from deltatune.ops._causal_conv.providers import CausalConvSpec
from deltatune.ops._numerics import most_demanding
from deltatune.ops._registry import choose
from deltatune.ops._validation import check_floating, check_same_device, check_sequences, check_tensors, num_sequences
from deltatune.packing.sequences import Sequences

__all__ = ["causal_conv"]

_FUSED_HEADS = (32, 64, 128, 256)  # a head is a block of channels of one program


class _Options(TypedDict, total=False):
    activation: str | None
    sequences: Sequences | None
    left: Tensor | None
    impl: str


class _PartsOptions(_Options, total=False):
    l2norm: Sequence[int] | None


@overload
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, split: None = None, **options: Unpack[_Options]
) -> Tensor: ...


@overload
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, split: Sequence[int], **options: Unpack[_PartsOptions]
) -> tuple[Tensor, ...]: ...


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    sequences: Sequences | None = None,
    left: Tensor | None = None,
    split: Sequence[int] | None = None,
    l2norm: Sequence[int] | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Depthwise causal convolution that never reads across a document boundary.

    ``y_t = act(bias + sum_j weight[:, W-1-j] * x_{t-j})``, over the ``0 <= j < W`` with ``x_{t-j}`` in t's document
    (zeros before it begins): each document as ``torch.nn.Conv1d`` sees it alone, left-padded by ``W - 1``.

    Args:
        x: ``[B, T, D]``, any strides; a view whose channels lie side by side, such as a slice of a projection, is read
            in place.
        weight: ``[D, W]``; ``weight[:, -1]`` multiplies the token itself (``Conv1d.weight.squeeze(1)``).
        bias: ``[D]`` or None.
        activation: ``"silu"`` or None.
        sequences: documents of the flattened ``[B*T]`` stream; None makes each row one document.
        left: ``[S, W - 1, D]``, the inputs that stand before each of the S sequences, the nearest last; zeros if None.
            S is the number of sequences: ``sequences.num_sequences``, or B. It has a gradient.
        split: widths that sum to D. The output comes in that many tensors, each contiguous, and their gradients are
            read where they are: neither direction splits, copies or concatenates.
        l2norm: for each part of ``split`` the width of the heads to normalise, ``y * rsqrt(sum(y^2) + 1e-6)`` over
            every head; 0 leaves a part as it is. None normalises nothing.
        impl: ``"triton"``: one kernel for forward and one for backward, on NVIDIA GPUs, for bf16, fp16 or fp32 and
            widths up to 8, without ``left``. ``"reference"``: plain torch, anywhere. ``"auto"``: the first of these
            that can run.

    Returns:
        ``[B, T, D]``, or with ``split`` a tuple of contiguous ``[B, T, split[i]]``, in ``x.dtype``: accumulated,
        activated and normalised in fp32 (fp64 for fp64 input) and rounded once. (On Triton, heads other than 32, 64,
        128 or 256 wide, or of several widths, are normalised after the rounding.) The gradient of a document's output
        with respect to another document's input is exactly zero, and no value of a document reaches another, NaN and
        infinity included. Gradients of weight and bias are sums in fp32, the same bits every time; one that is frozen
        costs nothing. The kernel saves its inputs alone and cannot be differentiated twice (RuntimeError).

    Raises:
        ValueError: shapes, widths or heads that do not fit, an activation that is not supported, an implementation
            that cannot run.

    Examples:
        >>> x, weight = torch.randn(1, 12, 8), torch.randn(8, 4)
        >>> whole = causal_conv(x, weight, sequences=Sequences.from_lengths([5, 7]))

        The second document in two pieces, the second of which begins behind the last three inputs of the first:

        >>> first = causal_conv(x[:, 5:9], weight)
        >>> second = causal_conv(x[:, 9:], weight, left=x[:, 6:9])
        >>> torch.allclose(torch.cat([first, second], 1), whole[:, 5:], atol=1e-6)
        True

    Source: the convolution of Gated Delta Networks (arXiv 2412.06464), as ``causal_conv1d_fn`` with ``seq_idx``.
    """
    _check(x, weight, bias, activation, sequences, left)
    sizes = [x.shape[-1]] if split is None else list(split)
    heads = [0] * len(sizes) if l2norm is None else list(l2norm)
    _check_parts(x.shape[-1], split, sizes, l2norm, heads)
    spec = CausalConvSpec(x.device, most_demanding(x.dtype, weight.dtype), weight.shape[1], left is not None)
    choice = choose(spec, impl)
    if sequences is None:
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.int32).repeat(x.shape[0])
    else:
        positions = sequences.positions
    if choice.impl == "reference":
        before = None if left is None or left.shape[1] == 0 else (left, _sequence_of_tokens(x, sequences).long())
        parts = reference.causal_conv(x, weight, bias, activation, positions, sizes, heads, before)
    else:
        fused = heads if _can_fuse(heads) else [0] * len(heads)
        parts = tuple(op.causal_conv(x, weight, bias, positions, sizes, fused, activation == "silu"))
        if fused != heads:
            parts = tuple(reference.normalise(part, head) for part, head in zip(parts, heads, strict=True))
    return parts[0] if split is None else parts


def _can_fuse(heads: Sequence[int]) -> bool:
    """The kernel has one block size for all parts; a part that is not normalised takes any."""
    widths = {head for head in heads if head}
    return not widths or (len(widths) == 1 and widths.issubset(_FUSED_HEADS))


def _sequence_of_tokens(x: Tensor, sequences: Sequences | None) -> Tensor:
    """The number of the sequence that each token of the stream is in."""
    tokens = torch.arange(x.shape[0] * x.shape[1], device=x.device, dtype=torch.int32)
    if sequences is None:
        return tokens // max(x.shape[1], 1)
    return torch.searchsorted(sequences.cu_seqlens, tokens, right=True) - 1


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    sequences: Sequences | None,
    left: Tensor | None,
) -> None:
    op = "causal_conv"
    check_tensors(op, x=(x, "B T D"), weight=(weight, "D W"), bias=(bias, "D"))
    check_sequences(op, sequences, x)
    if left is not None:
        check_floating(op, left=left)
        check_same_device(op, x=x, left=left)
        expected = [num_sequences(sequences, x), weight.shape[1] - 1, x.shape[-1]]
        if list(left.shape) != expected:
            raise ValueError(
                f"{op}: left must be [number of sequences, W - 1, D] = {expected}, got {list(left.shape)}; a sequence "
                "with nothing before it has zeros there"
            )
    if activation not in ("silu", None):
        raise ValueError(f"{op}: activation={activation!r} is not supported; expected one of 'silu', None")


def _check_parts(
    channels: int, split: Sequence[int] | None, sizes: list[int], l2norm: Sequence[int] | None, heads: list[int]
) -> None:
    if split is None and l2norm is not None:
        raise ValueError("causal_conv: l2norm names a head width for each part of split; pass split too")
    if not sizes or min(sizes) < 0 or sum(sizes) != channels:
        raise ValueError(f"causal_conv: split must hold widths that sum to D={channels}, got {sizes}")
    if len(heads) != len(sizes):
        raise ValueError(
            f"causal_conv: l2norm must hold one head width, or 0, for each of the {len(sizes)} parts, got {heads}"
        )
    for size, head in zip(sizes, heads, strict=True):
        if head < 0 or (head and size % head):
            raise ValueError(f"causal_conv: heads of l2norm={heads} must divide the parts of split={sizes}")
