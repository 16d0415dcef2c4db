"""Where the documents of a batch are, as kernels on a device want it: worked out once, for all layers."""

# S documents that hold tokens, n chunks

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["CHUNK_SIZE", "Documents", "documents_of", "rows_as_documents"]

CHUNK_SIZE = 64  # of the libraries' kernels


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents that hold tokens: libraries reject empty ones, or set memory aside for the state of each.

    Attributes:
        cu_seqlens: int32 ``[S + 1]`` on the device, strictly growing.
        cu_seqlens_cpu: the same on the CPU.
        chunk_indices: int32 ``[n, 2]`` on the device: the document of each chunk, and its place in the document.
    """

    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    chunk_indices: Tensor


# Keyed by identity, since all layers of a step hold the same tensor and the libraries' own caches go by identity too.
_KNOWN = WeakTensorKeyDictionary()


def documents_of(cu_seqlens_cpu: Tensor, device: torch.device) -> Documents:
    """Those of cumulative lengths on the CPU ``[any + 1]``; the same object again while that tensor lives.

    Copies to the device without waiting for it.
    """
    if cu_seqlens_cpu not in _KNOWN:
        _KNOWN[cu_seqlens_cpu] = {}
    on_devices: dict[torch.device, Documents] = _KNOWN[cu_seqlens_cpu]
    if device not in on_devices:
        on_devices[device] = _documents(cu_seqlens_cpu, device)
    return on_devices[device]


@functools.lru_cache(maxsize=8)
def rows_as_documents(batch: int, tokens: int, device: torch.device) -> Documents:
    """Each of ``batch`` rows one document."""
    return _documents(torch.arange(batch + 1, dtype=torch.int32) * tokens, device)


def _documents(cu_seqlens_cpu: Tensor, device: torch.device) -> Documents:
    ends = cu_seqlens_cpu[1:][cu_seqlens_cpu.diff() > 0]
    compact = torch.cat([ends.new_zeros(1), ends]).int()
    chunks = (compact.diff() + CHUNK_SIZE - 1) // CHUNK_SIZE
    document = torch.arange(chunks.numel()).repeat_interleave(chunks)
    place = torch.arange(document.numel()) - (chunks.cumsum(0) - chunks)[document]
    indices = torch.stack([document, place], dim=1).int()
    return Documents(compact.to(device, non_blocking=True), compact, indices.to(device, non_blocking=True))
