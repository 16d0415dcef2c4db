"""What ``training/servers.py`` specifies, read back as it says that servers read it: no patterns, one scale."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from deltatune.training.export import export_adapter, save_trained
from tiny import randomised, tiny_model

NAMES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SCALES: dict[str, dict[str, Any]] = {
    "one": {},
    "alpha of a weight": {"alpha_pattern": {"experts.down_proj": 12}},
    "rank of a weight": {"rank_pattern": {"mlp.experts.gate_up_proj": 3}},
    "root": {"use_rslora": True},
    "root and ranks": {"use_rslora": True, "rank_pattern": {"down_proj": 3, "o_proj": 1}},
    "of a linear layer": {"rank_pattern": {"o_proj": 1}, "alpha_pattern": {"layers.1.self_attn.o_proj": 5}},
}
# a layer's weight that is named as a Parameter: PEFT holds patterns against the name of the Parameter
WEIGHTS: dict[str, dict[str, Any]] = {
    "one": {},
    "alpha": {"alpha_pattern": {"mlp.gate.weight": 12}},
    "rank": {"rank_pattern": {"mlp.gate.weight": 4}},
    "both": {"rank_pattern": {r"layers\.1\.mlp\.gate\.weight": 4}, "alpha_pattern": {"gate.weight": 1}},
    "root and rank": {"use_rslora": True, "rank_pattern": {"gate.weight": 4, "down_proj": 3}},
    "of the layer's name, which PEFT matches with nothing": {"rank_pattern": {"mlp.gate": 4}, "use_rslora": True},
}
LAST = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def tiny(family: str) -> Any:
    if family != "mixtral":
        return tiny_model(family)
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 16,
              "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    torch.manual_seed(0)
    return randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **values)), 0)


def exported(family: str, layout: str, tmp_path: Path, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """An exported adapter, and what PEFT adds to each weight of the model by the one that it is of."""
    tiny(family).save_pretrained(tmp_path / "base")
    values = {"r": 2, "lora_alpha": 6, "target_modules": ["o_proj"], "target_parameters": NAMES, **changes}
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(init_lora_weights=False, **values)
    )
    save_trained(model, None, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    merged = model.merge_and_unload().state_dict()
    folder = export_adapter(tmp_path / "adapter", tmp_path / "served", layout=layout)
    return folder, {name: merged[name] - weight for name, weight in plain.items()}


def products(folder: Path) -> dict[str, torch.Tensor]:
    """``B A`` by the path of its module, times the one scale that servers read."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "adapter_model.safetensors")
    assert not config["use_rslora"]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): config["lora_alpha"]
        / config["r"]
        * state[name.replace("lora_A", "lora_B")]
        @ tensor
        for name, tensor in state.items()
        if name.endswith("lora_A.weight")
    }


def assert_stock_peft_adds(folder: Path, tmp_path: Path, added: dict[str, torch.Tensor]) -> None:
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(folder))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    merged = loaded.merge_and_unload().state_dict()
    for name, change in added.items():
        torch.testing.assert_close(merged[name] - plain[name], change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [NAMES, NAMES[:1], NAMES[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_every_expert_has_all_three_projections(family: str, targets: list[str], tmp_path: Path) -> None:
    folder, added = exported(family, "per-expert", tmp_path, target_parameters=targets)
    found = products(folder)
    part = "block_sparse_moe" if family == "mixtral" else "mlp"
    for layer in range(2):
        for e in range(4):
            prefix = f"model.layers.{layer}.{part}.experts.{e}."
            of_expert = {LAST.get(k[len(prefix) :], k[len(prefix) :]): v for k, v in found.items() if prefix in k}
            assert of_expert.keys() == {"gate_proj", "up_proj", "down_proj"}
            both, down = (added[f"model.layers.{layer}.{name}"][e] for name in NAMES)
            if family == "gpt_oss":
                both, down = both.mT, down.mT
            gate, up = (both[::2], both[1::2]) if family == "gpt_oss" else both.chunk(2)
            for projection, change in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
                torch.testing.assert_close(of_expert[projection], change, rtol=1e-4, atol=1e-6)


def test_experts_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    folder, _ = exported("mixtral", "per-expert", tmp_path)
    saved = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name.removesuffix(".weight") for name in saved if re.search(r"experts\.\d+\.", name)}
    assert {path for path in products(folder) if ".experts." in path} == weights


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("targets", [NAMES, NAMES[:1], NAMES[1:]], ids=["both", "gate_up", "down"])
def test_stock_peft_reads_it(family: str, targets: list[str], tmp_path: Path) -> None:
    folder, added = exported(family, "per-expert", tmp_path, target_parameters=targets, use_rslora=True)
    assert_stock_peft_adds(folder, tmp_path, added)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("layout", ["peft", "per-expert"])
def test_one_scale_serves_all(layout: str, scales: str, tmp_path: Path) -> None:
    folder, added = exported("qwen3_moe", layout, tmp_path, **SCALES[scales])
    found = products(folder)
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.o_proj"
        torch.testing.assert_close(found[path], added[f"{path}.weight"], rtol=1e-4, atol=1e-6)
        if layout == "per-expert":
            down = added[f"model.layers.{layer}.{NAMES[1]}"]
            for e in range(4):
                one = found[f"model.layers.{layer}.mlp.experts.{e}.down_proj"]
                torch.testing.assert_close(one, down[e], rtol=1e-4, atol=1e-6)
    assert_stock_peft_adds(folder, tmp_path, added)


@pytest.mark.parametrize("scales", WEIGHTS)
@pytest.mark.parametrize("layout", ["peft", "per-expert"])
def test_one_scale_serves_weights_that_are_named_as_parameters(layout: str, scales: str, tmp_path: Path) -> None:
    folder, added = exported(
        "qwen3_moe", layout, tmp_path, target_parameters=[*NAMES, "mlp.gate.weight"], **WEIGHTS[scales]
    )
    found = products(folder)
    for layer in range(2):
        for path in (f"model.layers.{layer}.mlp.gate", f"model.layers.{layer}.self_attn.o_proj"):
            torch.testing.assert_close(found[path], added[f"{path}.weight"], rtol=1e-4, atol=1e-6)
    assert_stock_peft_adds(folder, tmp_path, added)


def test_an_adapter_of_one_scale_keeps_its_bits(tmp_path: Path) -> None:
    folder, _ = exported("qwen3_moe", "peft", tmp_path)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapter", folder))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == 6
