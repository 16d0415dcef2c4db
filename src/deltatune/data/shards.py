"""Tokenised rows on disk: one safetensors file for a range of rows, whole or not there, with a checksum."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from deltatune.errors import DataError

__all__ = ["Shard", "read_shard", "write_shard"]

_DTYPES = {"I32": np.int32, "I64": np.int64, "U64": np.uint64, "BOOL": np.bool_}


@dataclass(frozen=True, eq=False)
class Shard:
    """The documents of a range of rows, one after the other."""

    tokens: NDArray[np.int32]  # [N]
    trained: NDArray[np.bool_]  # [N], whether a token is a target
    lengths: NDArray[np.int32]  # [D], tokens of each document
    targets: NDArray[np.int32]  # [D], its trained tokens after the first
    rows: NDArray[np.int64]  # [D], the row that it came from
    contents: NDArray[np.uint64]  # [D], a digest of that row
    remarks: Mapping[str, Any] = field(default_factory=dict)  # JSON: what the reader of the rows should know

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ("tokens", "trained", "lengths", "targets", "rows", "contents")}


def write_shard(file: Path, shard: Shard) -> None:
    """Writes a shard beside its place and moves it there, so that no reader ever sees a part of it.

    The file is a checksum (CRC-32, 8 bytes, little-endian) and the content of a safetensors file.

    Raises:
        DataError: the folder cannot be written.
    """
    content = save(shard.arrays(), {"remarks": json.dumps(dict(shard.remarks))})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".partial-", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(struct.pack("<Q", zlib.crc32(content)))
                stream.write(content)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(f"cannot write the cache of tokenised data: {error}; set data.cache_dir") from error


def read_shard(file: Path) -> Shard | None:
    """A shard over the mapped file; ``None`` where there is none, or what is there is not what was written."""
    try:
        with file.open("rb") as stream:
            (checksum,) = struct.unpack("<Q", stream.read(8))
            # read rather than mapped, so that memory which the data may never need is not counted as this process's
            value = 0
            while block := stream.read(1 << 20):
                value = zlib.crc32(block, value)
            if value != checksum:
                return None
            stream.seek(8)
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
            # a plain array over the mapped file: slicing a np.memmap costs several times as much
            data = np.asarray(np.memmap(stream, dtype=np.uint8, mode="r", offset=16 + size))
    except (OSError, struct.error):
        return None
    remarks = json.loads(header.pop("__metadata__")["remarks"])
    places = {name: (slice(*entry["data_offsets"]), _DTYPES[entry["dtype"]]) for name, entry in header.items()}
    return Shard(**{name: data[place].view(dtype) for name, (place, dtype) in places.items()}, remarks=remarks)
