"""Weights that compute in fp8: forward, backward, beside adapters, of experts, in one graph; documents stay apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltatune import CompileOptions, Sequences, ops, prepare, verify
from deltatune.compile.memory import estimate_memory
from deltatune.ops._fp8_mm import api
from deltatune.ops._grouped_mm import reference
from deltatune.ops._grouped_mm.linear import columns_of
from deltatune.ops._lora_linear.api import linear_with_lora
from deltatune.quantization.products import compute_in_fp8, op_specs, quantized_weights, why_decoded
from deltatune.quantization.tensor import QuantizedTensor, computes_in_fp8, in_fp8, stored_bytes
from lora_cases import assert_gradients_close, fused_layers, packed_call, relative
from quantized_models import adapted, compiled, decoded, quantize_layers, quantized
from tiny import tiny_model

CPU = torch.device("cpu")
#: wide enough that most products are computed in fp8
SIZES = {"hidden_size": 128, "intermediate_size": 96, "linear_value_head_dim": 32}
EXPERTS = {"hidden_size": 128, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}
FAMILIES: dict[str, dict[str, int]] = {
    "qwen3": {"hidden_size": 128, "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 32},
    "qwen3_5": SIZES,
    "qwen3_5_moe": {**EXPERTS, "linear_value_head_dim": 32},
    "gpt_oss": {"hidden_size": 128, "intermediate_size": 48},
}
#: Rounding to three bits moves a value by this share of it in the root mean square, whatever its exponent: errors are
#: even over a step, 2^-3 of the lowest value of a binade, and values even over the binade.
ROUNDING = 0.026


def linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=bias)
    layer.weight = nn.Parameter(in_fp8(quantized(layer.weight, "fp8")), requires_grad=False)
    return layer


@pytest.mark.parametrize("called", [lambda layer: layer, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [False, True])
def test_both_directions_multiply_codes(bias: bool, called: Any) -> None:
    layer = linear(bias=bias)
    weight, x = layer.weight, torch.randn(2, 7, 64, requires_grad=True)
    y = called(layer)(x)
    expected = ops.fp8_mm(x.detach().view(14, 64), weight.codes, weight.scales).view(2, 7, 96)
    torch.testing.assert_close(y, expected + layer.bias if bias else expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    turned = weight.codes.float().mT.contiguous().to(torch.float8_e4m3fn)
    torch.testing.assert_close(dx, ops.fp8_mm(dy.view(14, 96), turned, of_x=weight.scales).view(2, 7, 64))
    plain = decoded(layer)
    assert 0.01 < relative(y, plain(x)) < 0.04
    assert 0.01 < relative(dx, torch.autograd.grad(plain(x), x, dy)[0]) < 0.04


@pytest.mark.parametrize("transposed", [False, True])
def test_both_directions_of_a_group_multiply_its_codes(transposed: bool) -> None:
    torch.manual_seed(0)
    given = torch.randn(3, 64, 96) if transposed else torch.randn(3, 96, 64)
    weight: Any = in_fp8(quantized(given, "fp8", transposed=transposed).data)
    x, offsets = torch.randn(9, 64, requires_grad=True), torch.tensor([4, 4, 8], dtype=torch.int32)
    upright = weight.mT if transposed else weight
    y = ops.grouped_linear(x, upright, offsets)
    assert torch.equal(y, ops.fp8_mm(x.detach(), weight.codes, weight.scales, offsets=offsets))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, ops.fp8_mm(dy, weight.turned, of_x=weight.scales, offsets=offsets))
    plain = ops.grouped_linear(x, upright.decoded(), offsets)
    assert 0.01 < relative(y, plain) < 0.04
    assert 0.01 < relative(dx, torch.autograd.grad(plain, x, dy)[0]) < 0.04
    assert not y[8:].any()
    assert not dx[8:].any()


def test_it_takes_the_memory_of_16_bits_and_stays_in_fp8_when_it_moves() -> None:
    layer = linear()
    assert stored_bytes(layer.weight) == 2 * 64 * 96 + 4 * 96
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).to(torch.bfloat16), layer.requires_grad_(False)):
        assert computes_in_fp8(other.weight)
        assert computes_in_fp8(other.weight.mT)
    assert torch.equal(layer.weight.decoded(), decoded(layer).weight)
    stack: Any = in_fp8(quantized(torch.randn(2, 16, 32), "fp8"))
    assert computes_in_fp8(stack[1])
    assert torch.equal(stack[1].decoded(), stack.decoded()[1])
    with pytest.raises(ValueError, match=r"take a weight in fp8, got nf4 \[16, 64\]"):
        in_fp8(quantized(torch.randn(16, 64)))


@pytest.mark.parametrize("shape", [(192, 160), (2, 130, 192)])
def test_blocks_are_rounded_once_more(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = QuantizedTensor(ops.quantize(torch.randn(shape), "fp8", blocks=True), torch.float32)
    found = in_fp8(weight)
    assert (found.rounded, in_fp8(found).rounded, in_fp8(quantized(torch.randn(shape), "fp8")).rounded) == (
        True, False, False,
    )  # fmt: skip
    values, again = weight.decoded(), found.decoded()
    large = values.abs() > values.abs().amax(-1, keepdim=True) * 2.0**-6 / 448  # what is below has fewer bits
    assert ((again - values).abs() <= values.abs() / 16 * 1.0001)[large].all()
    assert 0.8 * ROUNDING < relative(again, values) < 1.1 * ROUNDING


def test_blocks_as_wide_as_a_channel_keep_their_values() -> None:
    weight = QuantizedTensor(ops.quantize(torch.randn(2, 200, 112), "fp8", blocks=True), torch.float32)
    assert weight.scales.shape == (2, 2, 1)
    found = in_fp8(weight)
    assert not found.rounded
    assert torch.equal(found.decoded(), weight.decoded())


def pair(family: str = "qwen3_5", *, dtype: torch.dtype = torch.float32, layers: int = 2) -> tuple[Any, Any]:
    """Computing in fp8, and with the values of the same weights; the same adapters."""
    model = tiny_model(family, dtype=dtype, layers=layers, **FAMILIES[family])
    quantize_layers(model, "fp8")
    plain = decoded(model)
    compute_in_fp8(model, CPU, dtype)
    return adapted(model), adapted(plain)


def step(model: Any) -> Tensor:
    loss: Tensor = model(**packed_call()).loss
    loss.backward()
    return loss


def with_noise(x: Tensor, codes: Tensor, scales: Tensor | None = None, **given: Any) -> Tensor:
    """``ops.fp8_mm`` of values that each are another by as much as rounding makes of them, at random."""
    of_x, offsets = given.get("of_x"), given.get("offsets")
    values = x.float() if of_x is None else x.float() * columns_of(of_x, offsets, x.shape[0])
    values = values * (1 + ROUNDING * 3**0.5 * (2 * torch.rand_like(values) - 1))
    weight = codes.float() if scales is None else codes.float() * scales
    y = values @ weight.mT if offsets is None else reference.product(values, weight, offsets, None, None)
    beside = given.get("beside")
    return y.to(x.dtype) if beside is None else torch.addmm(y.to(x.dtype), *beside)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_adapters_are_as_far_from_those_of_the_values_as_rounding_moves_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What noise of the size of the rounding does to them, in the same places, is what rounding may do.

    An error of e times the gradient turns it by e at most, so its cosine to that of the values is 1 - e^2 / 2 at least.
    """
    found, plain = pair(family, dtype=torch.bfloat16)
    noisy = copy.deepcopy(found)
    for model in (found, plain, noisy):
        prepare(model, lora="fused")
    assert fused_layers(found) == fused_layers(plain) > 0
    losses = [step(model) for model in (found, plain)]
    with monkeypatch.context() as patched:
        patched.setattr(ops, "fp8_mm", with_noise)
        torch.manual_seed(0)
        step(noisy)
    assert losses[0] != losses[1]
    assert relative(*losses) < 1e-2
    ours, theirs, moved = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        for model in (found, plain, noisy)
    )
    allowed = 1.5 * relative(moved, theirs)
    assert relative(ours, theirs) < allowed < 0.3
    assert torch.cosine_similarity(ours, theirs, dim=0) > 1 - allowed**2 / 2


