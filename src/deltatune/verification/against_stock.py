"""A prepared model against the stock class's own forward: the same function, also beyond the lengths a config names."""

# T tokens, E features

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from deltatune.hf.cached import stock_path
from deltatune.verification.measure import Documents, Outcome, Subject, differences, relative, run_once, worst_of
from deltatune.verification.report import VerifyCheck
from deltatune.verification.rounding import limit_of, nudged
from deltatune.verification.subjects import Probed, boundaries_of
from deltatune.verification.untouched import compiled_as

__all__ = ["bounds_of", "compare_beyond_bounds", "compare_with_stock"]

#: Tokens of the longest document that is run; a CPU's attention takes seconds for more.
_LONGEST: Final = {"cpu": 1024}
_LONGEST_ELSEWHERE: Final = 8192
_SHORT, _PADDING = 17, 11

#: Names in a config of lengths beyond which a layer may compute something else.
_BOUNDS: Final = ("original_max_position_embeddings", "sliding_window", "attention_chunk_size", "index_topk")

#: What a stock layer raises where it cannot run: a kernel or a package that is missing, memory.
_NOT_RUNNING: Final = (RuntimeError, ValueError, ImportError)


def _longest_run(device: torch.device) -> int:
    """Tokens of the longest document that is run on a device."""
    return _LONGEST.get(device.type, _LONGEST_ELSEWHERE)


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


def compare_with_stock(probed: Probed, subject: Subject, tolerance: float) -> VerifyCheck | str:
    """The longest document alone, by the prepared layers and by the stock ones; a note where those cannot run."""
    number = max(range(len(probed.documents.lengths)), key=lambda i: probed.documents.lengths[i])
    length = probed.documents.lengths[number]
    place = probed.documents.slices[number]

    def once() -> Outcome:
        trained = torch.ones(length, dtype=torch.bool, device=probed.device)
        one = run_once(subject.alone(number), probed.inputs[:, place], trained, tuple(subject.parameters.values()))
        return Outcome([one.output], one.objective, [one.input_grad], one.parameter_grads)

    found = once()
    try:
        with _stock(probed):
            expected = once()
    except _NOT_RUNNING as error:
        return f"not compared with the stock class, which does not run here ({_line(error)})"
    figures, _ = differences(subject, found, expected)
    limits: tuple[float, ...] = (tolerance,) * 3
    if any(figure > tolerance for figure in figures):
        with nudged():
            other = once()
        limits = tuple(limit_of(tolerance, measured) for measured in differences(subject, other, found)[0])
    return VerifyCheck(f"one document of {length} tokens against the stock class", figures, limits)


def compare_beyond_bounds(probed: Probed, tolerance: float) -> Iterator[VerifyCheck | str]:
    """A short document and one longer than the bounds, packed, against each alone by the stock layers; no backward.

    Half as long again, since one more token is one key in a window, or one not among the top k. Bounds too large to be
    run are told in a note.
    """
    near, most = {}, _longest_run(probed.device)
    for name, length in bounds_of(probed.text_model.config).items():
        if _beyond(length) <= most:
            near[name] = length
        else:
            yield f"documents longer than {name}={length} were not run: {most} tokens are the most on this device"
    if not near:
        return
    documents = Documents((_SHORT, _beyond(max(near.values()))), _PADDING if probed.state is not None else 0)
    inputs = probed.random_inputs(documents.total)
    places = documents.slices[:2]

    def alone() -> list[Tensor]:
        return [_hidden(probed, inputs[:, place], {}) for place in places]

    longer = ", ".join(f"{name}={length}" for name, length in near.items())
    packed = _hidden(probed, inputs, boundaries_of(probed, documents))
    try:
        with _stock(probed):
            expected = alone()
    except _NOT_RUNNING as error:
        yield f"documents longer than {longer} were not compared with the stock class ({_line(error)})"
        return
    figure = worst_of([relative(packed[:, place], one) for place, one in zip(places, expected, strict=True)])
    limit = tolerance
    if figure > tolerance:
        ours = alone()
        with nudged():
            other = alone()
        limit = limit_of(tolerance, worst_of([relative(*pair) for pair in zip(other, ours, strict=True)]))
    yield VerifyCheck(f"a document of {documents.lengths[1]} tokens (longer than {longer})", (figure,), (limit,))


def _beyond(length: int) -> int:
    return length + length // 2 + 1


def _hidden(probed: Probed, inputs: Tensor, metadata: dict[str, Any]) -> Tensor:
    with torch.no_grad(), compiled_as(probed.state, compiled=False):
        run: Callable[..., Any] = probed.text_model
        output: Tensor = run(inputs_embeds=inputs, **probed.switches, **metadata)[0]
    return output


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def _stock(probed: Probed) -> Iterator[None]:
    """The stock layers run inside, and read the stock config: some compute what its attention implementation names."""
    if probed.state is None:
        yield
        return
    text_model: Any = probed.text_model
    ours, stock = text_model.config, probed.state.options.stock_config
    readers = [
        module for module in text_model.modules() if stock is not None and getattr(module, "config", None) is ours
    ]
    try:
        for module in readers:
            module.config = stock
        with stock_path(text_model):
            yield
    finally:
        for module in readers:
            module.config = ours
