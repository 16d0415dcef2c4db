"""Which form a LoRA layer runs in and why; whatever the form, it computes what PEFT's layer computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from deltatune import CompileOptions, prepare
from deltatune.layers.mlp import _CLASSES
from deltatune.lora.group import layout_of
from deltatune.lora.mode import BESIDE, FUSED, STOCK, form_of
from lora_cases import (
    adapted,
    assert_gradients_close,
    assert_same,
    bordered,
    groups,
    logits,
    packed_call,
    pair,
    relative,
)
from tiny import tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def layer(*, dtype: torch.dtype = torch.bfloat16, bias: bool = False, **changes: Any) -> Any:
    model = nn.Sequential(nn.Linear(8, 16, bias=bias)).to(dtype)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["0"], **changes})
    return peft.inject_adapter_in_model(config, model)[0]


def _hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


FORMS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str, str]] = {
    "plain": (layer, lambda m: None, FUSED, "one product"),
    "bias": (lambda: layer(bias=True), lambda m: None, FUSED, "one product"),
    "rslora": (lambda: layer(use_rslora=True), lambda m: None, FUSED, "one product"),
    "float32": (lambda: layer(dtype=torch.float32), lambda m: None, FUSED, "one product"),
    "dropout": (lambda: layer(lora_dropout=0.1), lambda m: None, BESIDE, "lora_dropout"),
    "dora": (lambda: layer(use_dora=True), lambda m: None, STOCK, "DoraLinearVariant"),
    "lora_bias": (lambda: layer(bias=True, lora_bias=True), lambda m: None, STOCK, "lora_bias"),
    "merged": (layer, lambda m: m.merge(), STOCK, "merged"),
    "inactive": (layer, lambda m: m.delete_adapter("default"), STOCK, "no active adapter"),
    "trained": (layer, lambda m: m.base_layer.weight.requires_grad_(), BESIDE, "trains"),
    "subclass": (
        layer,
        lambda m: setattr(m.base_layer, "__class__", type("Other", (nn.Linear,), {})),
        BESIDE,
        "is a Other",
    ),
    "base_hook": (layer, lambda m: _hook(m.base_layer), BESIDE, "hooks on the base layer"),
    "adapter_hook": (layer, lambda m: _hook(m.lora_A["default"]), STOCK, "hooks on the adapters"),
    "meta": (layer, lambda m: m.to("meta"), STOCK, "no storage"),
    "quantised": (
        layer,
        lambda m: setattr(m.base_layer, "weight", nn.Parameter(torch.zeros(16, 8).char(), requires_grad=False)),
        BESIDE,
        "int8",
    ),
    "zero_3": (layer, lambda m: setattr(m.lora_A["default"].weight, "ds_id", 0), STOCK, "ZeRO-3"),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_and_their_reasons(case: str) -> None:
    build, change, name, reason = FORMS[case]
    module = build()
    module.base_layer.requires_grad_(False)
    change(module)
    form = form_of(module, "fused")
    assert (form.name, reason in form.reason) == (name, True), form
    assert form_of(module, "stock").name == STOCK


def test_auto_fuses_16_bit_weights_on_a_gpu_alone() -> None:
    module = layer()
    module.base_layer.requires_grad_(False)
    on_meta, wide = copy.deepcopy(module).to("meta"), copy.deepcopy(module).to("meta", torch.float32)
    assert form_of(module, "auto").name == STOCK
    assert "on a CPU" in form_of(module, "auto").reason
    assert form_of(on_meta, "auto", device=CUDA).name == FUSED
    assert form_of(wide, "auto", device=CUDA).name == STOCK
    assert "float32" in form_of(wide, "auto", device=CUDA).reason
    assert form_of(on_meta, "auto", device=CPU).name == STOCK


def reference_of(model: Any) -> Any:
    stock = copy.deepcopy(model)
    prepare(stock, lora="stock")
    return stock


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7, "up_proj": 1}, "alpha_pattern": {"v_proj": 1, "in_proj_qkv": 40}},
        {"target_modules": ["q_proj", "v_proj", "up_proj", "in_proj_z"]},
        {"target_modules": ["gate_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj", "down_proj"]},
        {"modules_to_save": ["lm_head", "q_norm", "mlp"], "target_modules": ["q_proj", "in_proj_qkv"]},
        {"r": 80},
    ],
    ids=["rslora", "patterns", "some", "half_a_pair", "one_layer", "modules_to_save", "wide"],
)
def test_configurations_of_peft(changes: dict[str, Any]) -> None:
    fused, stock = pair(dtype=torch.float64, **changes)
    assert_same(fused, stock)
    assert bordered(fused) == sum(type(m).__name__ == "Linear" and hasattr(m, "lora_A") for m in fused.modules())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_every_family(family: str) -> None:
    names = ["q_proj", "k_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_a", "out_proj"]
    names += ["gate_proj", "up_proj", "down_proj"] if "moe" not in family and family != "qwen3_next" else []
    fused, stock = pair(family, target_modules=names)
    assert_same(fused, stock)


@pytest.mark.parametrize("mlp", _CLASSES)
def test_gated_mlps_are_what_they_are_taken_for(mlp: str) -> None:
    """Their forward is replaced by name: each computes down(act(gate(x)) * up(x))."""
    module = __import__(f"transformers.models.{mlp}.modeling_{mlp}", fromlist=[_CLASSES[mlp]])
    from transformers import AutoConfig

    config = AutoConfig.for_model({"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}.get(mlp, mlp))
    config.hidden_size, config.intermediate_size = 8, 12
    arguments = () if mlp in ("llama", "mistral", "qwen2", "qwen3") else (12,)
    stock = getattr(module, _CLASSES[mlp])(config, *arguments).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(stock(x), stock.down_proj(stock.act_fn(stock.gate_proj(x)) * stock.up_proj(x)))


@pytest.mark.parametrize("train", [False, True])
def test_several_active_adapters(train: bool) -> None:
    model = adapted(dtype=torch.float64)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    stock = reference_of(model)
    prepare(model, lora="fused")
    with torch.set_grad_enabled(train):
        assert relative(logits(model), logits(stock)) < 1e-5
    assert_same(model, stock)


def test_a_bias_is_added_and_trains() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen2", vocab_size=96, num_hidden_layers=2, **values)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).double()
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "bias": "all"}
    fused = peft.get_peft_model(base, peft.LoraConfig(**settings))
    stock = reference_of(fused)
    prepare(fused, lora="fused")
    assert_same(fused, stock)
    assert any(p.grad is not None and name.endswith("bias") for name, p in fused.named_parameters())


def test_dropout_runs_beside_the_base_product() -> None:
    """Without randomness the same as PEFT's; with it, the mask that PEFT's layer would draw."""
    model = adapted(lora_dropout=0.5)
    stock = reference_of(model)
    _as_if_on_a_gpu(model)
    assert relative(logits(model.eval()), logits(stock.eval())) < 1e-6
    for each in (model, stock):
        each.train()
        torch.manual_seed(3)
        each.zero_grad()
        each(**packed_call()).loss.backward()
    assert_gradients_close(model, stock)
    assert bordered(model) == 0


def _as_if_on_a_gpu(model: Any) -> None:
    """Forms that ``lora="fused"`` refuses ahead of time, on a CPU."""
    prepare(adapted(), lora="fused")
    prepare(model, lora="auto")
    for group in groups(model):
        group.setting = "fused"


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    model = adapted()
    stock = reference_of(model)
    prepare(model, lora="fused")
    logits(model)
    for each in (model, stock):
        for name, parameter in each.named_parameters():
            if "base_layer" in name:
                parameter.requires_grad_()
    assert_same(model, stock)
    for each in (model, stock):
        for name, parameter in each.named_parameters():
            if "base_layer" in name:
                parameter.requires_grad_(False)
    assert_same(model, stock)
    assert bordered(model) == 15


def test_dora_is_pefts_own_layer() -> None:
    model = adapted(use_dora=True)
    stock = reference_of(model)
    rows = prepare(model, lora="auto").report.lora_rows
    _as_if_on_a_gpu(model)
    assert torch.equal(logits(model), logits(stock))
    assert [row.form for row in rows] == ["stock"]
    with pytest.raises(ValueError, match=r"lora='fused' cannot run .*q_proj.*DoraLinearVariant|cannot run .*Dora"):
        prepare(model, lora="fused")


def test_an_adapter_for_every_row_is_pefts_own() -> None:
    model = adapted("qwen3").eval()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    stock = copy.deepcopy(model)
    prepare(model, lora="fused")
    logits(model)
    block, theirs = (m.get_base_model().model.layers[0].mlp.up_proj for m in (model, stock))
    x = torch.randn(3, 5, 32)
    names = ["default", "second", "__base__"]
    assert torch.equal(block(x, adapter_names=names), theirs(x, adapter_names=names))


def test_hooks_of_others_are_called() -> None:
    fused, stock = pair()
    seen = []
    mlp = fused.get_base_model().model.layers[0].mlp
    mlp.gate_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    mlp.up_proj.base_layer.register_forward_hook(lambda module, args, output: output * 2)
    stock.get_base_model().model.layers[0].mlp.up_proj.base_layer.register_forward_hook(
        lambda module, args, output: output * 2
    )
    assert relative(logits(fused), logits(stock)) < 1e-5
    assert len(seen) == 1


def test_autocast_over_weights_of_another_dtype_takes_pefts_path() -> None:
    fused, stock = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(fused), logits(stock))


def test_autocast_over_16_bit_weights_stays_fused() -> None:
    fused, stock = pair(dtype=torch.bfloat16)
    exact = copy.deepcopy(stock).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = logits(fused), logits(stock)
    assert relative(ours, logits(exact)) <= 2 * relative(theirs, logits(exact))
    assert bordered(fused) == 15


@pytest.fixture
def one_process() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_sharded_layers_run_beside_the_base_product(one_process: Any, ran: bool, compiled: bool) -> None:
    model = adapted()
    stock = reference_of(model)
    prepared = prepare(model, lora="fused", compile=CompileOptions(backend="aot_eager") if compiled else None)
    if ran:
        logits(model)
        prepared.release_adapters()
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    for each in (model, stock):
        for _ in range(2):
            each(**packed_call()).loss.backward()
    assert bordered(model) == 0
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            assert relative(ours.grad.full_tensor(), theirs.grad) < 1e-5, name


@pytest.mark.parametrize(
    ("shapes", "ranks", "around", "expected"),
    [
        ([(6144, 2048)], [[16]], "", (64, True, False)),
        ([(2048, 6144)], [[16]], "", (64, False, True)),
        ([(2048, 6144)], [[16]], "gated_input", (64, True, True)),
        ([(2048, 6144)], [[20, 12]], "gated_input", (64, True, True)),
        ([(2048, 6144)], [[33]], "gated_input", (64, False, True)),
        ([(2048, 2048)], [[16]], "", (64, False, False)),
        ([(6144, 2048), (6144, 2048)], [[16], [16]], "pointwise_gradients", (64, True, True)),
        ([(4096, 2048), (512, 2048), (512, 2048)], [[16], [16], [16]], "", (64, True, False)),
        ([(6144, 2048)], [[256]], "", (256, False, False)),
        ([(2048, 6144)], [[256]], "gated_input", (256, False, False)),
        ([(6144, 2048)], [[8, 9]], "", (64, True, False)),
    ],
)
def test_where_a_border_pays(shapes: Any, ranks: Any, around: str, expected: Any) -> None:
    known = {what: what == around for what in ("gated_input", "pointwise_gradients")}
    layout = layout_of(shapes, ranks, **known)
    assert (layout.width, layout.forward_border, layout.backward_border) == expected
    ends = [target.offset + target.width for target in layout.targets]
    assert [target.offset for target in layout.targets] == [0, *ends[:-1]]
    assert ends[-1] <= layout.width
    assert all(target.offset % 16 == 0 for target in layout.targets)


def test_a_model_without_adapters_is_left_alone() -> None:
    model = tiny_model("qwen3_5")
    prepare(model)
    assert groups(model) == []
    with pytest.raises(ValueError, match="needs LoRA layers, and the model has none"):
        prepare(model, lora="fused")
