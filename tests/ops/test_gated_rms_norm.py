"""The gated normalisation against its formula and against the stock module."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from deltatune.ops import GatedRmsNormSpec, choose, gated_rms_norm


def make_inputs(shape=(2, 5, 3, 8), *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, shape, shape[-1:]]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (7, 16), (4,)])
def test_is_the_formula(shape):
    x, gate, weight = make_inputs(shape, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight * gate * gate.sigmoid()
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, eps=1e-3), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_as_the_stock_module_does(dtype, weight_dtype):
    inputs = [x.detach() for x in make_inputs(dtype=dtype)]
    stock = Qwen3_5RMSNormGated(8, eps=1e-6).to(weight_dtype)
    stock.weight.data.copy_(inputs[2])
    x, gate = (t.clone().requires_grad_() for t in inputs[:2])
    got = gated_rms_norm(x, gate, stock.weight, eps=1e-6)
    expected = stock(x, gate)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    wanted = (x, gate, stock.weight)
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), wanted) for y in (got, expected)), strict=True):
        assert torch.equal(a, b)


def test_gradients():
    x, gate, weight = make_inputs((3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *args: gated_rms_norm(*args, eps=1e-6), (x, gate, weight))


def test_compiles_whole():
    torch._dynamo.reset()
    inputs = make_inputs()
    got = torch.compile(gated_rms_norm, fullgraph=True, backend="aot_eager")(*inputs, eps=1e-6)
    expected = gated_rms_norm(*inputs, eps=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs():
    x, gate, weight = make_inputs()
    strided = torch.cat([x, gate], dim=-1).detach()
    got = gated_rms_norm(strided[..., :8], strided[..., 8:], weight, eps=1e-6)
    torch.testing.assert_close(got, gated_rms_norm(x, gate, weight, eps=1e-6))


def test_zeros_stay_zeros():
    x, gate, weight = make_inputs()
    assert F.silu(gate).abs().min() > 0
    assert gated_rms_norm(torch.zeros_like(x), gate, weight, eps=1e-6).count_nonzero() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gate": torch.zeros(2, 5, 3, 7)},
            r"expected x \[..., D\], gate \[..., D\], weight \[D\]; got.*\[2, 5, 3, 7\]",
        ),
        ({"weight": torch.zeros(1)}, r"weight \[1\]"),
        ({"gate": torch.zeros(2, 5, 3, 8, dtype=torch.long)}, "gate must be floating point"),
        ({"weight": torch.zeros(8, device="meta")}, "weight is on meta but x is on cpu"),
        ({"impl": "fused"}, "unknown impl='fused'; expected 'auto' or one of 'triton', 'reference'"),
        ({"impl": "triton"}, "impl='triton' cannot run here: triton needs an NVIDIA GPU, the inputs are on cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    x, gate, weight = make_inputs()
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**{"x": x, "gate": gate, "weight": weight, "eps": 1e-6} | change)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cpu", torch.float32, "reference"), ("cuda", torch.bfloat16, "triton"), ("cuda", torch.float64, "reference")],
)
def test_the_choice_says_what_runs(device, dtype, expected):
    pytest.importorskip("triton", reason="needs triton")
    assert choose(GatedRmsNormSpec(torch.device(device), dtype)).impl == expected
