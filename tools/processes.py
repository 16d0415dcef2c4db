"""Process groups without processes, for what is decided before a rank sends anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["as_rank"]


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """Within, this process is one of so many, whose collectives return at once and whatever was in their outputs."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
