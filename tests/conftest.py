"""What every test shares."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """Tiny shapes run fastest on one thread; every run draws the same numbers."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
