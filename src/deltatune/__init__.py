"""deltatune: packed, compiled fine-tuning of hybrid language models.

Importing this package loads no torch and has no effect; every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltatune import ops
    from deltatune.compile.graphs import CompileReport
    from deltatune.compile.offloading import offload_activations
    from deltatune.options import CompileOptions
    from deltatune.packing.bins import pack
    from deltatune.packing.collate import PackedCollator
    from deltatune.packing.sequences import Sequences
    from deltatune.packing.shuffled import pack_shuffled
    from deltatune.parallel.parallelize import Parallel, parallelize
    from deltatune.preparation import Prepared, prepare
    from deltatune.verification import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "CompileOptions",
    "CompileReport",
    "PackedCollator",
    "Parallel",
    "Prepared",
    "Sequences",
    "VerifyReport",
    "__version__",
    "offload_activations",
    "ops",
    "pack",
    "pack_shuffled",
    "parallelize",
    "prepare",
    "verify",
]

_HOMES = {
    "CompileOptions": "deltatune.options",
    "CompileReport": "deltatune.compile.graphs",
    "PackedCollator": "deltatune.packing.collate",
    "Parallel": "deltatune.parallel.parallelize",
    "Prepared": "deltatune.preparation",
    "Sequences": "deltatune.packing.sequences",
    "VerifyReport": "deltatune.verification",
    "offload_activations": "deltatune.compile.offloading",
    "pack": "deltatune.packing.bins",
    "pack_shuffled": "deltatune.packing.shuffled",
    "parallelize": "deltatune.parallel.parallelize",
    "prepare": "deltatune.preparation",
    "verify": "deltatune.verification",
}


def __getattr__(name: str) -> object:
    if name == "ops":
        return importlib.import_module("deltatune.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'deltatune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
