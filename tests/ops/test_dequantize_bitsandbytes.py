"""nf4 beside bitsandbytes on the CPU: the same bytes, and the same values of them (``make test-optimizers``)."""

from __future__ import annotations

import pytest
import torch

from deltatune import ops

functional = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").functional


@pytest.mark.parametrize("shape", [(64, 64), (200, 320), (48, 4), (64, 96), (700, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bytes_and_values_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for trial in range(5):
        weight = (0.03 * torch.randn(2, *shape) * (1 + torch.rand(2, shape[0], 1))).to(dtype)
        weight[0, :2] = 0
        ours = ops.quantize(weight, "nf4")
        assert ours.extra is not None
        for group, matrix in enumerate(weight):
            codes, state = functional.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4", blocksize=64)
            nested = torch.cat([state.state2.absmax, state.state2.code, state.offset.view(1)])
            assert torch.equal(ours.codes[group].flatten(), codes.flatten()), trial
            assert torch.equal(ours.scales[group], state.absmax), trial
            assert torch.equal(ours.extra[group], nested), trial
            # 0.50.2 takes scales of other blocks where rows end inside one, with AVX-512
            if shape[1] % 64 == 0:
                values = functional.dequantize_4bit(codes, state)
                assert torch.equal(ops.dequantize(ours, dtype)[group], values), trial
