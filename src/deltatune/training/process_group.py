"""The process group of a run: made by accelerate where a launcher asks for it, and destroyed where it was made."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate.state import AcceleratorState

from deltatune.errors import InterruptedRunError

__all__ = ["own_process_group"]


@contextmanager
def own_process_group() -> Iterator[None]:
    """Destroys the process group that was made within, once the models of the run are gone.

    A DDP model that outlives its group frees it with the GIL held, and joins a thread of gloo that may itself wait for
    the GIL. After a failure the group stays: destroying it may wait for ranks that are gone.
    """
    mine = not _is_there()
    try:
        yield
    except BaseException as error:
        if mine and _is_there():
            _free(error)
            if isinstance(error, InterruptedRunError):
                _destroy()
        raise
    if mine and _is_there():
        gc.collect()
        _destroy()


def _is_there() -> bool:
    return dist.is_available() and dist.is_initialized()


def _destroy() -> None:
    dist.destroy_process_group()
    # accelerate would take the group for there, in another run of this process
    AcceleratorState._reset_state(reset_partial_state=True)


def _free(error: BaseException | None) -> None:
    """The frames of an error, and of those behind it, hold the model."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
