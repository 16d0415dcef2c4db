"""Head normalisation and rotary embedding against the formula and against the stock modules."""

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, apply_rotary_pos_emb

from deltatune.ops import RmsNormRopeSpec, _nvidia, choose, rms_norm_rope
from deltatune.ops._rms_norm_rope.api import rms_norm_rope_pair

EPS = 1e-6


def make_inputs(*, batch=2, tokens=5, heads=3, dim=8, rotary=4, rows=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(dim, generator=generator, dtype=torch.float64)
    angles = 3 * torch.randn(rows or batch, tokens, rotary // 2, generator=generator, dtype=torch.float64)
    angles = torch.cat([angles, angles], dim=-1)
    x, weight, cos, sin = (t.to(dtype) for t in (x, weight, angles.cos(), angles.sin()))
    return x.requires_grad_(), weight.requires_grad_(), cos, sin


@pytest.mark.parametrize("rotary", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_is_a_norm_and_a_turn_in_the_complex_plane(rotary, rows):
    x, weight, cos, sin = make_inputs(rotary=rotary, rows=rows, dtype=torch.float64)
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    half = rotary // 2
    turn = torch.complex(cos[..., :half], sin[..., :half]).unsqueeze(2)
    turned = torch.complex(normed[..., :half], normed[..., half:rotary]) * turn
    expected = torch.cat([turned.real, turned.imag, normed[..., rotary:]], dim=-1)
    got = rms_norm_rope(x, weight, cos, sin, eps=EPS)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_without_weight_it_still_normalises():
    x, weight, cos, sin = make_inputs(dtype=torch.float64)
    got = rms_norm_rope(x, None, cos, sin, eps=EPS)
    torch.testing.assert_close(got, rms_norm_rope(x, torch.ones_like(weight), cos, sin, eps=EPS))
    offset = rms_norm_rope(x, torch.zeros_like(weight), cos, sin, eps=EPS, unit_offset=True)
    torch.testing.assert_close(got, offset)
    torch.testing.assert_close(rms_norm_rope(x * 1e3, None, cos, sin, eps=EPS), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm", "unit_offset"), [(Qwen3RMSNorm, False), (Qwen3_5RMSNorm, True)])
def test_rounds_as_the_stock_modules_do(norm, unit_offset, dtype, rope_dtype):
    x, weight, cos, sin = make_inputs(dtype=dtype)
    cos, sin = cos.to(rope_dtype), sin.to(rope_dtype)
    stock = norm(8, eps=EPS).to(dtype)
    stock.weight.data.copy_(weight)
    got = rms_norm_rope(x, stock.weight, cos, sin, eps=EPS, unit_offset=unit_offset)
    heads_first = stock(x).transpose(1, 2)
    expected = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[0].transpose(1, 2)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    wanted = (x, stock.weight)
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), wanted) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradients(unit_offset):
    x, weight, cos, sin = make_inputs(batch=1, tokens=2, heads=2, dim=4, rotary=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, weight: rms_norm_rope(x, weight, cos, sin, eps=EPS, unit_offset=unit_offset), (x, weight)
    )


def test_compiles_whole():
    """Traced alone: compile/test_graphs.py has a model's attention with generated code."""
    torch._dynamo.reset()
    x, weight, cos, sin = make_inputs(rows=1)
    got = torch.compile(rms_norm_rope, fullgraph=True, backend="aot_eager")(
        x, weight, cos, sin, eps=EPS, unit_offset=True
    )
    expected = rms_norm_rope(x, weight, cos, sin, eps=EPS, unit_offset=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weight)) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_non_contiguous_input():
    x, weight, cos, sin = make_inputs()
    strided = torch.cat([x, -x], dim=-1).detach()[..., :8]
    assert not strided.is_contiguous()
    got, expected = (rms_norm_rope(y, weight, cos, sin, eps=EPS) for y in (strided, x))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 8)}, r"x must have 4 dims; expected x \[B, T, N, D\], cos \[B, T, R\]"),
        ({"weight": torch.zeros(7)}, "weight has D=7 where 8 is expected"),
        ({"cos": torch.zeros(3, 5, 4)}, "cos has B=3 where 2 is expected"),
        ({"sin": torch.zeros(2, 4, 4)}, "sin has T=4 where 5 is expected"),
        ({"sin": torch.zeros(1, 5, 4)}, "sin has B=1 where 2 is expected"),
        ({"cos": torch.zeros(2, 5, 3), "sin": torch.zeros(2, 5, 3)}, "must be even and at most D=8, got R=3"),
        ({"cos": torch.zeros(2, 5, 10), "sin": torch.zeros(2, 5, 10)}, "must be even and at most D=8, got R=10"),
        ({"x": torch.zeros(2, 5, 3, 8, dtype=torch.long)}, "x must be floating point"),
        ({"impl": "fused"}, "unknown impl='fused'; expected 'auto' or one of 'triton', 'reference'"),
        ({"impl": "triton"}, "impl='triton' cannot run here: triton needs an NVIDIA GPU, the inputs are on cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    x, weight, cos, sin = make_inputs()
    with pytest.raises(ValueError, match=message):
        rms_norm_rope(**{"x": x, "weight": weight, "cos": cos, "sin": sin, "eps": EPS} | change)


def test_a_pair_is_two_calls():
    (q, q_weight, cos, sin), (k, k_weight, *_) = make_inputs(heads=4), make_inputs(heads=2)
    pair = rms_norm_rope_pair(q, k, q_weight, k_weight, cos, sin, eps=EPS, unit_offset=True)
    for got, (x, weight) in zip(pair, ((q, q_weight), (k, k_weight)), strict=True):
        assert torch.equal(got, rms_norm_rope(x, weight, cos, sin, eps=EPS, unit_offset=True))
    with pytest.raises(ValueError, match="cos has T=5 where 4 is expected"):
        rms_norm_rope_pair(q, k[:, :4], q_weight, k_weight, cos, sin, eps=EPS)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, "reference"),
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.float64, "reference"),
    ],
)
def test_the_choice_says_what_runs(device, dtype, expected):
    pytest.importorskip("triton", reason="needs triton")
    assert choose(RmsNormRopeSpec(torch.device(device), dtype)).impl == expected


def test_the_kernel_is_refused_with_a_remedy(monkeypatch):
    def refused(**options):
        with pytest.raises(ValueError, match="impl='triton' cannot run here") as error:
            choose(RmsNormRopeSpec(torch.device("cuda"), **options), "triton")
        return str(error.value)

    assert "takes bf16, fp16 and fp32, got torch.float64; cast the inputs" in refused(dtype=torch.float64)
    monkeypatch.setattr(_nvidia, "_has_triton", lambda: True)
    assert "detach them or use impl='reference'" in refused(dtype=torch.float32, angles_grad=True)
    monkeypatch.setattr(_nvidia, "_has_triton", lambda: False)
    assert "triton is not installed; pip install triton" in refused(dtype=torch.float32)
    assert choose(RmsNormRopeSpec(torch.device("cuda"), torch.float32)).impl == "reference"
