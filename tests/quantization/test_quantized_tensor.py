"""A weight in few bits acts as its values, keeps its codes alone, and is never written to."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from deltatune import CompileOptions, ops, prepare
from deltatune.compile.memory import estimate_memory
from deltatune.compile.offloading import offload_activations
from deltatune.ops import grouped_linear
from deltatune.quantization.tensor import QuantizedTensor, stored_bytes
from lora_cases import FEW, assert_gradients_close, assert_same, fused_layers, packed_call
from packed_cases import alone, packed
from quantized_models import adapted, both, compiled, decoded, quantize_layers, quantized
from tiny import tiny_model

FORMATS = ["nf4", "fp8"]


def linear(format: str = "nf4", *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(32, 64, bias=bias)
    layer.weight = quantized(layer.weight, format)
    return layer


def kept_by(call) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result, and what autograd saves for its backward."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        return call(), kept


@pytest.mark.parametrize("called", [lambda layer: layer, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_computes_with_the_values_and_keeps_the_codes(format: str, bias: bool, called: Any) -> None:
    layer = linear(format, bias=bias)
    plain = decoded(layer)
    x = torch.randn(2, 5, 32, requires_grad=True)
    call = called(layer)
    y, kept = kept_by(lambda: call(x))
    expected = plain(x)
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(grad, wanted)
    of_values = [x for x in kept if x.numel() == layer.weight.numel() and not isinstance(x, QuantizedTensor)]
    assert all(x.dtype.itemsize == 1 for x in of_values)


def test_it_is_a_parameter_of_the_values_shape_and_dtype() -> None:
    weight = linear().weight
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert (list(weight.shape), weight.stride(), weight.dtype) == ([64, 32], (32, 1), torch.float32)
    assert stored_bytes(weight) == 64 * 32 // 2 + 32 + 4 * (1 + 257)
    assert stored_bytes(torch.zeros(3)) == 12
    assert "nf4" in repr(weight)
    assert torch.zeros_like(weight).shape == (64, 32)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_transposes_and_the_matrices_of_a_stack_stay_in_few_bits(mode: Any) -> None:
    stack = quantized(torch.randn(3, 16, 32))
    with mode():
        values = stack.decoded()
        for taken, wanted in [
            (stack.mT, values.mT),
            (stack.transpose(-1, -2), values.mT),
            (stack[1], values[1]),
            (stack[1].t(), values[1].t()),
            (stack[1:], values[1:]),
            (stack.detach(), values),
            (stack.clone(), values),
            (stack.mT.mT, values),
        ]:
            assert isinstance(taken, QuantizedTensor)
            assert (taken.shape, taken.stride()) == (wanted.shape, wanted.stride())
            assert torch.equal(taken.decoded(), wanted)
        for taken, wanted in [
            (stack[:, 1], values[:, 1]),
            (stack.reshape(48, 32), values.reshape(48, 32)),
            (stack + 1, values + 1),
        ]:
            assert type(taken) is torch.Tensor
            assert torch.equal(taken, wanted)
        x = torch.randn(5, 32)
        assert torch.equal(F.linear(x, stack[2]), F.linear(x, values[2]))
        assert torch.equal(torch.bmm(x.expand(3, 5, 32), stack.mT), torch.bmm(x.expand(3, 5, 32), values.mT))


@pytest.mark.parametrize("blocks", [True, False])
def test_what_has_other_scales_is_refused_before_a_part_is_written(blocks: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (
        QuantizedTensor(ops.quantize(torch.randn(192, 160), "fp8", blocks=each), torch.float32)
        for each in (blocks, not blocks)
    )
    values = ours.decoded()
    with pytest.raises(RuntimeError, match="would write to a weight in fp8"):
        ours.copy_(theirs)
    assert torch.equal(ours.decoded(), values)


def test_it_moves_and_casts_in_inference_mode() -> None:
    layer = linear("fp8")
    with torch.inference_mode():
        moved = [layer.weight.to(torch.bfloat16), layer.weight.to("meta"), layer.weight.contiguous()]
    assert all(isinstance(weight, QuantizedTensor) for weight in moved)
    values = torch.zeros(64, 32)
    with torch.inference_mode():
        assert torch.equal(values.copy_(layer.weight), layer.weight.decoded())
        assert torch.equal(torch.zeros(64, 32).copy_(layer.weight), values)


def test_it_moves_casts_copies_saves_and_loads() -> None:
    layer = linear("fp8")
    values = layer.weight.decoded()
    copied = copy.deepcopy(layer)
    assert copied.weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    assert (narrow.weight.dtype, narrow.weight.scales.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(narrow.weight.decoded(), values.bfloat16())
    assert copy.deepcopy(layer).to("meta").weight.codes.is_meta
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = linear("fp8")
    other.weight.scales.zero_()
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(other.weight.decoded(), values)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.add_(1),
        lambda w: w.data.copy_(torch.zeros(64, 32)),
        lambda w: torch.mul(torch.ones(64, 32), 2, out=w.data),
        lambda w: w.data.copy_(linear("fp8").weight.data),
        lambda w: torch._foreach_add_([w.data], 1),
    ],
)
def test_nothing_writes_to_it(write) -> None:
    weight = linear().weight
    before = weight.decoded()
    with pytest.raises(RuntimeError, match="would write to a weight in nf4, which is frozen"):
        write(weight)
    assert torch.equal(weight.decoded(), before)


def test_matrices_without_rows_are_not_decoded(monkeypatch) -> None:
    weight, seen = quantized(torch.randn(3, 16, 32)), []
    real = ops.dequantize

    def decode(*args, offsets=None, impl="auto"):
        seen.append(offsets)
        return real(*args, offsets=offsets, impl=impl)

    monkeypatch.setattr(ops, "dequantize", decode)
    offsets, x = torch.tensor([2, 2, 5], dtype=torch.int32), torch.randn(5, 32, requires_grad=True)
    y = grouped_linear(x, weight, offsets)
    expected = torch.cat([x[:2] @ weight.decoded()[0].mT, x[2:] @ weight.decoded()[2].mT])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))
    assert [found is offsets for found in seen if found is not None] == [True, True]


@pytest.mark.parametrize(
    ("family", "format", "how"),
    [
        ("qwen3_5", "nf4", "fused"),
        ("qwen3_5_moe", "fp8", "fused"),
        ("gpt_oss", "nf4", "fused"),
        ("qwen3_next", "fp8", "auto"),
        ("mixtral", "nf4", "auto"),
        ("qwen3_5_moe", "nf4", "stock"),
    ],
)
def test_a_prepared_model_trains_as_one_of_the_values(family: str, format: str, how: str) -> None:
    found, plain = both(family, format)
    for model in (found, plain):
        prepare(model, lora=how)
    assert fused_layers(found) == fused_layers(plain) > 0
    assert_same(found, plain)


@pytest.mark.parametrize(
    ("family", "layers", "checkpointing", "backend"),
    [
        pytest.param("qwen3_5", 1, "none", "inductor", marks=pytest.mark.slow),
        pytest.param("gpt_oss", 1, "layer", "inductor", marks=pytest.mark.slow),
        ("qwen3_5_moe", 2, "layer", "aot_eager"),
    ],
)
def test_compiled(family: str, layers: int, checkpointing: str, backend: Any) -> None:
    found, plain = both(family, layers=layers, target_modules=FEW)
    prepare(found, lora="fused", compile=CompileOptions(backend=backend), checkpointing=checkpointing)
    prepare(plain, lora="fused")
    for model in (found, plain):
        model(**packed_call()).loss.backward()
    assert_gradients_close(found, plain)


@pytest.mark.slow
def test_compiled_layers_keep_no_values_and_offload_no_codes() -> None:
    found, plain = both("qwen3_5", "fp8", target_modules=FEW)
    moved = []
    for model in (found, plain):
        prepare(model, lora="fused", compile=CompileOptions(backend="aot_eager"))
        with offload_activations(model, device=torch.device("cpu"), least_bytes=1) as offloading:
            loss = model(**packed_call()).loss
        loss.backward()
        moved.append(offloading.moved_bytes)
    # factors of adapters may be kept scaled or not
    codes = sum(weight.codes.nbytes for weight in found.parameters() if isinstance(weight, QuantizedTensor))
    assert 0 < moved[1] <= moved[0] < moved[1] + codes // 2


def test_memory_is_that_of_codes_and_one_decoded_weight() -> None:
    found, plain = (model.base_model.model for model in both("qwen3_5_moe"))
    quantized_weights = [weight for weight in found.parameters() if isinstance(weight, QuantizedTensor)]
    less = sum(weight.numel() * 4 - stored_bytes(weight) for weight in quantized_weights)
    estimates = []
    for model in (found, plain):
        prepare(model)
        estimates.append(estimate_memory(model, tokens_per_batch=64))
    assert estimates[1].weights - estimates[0].weights == less
    assert estimates[0].activations - estimates[1].activations == max(w.numel() * 4 for w in quantized_weights)


def test_packed_equals_alone() -> None:
    model = tiny_model("qwen3_5")
    quantize_layers(model)
    adapted(model)
    loss = alone(copy.deepcopy(model))
    prepare(model)
    assert abs(packed(model) - loss) < 1e-5


@pytest.mark.parametrize("safe", [False, True])
def test_merging_makes_values_of_the_weights(safe: bool) -> None:
    found, plain = both("qwen3_5_moe")
    for model in (found, plain):
        prepare(model, lora="fused")
    tokens = packed_call()
    del tokens["labels"]
    before = found(**tokens).logits
    for model in (found, plain):
        model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(found(**tokens).logits, plain(**tokens).logits)
    torch.testing.assert_close(found(**tokens).logits, before, atol=1e-4, rtol=1e-4)
    merged = [name for name, weight in found.named_parameters() if name.endswith("base_layer.weight")]
    assert merged
    assert not any(isinstance(found.get_parameter(name), QuantizedTensor) for name in merged)
    found.unmerge_adapter()
    torch.testing.assert_close(found(**tokens).logits, before, atol=1e-4, rtol=1e-4)


def test_merging_in_a_model_that_is_not_prepared_is_refused() -> None:
    found, _ = both("qwen3_5")
    with pytest.raises(RuntimeError, match="would write to a weight in nf4"):
        found.merge_adapter()


def test_generation_is_that_of_the_values() -> None:
    found, plain = both("qwen3_5_moe")
    for model in (found, plain):
        prepare(model)
        model.eval()
    prompt = torch.arange(1, 9)[None]
    tokens = [model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False) for model in (found, plain)]
    assert torch.equal(*tokens)