@pytest.mark.parametrize(
    ("family", "how"), [("qwen3_5", "stock"), ("qwen3_5", "fused"), ("qwen3_5_moe", "auto"), ("qwen3_5_moe", "fused")]
)
def test_what_computes_in_fp8_is_never_decoded(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(family)
    prepare(model, lora=how)
    weights = [weight for _, _, weight in quantized_weights(model)]
    multiplied = {weight.codes.data_ptr() for weight in weights if computes_in_fp8(weight)}
    assert 0 < len(multiplied) < len(weights)
    seen, real = set(), ops.dequantize

    def decode(weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.add(weight.codes.data_ptr())
        return real(weight, *args, **kwargs)

    monkeypatch.setattr(ops, "dequantize", decode)
    step(model)
    assert seen == {weight.codes.data_ptr() for weight in weights} - multiplied


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_mode_computes_in_fp8_too(family: str) -> None:
    model, plain = pair(family)
    prepare(model)
    with torch.no_grad():
        expected = model(**packed_call()).loss
        other = plain(**packed_call()).loss
    with torch.inference_mode():
        assert torch.equal(model(**packed_call()).loss, expected)
    assert not torch.equal(expected, other)


def test_layers_that_share_an_input_each_compute_in_their_own_precision() -> None:
    """The gradient of the input is a sum of both."""
    torch.manual_seed(0)
    eight: Any = in_fp8(quantized(torch.randn(96, 64), "fp8").data)
    others: list[Any] = [quantized(torch.randn(72, 64), "fp8").data, torch.randn(80, 64)]
    adapters = [[ops.Adapter(torch.randn(4, 64), torch.randn(n, 4), 0.5)] for n in (96, 72, 80)]
    x = torch.randn(9, 64, requires_grad=True)
    outputs = linear_with_lora(x, [eight, *others], adapters)
    grads = [torch.randn_like(y) for y in outputs]
    (dx,) = torch.autograd.grad(outputs, x, grads)
    expected = ops.fp8_mm(grads[0], eight.turned, of_x=eight.scales)
    expected = expected + sum(dy @ w for dy, w in zip(grads[1:], [others[0].decoded(), others[1]], strict=True))
    expected = expected + sum(dy @ b @ a * scale for dy, [(a, b, scale)] in zip(grads, adapters, strict=True))
    assert relative(dx, expected) < 1e-6


@pytest.mark.parametrize("how", ["auto", "stock"])
def test_every_way_of_adapters_computes_the_same(how: str) -> None:
    fused, other = pair()[0], pair()[0]
    prepare(fused, lora="fused")
    prepare(other, lora=how)
    for model in (fused, other):
        step(model)
    # sums in another order round other values of activations to fp8
    for ours, theirs in zip(fused.parameters(), other.parameters(), strict=True):
        if ours.grad is not None:
            assert relative(ours.grad, theirs.grad) < 0.1


@pytest.mark.parametrize(
    ("family", "layers", "checkpointing", "backend"),
    [
        ("qwen3_5", 2, "none", "aot_eager"),
        pytest.param("gpt_oss", 1, "layer", "inductor", marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", 2, "layer", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled(family: str, layers: int, checkpointing: str, backend: Any) -> None:
    found, other = (pair(family, layers=layers)[0] for _ in range(2))
    prepared = prepare(found, lora="fused", compile=CompileOptions(backend=backend), checkpointing=checkpointing)
    prepare(other, lora="fused")
    for model in (found, other):
        step(model)
    assert_gradients_close(found, other, 0.1)
    assert prepared.compile_report is not None
    assert not prepared.compile_report.breaks


def one_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """What per-token scales are not: that of the largest value of all rows."""
    scale = x.float().abs().amax() / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale.expand(x.shape[0], 1).contiguous()


@pytest.mark.parametrize("rows", [True, False], ids=["a scale for each row", "one for all"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_documents_do_not_see_each_other(family: str, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens in the last document change no bit of the others, forward or backward; with one scale they do."""
    if not rows:
        monkeypatch.setattr(api, "quantize_rows", one_scale)
    model, _ = pair(family)
    prepare(model, lora="fused")
    tokens, kept = packed_call()["input_ids"], 36
    found = []
    for other in (False, True):
        given = tokens.clone()
        given[:, kept:] = (given[:, kept:] + 11 * other) % 90
        inputs = (
            model.get_input_embeddings()(given).detach()
            * torch.where(torch.arange(43) < kept, 1, 1 + 9 * other)[None, :, None]
        )
        inputs.requires_grad_()
        logits = model(inputs_embeds=inputs, sequences=Sequences.from_lengths([5, 1, 30, 7])).logits
        (grad,) = torch.autograd.grad(logits.square().sum(), inputs)
        found.append((logits[:, :kept].detach(), grad[:, :kept]))
    assert all(torch.equal(*parts) for parts in zip(*found, strict=True)) == rows


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_finds_documents_independent(family: str) -> None:
    model, _ = pair(family)
    prepare(model)
    report = verify(model, lengths=[5, 1, 9])
    assert report.ok, report
    assert all(row.cross_document_gradient == 0 for row in report.rows)


def test_which_weights_compute_in_fp8() -> None:
    shapes = {
        "wide": (128, 64),
        "narrow": (64, 128),
        "odd": (128, 72),
        "a stack": (2, 48, 64),
        "an odd one": (2, 48, 72),
    }
    weights = {name: quantized(torch.randn(shape), "fp8").data for name, shape in shapes.items()}
    found = {name: why_decoded(weight, CPU, torch.float32) for name, weight in weights.items()}
    assert found == {
        "wide": None,
        "narrow": "no more than 64 outputs, part of the adapters' product in backward",
        "odd": "widths that are no multiples of 16",
        "a stack": None,
        "an odd one": "widths that are no multiples of 16",
    }
    assert why_decoded(quantized(torch.randn(128, 64)).data, CPU, torch.float32) == "in nf4"
    model = nn.ModuleDict({name: nn.Module() for name in shapes})
    for name, weight in weights.items():
        model[name].weight = nn.Parameter(weight, requires_grad=False)
    for _ in range(2):  # again changes nothing
        compute_in_fp8(model, CPU, torch.float32)
        kept = {name: model[name].weight for name in shapes}
        assert {name for name, weight in kept.items() if computes_in_fp8(weight)} == {"wide", "a stack"}
    turned = kept["wide"].turned
    compute_in_fp8(model, CPU, torch.float32)
    assert model["wide"].weight.turned is turned
    assert {(spec.op, getattr(spec, "shape", None)) for spec in op_specs(model, CPU, torch.float32)} == {
        ("fp8_mm", torch.Size((128, 64))), ("fp8_mm", torch.Size((2, 48, 64))), ("dequantize", None),
    }  # fmt: skip
    del model["wide"], model["a stack"]
    with pytest.raises(ValueError, match=r"no weight can compute in fp8: no more than 64 outputs.*; widths that"):
        compute_in_fp8(model, CPU, torch.float32)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_model_without_weights_is_planned(blocks: bool) -> None:
    weight = QuantizedTensor(ops.quantize(torch.randn(192, 160), "fp8", blocks=blocks), torch.float32)
    model = nn.Linear(160, 192, bias=False)
    model.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    compute_in_fp8(model, CPU, torch.float32)
    assert computes_in_fp8(model.weight)
    assert model.weight.device.type == "meta"
    assert stored_bytes(model.weight) == stored_bytes(in_fp8(weight))
    assert model.weight.rounded == blocks


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe"])
def test_the_memory_estimate_counts_rows_that_become_codes(family: str) -> None:
    """Of the widest product: 128 values of a row, once for each expert of a token, in float32 twice and fp8."""
    found, plain = pair(family)
    visits = getattr(found.config, "num_experts_per_tok", None) or 1
    estimates = [estimate_memory(model, tokens_per_batch=4096).activations for model in (found, plain)]
    assert estimates[0] - estimates[1] == 4096 * visits * 128 * (4 + 4 + 1)


def test_the_implementations_of_weights_are_named_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    report = prepare(model).report
    assert {row.op: row.impl for row in report.kernels}.items() >= {
        ("fp8_mm", "reference"),
        ("dequantize", "reference"),
    }
    asked, real = [], ops.dequantize

    def decode(*args: Any, impl: str, **kwargs: Any) -> Tensor:
        asked.append(impl)
        return real(*args, impl=impl, **kwargs)

    monkeypatch.setattr(ops, "dequantize", decode)
    prepared = prepare(model, kernels={"dequantize": "reference", "fp8_mm": "reference"})
    assert {row.op: row.reason for row in prepared.report.kernels}["dequantize"] == "named by the caller"
    step(model)
    assert set(asked) == {"reference"}
    weight = next(weight for _, _, weight in quantized_weights(copy.deepcopy(model)))
    assert weight.mT.impls == weight.detach().impls == ("reference", "reference")
    prepared.revert()
    assert {weight.impls for _, _, weight in quantized_weights(model)} == {("auto", "auto")}
    for op in ("dequantize", "fp8_mm"):
        with pytest.raises(ValueError, match=f"{op}: impl='{'triton' if op == 'dequantize' else 'torch'}' cannot run"):
            prepare(model, kernels={op: "triton" if op == "dequantize" else "torch"})
        with pytest.raises(ValueError, match=f"'{op}' is not an op of qwen3; expected one of"):
            prepare(tiny_model("qwen3"), kernels={op: "reference"})
