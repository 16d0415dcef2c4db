"""Where the ranks of a launch meet: a store of the launcher's, which waits without a device."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

__all__ = ["Meeting", "environment_of"]


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What a rank is told by its environment, as launchers name it."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Meeting:
    """Small values of all ranks, in the order of the calls, which are the same on every rank."""

    def __init__(self, timeout_s: float) -> None:
        """Joins the launcher's store; ``timeout_s``: for one wait."""
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        port = int(os.environ["MASTER_PORT"])
        self._store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))
        self._numbers = count()

    def join(self, backend: str) -> None:
        """Makes the default process group."""
        store = PrefixStore("group", self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world)

    def gather(self, value: Any = None) -> list[Any]:
        """The plain data that every rank gave, by rank; who comes first waits, on the host."""
        number = next(self._numbers)
        self._store.set(f"meeting/{number}/{self.rank}", json.dumps(value))
        return [json.loads(self._store.get(f"meeting/{number}/{rank}")) for rank in range(self.world)]
