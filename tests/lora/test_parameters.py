"""Adapters on Parameters (PEFT's ``target_parameters``), experts above all, against PEFT's own; in one graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from deltatune import CompileOptions, Sequences, prepare, verify
from deltatune.lora.parameters import LoRAParameters, parameters_mode
from lora_cases import logits, packed_call, relative
from mixtures import OTHERS, mixture
from packed_cases import alone, packed
from tiny import documents, tiny_model

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: Experts of every layout, families of their own and others.
SEVERAL = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "gemma4_text", "aria_text"]
FAMILIES = ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe", "gpt_oss"]


def adapted(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    both = [name.removeprefix("mlp.") for name in BOTH] if family == "gemma4_text" else BOTH
    values = {"r": 4, "lora_alpha": 12, "target_parameters": both, "target_modules": ["o_proj"], **changes}
    wide, layers = values.pop("autocast_adapter_dtype", True), values.pop("layers", 2)
    torch.manual_seed(1)
    config = peft.LoraConfig(init_lora_weights=False, **values)
    return peft.get_peft_model(mixture(family, dtype, layers), config, autocast_adapter_dtype=wide).train()


def assert_same_gradients(model: Any, stock: Any) -> None:
    """By name: PEFT's forward registers expert weights anew, behind the others."""
    theirs = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        want = theirs[name].grad
        if want is not None:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-5, msg=name)


def wrappers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoRAParameters)]


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        *((family, None) for family in (*FAMILIES, *OTHERS)),
        ("qwen3_next", "aot_eager"),
        ("gpt_oss", "aot_eager"),
        ("deepseek_v3", "aot_eager"),
        ("gemma4_text", "aot_eager"),
    ],
)
def test_a_pack_equals_peft_s_own_on_each_document_alone(family: str, backend: Any) -> None:
    model = adapted(family, layers=1 if backend else 2)
    stock = copy.deepcopy(model)
    prepared = prepare(model, compile=CompileOptions(backend=backend) if backend else None)
    assert prepared.report.family == (family if family in FAMILIES else "any")
    assert wrappers(model)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert_same_gradients(model, stock)
    if backend:
        assert prepared.compile_report is not None
        assert prepared.compile_report.breaks == []
        with torch._dynamo.config.patch(error_on_recompile=True):
            lengths = [3, 20, 9, 2, 9]
            tokens = torch.cat(documents(lengths, 4))[None]
            model(input_ids=tokens, labels=tokens, sequences=Sequences.from_lengths(lengths)).loss.backward()
    assert [row.mode for row in prepared.report.lora_rows if "experts" in row.reason] == ["fused"]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_parameters": BOTH[:1]},
        {"target_parameters": BOTH[1:]},
        {
            "rank_pattern": {"mlp.experts.gate_up_proj": 5},
            "alpha_pattern": {"experts.down_proj": 3},
            "use_rslora": True,
        },
        {"target_parameters": ["gate_up_proj"], "target_modules": None},
        {"r": 20},
    ],
)
def test_forms_of_the_adapters(changes: dict[str, Any]) -> None:
    model = adapted("gpt_oss" if "r" in changes else "qwen3_moe", **changes)
    stock = copy.deepcopy(model)
    prepare(model)
    assert wrappers(model)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert_same_gradients(model, stock)


@pytest.mark.parametrize("family", SEVERAL)
def test_everything_else_that_trains_beside_them(family: str) -> None:
    """Routers, the expert weights themselves, biases."""
    model = adapted(family).requires_grad_(True)
    stock = copy.deepcopy(model)
    prepare(model)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert_same_gradients(model, stock)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4_text", "deepseek_v3"])
def test_documents_are_independent_with_adapters(family: str) -> None:
    model = adapted(family)
    prepare(model)
    report = verify(model, lengths=(3, 1, 20, 9))
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in SEVERAL), ("qwen3_moe", torch.float16)]
)
def test_errors_are_no_larger_than_peft_s_own(family: str, dtype: torch.dtype) -> None:
    """Of one layer, in front of which both compute the same bits: rounding sends no token elsewhere in one of them."""
    forms: dict[str, Any] = {"target_modules": None, "layers": 1}
    exact = adapted(family, dtype=torch.float64, autocast_adapter_dtype=False, **forms)
    found, theirs = (adapted(family, dtype=dtype, **forms) for _ in range(2))
    for model, lora in ((exact, "stock"), (theirs, "stock"), (found, "auto")):
        model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in found.state_dict().items()})
        prepare(model, lora=lora)
        model.zero_grad(set_to_none=True)
        model(**packed_call()).loss.backward()
    errors = [
        [
            relative(p.grad, want.grad)
            for (name, p), want in zip(model.named_parameters(), exact.parameters(), strict=True)
            if "experts" in name and p.grad is not None
        ]
        for model in (found, theirs)
    ]
    assert len(errors[0]) == 4
    assert all(ours <= 2 * peft_s for ours, peft_s in zip(*errors, strict=True)), errors
    grads = [p.grad.dtype for n, p in found.named_parameters() if "experts" in n and p.grad is not None]
    assert set(grads) == {torch.float32}


