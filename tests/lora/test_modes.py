"""Which mode a LoRA layer runs in and why; whatever the mode, it computes what PEFT's layer computes."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from deltatune import CompileOptions, prepare
from deltatune.layers.lora import lora_modes
from deltatune.layers.mlp import GatedMLP, is_gated_mlp
from deltatune.lora import linear as lora_linear
from deltatune.lora.linear import LoRALinear
from deltatune.lora.mode import FUSED, STOCK, UNFUSED, is_lora_linear, mode_of
from deltatune.options import Options
from deltatune.state import State
from deltatune.subclass import swap
from lora_cases import (
    FEW,
    adapted,
    assert_gradients_close,
    assert_same,
    fused_layers,
    logits,
    packed_call,
    pair,
    relative,
)
from tiny import FAMILIES, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def layer(*, dtype: torch.dtype = torch.bfloat16, bias: bool = False, **changes: Any) -> Any:
    model = nn.Sequential(nn.Linear(8, 16, bias=bias)).to(dtype)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["0"], **changes})
    return peft.inject_adapter_in_model(config, model)[0]


def _hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


MODES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str, str]] = {
    "plain": (layer, lambda m: None, FUSED, "one product"),
    "bias": (lambda: layer(bias=True), lambda m: None, FUSED, "one product"),
    "rslora": (lambda: layer(use_rslora=True), lambda m: None, FUSED, "one product"),
    "float32": (lambda: layer(dtype=torch.float32), lambda m: None, FUSED, "one product"),
    "dropout": (lambda: layer(lora_dropout=0.1), lambda m: None, UNFUSED, "lora_dropout"),
    "dora": (lambda: layer(use_dora=True), lambda m: None, STOCK, "DoraLinearVariant"),
    "lora_bias": (lambda: layer(bias=True, lora_bias=True), lambda m: None, STOCK, "lora_bias"),
    "merged": (layer, lambda m: m.merge(), STOCK, "merged"),
    "inactive": (layer, lambda m: m.delete_adapter("default"), STOCK, "no active adapter"),
    "trained": (layer, lambda m: m.base_layer.weight.requires_grad_(), UNFUSED, "trains"),
    "subclass": (
        layer,
        lambda m: setattr(m.base_layer, "__class__", type("Other", (nn.Linear,), {})),
        UNFUSED,
        "is a Other",
    ),
    "base_hook": (layer, lambda m: _hook(m.base_layer), UNFUSED, "hooks on the base layer"),
    "adapter_hook": (layer, lambda m: _hook(m.lora_A["default"]), STOCK, "hooks on the adapters"),
    "meta": (layer, lambda m: m.to("meta"), STOCK, "no storage"),
    "quantised": (
        layer,
        lambda m: setattr(m.base_layer, "weight", nn.Parameter(torch.zeros(16, 8).char(), requires_grad=False)),
        UNFUSED,
        "int8",
    ),
    "zero_3": (layer, lambda m: setattr(m.lora_A["default"].weight, "ds_id", 0), STOCK, "ZeRO-3"),
}


@pytest.mark.parametrize("case", MODES)
def test_modes_and_their_reasons(case: str) -> None:
    build, change, name, reason = MODES[case]
    module = build()
    module.base_layer.requires_grad_(False)
    change(module)
    mode = mode_of(module, "fused")
    assert (mode.name, reason in mode.reason) == (name, True), mode
    assert mode_of(module, "stock").name == STOCK


def test_auto_fuses_16_bit_weights_on_a_gpu_alone() -> None:
    module = layer()
    module.base_layer.requires_grad_(False)
    on_meta, wide = copy.deepcopy(module).to("meta"), copy.deepcopy(module).to("meta", torch.float32)
    assert mode_of(module, "auto").name == STOCK
    assert "on a CPU" in mode_of(module, "auto").reason
    assert mode_of(on_meta, "auto", device=CUDA).name == FUSED
    assert mode_of(wide, "auto", device=CUDA).name == STOCK
    assert "float32" in mode_of(wide, "auto", device=CUDA).reason
    assert mode_of(on_meta, "auto", device=CPU).name == STOCK
    narrow = torch.bfloat16
    assert mode_of(wide, "auto", device=CUDA, dtype=narrow, gathered_in=narrow).name == FUSED
    assert mode_of(wide, "auto", device=CUDA, dtype=narrow).name == STOCK


def test_a_report_says_what_calls_under_autocast_do() -> None:
    model = with_mlp_adapters(tiny_model("qwen3"))
    prepared = prepare(model, lora="fused")
    assert {row.mode for row in prepared.report.lora_rows} == {FUSED}
    prepared.computes_in(torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    with torch.autocast("cpu", torch.bfloat16):
        modes = {module.mode_of_call(torch.zeros(1, 4, module.base_layer.in_features)) for module in layers}
    assert [row.mode for row in prepared.report.lora_rows] == [*modes] == [STOCK]
    reason = prepared.report.lora_rows[0].reason
    assert reason == "autocast to bfloat16 casts the base weights, float32, in every call"


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
    assert fused_layers(fused) == sum(type(m).__name__ == "Linear" and hasattr(m, "lora_A") for m in fused.modules())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_every_family(family: str) -> None:
    names = ["q_proj", "k_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_a", "out_proj"]
    names += ["gate_proj", "up_proj", "down_proj"] if "moe" not in family and family != "qwen3_next" else []
    fused, stock = pair(family, target_modules=names)
    assert_same(fused, stock)


class MLP(nn.Module):
    """As transformers writes them."""

    def __init__(self, act_fn: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down_proj, self.act_fn = nn.Linear(12, 8, bias=False), act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NormedMLP(MLP):
    """Something after the formula that changes the output little, and so at any input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.0000001


