"""A prepared model against the stock class's own forward: the same function, also beyond the lengths a config names."""

# T tokens, E features

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from deltatune.hf.attention_interface import exchange_configs
from deltatune.hf.cached import stock_path
from deltatune.layers.rotary import forget_lengths
from deltatune.verification.measure import Pack, Pass, Subject, differences, relative, run_once, worst_of
from deltatune.verification.report import VerifyCheck
from deltatune.verification.rounding import limits_of
from deltatune.verification.subjects import Probed
from deltatune.verification.untouched import layers_in_float32

__all__ = ["bounds_of", "compare_beyond_bounds", "compare_with_stock"]

#: Tokens of the longest document that is run; a CPU's attention takes seconds for more.
_LONGEST: Final = {"cpu": 1024}
_LONGEST_ELSEWHERE: Final = 8192
_SHORT, _PADDING = 17, 11

#: Names in a config of lengths beyond which a layer may compute something else.
_BOUNDS: Final = ("original_max_position_embeddings", "sliding_window", "attention_chunk_size", "index_topk")

#: Tolerance for a 16-bit model compared in float32, on the CPU and elsewhere: other packages' kernels take TF32.
_IN_FLOAT32: Final = 1e-5, 5e-3

#: What a stock layer raises where it cannot run: a kernel or a package that is missing, memory.
_NOT_RUNNING: Final = (RuntimeError, ValueError, ImportError)


def bounds_of(config: Any) -> dict[str, int]:
    """Lengths in a text config beyond which its layers may compute something else, by name."""
    found = {name: getattr(config, name, None) for name in _BOUNDS}
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        found["original_max_position_embeddings"] = (
            parameters.get("original_max_position_embeddings") or found["original_max_position_embeddings"]
        )
        if "dynamic" in str(parameters.get("rope_type")):
            found["max_position_embeddings"] = config.max_position_embeddings
    return {name: length for name, length in found.items() if isinstance(length, int) and length > 0}


def compare_with_stock(
    probed: Probed, subject: Subject, tolerance: float, last: nn.Module | None
) -> Iterator[VerifyCheck | str]:
    """The longest document alone, by the prepared layers and by the stock ones; a note where those cannot run.

    Of a 16-bit model outputs alone, and gradients too of the layers up to ``last`` in float32: what rounding makes of
    16-bit gradients grows from layer to layer and where a token goes to another expert, and hides another function.
    """
    yield _compare_document(probed, subject, probed.inputs, tolerance, compared=1 if last else 3)
    if last is None:
        return
    tolerance, name = _IN_FLOAT32[probed.device.type != "cpu"], "the first layers in float32: "
    try:
        with layers_in_float32(probed.model, probed.text_model, last):
            found = _compare_document(probed, subject, probed.inputs.float(), tolerance, name=name)
    except torch.OutOfMemoryError:
        found = f"{name}not compared with the stock class for want of memory"
    yield found


def _compare_document(
    probed: Probed, subject: Subject, inputs: Tensor, tolerance: float, *, compared: int = 3, name: str = ""
) -> VerifyCheck | str:
    lengths = probed.documents.lengths
    number = lengths.index(max(lengths))
    document = inputs[:, probed.documents.places[number]]
    once = functools.partial(run_once, subject.alone[number], document, tuple(subject.parameters.values()))

    def differ(found: Pass, expected: Pass) -> tuple[float, ...]:
        return differences(subject, [slice(None)], found, expected)[:compared]

    name += f"one document of {lengths[number]} tokens against the stock class"
    return _check(probed, name, once(), once, differ, tolerance)


def compare_beyond_bounds(probed: Probed, tolerance: float) -> Iterator[VerifyCheck | str]:
    """A short document and one longer than the bounds, packed, against each alone by the stock layers; no backward.

    Half as long again, since one more token is one key in a window, or one not among the top k. Bounds too large to be
    run are told in a note.
    """
    near, most = {}, _LONGEST.get(probed.device.type, _LONGEST_ELSEWHERE)
    for name, length in bounds_of(probed.text_model.config).items():
        if length + length // 2 < most:
            near[name] = length
        else:
            yield f"documents longer than {name}={length} were not run: {most} tokens are the most on this device"
    if not near:
        return
    bound = max(near.values())
    documents = Pack((_SHORT, bound + bound // 2 + 1), _PADDING if probed.state is not None else 0)
    inputs = probed.random(1, documents.total)[1]
    places = documents.places

    def alone() -> Tensor:
        return torch.cat([probed.hidden(inputs[:, place], {}) for place in places], dim=1)

    def differ(found: Tensor, expected: Tensor) -> tuple[float, ...]:
        return (worst_of(relative(found[:, place], expected[:, place]) for place in places),)

    longer = ", ".join(f"{name}={length}" for name, length in near.items())
    title = f"a document of {documents.lengths[1]} tokens (longer than {longer})"
    packed = probed.hidden(inputs, probed.metadata(documents))
    yield _check(probed, title, packed, alone, differ, tolerance)


def _check(
    probed: Probed,
    name: str,
    found: Any,
    alone: Callable[[], Any],
    differ: Callable[[Any, Any], tuple[float, ...]],
    tolerance: float,
) -> VerifyCheck | str:
    """What was found, against documents alone by the stock layers; a note where those cannot run."""
    try:
        with _stock(probed):
            expected = alone()
    except _NOT_RUNNING as error:
        reason = str(error).partition("\n")[0]
        return f"{name}: not compared with the stock class, which does not run here ({reason})"
    figures = differ(found, expected)
    return VerifyCheck(name, figures, limits_of(figures, tolerance, alone, differ, tf32=probed.device.type != "cpu"))


@contextmanager
def _stock(probed: Probed) -> Iterator[None]:
    """The stock layers run inside, with what no earlier call left in them.

    They read the stock config: some compute what its attention implementation names.
    """
    if probed.state is None:
        yield
        return
    text_model: Any = probed.text_model
    exchange_configs(text_model)
    try:
        forget_lengths(text_model)
        with stock_path(text_model):
            yield
    finally:
        exchange_configs(text_model)