def test_several_adapters_and_switches_between_calls() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=8, lora_alpha=4, target_parameters=BOTH, init_lora_weights=False))
    stock = copy.deepcopy(model)
    prepare(model)
    prepare(stock, lora="stock")
    seen = []
    for name in ("default", "other"):
        for one in (model, stock):
            one.set_adapter(name)
        assert relative(logits(model), logits(stock)) < 1e-5
        seen.append(logits(model))
    for one in (model, stock):
        one.base_model.set_adapter(["default", "other"])
    assert relative(logits(model), logits(stock)) < 1e-5
    assert relative(seen[0], seen[1]) > 1e-3
    with model.disable_adapter(), stock.disable_adapter():
        bare = logits(model)
        assert relative(bare, logits(stock)) < 1e-5
    assert relative(bare, seen[0]) > 1e-3
    for one in (model, stock):
        one.base_model.set_adapter("default")
        one.merge_adapter()
    assert relative(logits(model), seen[0]) < 1e-5
    for one in (model, stock):
        one.unmerge_adapter()
    assert relative(logits(model), seen[0]) < 1e-5


def test_what_changes_between_compiled_calls_acts() -> None:
    """One change after another, each of which alone is seen in the logits."""
    model = adapted()
    stock = copy.deepcopy(model)
    prepare(model, compile=CompileOptions(backend="aot_eager"))
    prepare(stock, lora="stock")
    model(**packed_call()).loss.backward()
    before = logits(stock)
    for change in ("A", "B", "scale", "disabled"):
        for one in (model, stock):
            for wrapper in (module for module in one.modules() if hasattr(module, "parameter_name")):
                if change == "scale":
                    wrapper.scaling["default"] *= 3
                elif change == "disabled":
                    wrapper.enable_adapters(False)
                else:
                    getattr(wrapper, f"lora_{change}")["default"].weight.data.mul_(2)
        expected = logits(stock)
        assert relative(expected, before) > 1e-3, change
        assert relative(logits(model), expected) < 1e-5, change
        before = expected


@pytest.mark.parametrize(("part", "mode"), [("base_layer", "stock"), ("experts", "unfused")])
def test_hooks_on_what_is_read_are_called(part: str, mode: str) -> None:
    model = adapted()
    prepared = prepare(model)
    before, calls = logits(model), []
    wrapper = wrappers(model)[0]
    hooked = wrapper.base_layer if part == "base_layer" else wrapper.get_base_layer()
    handle = hooked.register_forward_hook(lambda *_: calls.append(part))
    assert relative(logits(model), before) < 1e-5
    assert calls == [part]
    assert mode in {row.mode for row in prepared.report.lora_rows if "linear" not in row.reason}
    handle.remove()
    assert torch.equal(logits(model), before)
    assert calls == [part]


def tokens_of(model: Any, count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of experts."""
    generator = torch.Generator().manual_seed(3)
    x, scores = torch.randn(count, 32, generator=generator), torch.rand(count, 4, generator=generator)
    top = scores.topk(2)
    return x, top.indices, top.values


def test_experts_called_by_keyword() -> None:
    model = adapted()
    stock = copy.deepcopy(model)
    prepare(model)
    wrapper = wrappers(model)[0]
    x, index, weights = tokens_of(model)
    by_name = wrapper(x, top_k_index=index, top_k_weights=weights)
    assert relative(by_name, wrapper(x, index, weights)) < 1e-6
    theirs = stock.get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert relative(by_name, theirs(x, index, weights)) < 1e-5


def test_experts_cannot_take_another_adapter_for_each_row() -> None:
    """PEFT's own error, which names what it is."""
    model = adapted()
    prepare(model)
    with pytest.raises(ValueError, match="mixed adapter batches"):
        wrappers(model)[0](*tokens_of(model), adapter_names=["default"])


def test_experts_without_an_active_adapter() -> None:
    model = adapted()
    with model.disable_adapter():
        prepare(bare := copy.deepcopy(model))
        expected = logits(bare)
    prepare(model)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=True))
    model.set_adapter("other")
    assert parameters_mode(wrappers(model)[0], "auto") == ("stock", "no active adapter")
    assert relative(logits(model), expected) < 1e-5


