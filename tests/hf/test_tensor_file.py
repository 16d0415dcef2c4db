"""A weight file that the disk does not take whole is an error, however little of it is missing."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltatune.errors import UserError
from deltatune.hf.tensor_file import TensorFile
from deltatune.training.sealed import staged_checkpoint

TENSORS = {
    "a": torch.arange(2048, dtype=torch.float32),
    "b": torch.arange(101, dtype=torch.bfloat16),
    "c": torch.arange(33, dtype=torch.int64),
    "d": torch.arange(7, dtype=torch.uint8),
    "e": torch.ones(0, 3),
    "f": torch.tensor(3.0),
    "g": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within it no file of this process grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write(path: Path) -> None:
    with TensorFile(path, TENSORS) as file:
        for name, tensor in TENSORS.items():
            file.write(name, tensor)


@pytest.mark.parametrize("short", [1, 100, 4096, 5000])
def test_a_file_that_lacks_its_end_is_an_error(short: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path)
    size = path.stat().st_size
    with largest_file(size):
        write(path)
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with largest_file(size - short), pytest.raises(OSError, match="File too large") as error:
        write(path)
    assert error.value.errno == errno.EFBIG


def test_it_is_said_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    def save() -> None:
        with staged_checkpoint(tmp_path, 6) as staging:
            staging.mkdir()
            write(staging / "model.safetensors")

    with largest_file(9000), pytest.raises(UserError, match=r"checkpoint-6 cannot be saved: .*; make room, then go on"):
        save()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_somebody_cuts_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def cut() -> None:
        with TensorFile(path, {"a": TENSORS["a"]}) as file:
            file.write("a", TENSORS["a"])
            file._end += 1

    with pytest.raises(OSError, match=r"8,2\d\d bytes of 8,2\d\d are on the disk"):
        cut()


def test_what_failed_first_is_what_is_said(tmp_path: Path) -> None:
    def fail() -> None:
        with TensorFile(tmp_path / "model.safetensors", TENSORS) as file:
            file.write("d", TENSORS["d"])
            raise KeyError("of our own")

    with largest_file(5000), pytest.raises(KeyError, match="of our own"):
        fail()
