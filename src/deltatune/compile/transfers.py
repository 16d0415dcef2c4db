"""Copies between the memory of a device and that of the host, beside what is computed."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Transfers", "transfers_of"]

Event = torch.cuda.Event
Host = tuple[Tensor, ...]  # pieces, in order

_LEAST_PIECE = 2**24


class Transfers(Protocol):
    """Copies of bytes from one device, and to it. Nothing here waits for a device."""

    device: torch.device

    def is_beside(self) -> bool:
        """Whether what is computed now is ordered with the copies; on a stream of its own it is not."""

    def to_host(self, data: Tensor) -> tuple[Host, Event | None]:
        """Starts a copy; the memory of ``data`` may be given back once the event was waited for."""

    def to_device(self, host: Host) -> tuple[Tensor, Event | None]:
        """Starts a copy back into new memory, which may be read, or given back, once the event was waited for."""

    def wait(self, event: Event | None) -> None:
        """What is computed from here on comes after the event."""


def transfers_of(device: torch.device) -> Transfers:
    """Those of a GPU run beside the stream that is current now; on other devices tensors are cloned where they are."""
    return _Beside(device) if device.type == "cuda" else _InPlace(device)


class _InPlace:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def is_beside(self) -> bool:
        return True

    def to_host(self, data: Tensor) -> tuple[Host, Event | None]:
        return tuple(piece.clone() for piece in torch.split(data, _piece_sizes(data.numel()))), None

    def to_device(self, host: Host) -> tuple[Tensor, Event | None]:
        return torch.cat(host), None

    def wait(self, event: Event | None) -> None:
        del event


class _Beside:
    """On a stream of their own. Device memory belongs to the computing stream, which waits before it is used again.

    So it is given out again in the order of the computing stream, at once: memory that the allocator is told of
    (``record_stream``) would be held back until the copy has run, while the host is many layers ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        new_stream: Any = torch.cuda.Stream  # without types
        self._computing, self._copying = torch.cuda.current_stream(device), new_stream(device)

    def is_beside(self) -> bool:
        return torch.cuda.current_stream(self.device) == self._computing

    def to_host(self, data: Tensor) -> tuple[Host, Event | None]:
        sizes = _piece_sizes(data.numel())
        host = tuple(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True) for size in sizes)
        return host, self._copied(host, torch.split(data, sizes))

    def to_device(self, host: Host) -> tuple[Tensor, Event | None]:
        sizes = [piece.numel() for piece in host]
        with torch.cuda.stream(self._computing):
            data = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        return data, self._copied(torch.split(data, sizes), host)

    def wait(self, event: Event | None) -> None:
        if event is not None:
            self._computing.wait_event(event)

    def _copied(self, to: tuple[Tensor, ...], source: tuple[Tensor, ...]) -> Event:
        # behind what wrote the source, or still reads the memory that is written
        self._copying.wait_stream(self._computing)
        with torch.cuda.stream(self._copying):
            for piece, of in zip(to, source, strict=True):
                piece.copy_(of, non_blocking=True)
        left: Event = self._copying.record_event()
        return left


def _piece_sizes(num_bytes: int) -> list[int]:
    """Powers of two and a rest below 16 MiB: pinned memory is allocated in powers of two, rounded up.

    >>> _piece_sizes(320 * 2**20) == [2**28, 2**26]
    True
    """
    sizes = []
    while num_bytes >= _LEAST_PIECE:
        sizes.append(2 ** (num_bytes.bit_length() - 1))
        num_bytes -= sizes[-1]
    return [*sizes, num_bytes] if num_bytes else sizes
