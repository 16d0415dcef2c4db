"""Models patched as Liger and the kernels package do, by stand-ins that compute something else than the stock code.

What is called can so be told from what is read: the truth is the patched model on each document alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import types
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from deltatune import CompileOptions, prepare
from packed_cases import alone, assert_same_gradients, packed, packed_call
from tiny import documents, tiny_model

COMPILED = CompileOptions(backend="aot_eager")
PREFIXES = {"qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "qwen3_next": "Qwen3Next", "qwen3_5": "Qwen3_5"}


class FastNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        return fast_norm(self, hidden)


def fast_norm(self: Any, hidden: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden, hidden.shape[-1:]) * self.weight * 0.75


class FastMLP(nn.Module):
    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(config.hidden_size, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return fast_mlp(self, x)


def fast_mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


class FastExperts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        shape = (config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1] // 2))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states * top_k_weights.sum(-1, keepdim=True)


def fused_loss_forward(
    self: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    labels: Any = None,
    shift_labels: Any = None,
    logits_to_keep: Any = 0,
    **kwargs: Any,
) -> Any:
    """Logits, or in training with labels a loss of its own and none."""
    kwargs.pop("num_items_in_batch", None)
    outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    hidden = outputs[0][:, kept, :]
    if self.training and labels is not None:
        logits = nn.functional.linear(hidden, self.lm_head.weight)[0, :-1].float()
        return CausalLMOutputWithPast(loss=nn.functional.cross_entropy(logits, labels[0, 1:]))
    return CausalLMOutputWithPast(logits=self.lm_head(hidden), past_key_values=outputs.past_key_values)


def modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.fixture
def patched_classes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Classes of the modeling module replaced before a model is built."""
    family: str = request.param
    module, prefix = modeling(family), PREFIXES[family]
    monkeypatch.setattr(module, f"{prefix}RMSNorm", FastNorm)
    monkeypatch.setattr(module, f"{prefix}MLP", FastMLP)
    monkeypatch.setattr(getattr(module, f"{prefix}ForCausalLM"), "forward", fused_loss_forward)
    return family


@pytest.mark.parametrize(
    ("patched_classes", "compile"),
    [*((family, None) for family in PREFIXES), ("qwen3", COMPILED), ("qwen3_next", COMPILED)],
    indirect=["patched_classes"],
)
def test_classes_replaced_before_loading_are_called(patched_classes: str, compile: CompileOptions | None) -> None:
    stock, model = tiny_model(patched_classes).train(), tiny_model(patched_classes).train()
    expected = alone(stock)
    prepared = prepare(model, compile=compile)
    assert packed(model) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(model, stock)
    text = str(prepared.report)
    assert "test_patched_models.FastNorm" in text
    assert "test_patched_models.fused_loss_forward" in text
    assert "the loss of labels= is ours" in text
    prepared.revert()
    (doc,) = documents([20])
    assert torch.equal(model(doc[None]).logits, stock(doc[None]).logits)


def bind_to_instances(model: Any) -> None:
    """Forwards bound to the modules of a model that is loaded."""
    model.forward = types.MethodType(fused_loss_forward, model)
    norms = [model.model.norm]
    for layer in model.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        if hasattr(layer, "self_attn"):
            norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
        if hasattr(layer.mlp, "gate_proj"):
            layer.mlp.__dict__["forward"] = fast_mlp.__get__(layer.mlp, type(layer.mlp))
    for norm in norms:
        norm.__dict__["forward"] = fast_norm.__get__(norm, type(norm))
        norm.__dict__["_get_name"] = (lambda self: "FastNorm").__get__(norm, type(norm))


