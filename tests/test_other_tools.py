"""Models that other tools patched, before prepare and after it: each works as on documents alone, or is refused."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn

from deltatune import CompileOptions, prepare
from deltatune.subclass import stock_class
from packed_cases import alone, assert_same_gradients, packed, packed_call
from tiny import documents, tiny_model

COMPILED = CompileOptions(backend="aot_eager")


def method(module: nn.Module) -> None:
    inner = module.forward
    module.forward = types.MethodType(lambda self, *a, **k: inner(*a, **k), module)


def partial(module: nn.Module) -> None:
    inner = module.forward
    module.forward = functools.partial(lambda *a, **k: inner(*a, **k))


def bound_by_name(module: nn.Module) -> None:
    stock = type(module).forward
    object.__setattr__(module, "forward", (lambda self, *a, **k: stock(self, *a, **k)).__get__(module))


WAYS = {"method": method, "partial": partial, "bound by name": bound_by_name}
KEEPS_DOCUMENTS_APART: dict[str, Callable[[Any], nn.Module]] = {
    "model.layers.0.linear_attn": lambda m: m.model.layers[0].linear_attn,
    "model.layers.1.self_attn": lambda m: m.model.layers[1].self_attn,
    "model.layers.1": lambda m: m.model.layers[1],
    "model": lambda m: m.model,
}
OTHERS: dict[str, Callable[[Any], nn.Module]] = {
    "mlp": lambda m: m.model.layers[0].mlp,
    "final norm": lambda m: m.model.norm,
    "head": lambda m: m.lm_head,
    "q_norm": lambda m: m.model.layers[1].self_attn.q_norm,
    "embedding": lambda m: m.model.embed_tokens,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", KEEPS_DOCUMENTS_APART)
def test_a_forward_that_hides_a_class_is_refused_by_name_and_nothing_is_changed(path: str, way: str) -> None:
    model = tiny_model("qwen3_5")
    WAYS[way](KEEPS_DOCUMENTS_APART[path](model))
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"^{path}: expected the forward of .*, got test_other_tools\."):
        prepare(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_forward_put_on_experts_or_on_a_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3_moe")
    method(model.model.layers[1].mlp.experts)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: expected the forward of Qwen3MoeExperts"):
        prepare(model)
    model = tiny_model("qwen3")
    stock = type(model.model.layers[0].self_attn).forward
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", lambda *a, **k: stock(*a, **k))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: expected the forward of Qwen3Attention"):
        prepare(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", [*KEEPS_DOCUMENTS_APART, *OTHERS, "outer"])
def test_a_forward_put_there_after_prepare_wraps_ours(place: str, way: str) -> None:
    pick = (KEEPS_DOCUMENTS_APART | OTHERS | {"outer": lambda m: m})[place]
    stock, model = tiny_model("qwen3_5").train(), tiny_model("qwen3_5").train()
    prepared = prepare(model)
    WAYS["method" if way == "bound by name" else way](pick(model))
    expected = alone(stock)
    assert packed(model) == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(model, stock)
    again = prepare(model)  # what was put on since leads to our class still
    model.zero_grad()
    assert packed(model) == pytest.approx(expected, rel=1e-5)
    again.revert()
    (doc,) = documents([20])
    assert torch.equal(model(doc[None]).logits, stock(doc[None]).logits)
    del prepared


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", OTHERS)
def test_a_forward_that_hides_nothing_is_kept_and_called(place: str, way: str) -> None:
    stock, model = tiny_model("qwen3_5").train(), tiny_model("qwen3_5").train()
    WAYS[way](OTHERS[place](model))
    prepared = prepare(model)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert_same_gradients(model, stock)
    prepared.revert()
    (doc,) = documents([20])
    assert torch.equal(model(doc[None]).logits, stock(doc[None]).logits)


@pytest.mark.parametrize("first", [True, False], ids=["before prepare", "after prepare"])
@pytest.mark.parametrize("way", WAYS)
def test_a_forward_of_the_outer_model_sees_no_target_across_documents(way: str, first: bool) -> None:
    stock, model = tiny_model("qwen3_5").train(), tiny_model("qwen3_5").train()
    if first:
        WAYS[way](model)
        with pytest.warns(UserWarning, match="replaced on this model before prepare, by test_other_tools"):
            prepare(model)
    else:
        prepare(model)
        WAYS["method" if way == "bound by name" else way](model)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert_same_gradients(model, stock)


def drops_arguments(module: nn.Module) -> None:
    inner = module.forward
    known = {
        "hidden_states",
        "position_embeddings",
        "position_ids",
        "attention_mask",
        "past_key_values",
        "cache_params",
    }
    module.forward = lambda *a, **k: inner(*a, **{name: k[name] for name in known & k.keys()})


def filters_arguments(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, a, k: (a, k | {"sequences": None}), with_kwargs=True)


def calls_the_stock_class(module: Any) -> None:
    inner, stock = module.forward, stock_class(module).forward

    @functools.wraps(inner)
    def forward(*args: Any, sequences: Any = None, **kwargs: Any) -> Any:
        return stock(module, *args, **kwargs) if sequences is not None else inner(*args, **kwargs)

    module.forward = forward


LOST = {"drops": drops_arguments, "filters": filters_arguments, "calls the stock class": calls_the_stock_class}


@pytest.mark.parametrize(
    ("path", "how", "compile"),
    [
        *((path, how, None) for path in ("layers.0.linear_attn", "layers.1.self_attn", "layers.1") for how in LOST),
        ("layers.0.linear_attn", "calls the stock class", COMPILED),
        ("layers.1.self_attn", "filters", COMPILED),
        ("layers.1", "drops", COMPILED),
    ],
)
def test_boundaries_that_get_lost_after_prepare_are_refused(
    path: str, how: str, compile: CompileOptions | None
) -> None:
    model = tiny_model("qwen3_5")
    prepare(model, compile=compile)
    LOST[how](model.model.get_submodule(path))

    def is_refused() -> None:
        with pytest.raises((ValueError, RuntimeError), match=r"documents begin|was replaced after prepare"):
            model(**packed_call())

    with torch.set_grad_enabled(compile is None):  # the layers around compile without a backward
        is_refused()
        (doc,) = documents([20])
        expected = tiny_model("qwen3_5").generate(doc[None], max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(doc[None], max_new_tokens=4, do_sample=False), expected)
        is_refused()


@pytest.mark.parametrize("path", ["layers.0", "layers.0.linear_attn", "layers.1.self_attn", ""])
def test_a_stock_module_put_there_after_prepare_is_refused(path: str) -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    model.set_submodule(f"model.{path}".rstrip("."), tiny_model("qwen3_5").model.get_submodule(path))
    with pytest.raises(ValueError, match=r"prepare\(model\) again"):
        model(**packed_call())


@pytest.mark.parametrize("first", [True, False], ids=["before prepare", "after prepare"])
def test_labels_by_position_reach_another_loss_without_crossing_targets(first: bool) -> None:
    def forward(input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        out = inner(input_ids=input_ids, **kwargs)
        out.loss = nn.functional.cross_entropy(out.logits[0, :-1], labels[0, 1:])
        return out

    model = tiny_model("qwen3")
    if not first:
        prepare(model)
    inner, model.forward = model.forward, forward
    if first:
        with pytest.warns(UserWarning, match="replaced on this model before prepare"):
            prepare(model)
    call = packed_call()
    ids, sequences = call["input_ids"], call["sequences"]
    assert float(model(ids, None, ids, sequences=sequences).loss) == pytest.approx(alone(tiny_model("qwen3")), rel=1e-5)


def test_a_bound_method_of_the_class_itself_hides_nothing() -> None:
    stock, model = tiny_model("qwen3_5").train(), tiny_model("qwen3_5").train()
    for module in model.modules():
        module.forward = module.forward
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = prepare(model)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a copy that called the original would notice
    assert packed(copied) == pytest.approx(alone(stock), rel=1e-5)
    prepared.revert()
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert all(module.forward.__func__ is type(module).forward for module in model.modules())


@pytest.mark.parametrize("first", [True, False], ids=["before prepare", "after prepare"])
@pytest.mark.parametrize("how", ["cpu_offload", "dispatch", "hooks", "removed again"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_moe"])
def test_accelerates_hooks_stand_around_our_forwards(family: str, how: str, first: bool) -> None:
    stock, model = tiny_model(family).train(), tiny_model(family).train()
    prepared = None if first else prepare(model)
    _accelerated(model, how)
    prepared = prepared or prepare(model)
    if how == "cpu_offload":  # no gradients reach weights that are not there
        with torch.no_grad():
            loss = float(model(**packed_call(labels=packed_call()["input_ids"])).loss)
        assert loss == pytest.approx(alone(stock), rel=1e-5)
    else:
        assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
        assert_same_gradients(model, stock)
    (doc,) = documents([20])
    prepared.revert()
    with torch.no_grad():
        assert torch.equal(model(doc[None]).logits, stock(doc[None]).logits)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    with torch.no_grad():
        assert torch.equal(model(doc[None]).logits, stock(doc[None]).logits)


def _accelerated(model: nn.Module, how: str) -> None:
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "dispatch":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook(), append=True)
    if how == "removed again":
        accelerate.hooks.remove_hook_from_module(model, recurse=True)


def test_offloading_inside_a_graph_is_refused() -> None:
    model = tiny_model("qwen3")
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="accelerate moves weights"):
        prepare(model, compile=COMPILED)


def test_lora_layers_with_a_forward_of_their_own_are_left_to_peft() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    stock = peft.get_peft_model(tiny_model("qwen3"), config).train()
    model = copy.deepcopy(stock)
    method(model.get_base_model().model.layers[0].self_attn.q_proj)
    report = str(prepare(model, lora="auto").report)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert "lora" in report


def test_pickle_with_a_bound_forward() -> None:
    model = tiny_model("qwen3_5")
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    prepare(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**packed_call()).logits, model(**packed_call()).logits)


def class_of_its_own(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__class__ = type("Theirs", (type(module),), {"forward": forward})


@pytest.mark.parametrize("path", ["model.layers.0.linear_attn", "model.layers.1.self_attn", "model.layers.1"])
@pytest.mark.parametrize("one", [True, False], ids=["a class over one instance", "a forward on the class"])
def test_a_class_whose_forward_takes_the_place_of_ours_is_refused(
    one: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    module = model.get_submodule(path)
    stock = stock_class(module).forward
    if one:
        class_of_its_own(module, stock)
    else:
        monkeypatch.setattr(type(module), "forward", stock)
    with pytest.raises(ValueError, match=f"{stock_class(module).__name__} of layer .: its forward was replaced after"):
        model(**packed_call())


def test_a_class_over_ours_is_refused_in_a_compiled_layer_too() -> None:
    model = tiny_model("qwen3", layers=1)
    prepare(model, compile=COMPILED)
    attention = model.model.layers[0].self_attn
    class_of_its_own(attention, stock_class(attention).forward)
    with pytest.raises(ValueError, match="Qwen3Attention of layer 0: its forward was replaced after"):
        model(**packed_call())


def test_a_class_over_ours_whose_forward_calls_it_works() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    expected = model(**packed_call()).logits
    module = model.model.layers[1].self_attn
    inner = type(module).forward
    class_of_its_own(module, lambda self, *a, **k: inner(self, *a, **k))
    assert torch.equal(model(**packed_call()).logits, expected)


def test_a_compiled_forward_that_is_ours_works() -> None:
    """A graph hides whether it calls our forward, but torch says what it compiled."""
    model = tiny_model("qwen3", layers=1)
    prepare(model)
    expected = model(**packed_call()).logits
    attention = model.model.layers[0].self_attn
    attention.forward = torch.compile(attention.forward, backend="eager")
    torch.testing.assert_close(model(**packed_call()).logits, expected)


def with_functools_wraps(model: Any) -> None:
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *a, **k: inner(*a, **k))


@pytest.mark.parametrize("put", [with_functools_wraps, accelerate.cpu_offload], ids=["wraps", "cpu_offload"])
def test_tokens_by_position_reach_a_wrapped_model_with_labels(put: Callable[[Any], Any]) -> None:
    model = tiny_model("qwen3")
    prepare(model)
    call = packed_call()
    tokens, labels = call.pop("input_ids"), torch.cat(documents([5, 1, 30, 7]))[None]
    expected = model(tokens, labels=labels, **call).loss
    put(model)
    torch.testing.assert_close(model(tokens, labels=labels, **call).loss, expected)
