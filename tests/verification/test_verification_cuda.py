"""The probe on a GPU, whose kernels round in their own ways, those of the stock class too."""

from __future__ import annotations

import pytest
import torch

from deltatune import prepare, verify
from tiny import tiny_model

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

#: Head dims that the GPU's kernels take.
SIZES = {"hidden_size": 128, "head_dim": 64, "linear_key_head_dim": 128, "linear_value_head_dim": 128}


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_leak_and_no_other_function(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, layers=4, dtype=dtype, **SIZES).cuda()
    prepare(model)
    report = verify(model)
    assert report.ok, str(report)
