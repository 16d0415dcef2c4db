"""Checks of an op's inputs; every message restates the expected shapes and what came.

All of them read shapes and dtypes only, never values: they run while a graph is traced and leave nothing in it.
"""

from __future__ import annotations

from torch import Tensor

from deltatune.packing.sequences import Sequences

__all__ = ["bind_shapes", "check_floating", "check_same_device", "check_sequences", "check_tensors", "num_sequences"]


def bind_shapes(op: str, **tensors: tuple[Tensor, str]) -> dict[str, int]:
    """Binds the letters of patterns such as ``q=(q, "B T H K")`` to sizes, in the order given.

    A 1 in a pattern asks for that very size.

    Raises:
        ValueError: a tensor whose rank or size does not fit, with all the patterns and all the shapes.
    """
    sizes = {"1": 1}
    for name, (tensor, pattern) in tensors.items():
        letters = pattern.split()
        if tensor.ndim != len(letters):
            raise ValueError(f"{op}: {name} must have {len(letters)} dims; {_expected_and_got(tensors)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{op}: {name} has {letter}={size} where {sizes[letter]} is expected; {_expected_and_got(tensors)}"
                )
    return sizes


def _expected_and_got(tensors: dict[str, tuple[Tensor, str]]) -> str:
    expected = ", ".join(f"{name} [{pattern.replace(' ', ', ')}]" for name, (_, pattern) in tensors.items())
    got = ", ".join(f"{name} {list(tensor.shape)}" for name, (tensor, _) in tensors.items())
    return f"expected {expected}; got {got}"


def check_tensors(op: str, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """``bind_shapes`` of those that are not None, all of them floating point and on the first one's device."""
    given = {name: (tensor, pattern) for name, (tensor, pattern) in tensors.items() if tensor is not None}
    sizes = bind_shapes(op, **given)
    alone = {name: tensor for name, (tensor, _) in given.items()}
    check_floating(op, **alone)
    check_same_device(op, **alone)
    return sizes


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raises ValueError for a tensor that is not floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Raises ValueError unless all the tensors are on the first one's device."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.device != tensors[first].device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {first} is on {tensors[first].device}; move them to one device"
            )


def check_sequences(op: str, sequences: Sequences | None, like: Tensor) -> None:
    """Raises ValueError unless ``sequences`` describes the flattened tokens of ``like`` ``[B, T, ...]``, where it is.

    Reads the length of ``sequences.positions``, never one of the description's integers: those change from batch to
    batch, and a traced graph must not depend on them.
    """
    if sequences is None:
        return
    batch, tokens = like.shape[:2]
    described = sequences.positions.shape[0]
    if described != batch * tokens:
        raise ValueError(
            f"{op}: sequences describe {described} tokens but the input holds B*T = {batch}*{tokens} = "
            f"{batch * tokens}; describe the flattened [B*T] stream, padding as a document of its own"
        )
    if sequences.positions.device != like.device:
        raise ValueError(
            f"{op}: sequences are on {sequences.positions.device} but the input is on {like.device}; "
            f"pass sequences.to({str(like.device)!r})"
        )


def num_sequences(sequences: Sequences | None, like: Tensor) -> int:
    """The number of sequences that a state has an entry for: ``sequences.num_sequences``, or the rows of ``like``.

    An integer of the description, so only ops that are given or asked for a state read it: in a graph every other
    number is another graph, but for ``Sequences.static()``, whose number is its capacity.
    """
    return like.shape[0] if sequences is None else sequences.num_sequences