def test_experts_whose_place_is_taken_by_stock_ones_after_prepare_are_called() -> None:
    model = adapted()
    stock = copy.deepcopy(model)
    prepared = prepare(model)
    wrapper = wrappers(model)[0]
    theirs = stock.get_submodule("base_model.model.model.layers.0.mlp.experts")
    wrapper.base_layer.base_layer = copy.deepcopy(theirs.base_layer.base_layer)
    call = tokens_of(model)
    assert relative(wrapper(*call), theirs(*call)) < 1e-5
    modes = [row.mode for row in prepared.report.lora_rows if "linear" not in row.reason]
    assert "unfused" in modes


def test_all_fused_is_said_of_experts_before_they_are_prepared() -> None:
    model = adapted(target_modules=None)
    prepare(model, lora="fused")
    wrapper = wrappers(model)[0]
    assert parameters_mode(wrapper, "fused").name == "fused"
    untouched = adapted(target_modules=None).get_submodule("base_model.model.model.layers.0.mlp.experts")
    assert parameters_mode(untouched, "fused") == parameters_mode(wrapper, "fused")


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_hooks_on_the_adapters_of_experts_leave_them_to_peft(part: str) -> None:
    """Those of offload bring weights when the module is called, which nobody else does."""
    model = adapted()
    prepared = prepare(model)
    before = logits(model)
    handle = getattr(wrappers(model)[0].base_layer, part)["default"].register_forward_pre_hook(lambda *_: None)
    rows = [row for row in prepared.report.lora_rows if "hooks on the adapters" in row.reason]
    assert [(row.mode, row.layers) for row in rows] == [("stock", 1)]
    assert relative(logits(model), before) < 1e-5
    handle.remove()
    assert not [row for row in prepared.report.lora_rows if "hooks on the adapters" in row.reason]


@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_of_two_dimensions(compiled: bool) -> None:
    """What ``all-linear`` becomes for PEFT on a mixture: the router too."""
    model = adapted(target_parameters=["gate.weight", "down_proj"])
    stock = copy.deepcopy(model)
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager") if compiled else None)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert_same_gradients(model, stock)
    modes = [
        (row.mode, row.layers) for row in prepared.report.lora_rows if row.reason.split()[0] in ("adapters", "the")
    ]
    assert ("fused", 2) in modes
    assert ("unfused", 2) in modes


def test_stock_adapters_of_parameters_may_come_after_prepare() -> None:
    """As asked for, breaks and all."""
    found = []
    for options in (None, CompileOptions(backend="aot_eager", strict=False)):
        model = mixture("qwen3_moe", layers=1)
        prepare(model, compile=options, lora="stock")
        torch.manual_seed(1)
        config = peft.LoraConfig(target_parameters=["mlp.gate.weight"], init_lora_weights=False)
        found.append(logits(peft.get_peft_model(model, config)))
    assert relative(*found) < 1e-5


@pytest.mark.parametrize("names", [BOTH, ["mlp.gate.weight"]])
def test_adapters_of_parameters_added_after_prepare(names: list[str]) -> None:
    model = mixture("qwen3_moe")
    prepare(model, compile=CompileOptions(backend="aot_eager", strict=False))
    model = peft.get_peft_model(model, peft.LoraConfig(target_parameters=names, init_lora_weights=False))
    name = names[-1].rpartition(".")[2]
    with pytest.raises(ValueError, match=rf"adapters of {name} of layer 0 were .* call prepare\(model\) again"):
        model(**packed_call())
    prepare(model, compile=CompileOptions(backend="aot_eager"))
    model(**packed_call()).loss.backward()
    eager = mixture("qwen3_moe")
    prepare(eager)
    eager = peft.get_peft_model(eager, peft.LoraConfig(target_parameters=names, init_lora_weights=False))
    eager.load_state_dict(model.state_dict())
    assert relative(logits(eager), logits(model)) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4_text", "aria_text"])
