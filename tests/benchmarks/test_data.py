"""The comparison of tokenising runs and compares the same work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import compare, packing
from deltatune.data.epochs import Epochs
from deltatune.data.mixture import Mixture


def test_every_system_is_timed_on_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    found = compare(tmp_path, rows=30, num_proc=1, turns=1)
    assert list(found) == ["deltatune", "map(apply_chat_template)", "map(our renderer)"]
    assert all(cpu > 0 and wall > 0 for cpu, wall in found.values())


def test_packing_says_what_it_took() -> None:
    assert packing(2000).startswith("2,000 documents packed in ")


def test_memory_of_packing_is_bounded_by_the_document() -> None:
    """Some ten numbers of four bytes for each: ten million documents take half a gigabyte."""
    import tracemalloc

    lengths = np.random.default_rng(0).integers(5, 400, 40_000).astype(np.int32)
    tracemalloc.start()
    try:
        epochs = Epochs(lengths, 4096, Mixture.of([lengths]), seed=0)
        epochs(1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / lengths.size < 60, "bytes a document"
