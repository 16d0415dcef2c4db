"""Packed documents that tests hand to prepared models."""

from __future__ import annotations

from typing import Any

import torch

from deltatune import Sequences
from tiny import documents

LENGTHS = [5, 1, 30, 7]


def packed_call(**extra: Any) -> dict[str, Any]:
    return {"input_ids": torch.cat(documents(LENGTHS))[None], "sequences": Sequences.from_lengths(LENGTHS), **extra}