def test_files_are_peft_s_own_both_ways(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    base_model = mixture(family)
    prepare(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model, tmp_path)
    prepare(loaded, lora="stock")
    assert relative(logits(loaded), expected) < 1e-5
    prepare(loaded)
    assert wrappers(loaded)
    assert relative(logits(loaded), expected) < 1e-5
    merged = loaded.merge_and_unload()
    call = packed_call()
    del call["labels"]
    prepare(merged)
    assert relative(merged(**call).logits, expected) < 1e-5


def test_they_are_restored_and_copied() -> None:
    model = adapted()
    names = [type(module).__name__ for module in model.modules()]
    keys = list(model.state_dict())
    prepared = prepare(model)
    assert list(model.state_dict()) == keys
    other = copy.deepcopy(model)
    assert type(other) is type(model)
    assert other.get_base_model()._deltatune is not model.get_base_model()._deltatune
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert relative(logits(model), logits(other)) > 0.1
    prepared.revert()
    assert not wrappers(model)
    assert [type(module).__name__ for module in model.modules()] == names


def test_files_of_older_peft_versions_with_the_roles_swapped_are_told_by_their_shapes() -> None:
    model = adapted()
    prepare(model)
    wrapper = wrappers(model)[0]
    a, b = wrapper.lora_A["default"], wrapper.lora_B["default"]
    inner, outer, rank = wrapper.in_features, wrapper.out_features, a.weight.shape[0]
    wrapper.lora_A["default"] = torch.nn.Linear(outer, rank, bias=False)
    wrapper.lora_B["default"] = torch.nn.Linear(rank, inner, bias=False)
    rows = prepare(model).report.lora_rows
    assert any(row.mode == "stock" and "before 0.19.1" in row.reason for row in rows)
    wrapper.lora_A["default"], wrapper.lora_B["default"] = a, b
    assert not any("before 0.19.1" in row.reason for row in prepare(model).report.lora_rows)


def test_what_is_kept_for_backward_is_small_beside_the_experts() -> None:
    """No effective weight, and no gradient of one: nothing with the experts' three dimensions is kept."""
    model = adapted()
    prepare(model)
    experts = wrappers(model)[0].get_base_layer()
    shapes = {tuple(experts.gate_up_proj.shape), tuple(experts.down_proj.shape)}
    own = {p.data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert model(**packed_call()).loss.requires_grad
    assert not [t for t in kept if tuple(t.shape) in shapes and t.data_ptr() not in own]


@pytest.mark.parametrize("lora", ["auto", "fused"])
def test_weights_of_linear_layers_by_their_names_are_lora_layers_like_others(lora: str) -> None:
    names = ["q_proj.weight", "v_proj.weight", "shared_expert.gate_proj.weight", "shared_expert.down_proj.weight"]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_parameters=names, init_lora_weights=False)
    kinds = {"layers": 1, "layer_types": ["full_attention"]}
    model = peft.get_peft_model(tiny_model("qwen3_next", **kinds), config)
    other = peft.LoraConfig(r=4, target_modules=[name.removesuffix(".weight") for name in names[:2]])
    keys = {key for key in peft.get_peft_model(tiny_model("qwen3_next", **kinds), other).state_dict() if "lora" in key}
    assert keys <= set(model.state_dict()), "the same names as of modules"
    stock = copy.deepcopy(model)
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager"), lora=lora)
    assert packed(model) == pytest.approx(alone(stock), rel=1e-5)
    assert_same_gradients(model, stock)
    assert {row.mode for row in prepared.report.lora_rows} == {"fused" if lora == "fused" else "unfused"}


@pytest.mark.parametrize("aux_loss", [False, True])
def test_a_router_trained_whole_beside_them(aux_loss: bool) -> None:
    model = adapted(modules_to_save=["gate"])
    model.get_base_model().router_aux_loss_coef = 0.5
    reference = copy.deepcopy(model)
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager"))
    prepare(reference, lora="stock")
    call = packed_call() | ({"output_router_logits": True} if aux_loss else {})
    for one in (model, reference):
        one(**call).loss.backward()
    assert_same_gradients(model, reference)
    routers = [name for name, p in model.named_parameters() if "gate.modules_to_save" in name and p.grad is not None]
    assert len(routers) == 2
    assert prepared.compile_report is not None
    assert prepared.compile_report.breaks == []


def test_a_compiled_backward_builds_rows_of_experts_again() -> None:
    """Kept are the rows before the gate and the narrow ones: not the copies of tokens, nor what the gate leaves."""
    model = adapted()
    prepare(model, compile=CompileOptions(backend="aot_eager"))
    model(**packed_call()).loss.backward()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert model(**packed_call()).loss.requires_grad
    rows = 2 * packed_call()["input_ids"].shape[1]
    assert {tuple(t.shape) for t in kept if t.ndim == 2 and t.shape[0] == rows and t.shape[1] > 1} == {
        (rows, 2 * 24),
        (rows, 16),
    }
