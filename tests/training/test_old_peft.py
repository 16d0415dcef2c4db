"""Files of experts that PEFT 0.17, 0.18 and 0.19 wrote themselves (``old_peft/make.py``), in the PEFT of today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from old_peft.make import model as make_base
from peft import PeftModel
from safetensors.torch import load_file
from training_cases import byte_tokenizer
from transformers import AutoModelForCausalLM

from deltatune.config.schema import LoraSection
from deltatune.errors import UserError
from deltatune.training.adapters import adapt
from deltatune.training.continuing import load_adapter
from deltatune.training.expert_adapters import current_roles
from deltatune.training.export import export_adapter, merge_adapter

FILES = Path(__file__).parent / "old_peft"
OLD = sorted([*FILES.glob("qwen3_moe-peft-0.18.1*"), *FILES.glob("*-peft-0.19.0*")])
ALL = sorted(path for path in FILES.iterdir() if (path / "adapter_config.json").is_file())


@pytest.fixture(params=ALL, ids=lambda path: path.name)
def adapter(request: Any) -> Path:
    found: Path = request.param
    return found


def base_of(adapter: Path, folder: Path) -> Path:
    make_base(adapter.name.partition("-")[0]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def added_by(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight of the experts, by PEFT's own reading of it."""
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    return {name.rpartition(".")[2]: weight - plain[name] for name, weight in merged.state_dict().items()
            if name.endswith(("gate_up_proj", "down_proj"))}  # fmt: skip


def test_there_are_files_of_every_version() -> None:
    assert {path.name.split("-")[2] for path in ALL} == {"0.17.1", "0.18.1", "0.19.0", "0.19.1"}
    assert len(OLD) == 6


def test_an_exported_file_adds_what_its_own_version_added(adapter: Path, tmp_path: Path) -> None:
    base = base_of(adapter, tmp_path / "base")
    exported = export_adapter(adapter, tmp_path / "now", layout="peft", base=str(base))
    found, expected = added_by(exported, base), load_file(adapter / "added.safetensors")
    assert expected.keys() <= found.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-6)


def test_each_expert_of_an_exported_file_adds_what_its_own_version_added(adapter: Path, tmp_path: Path) -> None:
    base = base_of(adapter, tmp_path / "base")
    exported = export_adapter(adapter, tmp_path / "served", layout="per-expert", base=str(base))
    state = load_file(exported / "adapter_model.safetensors")
    expected = load_file(adapter / "added.safetensors")["gate_up_proj"]
    interleaved = adapter.name.startswith("gpt_oss")
    expected = expected.mT if interleaved else expected
    for e, change in enumerate(expected):
        prefix = f"base_model.model.model.layers.0.mlp.experts.{e}"
        halves = (change[::2], change[1::2]) if interleaved else change.chunk(2)
        for projection, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            a, b = (state[f"{prefix}.{projection}.lora_{one}.weight"] for one in "AB")
            torch.testing.assert_close(3 * b @ a, half, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("old", OLD, ids=lambda path: path.name)
def test_files_in_old_roles_are_refused_with_the_command_that_turns_them(old: Path, tmp_path: Path) -> None:
    base = base_of(old, tmp_path / "base")
    remedy = f"as PEFT {old.name.split('-')[2]} wrote them; deltatune export {old} --output NEW --layout peft"
    with pytest.raises(UserError, match=remedy):
        merge_adapter(old, tmp_path / "merged", base=str(base))
    section = LoraSection(name_or_path=str(old))
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UserError, match=remedy):
        load_adapter(adapt(model, section), section)


def test_other_files_are_taken_as_they_are(adapter: Path, tmp_path: Path) -> None:
    if adapter in OLD:
        return
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    state = load_file(adapter / "adapter_model.safetensors")
    found = current_roles(state, config, make_base(adapter.name.partition("-")[0]))
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def square(version: str | None) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    """Adapters of one weight alone whose two widths agree, so that no shape tells."""
    config = {"target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": version}
    path = "base_model.model.model.layers.0.mlp.experts.lora_"
    return {f"{path}A.weight": torch.randn(6, 12), f"{path}B.weight": torch.randn(12, 6)}, config, make_square()


def make_square(family: str = "qwen3_moe") -> Any:
    base = make_base(family)
    experts = base.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 12, 12))
    return base


def test_square_weights_of_old_versions_are_refused_and_of_others_taken() -> None:
    for version in ("0.18.0", "0.18.2.dev0", "0.19.0"):
        with pytest.raises(UserError, match=f"PEFT {version} wrote .* weights are square"):
            current_roles(*square(version))
    for version in ("0.19.1", "0.21.2", None):
        state, config, model = square(version)
        assert all(torch.equal(current_roles(state, config, model)[name], value) for name, value in state.items())


def test_square_weights_that_are_stored_transposed_are_the_same_in_both() -> None:
    state, config, _ = square("0.18.0")
    model = make_square("gpt_oss")
    assert all(torch.equal(current_roles(state, config, model)[name], value) for name, value in state.items())


def test_one_weight_that_tells_tells_of_all() -> None:
    state, config, model = square("0.18.1")
    inner = {name.replace("experts.", "experts.base_layer."): tensor for name, tensor in state.items()}
    outer = {name: torch.randn(6, 8) if "lora_A" in name else torch.randn(6, 6) for name in state}
    # down_proj is [3, 8, 6]: its A is [6, 8] in 0.18 alone
    found = current_roles(inner | outer, config, model)
    for name, tensor in inner.items():
        assert not torch.equal(found[name], tensor), name