class DroppedMLP(MLP):
    """The same parts, another function in training alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), 0.5, self.training)


class ClampedMLP(MLP):
    """The same parts, another function of large values alone, as gpt-oss and what follows it write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x).clamp(-7.0, 7.0)
        return self.down_proj(self.act_fn(gate) * up)


class SwitchedMLP(MLP):
    """The same instructions over other names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class WithMoreArguments(MLP):
    """The same instructions, a call that ours does not take."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NamedMLP(MLP):
    """The same function under other names of its own."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return result


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.functional.silu])
def test_a_gated_mlp_is_known_by_how_its_forward_is_written(act_fn: Any, device: str) -> None:
    assert is_gated_mlp(MLP(act_fn).to(device))
    assert is_gated_mlp(NamedMLP(act_fn).to(device))
    for other in (NormedMLP, DroppedMLP, ClampedMLP, SwitchedMLP, WithMoreArguments):
        assert not is_gated_mlp(other(act_fn).to(device)), other
    hooked = MLP(act_fn).to(device)
    _hook(hooked.up_proj)
    assert not is_gated_mlp(hooked)


def small(family: str, **changes: Any) -> Any:
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 48, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values | changes))


def with_mlp_adapters(base: Any) -> Any:
    names = ["gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False))


def test_a_dropout_at_the_end_of_an_mlp_stays() -> None:
    model = with_mlp_adapters(small("seed_oss", attention_dropout=0.0, residual_dropout=0.5)).train()
    tokens = torch.arange(24)[None]

    def loss() -> float:
        torch.manual_seed(1)
        return model(input_ids=tokens, labels=tokens).loss.item()

    expected = loss()
    prepare(model)
    assert fused_layers(model) == 6
    assert loss() == pytest.approx(expected, rel=1e-5)


def test_a_clamp_inside_an_mlp_stays() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP

    stock = tiny_model("qwen3")
    for layer_of in stock.model.layers:
        clamped = DeepseekV4MLP(AutoConfig.for_model("deepseek_v4", hidden_size=32, moe_intermediate_size=48))
        clamped.load_state_dict({name: 40 * weight for name, weight in layer_of.mlp.state_dict().items()}, strict=True)
        layer_of.mlp = clamped
    model, tokens = with_mlp_adapters(stock), torch.arange(24)[None]
    expected = model(tokens).logits
    prepare(model)
    assert fused_layers(model) == 6
    assert not any(isinstance(module, GatedMLP) for module in model.modules())
    assert relative(model(tokens).logits, expected) < 1e-5


#: Families, and other decoders whose stock MLP is written in either way.
GATED = ("qwen3", "qwen3_5", "qwen3_5_moe", "llama", "gemma3_text", "mistral", "qwen2", "olmo2")


@pytest.mark.parametrize("family", GATED)
def test_mlps_of_transformers_share_the_product_of_their_input(family: str) -> None:
    model = with_mlp_adapters(tiny_model(family) if family in FAMILIES else small(family))
    mlps = [module for module in model.modules() if type(module).__name__.endswith("MLP")]
    prepare(model)
    assert len(mlps) == 2
    assert all(isinstance(module, GatedMLP) for module in mlps)


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


def test_a_bias_of_another_dtype_is_added_in_that_of_the_product() -> None:
    stock = layer(bias=True)
    stock.base_layer.bias = nn.Parameter(stock.base_layer.bias.float(), requires_grad=False)
    fused = copy.deepcopy(stock)
    swap(fused, LoRALinear, State(Options(kernels={}, mask_form="mapping", lora="fused")))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.mode_of_call(x) == FUSED
        found, expected = fused(x), stock(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative(found, expected) < 1e-2


def test_dropout_runs_unfused() -> None:
    """Without randomness the same as PEFT's; with it, the mask that PEFT's layer would draw."""
    model = adapted(dtype=torch.float64, lora_dropout=0.5)
    stock = reference_of(model)
    _as_if_on_a_gpu(model)
    assert relative(logits(model.eval()), logits(stock.eval())) < 1e-6
    for each in (model, stock):
        each.train()
        torch.manual_seed(3)
        each.zero_grad()
        each(**packed_call()).loss.backward()
    assert_gradients_close(model, stock)
    assert fused_layers(model) == 0


def test_dropout_runs_unfused_in_a_compiled_evaluation() -> None:
    model = adapted("qwen3", lora_dropout=0.5, target_modules=["q_proj"]).eval()
    stock = reference_of(model)
    _as_if_on_a_gpu(model, CompileOptions(backend="aot_eager"))
    with torch.no_grad():
        assert relative(logits(model), logits(stock)) < 1e-6


def _as_if_on_a_gpu(model: Any, options: CompileOptions | None = None) -> None:
    """Modes that ``lora="fused"`` refuses ahead of time, on a CPU."""
    prepare(model, lora="auto", compile=options)
    state = model.get_base_model()._deltatune
    state.options = dataclasses.replace(state.options, lora="fused")


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
    assert fused_layers(model) == 15


class Int8Linear(nn.Module):
    """A quantised base: no floating-point weight to read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().char())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.qweight.to(x.dtype) * self.scale.to(x.dtype))


