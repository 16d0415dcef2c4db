"""Experts merged in bfloat16 are the exact sums of base and adapter up to rounding, whichever layout their file has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training_cases import byte_tokenizer
from transformers import AutoModelForCausalLM

from deltatune.training.export import merge_adapter, save_trained
from mixtures import mixture
from tiny import tiny_model

UNIT = torch.finfo(torch.bfloat16).eps / 2
#: Of a checkpoint's experts: fused, transposed or not, or each by itself, under two kinds of names.
LAYOUTS = {
    "gemma4_text": r"\.experts\.gate_up_proj",
    "gpt_oss": r"\.experts\.gate_up_proj",
    "qwen3_moe": r"\.experts\.0\.gate_proj\.weight",
    "qwen3_5_moe": r"\.experts\.(gate_up_proj|0\.gate_proj\.weight)",
    "mixtral": r"\.experts\.0\.w1\.weight",
}


def base(family: str, folder: Path) -> None:
    model: Any = mixture(family) if family in ("mixtral", "gemma4_text") else tiny_model(family)
    model.resize_token_embeddings(259)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("family", LAYOUTS)
def test_experts_of_16_bits_are_rounded_sums(family: str, tmp_path: Path) -> None:
    base(family, tmp_path / "base")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(
        r=2, lora_alpha=4, use_rslora=True, target_parameters=names, rank_pattern={names[1]: 3}, init_lora_weights=False
    )
    torch.manual_seed(0)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16), config)
    save_trained(trained, byte_tokenizer(), tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    wide = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    exact = wide.merge_and_unload().state_dict()
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "base", folder))
    assert before.keys() == after.keys()
    assert any(re.search(LAYOUTS[family], name) for name in after)
    for name, weight in exact.items():
        assert merged[name].dtype == torch.bfloat16
        if not name.endswith(tuple(names)):
            assert torch.equal(merged[name].float(), plain[name])
            continue
        change = weight - plain[name]
        assert change.norm() > 0.05 * weight.norm()
        # what is added rounds once, and the sum; float32 has its own rounding
        limit = UNIT * ((1 + UNIT) * change.abs() + weight.abs())
        assert bool(((merged[name].float() - weight).abs() <= limit + 1e-7).all()), name
