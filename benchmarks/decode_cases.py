"""The frozen matrices of an MLP in formats of few bits, at the shapes of models, and other ways to their values."""

# X experts, H hidden width, I width of an expert or of an MLP

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from deltatune import ops
from deltatune.ops import QuantizedWeight
from deltatune.ops._dequantize import reference

__all__ = ["FORMATS", "baselines", "draw_parts", "matrices", "ours", "plain"]

FORMATS: Final = ("nf4", "fp8", "mxfp4", "nvfp4")
_GROUP: Final = {"nf4": 64, "mxfp4": 32, "nvfp4": 16}
_BLOCK: Final = 128
#: Values whose scales share an absolute maximum.
_NESTED: Final = 64 * 256


def matrices(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> ``[X, N, K]``, or ``[N, K]`` of a dense model."""
    v = shape.values
    experts = v.get("num_experts", v.get("num_local_experts"))
    hidden, inner = v["hidden_size"], v.get("moe_intermediate_size") or v["intermediate_size"]
    lead = () if experts is None else (experts,)
    return {"up": (*lead, 2 * inner, hidden), "down": (*lead, hidden, inner)}


def draw_parts(generator: torch.Generator, format: str, size: tuple[int, ...]) -> dict[str, Tensor]:
    """Random codes and scales that are numbers; those of one byte are uint8, whatever the format takes them for."""
    device = generator.device

    def numbers(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.uint8)

    def near_one(*shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=generator, device=device)

    *lead, rows, columns = size
    if format == "fp8":
        codes = numbers(*size)
        codes = torch.where(codes & 127 == 127, 0, codes)
        return {"codes": codes, "scales": near_one(*lead, -(-rows // _BLOCK), -(-columns // _BLOCK))}
    codes, group = numbers(*lead, rows, columns // 2), _GROUP[format]
    if format == "mxfp4":
        return {"codes": codes, "scales": numbers(*lead, rows, columns // group, low=118, high=124)}
    if format == "nvfp4":
        scales = numbers(*lead, rows, columns // group, low=48, high=80)
        return {"codes": codes, "scales": scales, "extra": near_one(*lead, 2)}
    table = torch.linspace(-1, 1, 256, device=device).expand(*lead, -1)
    nested = near_one(*lead, -(-rows * columns // _NESTED))
    extra = torch.cat([nested, table, 2 * torch.ones(*lead, 1, device=device)], -1)
    return {"codes": codes, "scales": numbers(*lead, rows * columns // group), "extra": extra}


def ours(format: str, names: Iterable[str], impl: str) -> Callable[[Any], tuple[Tensor, ...]]:
    """``ops.dequantize`` of every matrix, to the dtype of ``like``."""

    def run(t: Any) -> tuple[Tensor, ...]:
        weights = (_weight(format, t, name) for name in names)
        return tuple(ops.dequantize(w, t["like"].dtype, offsets=t.get("offsets"), impl=impl) for w in weights)

    return run


def plain(format: str, names: Iterable[str]) -> Callable[[Any], tuple[Tensor, ...]]:
    """The specification where a compiler sees into it; it decodes experts without rows too."""

    def run(t: Any) -> tuple[Tensor, ...]:
        parts = (_parts(t, name) for name in names)
        return tuple(reference.decode(*of, None, format, False, t["like"].dtype) for of in parts)

    return run


def baselines(
    format: str, sizes: Mapping[str, tuple[int, ...]]
) -> Iterable[tuple[str, str, Callable[[], Callable[[Any], tuple[Tensor, ...]]]]]:
    """Name, whose it is, and how to build it."""

    def bitsandbytes() -> Callable[[Any], tuple[Tensor, ...]]:
        library: Any = importlib.import_module("bitsandbytes.functional")
        if any(len(size) == 3 and size[1] * size[2] % _NESTED for size in sizes.values()):
            raise ValueError(f"one state holds all experts where each has a multiple of {_NESTED} values")

        def run(t: Any) -> tuple[Tensor, ...]:
            return tuple(decoded(size, *_parts(t, name), t["like"].dtype) for name, size in sizes.items())

        def decoded(
            size: tuple[int, ...], codes: Tensor, scales: Tensor, extra: Tensor | None, dtype: torch.dtype
        ) -> Tensor:
            assert extra is not None
            # table and offset are the same in all experts
            shared = extra.view(-1, extra.shape[-1])[0]
            nested = library.QuantState(
                absmax=extra[..., :-257].flatten(), blocksize=256, code=shared[-257:-1], dtype=torch.float32
            )
            state = library.QuantState(
                absmax=scales.flatten(), shape=torch.Size(size), blocksize=64, quant_type="nf4", dtype=dtype,
                offset=shared[-1], state2=nested,
            )  # fmt: skip
            found: Tensor = library.dequantize_4bit(codes.view(-1, 1), state)
            return found

        return run

    if format == "nf4":
        yield "bitsandbytes", "library", bitsandbytes


def _parts(t: Any, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and extra as the op takes them: what a check has made float64 is fp32 again."""
    codes, *rest = (t.get(f"{name}.{part}") for part in ("codes", "scales", "extra"))
    scales, extra = (x.float() if x is not None and x.is_floating_point() else x for x in rest)
    return codes, scales, extra


def _weight(format: str, t: Any, name: str) -> QuantizedWeight:
    codes, scales, extra = _parts(t, name)
    e4m3 = torch.float8_e4m3fn
    if format == "fp8":
        return QuantizedWeight(format, codes.view(e4m3), scales)
    return QuantizedWeight(format, codes, scales.view(e4m3) if format == "nvfp4" else scales, extra)
