"""Adapters: names that match nothing are errors, towers stay out, dtypes are as asked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deltatune.config.schema import LoraSection
from deltatune.errors import UserError
from deltatune.training import adapters
from deltatune.training.adapters import adapt
from tiny import tiny_conditional, tiny_model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ("q_proj", "qkv_proj")}, r"target_modules: 'qkv_proj' matches no module.*q_proj"),
        ({"target_modules": ("zzz",)}, r"target_modules: 'zzz' matches no module; linear layers here:.*q_proj"),
        ({"target_modules": r".*\.w_pack"}, r"target_modules: .* matches no module"),
        ({"target_modules": "("}, r"target_modules: '\(' is no regular expression"),
        ({"modules_to_save": ("lm_heads",)}, r"modules_to_save: 'lm_heads' matches no module.*lm_head"),
        ({"rank_pattern": {"qproj": 8}}, r"rank_pattern: 'qproj' matches nothing that is adapted: q_proj"),
        ({"target_modules": ("k_proj",), "rank_pattern": {"q_proj": 8}}, r"'q_proj' .* that is adapted: k_proj$"),
        ({"layers_to_transform": (1,), "rank_pattern": {r"layers\.0\..*": 8}}, r"matches nothing that is adapted"),
        ({"alpha_pattern": {"qproj": 8}}, r"alpha_pattern: 'qproj' matches nothing that is adapted"),
        ({"exclude_modules": ("k_prj",)}, r"exclude_modules: 'k_prj' matches no module"),
        ({"layers_to_transform": (0, 2)}, r"layers_to_transform: 2 is no layer; the model has layers 0 to 1"),
    ],
)
def test_what_matches_nothing_is_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt(tiny_model("qwen3"), LoraSection(**values))


def test_what_matches_is_taken() -> None:
    section = LoraSection(target_modules=("q_proj", "mlp.up_proj"), rank_pattern={"mlp.up_proj": 2}, r=4)
    model = adapt(tiny_model("qwen3"), section)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_A" in name}
    assert {name.split(".lora_A")[0].rpartition(".")[2] for name in shapes} == {"q_proj", "up_proj"}
    assert {shape[0] for name, shape in shapes.items() if "up_proj" in name} == {2}
    assert {shape[0] for name, shape in shapes.items() if "q_proj" in name} == {4}


def test_all_linear_leaves_towers_and_the_head_alone() -> None:
    model = adapt(tiny_conditional(), LoraSection())
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted
    assert not any("visual" in name or "lm_head" in name for name in adapted)


def test_targets_are_the_text_model_s() -> None:
    model = adapt(tiny_conditional(), LoraSection(target_modules=("q_proj", "qkv")))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert adapted
    assert all("self_attn.q_proj" in name for name in adapted)


@pytest.mark.parametrize("values", [{"modules_to_save": ("merger",)}, {"exclude_modules": ("down_proj",)}])
def test_a_tower_that_would_train_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"lora: model\.visual\..* would train, of a tower that text gives no gradient"):
        adapt(tiny_conditional(), LoraSection(**values))


def test_full_training_freezes_what_text_never_reaches() -> None:
    model = tiny_conditional()
    adapt(model, None)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(trains for name, trains in trained.items() if "visual" in name)
    assert all(trains for name, trains in trained.items() if "visual" not in name)


@pytest.mark.parametrize("adapter_dtype", ["float32", "model"])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_adapters_of_an_empty_model_are_those_of_a_whole_one(family: str, adapter_dtype: Any) -> None:
    section = LoraSection(adapter_dtype=adapter_dtype, target_parameters="all-experts")
    whole = tiny_model(family, dtype=torch.bfloat16)
    found = []
    for model in (copy.deepcopy(whole).to("meta"), whole):
        adapted = adapt(model, section).named_parameters()
        found.append({name: (weight.shape, weight.dtype, weight.requires_grad) for name, weight in adapted})
    assert found[0] == found[1]


@pytest.mark.parametrize(("adapter_dtype", "expected"), [("float32", torch.float32), ("model", torch.bfloat16)])
def test_adapters_are_kept_in_the_dtype_asked_for(adapter_dtype: Any, expected: torch.dtype) -> None:
    model = adapt(tiny_model("qwen3", dtype=torch.bfloat16), LoraSection(adapter_dtype=adapter_dtype))
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


@pytest.mark.parametrize("values", [{}, {"use_dora": True}, {"init_lora_weights": "mica"}])
def test_adapters_of_an_empty_model_take_no_memory(values: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = tiny_model("qwen3")
    model = adapt(model, LoraSection(r=10**9, **values))
    assert {p.device.type for p in model.parameters()} == {"meta"}


EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def adapted_names(model: Any) -> set[str]:
    """Paths in a layer of what has adapters, wrappers around the same experts left out."""
    names = (name.partition("layers.")[2].partition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name)
    return {name.partition(".lora_A")[0].removesuffix(".base_layer") for name in names}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss"])
def test_all_linear_is_every_linear_layer_of_a_mixture_and_no_expert(family: str) -> None:
    model = tiny_model(family)
    linear = {name.partition("layers.")[2].partition(".")[2] for name, module in model.get_decoder().named_modules()
              if isinstance(module, torch.nn.Linear)}  # fmt: skip
    model = adapt(model, LoraSection(r=4))
    assert adapted_names(model) == linear
    assert all(shape[0] == 4 for shape in (p.shape for n, p in model.named_parameters() if "lora_A" in n))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss"])
def test_all_experts(family: str) -> None:
    alone = adapt(tiny_model(family), LoraSection(r=4, target_modules=None, target_parameters="all-experts"))
    assert adapted_names(alone) == {"mlp.experts"}
    ranks = {p.shape[0] for n, p in alone.named_parameters() if "lora_A" in n}
    assert ranks == {4 * 4}, "four experts, and no rank that PEFT doubled"
    both = adapt(tiny_model(family), LoraSection(r=4, target_parameters="all-experts"))
    assert adapted_names(both) > {"mlp.experts", "self_attn.q_proj"}
    chosen = adapt(
        tiny_model(family), LoraSection(r=4, target_parameters=("experts.down_proj",), layers_to_transform=(1,))
    )
    assert not [n for n, _ in chosen.named_parameters() if "lora_" in n and "layers.0." in n]
    assert [n for n, _ in chosen.named_parameters() if "experts.lora_A" in n]


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("qwen3_next", {"target_modules": ("q_proj", "gate_proj", "up_proj")},
         r"PEFT takes gate_proj, up_proj for the routed experts of a qwen3_next and drops.*all-experts"),
        ("qwen3_moe", {"target_modules": ("mlp.down_proj",)}, "PEFT takes mlp.down_proj.*all-experts"),
        ("qwen3_next", {"target_modules": r".*\.(gate_proj|up_proj)"}, "PEFT takes gate_proj, up_proj for the routed"),
        ("gpt_oss", {"target_modules": ("q_proj", "down_proj")}, "'down_proj' matches no module.*all-experts"),
        ("qwen3", {"target_parameters": "all-experts"}, "all-experts matches nothing: the model has no routed"),
        ("qwen3_moe", {"target_parameters": ("experts.gate_up",)}, r"'experts.gate_up' matches no parameter.*did you"),
        ("qwen3_moe", {"target_parameters": "mlp.experts.down_proj"},
         "target_parameters: expected all-experts or a list of names, got mlp.experts.down_proj"),
        *(
            ("qwen3_moe", {"target_parameters": "all-experts", "init_lora_weights": start},
             f"init_lora_weights: {start} cannot act on mlp.experts.gate_up_proj.*true .*gaussian .*false")
            for start in ("pissa", "pissa_niter_4", "olora", "orthogonal", "corda", "loftq", "eva", "lora_ga")
        ),
        ("qwen3_next", {"lora_dropout": 0.1}, "lora_dropout: 0.1 cannot act on shared_expert.gate_proj.weight"),
    ],
)  # fmt: skip
def test_targets_of_a_mixture_that_peft_would_twist(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt(tiny_model(family), LoraSection(**values))


def test_exclusions_and_patterns_act_on_parameters_too() -> None:
    section = LoraSection(
        r=4,
        target_parameters="all-experts",
        exclude_modules=r".*layers\.0\..*",
        rank_pattern={"shared_expert.gate_proj": 8, "experts.down_proj": 2},
        alpha_pattern={"shared_expert.gate_proj": 24},
    )
    model = adapt(tiny_model("qwen3_next"), section)
    factors = {name: p for name, p in model.named_parameters() if "lora_A" in name}
    assert not [name for name in factors if "layers.0." in name]
    ranks = {name.partition("layers.1.")[2].partition(".lora_A")[0]: p.shape[0] for name, p in factors.items()}
    assert ranks["mlp.shared_expert.gate_proj"] == 8
    assert ranks["mlp.shared_expert.up_proj"] == 4
    assert ranks["mlp.experts"] == 2 * 4
    assert ranks["mlp.experts.base_layer"] == 4 * 4
    shared = model.get_submodule("base_model.model.model.layers.1.mlp.shared_expert.gate_proj")
    assert shared.scaling["default"] == 3


@pytest.mark.parametrize("also", [None, ("o_proj",)], ids=["alone", "with a layer"])
@pytest.mark.parametrize("name", ["mlp.{}", "mlp.{}.weight", r"layers\.\d\.mlp\.{}", r".*\.{}\.weight"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss"])
def test_patterns_act_on_weights_that_are_named_as_parameters(
    family: str, name: str, also: tuple[str, ...] | None
) -> None:
    router = "router" if family == "gpt_oss" else "gate"
    pattern = {name.format(router): 8}
    targets = {"target_modules": also, "target_parameters": (f"mlp.{router}.weight",)}
    model = adapt(tiny_model(family), LoraSection(r=4, **targets, rank_pattern=pattern, alpha_pattern=pattern))
    layers = [module for path, module in model.named_modules() if path.endswith(f"mlp.{router}")]
    assert {(m.r["default"], m.scaling["default"]) for m in layers} == {(8, 1.0)}
    others = {m.r["default"] for path, m in model.named_modules() if path.endswith("o_proj")} if also else {4}
    assert others == {4}


def test_the_first_pattern_of_a_weight_acts_under_either_name() -> None:
    ranks = {"gate": 2, "mlp.gate.weight": 8}
    for expected in ranks.values():
        section = LoraSection(target_modules=None, target_parameters=("mlp.gate.weight",), rank_pattern=ranks)
        model = adapt(tiny_model("qwen3_5_moe"), section)
        assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {expected}
        ranks = dict(reversed(ranks.items()))


def test_a_pattern_that_acts_on_no_expert_weight_is_an_error() -> None:
    with pytest.raises(UserError, match=r"rank_pattern: 'experts' matches nothing .*experts\.down_proj"):
        adapt(tiny_model("qwen3_moe"), LoraSection(target_parameters="all-experts", rank_pattern={"experts": 2}))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "gpt_oss"])
def test_an_expression_adapts_what_it_matches_and_nothing_else_of_the_same_name(family: str) -> None:
    model = adapt(tiny_model(family), LoraSection(target_modules=r".*layers\.1\.self_attn\.(q|v)_proj"))
    names = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"base_model.model.model.layers.1.self_attn.{one}_proj" for one in "qv"}


@pytest.mark.parametrize(
    "values", [{"target_parameters": "all-experts"}, {"target_parameters": ("experts.down_proj",)}]
)
def test_a_tower_with_experts_of_its_own_gets_no_adapters(values: dict[str, Any]) -> None:
    model = tiny_conditional("qwen3_vl_moe")
    text = model.model.language_model.layers[0].mlp.experts
    model.model.visual.blocks[0].mlp.experts = copy.deepcopy(text)
    adapted = adapt(model, LoraSection(target_modules=None, **values))
    names = [name for name, p in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == 2 * (1 + (values["target_parameters"] == "all-experts"))
    assert not any("visual" in name for name in names)


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_how_adapters_of_experts_may_start(start: Any) -> None:
    model = adapt(tiny_model("qwen3_moe"), LoraSection(target_parameters="all-experts", init_lora_weights=start))
    up = [p for name, p in model.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(up) == 4
    assert all(bool(p.any()) == (start is False) for p in up)


def test_weights_of_linear_layers_by_name_start_as_those_of_linear_layers() -> None:
    """PEFT takes the shared expert's names for the routed ones, so that its weights are named as Parameters."""
    model = adapt(tiny_model("qwen3_next"), LoraSection(r=4, init_lora_weights="pissa"))
    shared = model.get_submodule("base_model.model.model.layers.1.mlp.shared_expert.gate_proj")
    assert shared.lora_B["default"].weight.any()


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
@pytest.mark.parametrize("excluded", [r"model\.layers\.0\..*", r".*\.0\..*", ("layers.0.mlp.experts",)])
def test_exclusions_are_full_names_or_their_ends(family: str, excluded: Any) -> None:
    section = LoraSection(r=4, target_parameters="all-experts", exclude_modules=excluded)
    names = [name for name, _ in adapt(tiny_model(family), section).named_parameters() if "lora_A" in name]
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 2
    assert not any("layers.0." in name for name in (experts if isinstance(excluded, tuple) else names))
    shared = [name for name in names if "layers.1.mlp.shared_expert.up_proj" in name]
    assert len(shared) == 1


def test_what_peft_takes_for_experts_unseen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "taken_for_experts", lambda *_: set())
    with pytest.raises(UserError, match=r"PEFT takes .*gate_up_proj"):
        adapt(tiny_model("qwen3_next"), LoraSection(target_modules=("gate_proj", "up_proj")))
