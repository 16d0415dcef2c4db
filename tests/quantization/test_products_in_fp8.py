"""Weights that compute in fp8: forward, backward, beside adapters, in one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltatune import CompileOptions, ops, prepare
from deltatune.quantization.tensor import QuantizedTensor, computes_in_fp8, in_fp8, stored_bytes
from lora_cases import assert_gradients_close, fused_layers, packed_call, relative
from quantized_models import adapted, decoded, quantize_layers, quantized
from tiny import tiny_model


def linear(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=bias)
    layer.weight = nn.Parameter(in_fp8(quantized(layer.weight, "fp8")), requires_grad=False)
    return layer


def to_fp8(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedTensor):
                module._parameters[name] = nn.Parameter(in_fp8(weight), requires_grad=False)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_both_directions_multiply_codes(bias: bool) -> None:
    layer = linear(bias=bias)
    weight, x = layer.weight, torch.randn(2, 7, 64, requires_grad=True)
    y = layer(x)
    expected = ops.fp8_mm(x.detach().view(14, 64), weight.codes, weight.scales).view(2, 7, 96)
    torch.testing.assert_close(y, expected + layer.bias if bias else expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    turned = weight.codes.float().mT.contiguous().to(torch.float8_e4m3fn)
    torch.testing.assert_close(dx, ops.fp8_mm(dy.view(14, 96), turned, of_x=weight.scales).view(2, 7, 64))
    plain = decoded(layer)
    assert 0.01 < relative(y, plain(x)) < 0.04
    assert 0.01 < relative(dx, torch.autograd.grad(plain(x), x, dy)[0]) < 0.04


def test_it_takes_the_memory_of_16_bits_and_stays_in_fp8_when_it_moves() -> None:
    layer = linear()
    assert stored_bytes(layer.weight) == 2 * 64 * 96 + 4 * 96
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).to(torch.bfloat16), layer.requires_grad_(False)):
        assert computes_in_fp8(other.weight)
        assert computes_in_fp8(other.weight.mT)
    assert torch.equal(layer.weight.decoded(), decoded(layer).weight)
    for weight in (quantized(torch.randn(16, 64)), quantized(torch.randn(2, 16, 32), "fp8")):
        assert not computes_in_fp8(weight)
        with pytest.raises(ValueError, match="take a matrix in fp8 with a scale for each output channel"):
            in_fp8(weight)


def pair():
    """Computing in fp8, and with the values of the same weights; the same adapters."""
    model = tiny_model("qwen3_5")
    quantize_layers(model, "fp8")
    plain = decoded(model)
    return adapted(to_fp8(model)), adapted(plain)


def test_gradients_of_adapters_are_near_those_of_the_values() -> None:
    found, plain = pair()
    for model in (found, plain):
        prepare(model, lora="fused")
    assert fused_layers(found) == fused_layers(plain) > 0
    losses = [model(**packed_call()).loss for model in (found, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0] != losses[1]
    assert relative(*losses) < 1e-2
    for (name, ours), theirs in zip(found.named_parameters(), plain.parameters(), strict=True):
        if ours.grad is not None:
            assert torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("how", ["auto", "stock"])
def test_every_way_of_adapters_computes_the_same(how: str) -> None:
    fused, other = pair()[0], pair()[0]
    prepare(fused, lora="fused")
    prepare(other, lora=how)
    for model in (fused, other):
        model(**packed_call()).loss.backward()
    # sums in another order round other values of activations to fp8
    for ours, theirs in zip(fused.parameters(), other.parameters(), strict=True):
        if ours.grad is not None:
            assert relative(ours.grad, theirs.grad) < 0.1


def test_compiled() -> None:
    found, other = pair()[0], pair()[0]
    prepare(found, lora="fused", compile=CompileOptions(), checkpointing="layer")
    prepare(other, lora="fused")
    for model in (found, other):
        model(**packed_call()).loss.backward()
    assert_gradients_close(found, other, 0.1)