@pytest.mark.parametrize(
    ("family", "compile", "first"),
    [
        *((family, None, first) for family in PREFIXES for first in (True, False)),
        # compiled layers read what is bound where they are traced, whenever it came
        ("qwen3", COMPILED, False),
        ("qwen3_5", COMPILED, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*was replaced on this model before prepare")
def test_forwards_bound_to_a_loaded_model_are_called(family: str, compile: CompileOptions | None, first: bool) -> None:
    stock, model = tiny_model(family).train(), tiny_model(family).train()
    bind_to_instances(stock)
    if first:
        bind_to_instances(model)
    prepared = prepare(model, compile=compile)
    if not first:
        bind_to_instances(model)
    expected = alone(stock)
    assert packed(model) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(model, stock)
    text = str(prepared.report)
    assert "test_patched_models.fast_norm" in text
    assert "its loss sees no target across documents" in text
    if compile is not None and family == "qwen3":
        assert prepared.compile_report is not None
        assert list(prepared.compile_report.graphs.values()) == [1]
    prepared.revert()
    (doc,) = documents([20])
    assert torch.equal(model(doc[None]).logits, stock(doc[None]).logits)


@pytest.mark.parametrize("before_loading", [True, False])
def test_replaced_experts_are_refused_by_name(before_loading: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = None if before_loading else tiny_model("qwen3_moe")
    monkeypatch.setattr(modeling("qwen3_moe"), "Qwen3MoeExperts", FastExperts)
    model = model or tiny_model("qwen3_moe")
    if not before_loading:
        for layer in model.model.layers:
            experts = layer.mlp.experts
            experts.__dict__["forward"] = FastExperts.forward.__get__(experts, type(experts))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: expected .* got test_patched_models\.FastExperts"):
        prepare(model)


def test_experts_whose_place_is_taken_after_prepare_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    prepare(model)
    experts = model.model.layers[1].mlp.experts
    experts.forward = FastExperts.forward.__get__(experts)
    with pytest.raises(ValueError, match="Qwen3MoeExperts of layer 1: its forward was replaced after prepare"):
        model(**packed_call())


def test_a_replaced_rotation_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling("qwen3"), "apply_rotary_pos_emb", lambda q, k, cos, sin: (k, q))
    with pytest.raises(ValueError, match=r"apply_rotary_pos_emb .* was replaced by test_patched_models"):
        prepare(tiny_model("qwen3"))


def test_a_replaced_cross_entropy_is_reported_and_changes_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3").train()
    expected = alone(tiny_model("qwen3").train())
    stock = nn.functional.cross_entropy
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda *args, **kwargs: stock(*args, **kwargs))
    prepared = prepare(model)
    assert packed(model) == pytest.approx(expected, rel=1e-5)
    assert "linear_cross_entropy elsewhere" in str(prepared.report)


KERNELS: dict[str, Any] = {
    "layers.0.linear_attn": lambda self, hidden_states, **_: hidden_states,
    "layers.1.self_attn": lambda self, hidden_states, **_: (hidden_states, None),
    "layers.0": lambda self, hidden_states, **_: hidden_states,
    "": lambda self, input_ids, **_: BaseModelOutputWithPast(last_hidden_state=self.embed_tokens(input_ids)),
}


@pytest.mark.parametrize("path", KERNELS)
def test_a_kernel_that_takes_a_forwards_place_after_prepare_is_refused(path: str) -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    module = model.model.get_submodule(path)
    module.forward = types.MethodType(KERNELS[path], module)
    with pytest.raises(ValueError, match="was replaced after prepare, by test_patched_models"):
        model(**packed_call())
    del module.forward
    assert model(**packed_call()).logits.shape == (1, 43, 96)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.filterwarnings("ignore:.*was replaced on this model before prepare")
def test_liger_itself_is_named_in_the_report() -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    module = modeling("qwen3")
    kept = {name: getattr(module, name) for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP")}
    try:
        model = tiny_model("qwen3")
        apply_liger_kernel_to_qwen3(model=model)
        text = str(prepare(model).report)
    finally:
        for name, value in kept.items():
            setattr(module, name, value)
    assert text.count("liger_kernel.") >= 4
    assert isinstance(model, transformers.Qwen3ForCausalLM)
