"""What every test shares."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# processes that tests start as well: where several share the cores, threads that wait for each other spin
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Dynamo would look for dead objects behind every graph
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")
# Inductor would compile and load a file for each set of vector instructions, to see whether it can: some seconds of the
# first compilation, and one of each other process that compiles
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
sys.path.insert(0, str(Path(__file__).parent))
# a compiler makes hundreds of thousands of objects that live on: a tenth of its time went into looking for dead ones
gc.set_threshold(100_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def earlier_files_are_not_searched() -> None:
    """Compilers keep millions of objects from test to test: the garbage collector need not look at them every time.

    Libraries call ``gc.collect`` themselves: behind test_compile.py, that was 15 s of training/test_run.py.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """What is still frozen when Python ends is never freed, and Triton's bindings would list it as leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """Tiny shapes run fastest on one thread; every run draws the same numbers."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
