"""Models that transformers loads in 4 bits with bitsandbytes, on the CPU (``make test-optimizers``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deltatune import CompileOptions, prepare
from tiny import tiny_model

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

#: Widths that its kernels for a CPU pack.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "layers": 4}
LENGTHS = (10, 1, 13)
IDS = torch.randint(1, 90, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def loaded(folder: Path, family: str) -> Any:
    tiny_model(family, **SIZES, head_dim=32).save_pretrained(folder)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=four_bits)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    return model


def adapted(model: Any) -> Any:
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return model.train()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_packed_documents_train_as_each_alone_with_peft(family: str, tmp_path: Path) -> None:
    model = adapted(loaded(tmp_path / "base", family))
    alone = []
    for document in IDS.split(LENGTHS, dim=1):
        logits = model(input_ids=document).logits
        logits.square().sum().backward()
        alone.append(logits.detach())
    expected = gradients(model)
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager"))
    logits = model(input_ids=IDS, position_ids=POSITIONS).logits
    logits.square().sum().backward()
    torch.testing.assert_close(logits.detach(), torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max().item())
    assert prepared.compile_report.breaks == []
    assert prepared.compile_report.graphs


def test_the_adapter_alone_is_saved_and_loads_beside_peft(tmp_path: Path) -> None:
    model = adapted(loaded(tmp_path / "base", "qwen3_5"))
    expected = model(input_ids=IDS).logits.detach()
    prepare(model, compile=None)
    model.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name for name in names)
    again = PeftModel.from_pretrained(loaded(tmp_path / "base", "qwen3_5"), tmp_path / "adapter").train()
    torch.testing.assert_close(again(input_ids=IDS).logits.detach(), expected, rtol=1e-4, atol=1e-4)
