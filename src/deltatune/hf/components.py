"""The tensors of a checkpoint that are one weight in few bits together, by the names that programs give them.

=================== ========================= ====================== ======================== ==========
method              codes                     scales                 global scale             format
=================== ========================= ====================== ======================== ==========
fp8                 ``W`` e4m3                ``W_scale_inv``                                 fp8
mxfp4               ``W_blocks`` uint8        ``W_scales``                                    mxfp4
compressed-tensors  ``W_packed`` uint8        ``W_scale`` e4m3       ``W_global_scale`` (/)   nvfp4
compressed-tensors  ``W_packed`` uint8        ``W_scale`` uint8                               mxfp4
compressed-tensors  ``W`` e4m3                ``W_scale``                                     fp8
modelopt            ``W`` uint8               ``W_scale`` e4m3       ``W_scale_2`` (*)        nvfp4
modelopt            ``W`` e4m3                ``W_scale``                                     fp8
=================== ========================= ====================== ======================== ==========

``W`` is the name that the weight has in a checkpoint of 16 bits: ``....weight``, or of fused experts
``....experts.gate_up_proj``. Scales of activations and of caches are not read.
"""

# N rows, K columns

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltatune.ops import QuantizedWeight
from deltatune.ops._dequantize.weight import shape_of
from deltatune.quantization.blank import Encoding
from deltatune.quantization.released import is_component
from deltatune.quantization.tensor import QuantizedTensor

__all__ = ["Source", "assembled", "check_experts", "split"]

_BYTES: Final = (torch.uint8, torch.int8)
_FLOATS: Final = torch.float8_e4m3fn
#: Scales of activations and of key-value caches.
_IDLE: Final = re.compile(r"[._](input_scale|input_global_scale|activation_scale|[kv]_scale|output_scale)$")
_EXPERT: Final = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")


class _Style(NamedTuple):
    """What follows the name of a weight in its tensors' names."""

    codes: str
    dtype: torch.dtype
    scales: str
    extra: str | None
    format: str
    divides: bool = False


_STYLES: Final[Mapping[str, tuple[_Style, ...]]] = {
    "fp8": (_Style("", _FLOATS, "_scale_inv", None, "fp8"),),
    "mxfp4": (_Style("_blocks", torch.uint8, "_scales", None, "mxfp4"),),
    "compressed-tensors": (
        _Style("_packed", torch.uint8, "_scale", "_global_scale", "nvfp4", divides=True),
        _Style("_packed", torch.uint8, "_scale", None, "mxfp4"),
        _Style("", _FLOATS, "_scale", None, "fp8"),
    ),
    "modelopt": (_Style("", torch.uint8, "_scale", "_scale_2", "nvfp4"), _Style("", _FLOATS, "_scale", None, "fp8")),
}


