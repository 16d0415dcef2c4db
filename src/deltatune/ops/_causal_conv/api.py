"""The short causal convolution of Gated DeltaNet layers, restarted at every document."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.ops._causal_conv import reference
from deltatune.ops._choice import Choice, choose, traced_reference
from deltatune.ops._validation import bind_shapes, check_floating, check_same_device, check_sequences
from deltatune.sequences import Sequences

__all__ = ["ACTIVATIONS", "causal_conv", "choose_causal_conv"]

ACTIVATIONS: tuple[str | None, ...] = ("silu", None)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    sequences: Sequences | None = None,
    impl: str = "auto",
) -> Tensor:
    """Depthwise causal convolution that never reads across a document boundary.

    ``y_t = act(bias + sum_j weight[:, W-1-j] * x_{t-j})``, over the ``0 <= j < W`` with ``x_{t-j}`` in t's document
    (zeros before it begins): each document as ``torch.nn.Conv1d`` sees it alone, left-padded by ``W - 1``.

    Args:
        x: ``[B, T, D]``, any strides.
        weight: ``[D, W]``; ``weight[:, -1]`` multiplies the token itself (``Conv1d.weight.squeeze(1)``).
        bias: ``[D]`` or None.
        activation: ``"silu"`` or None.
        sequences: documents of the flattened ``[B*T]`` stream; None makes each row one document.
        impl: ``"auto"`` or ``"reference"``.

    Returns:
        ``[B, T, D]`` in ``x.dtype``, accumulated and activated in fp32 (fp64 for fp64 input) and rounded once. The
        gradient of a document's output with respect to another document's input is exactly zero.

    Raises:
        ValueError: shapes that do not fit, an activation that is not supported, an implementation that cannot run.

    Source: the convolution of Gated Delta Networks (arXiv 2412.06464), as ``causal_conv1d_fn`` with ``seq_idx``.
    """
    _check(x, weight, bias, activation, sequences)
    choose_causal_conv(x.device, x.dtype, impl=impl)
    if sequences is None:
        positions = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0])
    else:
        positions = sequences.positions
    return reference.causal_conv(x, weight, bias, activation, positions)


def choose_causal_conv(device: torch.device, dtype: torch.dtype, *, impl: str = "auto") -> Choice:
    """Which implementation of ``causal_conv`` runs, and why."""
    return choose("causal_conv", impl, [traced_reference(device, dtype)])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, sequences: Sequences | None) -> None:
    op = "causal_conv"
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    patterns = {"x": "B T D", "weight": "D W", "bias": "D"}
    bind_shapes(op, **{name: (tensor, patterns[name]) for name, tensor in tensors.items()})
    check_floating(op, **tensors)
    check_same_device(op, **tensors)
    check_sequences(op, sequences, x)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation={activation!r} is not supported; expected one of {', '.join(map(repr, ACTIVATIONS))}"
        )
