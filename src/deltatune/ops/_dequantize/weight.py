"""A frozen matrix, or one an expert, in a format of few bits: what it holds, and in which shapes."""

# G experts, N rows, K columns, S groups of values that share a scale, B blocks of 256 such scales, P parts of rows

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from deltatune.ops._validation import check_same_device

__all__ = ["BLOCK", "FORMATS", "GROUP", "NESTED", "QuantizedWeight", "nested_blocks", "shape_of"]

FORMATS: Final = ("nf4", "fp8", "mxfp4", "nvfp4")
#: Values that share a scale, of the formats with two codes a byte.
GROUP: Final = {"nf4": 64, "mxfp4": 32, "nvfp4": 16}
#: Rows and columns that share a scale of fp8.
BLOCK: Final = 128
#: Scales of nf4 that share an absolute maximum, and entries of the table that they index.
NESTED: Final = 256


def shape_of(codes: Tensor, format: str) -> torch.Size:
    """``[..., N, K]`` of the matrices that these codes are of."""
    return codes.shape if format == "fp8" else torch.Size((*codes.shape[:-1], 2 * codes.shape[-1]))


def nested_blocks(values: int) -> int:
    """B of an nf4 matrix with so many values."""
    return -(-values // (GROUP["nf4"] * NESTED))


class QuantizedWeight(NamedTuple):
    """Frozen matrices ``W [..., N, K]`` in a format of few bits; ``...`` is nothing, or G of experts.

    With i the place of a value in its matrix, row by row, and all products in fp32::

        nf4     W_i = code(c_i) * (table[s_b] * nested[b // 256] + offset)    b = i // 64
        fp8     W_nk = c_nk * s[n // 128, k // 128]    or    c_nk * s[n, 0]
        mxfp4   W_i = e2m1(c_i) * 2^(s_b - 127)    b = i // 32
        nvfp4   W_i = e2m1(c_i) * s_b * global_p    (or / global_p)    b = i // 16, p = n // (N / P)

    Attributes:
        format: ``"nf4"``, bitsandbytes' with double quantisation; ``"fp8"``; ``"mxfp4"``, OCP's; or ``"nvfp4"``.
        codes: uint8 ``[..., N, K / 2]``, two codes a byte: of nf4 the high four bits are the even column, of mxfp4 and
            nvfp4 the low ones. Of fp8 float8_e4m3fn ``[..., N, K]``.
        scales: of nf4 uint8 ``[..., N * K / 64]``; of fp8 fp32 or bf16 ``[..., ceil(N / 128), ceil(K / 128)]``, or
            ``[..., N, 1]``; of mxfp4 uint8 ``[..., N, K / 32]``, exponents of 2 plus 127, 255 being NaN; of nvfp4
            float8_e4m3fn ``[..., N, K / 16]``.
        extra: of nf4 fp32 ``[..., B + 257]``, B = ceil(N * K / 16384): nested ``[B]``, table ``[256]`` and offset; of
            nvfp4 the global scales, fp32 ``[..., P]``, each of N / P rows, so that a fused gate and up have one each;
            otherwise None.
        divides: of nvfp4, whether values are divided by the global scale, as compressed-tensors stores it.
    """

    format: str
    codes: Tensor
    scales: Tensor
    extra: Tensor | None = None
    divides: bool = False

    @property
    def shape(self) -> torch.Size:
        """``[..., N, K]``."""
        return shape_of(self.codes, self.format)

    def check(self, op: str = "QuantizedWeight") -> None:
        """Reads shapes, dtypes and devices, never values.

        Raises:
            ValueError: an unknown format, or tensors that do not fit it or each other; it names ``op``.
        """
        if self.format not in FORMATS:
            raise ValueError(f"{op}: unknown format {self.format!r}; expected one of {', '.join(map(repr, FORMATS))}")
        byte, floats = torch.uint8, torch.float8_e4m3fn
        _check_dtype(op, self.format, "codes", self.codes, floats if self.format == "fp8" else byte)
        if self.codes.ndim not in (2, 3):
            raise ValueError(f"{op}: codes must be [N, columns] or [G, N, columns], got {list(self.codes.shape)}")
        if self.divides and self.format != "nvfp4":
            raise ValueError(f"{op}: divides=True is for the global scales of nvfp4; {self.format} has none")
        *lead, rows, columns = self.shape
        expected: tuple[list[int], ...]
        if self.format == "fp8":
            _check_dtype(op, self.format, "scales", self.scales, torch.float32, torch.bfloat16)
            expected = ([-(-rows // BLOCK), -(-columns // BLOCK)], [rows, 1])
        elif self.format == "nf4":
            check_groups(op, self.format, rows, columns)
            _check_dtype(op, self.format, "scales", self.scales, byte)
            expected = ([rows * columns // GROUP["nf4"]],)
        else:
            check_groups(op, self.format, rows, columns)
            _check_dtype(op, self.format, "scales", self.scales, byte if self.format == "mxfp4" else floats)
            expected = ([rows, columns // GROUP[self.format]],)
        _check_shape(op, self, "scales", self.scales, *(lead + shape for shape in expected))
        self._check_extra(op, lead, rows, columns)
        given = {"codes": self.codes, "scales": self.scales, "extra": self.extra}
        check_same_device(op, **{name: x for name, x in given.items() if x is not None})

    def _check_extra(self, op: str, lead: list[int], rows: int, columns: int) -> None:
        if self.format in ("fp8", "mxfp4"):
            if self.extra is not None:
                raise ValueError(f"{op}: {self.format} has no extra tensor, got {list(self.extra.shape)}; pass None")
            return
        if self.extra is None:
            holds = "nested absolute maxima, table and offset" if self.format == "nf4" else "global scales"
            raise ValueError(f"{op}: {self.format} needs extra, its {holds}; got None")
        _check_dtype(op, self.format, "extra", self.extra, torch.float32)
        if self.format == "nf4":
            _check_shape(op, self, "extra", self.extra, [*lead, nested_blocks(rows * columns) + NESTED + 1])
            return
        parts = self.extra.shape[-1] if self.extra.ndim else 0
        if self.extra.shape[:-1] != torch.Size(lead) or parts == 0 or rows % parts:
            raise ValueError(
                f"{op}: extra of nvfp4 must be [{', '.join(map(str, [*lead, 'P']))}] with P a divisor of {rows} rows, "
                f"got {list(self.extra.shape)}"
            )


def check_groups(op: str, format: str, rows: int, columns: int) -> None:
    """Raises ValueError where the scales of a format do not divide a matrix ``[N, K]`` evenly."""
    group = GROUP[format]
    if format == "nf4" and (rows * columns % group or columns % 2):
        raise ValueError(
            f"{op}: nf4 needs N * K a multiple of {group} and K even, got N={rows}, K={columns}; "
            "keep this matrix in 16 bits"
        )
    if format != "nf4" and columns % group:
        raise ValueError(f"{op}: {format} needs K a multiple of {group}, got K={columns}; keep this matrix in 16 bits")


def _check_dtype(op: str, format: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        same_bytes = tensor.dtype.itemsize == dtypes[0].itemsize
        remedy = f"; pass {name}.view({dtypes[0]})" if same_bytes else ""
        raise ValueError(f"{op}: {name} of {format} must be {names}, got {tensor.dtype}{remedy}")


def _check_shape(op: str, weight: QuantizedWeight, name: str, tensor: Tensor, *shapes: list[int]) -> None:
    if not any(list(tensor.shape) == shape for shape in shapes):  # torch 2.11 traces `in` as if none were equal
        expected = " or ".join(map(str, shapes))
        raise ValueError(
            f"{op}: {name} of {weight.format} for a weight {list(weight.shape)} must be {expected}, "
            f"got {list(tensor.shape)}"
        )