@dataclass(frozen=True)
class Source:
    """One weight of a checkpoint, and where its parts are.

    Attributes:
        encoding: what it is held in.
        shape: ``[..., N, K]``.
        keys: of ``codes``, ``scales`` and ``extra`` in the checkpoint.
        transposed: whether the weight of 16 bits is ``[..., K, N]``.
    """

    encoding: Encoding
    shape: torch.Size
    keys: Mapping[str, str]
    transposed: bool

    def as_values(self, dtype: torch.dtype) -> Tensor:
        """The weight of 16 bits, on the meta device."""
        values = torch.empty(self.shape, dtype=dtype, device="meta")
        return values.mT if self.transposed else values

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """One of its tensors with as many dims as the weight, and rows in the place of rows: as conversions take it.

        Bytes are uint8, of fp8 and global scales there is one for each row.
        """
        *lead, rows, _ = self.shape
        groups = math.prod(lead)
        if name == "extra" or (name == "scales" and self.encoding.format == "fp8" and not self.encoding.blocks):
            each = tensor.reshape(*lead, -1)
            return each.repeat_interleave(rows // each.shape[-1], -1).unsqueeze(-1).to(self._dtype(name))
        if name == "codes" and tensor.ndim == len(self.shape) + 1:  # of gpt-oss, blocks of 16 bytes
            tensor = tensor.flatten(-2)
        assert tensor.numel() % groups == 0
        return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor

    def converted(self, name: str, shape: torch.Size) -> Tensor:
        """What stands for one of its tensors after conversions, of weights ``[..., N, K]``, on the meta device."""
        size, dtype = self.encoding.parts(shape)[name]
        if name == "extra":
            size = [*shape[:-1], 1]
        return torch.empty(size, dtype=torch.uint8 if dtype.itemsize == 1 else dtype, device="meta")

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name == "extra" else self.encoding.scales


def split(
    described: Mapping[str, Tensor], method: str, *, transposed_experts: bool
) -> tuple[dict[str, Source], dict[str, Tensor]]:
    """The weights in few bits of a checkpoint by the names that they have in 16 bits, and its other tensors.

    Args:
        described: its tensors, on the meta device.
        method: ``quant_method`` of its config.
        transposed_experts: whether the model's fused experts are ``[G, K, N]``.

    Raises:
        ValueError: codes without scales, parts of other shapes or dtypes, or experts that are not all there.
    """
    sources, taken = dict[str, Source](), set[str]()
    for key, tensor in described.items():
        for name, style in _weights(key, tensor, method, described):
            keys = {"codes": key, "scales": f"{name}{style.scales}"}
            keys |= {} if style.extra is None else {"extra": f"{name}{style.extra}"}
            sources[name] = _source(style, keys, described, transposed_experts)
            taken |= set(keys.values())
    rest = {key: tensor for key, tensor in described.items() if key not in taken and not _IDLE.search(key)}
    for key, tensor in rest.items():
        if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{key} is {kind} {list(tensor.shape)}, which is no weight in few bits that is known here")
    check_experts({*sources, *rest})
    return sources, rest


def assembled(target: QuantizedTensor, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """A weight of the model, of what conversions made of the parts of its sources.

    Args:
        target: the same on the meta device.
        parts: by name; bytes as uint8, a global scale for each row.

    Raises:
        ValueError: parts that do not fit, or rows with other global scales than their neighbours.
    """
    held = {}
    for name, tensor in parts.items():
        blank: Tensor = getattr(target, name)
        if name == "extra":
            tensor = tensor.view(*blank.shape, -1)
            if bool((tensor != tensor[..., :1]).any()):
                raise ValueError(f"its rows have more than {blank.shape[-1]} global scales")
            tensor = tensor[..., 0].contiguous()
        held[name] = tensor.view(blank.dtype) if blank.dtype.itemsize == 1 else tensor
    stored = target.stored
    weight = QuantizedWeight(stored.format, **held, divides=stored.divides)
    weight.check()
    return QuantizedTensor(weight, target.dtype, transposed=target.transposed)


def _weights(key: str, tensor: Tensor, method: str, described: Mapping[str, Tensor]) -> list[tuple[str, _Style]]:
    """The name of the weight that a tensor holds the codes of, and how its others are called; one at most."""
    for style in _STYLES[method]:
        name = key.removesuffix(style.codes)
        if not key.endswith(style.codes) or tensor.dtype != style.dtype or tensor.ndim < 2 or is_component(name):
            continue
        scales = described.get(f"{name}{style.scales}")
        if scales is None:
            raise ValueError(f"{key} has no scales: {name}{style.scales} is missing")
        if style.format != "fp8" and (style.format == "nvfp4") != (scales.dtype == _FLOATS):
            continue
        return [(name, style)]
    return []


def _source(
    style: _Style, keys: Mapping[str, str], described: Mapping[str, Tensor], transposed_experts: bool
) -> Source:
    if missing := [key for key in keys.values() if key not in described]:
        raise ValueError(f"{keys['codes']} has no global scale: {missing[0]} is missing")
    codes, scales = described[keys["codes"]], described[keys["scales"]]
    if style.codes == "_blocks":
        if codes.ndim != 4 or codes.shape[-1] != 16:
            raise ValueError(f"{keys['codes']} must be [G, N, K / 32, 16], got {list(codes.shape)}")
        codes = codes.flatten(-2)
    shape = shape_of(codes, style.format)
    *lead, rows, _ = shape
    groups = math.prod(lead)
    blocks = style.format == "fp8" and scales.numel() not in (groups, groups * rows)
    dtype = scales.dtype if style.format == "fp8" and scales.dtype == torch.bfloat16 else torch.float32
    encoding = Encoding(style.format, blocks, dtype, style.divides)
    encoding.check(shape)
    expected, kind = encoding.parts(shape)["scales"]
    rowwise = style.format == "fp8" and not blocks
    if not rowwise and (list(scales.shape) != expected or scales.dtype != kind):
        raise ValueError(
            f"{keys['scales']} must be {str(kind).removeprefix('torch.')} {expected} for {keys['codes']} "
            f"{list(shape)}, got {str(scales.dtype).removeprefix('torch.')} {list(scales.shape)}"
        )
    if "extra" in keys:
        count = described[keys["extra"]].numel()
        if count % groups or rows % (count // groups or 1) or not count:
            raise ValueError(f"{keys['extra']} must be one number for each of {groups} matrices, got {count}")
    return Source(encoding, shape, keys, transposed_experts and len(shape) == 3)


def check_experts(names: set[str]) -> None:
    """Experts by number are 0, 1, ... of every projection: conversions stack what is there.

    Raises:
        ValueError: a number that is not there.
    """
    numbers: dict[str, dict[str, set[int]]] = {}
    for name in names:
        if found := _EXPERT.fullmatch(name):
            numbers.setdefault(found[1], {}).setdefault(found[3], set()).add(int(found[2]))
    for path, parts in sorted(numbers.items()):
        count = max(max(there) for there in parts.values()) + 1
        for part, there in sorted(parts.items()):
            if len(there) < count:
                absent = min(set(range(count)) - there)
                raise ValueError(f"{path}.{absent}.{part} is missing, of {count} experts")
