"""What files of Triton kernels share. It imports triton, so nothing imports it but what runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["DTYPES", "jit"]

#: ``triton.jit``, typed
jit: Callable[[Callable[..., Any]], Any] = triton.jit

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
