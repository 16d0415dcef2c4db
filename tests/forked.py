"""Processes that begin with the libraries imported: forked from one that has done nothing else.

By itself each would import torch, transformers and PEFT first, which takes some seconds of a core.
"""

from __future__ import annotations

import gc
import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "deltatune.training.run",
        "deltatune.verification.probe",
        "peft",
        "transformers.models.qwen3_5.modeling_qwen3_5",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
    ]
)


def free_port() -> int:
    """For ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run_ranks(main: Callable[..., None], *args: Any, count: int) -> None:
    """``main(rank, *args)`` in ``count`` processes; an error of one is raised here."""
    torch.multiprocessing.start_processes(_rank, (main, *args), nprocs=count, start_method="forkserver")


def settle() -> None:
    """First in a process of ``FORKED``."""
    gc.freeze()  # what was imported is not searched again
    torch.set_num_threads(1)


def _rank(rank: int, main: Callable[..., None], *args: Any) -> None:
    settle()
    main(rank, *args)
    # A DDP model that outlives the process group frees it with the GIL held and joins gloo's thread, which may
    # itself wait for the GIL to drop a tensor.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
