"""Activation offloading: what forward saves for backward lies in the host's memory until backward comes near it."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deltatune.compile.transfers import Transfers, transfers_of
from deltatune.hf import model as hf_model

__all__ = ["IN_FLIGHT_BYTES", "Offloading", "offload_activations"]

IN_FLIGHT_BYTES: Final = 2**29
"""Bytes on their way at once, in each direction; 10 ms of a PCIe 5 link."""

_LEAST_BYTES: Final = 2**20


@contextmanager
def offload_activations(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    least_bytes: int = _LEAST_BYTES,
    in_flight_bytes: int = IN_FLIGHT_BYTES,
) -> Iterator[Offloading]:
    """Moves what autograd saves inside the block to pinned host memory; backward, after the block, brings it back.

    Put it around the forward and the loss of each training step, not around backward::

        with offload_activations(model):
            loss = model(**batch).loss
        loss.backward()

    Losses and gradients stay equal bit for bit. Storages are copied whole, on a stream of their own, each once however
    many tensors share it; a tensor comes back with its shape and strides. What leaves: strided floating-point and bool
    tensors on ``device`` whose storage has ``least_bytes`` or more. What stays: parameters and buffers of the model and
    whatever shares their storage, integers, tensors of a subclass, tensors of other streams. Copies of weights that
    autocast makes leave too.

    With ``checkpointing="layer"`` the inputs of the layers leave; with ``"none"`` or a share, all that they save, which
    is many times as much. Compiled layers save as eager ones do; ``scope="model"`` is one graph that hands all of it
    over at its end, so nothing is gained, and ``checkpointing="auto"`` predicts a peak without offloading.

    Nothing waits for the device. The oldest copies are waited for, on the stream that was current at the start of the
    block, once more than ``in_flight_bytes`` (or one storage) are on their way; those on their way at the end of the
    block stay on the device too. Backward asks for the storages in reverse order, up to as many bytes ahead. A graph
    that is retained keeps on the device what its first backward brought back. The host holds the bytes that left until
    the graph is gone; the allocator of pinned memory keeps them for the next step.

    As without offloading, a tensor that is changed in place after it was saved is a RuntimeError in backward, on this
    device and in any thread.

    Args:
        model: whose parameters and buffers stay.
        device: where activations are; the model's own by default. The CPU, where tensors are copied to where they are,
            only if it is named.
        least_bytes: of a storage that leaves.
        in_flight_bytes: see above.

    Yields:
        What has left so far.

    Raises:
        ValueError: the model is sharded (a weight that is gathered for a layer looks like an activation), or is on the
            CPU and no device is given.
    """
    if hf_model.is_sharded(model):
        raise ValueError("activations of a sharded model cannot be offloaded; shard less, or recompute more")
    if device is None and hf_model.device_of(model).type != "cuda":
        raise ValueError(
            f"activation offloading moves tensors from a GPU, and the model is on {hf_model.device_of(model)}; move it"
        )
    where = torch.empty(0, device=hf_model.device_of(model) if device is None else device).device
    offloading = Offloading(model, transfers_of(where), least_bytes, in_flight_bytes)
    with torch.autograd.graph.saved_tensors_hooks(offloading._pack, offloading._unpack):
        yield offloading


class Offloading:
    """The storages that left in one block, in order. Only the graph keeps it, and each of them, alive.

    Attributes:
        moved_bytes: that were copied to the host.
        moved: storages that were.
    """

    def __init__(self, model: nn.Module, transfers: Transfers, least_bytes: int, in_flight_bytes: int) -> None:
        self.moved_bytes = self.moved = 0
        self._transfers, self._least, self._in_flight = transfers, least_bytes, in_flight_bytes
        weights: list[Any] = [*model.parameters(), *model.buffers()]
        self._weights = {part.untyped_storage()._cdata for weight in weights for part in _parts(weight)}
        self._order: list[weakref.ref[_Storage]] = []
        self._known = weakref.WeakValueDictionary[tuple[int, int], _Storage]()  # by identity and version
        self._leaving: deque[weakref.ref[_Storage]] = deque()
        self._lock = threading.Lock()  # engines of autograd have threads of their own

    def _pack(self, tensor: Tensor) -> _Kept | _Moved:
        if not self._leaves(tensor):
            return _Kept(tensor, tensor._version)
        with self._lock:
            storage = self._storage_of(tensor)
        offset = int(tensor.storage_offset())
        layout = tensor.dtype, offset, tensor.shape, tensor.stride()
        return _Moved(storage, *layout, _version_of(tensor), tensor._version)

    def _unpack(self, saved: _Kept | _Moved) -> Tensor:
        saved.check()
        if isinstance(saved, _Kept):
            return saved.tensor
        with self._lock:
            data = saved.storage.take()
            self._fetch_before(saved.storage.index)
        empty = torch.empty(0, dtype=saved.dtype, device=data.device)
        return empty.set_(data.untyped_storage(), saved.offset, saved.shape, saved.stride)

    def _leaves(self, tensor: Tensor) -> bool:
        return (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.device == self._transfers.device
            and tensor.layout is torch.strided
            and (tensor.is_floating_point() or tensor.dtype is torch.bool)
            and not tensor.is_neg()
            and tensor.untyped_storage().nbytes() >= self._least
            and tensor.untyped_storage()._cdata not in self._weights
            and self._transfers.is_beside()
        )

    def _storage_of(self, tensor: Tensor) -> _Storage:
        key = tensor.untyped_storage()._cdata, tensor._version
        storage = self._known.get(key)
        if storage is None:
            storage = self._known[key] = _Storage(tensor, self._transfers, len(self._order))
            self.moved += 1
            self.moved_bytes += storage.num_bytes
            self._order.append(weakref.ref(storage))
            self._leaving.append(weakref.ref(storage))
            self._let_go()
        return storage

    def _let_go(self) -> None:
        """Gives device memory back, the oldest first, where more than the bound is on its way, but for the last."""
        on_its_way = sum(storage.num_bytes for ref in self._leaving if (storage := ref()))
        while on_its_way > self._in_flight and len(self._leaving) > 1:
            storage = self._leaving.popleft()()
            if storage is not None:
                on_its_way -= storage.num_bytes
                storage.let_go()

    def _fetch_before(self, index: int) -> None:
        """Asks for the storages that left before one: backward comes to them next."""
        ahead = 0
        for earlier in range(index - 1, -1, -1):
            storage = self._order[earlier]()
            if storage is None:
                continue
            ahead += storage.num_bytes
            if ahead > self._in_flight and ahead > storage.num_bytes:
                return
            storage.fetch()


class _Storage:
    """A storage that leaves, and comes back; on the device while it is on its way, and from then on."""

    def __init__(self, tensor: Tensor, transfers: Transfers, index: int) -> None:
        self._arrived: torch.cuda.Event | None = None
        source = tensor.untyped_storage()
        self.index = index
        self.num_bytes = source.nbytes()
        weak_reference: Any = StorageWeakRef  # without types
        self._identity = weak_reference(source)  # nobody else gets its address while this is there
        self._transfers = transfers
        self._data: Tensor | None = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(source)
        self._host, self._left = transfers.to_host(self._data)

    def let_go(self) -> None:
        """Gives the memory back behind the copy."""
        self._transfers.wait(self._left)
        self._data = None

    def fetch(self) -> None:
        """Starts the copy back, where there is none."""
        if self._data is None:
            self._data, self._arrived = self._transfers.to_device(self._host)

    def take(self) -> Tensor:
        """The bytes, for what is computed from here on."""
        self.fetch()
        self._wait()
        assert self._data is not None
        return self._data

    def _wait(self) -> None:
        if self._arrived is not None:
            self._transfers.wait(self._arrived)
            self._arrived = None

    def __del__(self) -> None:
        # a copy that nobody took still writes into memory that is given back now
        self._wait()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A saved tensor that stays, as it is."""

    tensor: Tensor
    version: int

    def check(self) -> None:
        _check_version(self.tensor, self.version, self.tensor)


@dataclass(frozen=True, slots=True)
class _Moved:
    """A saved tensor, as a view of its storage."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    counter: Tensor
    version: int

    def check(self) -> None:
        _check_version(self.counter, self.version, self)


def _version_of(tensor: Tensor) -> Tensor:
    """An empty tensor whose version counts the changes of another, without its memory."""
    counter = tensor.detach()
    counter.data = counter.new_empty(0)
    return counter


def _check_version(counter: Tensor, version: int, saved: Tensor | _Moved) -> None:
    """Autograd's own check, which hooks switch off."""
    if counter._version != version:
        raise RuntimeError(
            f"a tensor that backward needs was changed in place after forward had saved it ({saved.dtype}, shape "
            f"{list(saved.shape)}, version {counter._version}, saved at {version}); change a copy of it"
        )


def _parts(tensor: Any) -> Iterator[Tensor]:
    """A tensor, or what one of another class is made of: what compiled graphs save."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor
