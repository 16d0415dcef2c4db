"""Hooks and forwards put on modules that a fused op would read: they act as on the stock model, whenever they come."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deltatune import CompileOptions, prepare
from packed_cases import alone, assert_same_gradients, packed, packed_call
from tiny import documents, tiny_conditional, tiny_model

COMPILED = CompileOptions(backend="aot_eager")


def _half(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * 0.5
    output.last_hidden_state = output.last_hidden_state * 0.5
    return output


def _half_input(_: nn.Module, args: Any) -> Any:
    return (args[0] * 0.5, *args[1:])


def _own_forward(module: nn.Module) -> None:
    inner = module.forward
    module.forward = types.MethodType(lambda self, *args: inner(*args) * 0.5, module)


def _third_of_gradient(_: nn.Module, grad_input: Any, __: Any) -> Any:
    return tuple(None if grad is None else grad / 3 for grad in grad_input)


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(_half),
    "pre": lambda m: m.register_forward_pre_hook(_half_input),
    "own forward": _own_forward,
    "full backward": lambda m: m.register_full_backward_hook(_third_of_gradient),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", _Halved()),
}
READ: dict[str, Callable[[Any], nn.Module]] = {
    "lm_head": lambda m: m.lm_head,
    "q_norm": lambda m: m.model.layers[-1].self_attn.q_norm,
    "k_norm": lambda m: m.model.layers[1].self_attn.k_norm,
    "gated norm": lambda m: m.model.layers[0].linear_attn.norm,
    "final norm": lambda m: m.model.norm,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("read", READ)
def test_what_is_hung_on_a_read_module_acts_as_on_the_stock_model(read: str, way: str) -> None:
    stock, model = tiny_model("qwen3_5").train(), tiny_model("qwen3_5").train()
    for each in (stock, model):
        WAYS[way](READ[read](each))
    expected = alone(stock)
    prepared = prepare(model)
    assert packed(model) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(model, stock)
    logits = model(**packed_call(labels=packed_call()["input_ids"], output_logits=True)).logits
    torch.testing.assert_close(logits, model(**packed_call()).logits)
    prepared.revert()
    (doc,) = documents([20])
    assert torch.equal(model(doc[None]).logits, stock(doc[None]).logits)


INNER = READ | {"mlp": lambda m: m.model.layers[0].mlp, "act": lambda m: m.model.layers[0].mlp.act_fn}


@pytest.mark.parametrize(
    ("family", "compile", "reads"),
    [
        *(("qwen3_5", None, (read,)) for read in INNER),
        # those in a layer, of which there is one to trace; the two norms of attention are alike
        ("qwen3", COMPILED, ("q_norm", "mlp", "act")),
        ("qwen3_5", COMPILED, ("gated norm",)),
    ],
)
def test_a_hook_acts_from_when_it_comes_until_it_goes(
    family: str, compile: CompileOptions | None, reads: tuple[str, ...]
) -> None:
    stock = tiny_model(family, layers=2 if compile is None else 1).train()
    model = copy.deepcopy(stock)
    prepare(model, compile=compile)
    without = packed(model)
    for read in reads:
        hooks = [INNER[read](each).register_forward_hook(_half) for each in (stock, model)]
        assert packed(model) == pytest.approx(alone(stock), rel=1e-5), read
        assert packed(model) != pytest.approx(without, rel=1e-4), read
        for hook in hooks:
            hook.remove()
        assert packed(model) == without, read


def test_hooks_that_differ_from_layer_to_layer_each_act_in_their_own() -> None:
    stock, model = tiny_model("qwen3").train(), tiny_model("qwen3").train()
    for each in (stock, model):
        for factor, layer in enumerate(each.model.layers, start=2):
            layer.mlp.register_forward_hook(lambda _, __, out, factor=factor: out / factor)
    expected = alone(stock)
    prepared = prepare(model, compile=COMPILED)
    assert packed(model) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(model, stock)
    assert prepared.compile_report is not None
    assert not prepared.compile_report.recompiles


def test_one_function_hung_on_every_layer_is_one_graph() -> None:
    model = tiny_model("qwen3", layers=3).train()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(_half)
    prepared = prepare(model, compile=COMPILED)
    packed(model)
    assert prepared.compile_report is not None
    assert list(prepared.compile_report.graphs.values()) == [1]


def test_a_hook_on_the_head_is_called_once_with_the_logits_of_the_call() -> None:
    model, seen = tiny_model("qwen3").train(), []
    prepare(model)
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(tuple(logits.shape)))
    packed(model)
    assert seen == [(1, 43, 96)]


@pytest.mark.parametrize("lora", [True, False])
def test_a_parametrization_that_came_after_prepare_is_refused_by_revert(lora: bool) -> None:
    model = tiny_model("qwen3")
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    prepared = prepare(model)
    expected = model(**packed_call()).logits
    norm = model.get_submodule("base_model.model.model.norm" if lora else "model.norm")
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    classes = [type(module) for module in model.modules()]
    for undo in (prepared.revert, lambda: prepare(model)):
        with pytest.raises(ValueError, match=r"model\.norm: ParametrizedQwen3RMSNorm was put over its class after"):
            undo()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**packed_call()).logits, expected)
    parametrize.remove_parametrizations(norm, "weight")
    prepared.revert()
    assert type(norm).__mro__[1] is nn.Module


def test_a_hook_on_the_text_model_reaches_the_loss() -> None:
    stock, model = tiny_model("qwen3_5").train(), tiny_model("qwen3_5").train()
    for each in (stock, model):
        each.model.register_forward_hook(_half)
    prepare(model)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert_same_gradients(model, stock)


def test_a_hook_between_the_text_model_and_the_head_reaches_the_loss() -> None:
    stock, model = tiny_conditional().train(), tiny_conditional().train()
    for each in (stock, model):
        each.model.register_forward_hook(_half)
    prepare(model)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)


@pytest.mark.parametrize("module", ["lm_head", "q_norm", "norm"])
def test_hooks_on_a_trained_copy_act(module: str) -> None:
    config = peft.LoraConfig(target_modules=["up_proj"], modules_to_save=[module])
    stock = peft.get_peft_model(tiny_model("qwen3"), config).train()
    copies = [m for n, m in stock.named_modules() if n.endswith(f"{module}.modules_to_save.default")]
    for trained in copies:
        trained.register_forward_hook(_half)
    model = copy.deepcopy(stock)
    prepare(model)
    assert copies
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)


def test_a_hook_on_the_convolution_is_refused_by_name() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    hook = model.model.layers[0].linear_attn.conv1d.register_forward_hook(_half)
    with pytest.raises(ValueError, match=r"Conv1d with _forward_hooks is read by a fused op"):
        model(**packed_call())
    hook.remove()
    parametrize.register_parametrization(model.model.layers[0].linear_attn.conv1d, "weight", _Halved())
    stock = tiny_model("qwen3_5").train()
    stock.model.layers[0].linear_attn.conv1d.weight.data.mul_(0.5)
    assert packed(model.train()) == pytest.approx(alone(stock), rel=1e-5)


@pytest.mark.parametrize("compile", [None, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", ["hook inside", "keyword argument", "parametrization", "buffer", "closure"])
def test_a_layer_without_trained_parameters_passes_on_what_is_hung_in_it(
    way: str, compile: CompileOptions | None
) -> None:
    gradients: list[Any] = []
    layers = 2 if compile is None else 1
    for each in (tiny_model("qwen3", layers=layers).train(), tiny_model("qwen3", layers=layers).train()):
        each.requires_grad_(False)
        each.lm_head.requires_grad_(True)
        steering = nn.Parameter(torch.zeros(32))
        layer = each.model.layers[0]
        if way == "hook inside":
            layer.mlp.register_forward_hook(lambda _, __, out, v=steering: out + v)
        elif way == "keyword argument":
            each.model.rotary_emb.register_forward_hook(lambda _, __, out, v=steering: (out[0] * (1 + v[:1]), out[1]))
        elif way == "parametrization":
            parametrize.register_parametrization(layer.mlp.down_proj, "weight", _Steered(steering))
        else:
            # a leaf that no list of parameters has
            steering = torch.zeros(48, requires_grad=True)
            _hide(steering, layer.mlp, way)
        if not gradients:
            alone(each)
        else:
            prepare(each, compile=compile)
            packed(each)
        gradients.append(steering.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert bool(gradients[0].abs().sum() > 0)


def _hide(steering: Tensor, mlp: Any, way: str) -> None:
    """In what scales the activated gate."""
    mlp.register_buffer("steering", steering)
    del mlp.act_fn
    scale = (lambda: mlp.steering) if way == "buffer" else (lambda: steering)
    mlp.act_fn = lambda gate: nn.functional.silu(gate) * (1 + scale())


class _Steered(nn.Module):
    def __init__(self, steering: nn.Parameter) -> None:
        super().__init__()
        self.steering = steering

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.steering[:, None]
