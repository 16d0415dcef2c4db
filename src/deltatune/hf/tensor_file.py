"""Safetensors files whose tensors are described first and written one by one, in any order."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["TensorFile", "described_in", "is_writable"]

#: The format's names, in the order in which it lays tensors out, the last first.
_TYPES: Final = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in _TYPES.items()}
_ORDER: Final = {dtype: place for place, dtype in enumerate(_TYPES.values())}


def described_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file on the meta device, of which its header alone is read.

    Raises:
        ValueError: a type of numbers that is not known here.
        SafetensorError, OSError: a file that cannot be read.
    """
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            about = file.get_slice(name)
            dtype = _TYPES.get(about.get_dtype())
            if dtype is None:
                raise ValueError(f"{path.name} holds numbers of type {about.get_dtype()}")
            yield name, torch.empty(about.get_shape(), dtype=dtype, device="meta")


def is_writable(tensor: Tensor) -> bool:
    """Whether the format has the tensor's type of numbers."""
    return tensor.dtype in _NAMES


class TensorFile:
    """A file as ``safetensors.torch.save_file`` writes it, with room for tensors that come later.

    The bytes are those of ``save_file(tensors, path, metadata={"format": "pt"})`` once each has been written, and the
    file is left, as a context, when all of them are on the disk.

    Args:
        path: the file; one that is there is replaced.
        tensors: name, shape and dtype of all that it will hold; on the meta device, say.

    Raises:
        OSError: the disk does not take the file, here, as a tensor is written or as the context is left.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        order = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, Tensor]] = {}
        end = 0
        for name in order:
            tensor, start = tensors[name], end
            end += tensor.numel() * tensor.element_size()
            about = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            header[name], self._places[name] = about, (start, tensor)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._end = self._data + end
        self._path, self._file = path, path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one of the tensors, on the CPU and of the shape and dtype that were announced, in its place."""
        start, about = self._places.pop(name)
        assert (tensor.shape, tensor.dtype) == (about.shape, about.dtype), name
        self._file.seek(self._data + start)
        if tensor.numel():
            # numpy's tofile has a buffer of its own, whose end a full disk loses without a word
            self._file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            with suppress(OSError):  # of what failed, and is said already
                self._file.close()
            return
        self._file.close()
        size = self._path.stat().st_size
        assert not self._places, f"not written: {next(iter(self._places))}"
        if size != self._end:
            raise OSError(errno.EIO, f"{size:,} bytes of {self._end:,} are on the disk", str(self._path))
