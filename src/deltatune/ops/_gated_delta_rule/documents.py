"""Where the documents of a batch are, as kernels on a device want it: worked out once, for all layers."""

# S documents that hold tokens, n chunks

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHUNK_SIZE", "Documents", "documents_of"]

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


def documents_of(cu_seqlens_cpu: Tensor, device: torch.device) -> Documents:
    """Those of cumulative lengths on the CPU ``[any + 1]``; the same object for the same boundaries, so for all layers.

    Copies to the device without waiting for it. Known by what the boundaries say: the tensor may be rewritten, and the
    libraries' own caches go by the identity of what is returned here.
    """
    # the repeated tail says nothing, and is most of the tensor
    used = cu_seqlens_cpu[: int(torch.searchsorted(cu_seqlens_cpu, cu_seqlens_cpu[-1])) + 1]
    return _documents(tuple(used.tolist()), device)


@functools.lru_cache(maxsize=16)
def _documents(boundaries: tuple[int, ...], device: torch.device) -> Documents:
    cu_seqlens_cpu = torch.tensor(boundaries)
    ends = cu_seqlens_cpu[1:][cu_seqlens_cpu.diff() > 0]
    compact = torch.cat([ends.new_zeros(1), ends]).int()
    chunks = (compact.diff() + CHUNK_SIZE - 1) // CHUNK_SIZE
    document = torch.arange(chunks.numel()).repeat_interleave(chunks)
    place = torch.arange(document.numel()) - (chunks.cumsum(0) - chunks)[document]
    indices = torch.stack([document, place], dim=1).int()
    return Documents(compact.to(device, non_blocking=True), compact, indices.to(device, non_blocking=True))