QUANTISED = ["aqlm.AqlmLoraLinear", "gptq.GPTQLoraLinear", "awq.AwqLoraLinear", "te.TeLinear"]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
# one of them compiled: all run the same forward of ours
@pytest.mark.parametrize(("kind", "compiled"), [*((kind, False) for kind in QUANTISED), (QUANTISED[1], True)])
def test_layers_over_quantised_bases_run_unfused(kind: str, compiled: bool) -> None:
    module, name = kind.split(".")
    cls = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name)
    model = adapted("qwen3", target_modules=["q_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False)
    for layer_of in model.get_base_model().model.layers:
        for parent, child in ((layer_of.mlp, "up_proj"), (layer_of.self_attn, "v_proj")):
            setattr(
                parent, child, cls(Int8Linear(getattr(parent, child)), "default", config=config, r=4, lora_alpha=12)
            )
    stock = reference_of(model)
    _as_if_on_a_gpu(model, CompileOptions(backend="aot_eager") if compiled else None)
    modes = lora_modes(model, model.get_base_model().model, "fused", CPU)
    assert [mode for path, mode in modes if "q_proj" not in path] == [(UNFUSED, "the base layer is a Int8Linear")] * 4
    assert_same(model, stock)
    with model.disable_adapter(), stock.disable_adapter():
        assert relative(logits(model), logits(stock)) < 1e-6


def test_only_layers_that_add_products_of_their_input_are_taken() -> None:
    base = nn.ModuleDict({"linear": nn.Linear(8, 8), "embedding": nn.Embedding(9, 8), "conv": nn.Conv1d(8, 8, 1)})
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["linear", "embedding", "conv"]), base)
    assert [name for name, module in model.named_children() if is_lora_linear(module)] == ["linear"]
    wrapped = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm((8, 8)))
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_parameters=["0.weight", "1.weight"]), wrapped)
    assert [is_lora_linear(module) for module in wrapped] == [True, False]


def test_dora_is_pefts_own_layer() -> None:
    model = adapted(use_dora=True)
    stock = reference_of(model)
    rows = prepare(model, lora="auto").report.lora_rows
    _as_if_on_a_gpu(model)
    assert torch.equal(logits(model), logits(stock))
    assert [row.mode for row in rows] == ["stock"]
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
    assert fused_layers(fused) == 15


def modes_of_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How layers with adapters run in a forward."""
    seen: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(mode_of(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(lora_linear, "mode_of", noted)
    model(**packed_call())
    monkeypatch.undo()
    return seen


@pytest.fixture
def one_process() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("ran", "compiled"), [(False, False), (True, False), (True, True)])
def test_layers_that_fsdp2_gathers_run_fused(
    one_process: Any, monkeypatch: pytest.MonkeyPatch, ran: bool, compiled: bool
) -> None:
    model = adapted("qwen3", target_modules=FEW) if compiled else adapted("qwen3_5")
    stock = reference_of(model)
    prepare(model, lora="fused", compile=CompileOptions(backend="aot_eager") if compiled else None)
    if ran:
        logits(model)
    whole = fused_layers(model)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    for each in (model, stock):
        for _ in range(2):
            each(**packed_call()).loss.backward()
    assert fused_layers(model) == whole > 0
    if not compiled:
        assert {mode.name for mode in modes_of_calls(model, monkeypatch)} == {FUSED}
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            assert relative(ours.grad.full_tensor(), theirs.grad) < 1e-5, name


@pytest.mark.parametrize("reshard", [True, False])
def test_the_report_takes_what_fsdp2_shards_as_gathered(one_process: Any, reshard: bool) -> None:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted("qwen3_moe", target_modules=["q_proj"], target_parameters=experts)
    prepared = prepare(model, lora="fused")
    rows = prepared.report.lora_rows
    for block in model.get_base_model().model.layers:
        fully_shard(block, reshard_after_forward=reshard)
    assert prepared.report.lora_rows == rows
    model(**packed_call())
    assert prepared.report.lora_rows == rows
    assert {row.mode for row in rows} == {FUSED}


def test_a_model_without_adapters_is_left_alone() -> None:
    model = tiny_model("qwen3_5")
    classes = [type(module) for module in model.modules() if isinstance(module, nn.Linear)]
    prepare(model)
    assert [type(module) for module in model.modules() if isinstance(module, nn.Linear)] == classes
    with pytest.raises(ValueError, match="needs LoRA layers, and the model has none"):
        prepare(model, lora="fused")
