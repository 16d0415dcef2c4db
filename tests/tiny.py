"""Small random models of every family, with slow decay so that a leak cannot hide."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

VOCAB = 96

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": 4096, **_ATTENTION}
_DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SHARED = {"shared_expert_intermediate_size": 24}

TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "intermediate_size": 48},
    "qwen3_moe": {"model_type": "qwen3_moe", "intermediate_size": 48, **_EXPERTS},
    "qwen3_next": {"model_type": "qwen3_next", "intermediate_size": 48, **_EXPERTS, **_SHARED, **_DELTA},
    "qwen3_5": {"model_type": "qwen3_5_text", "intermediate_size": 48, **_DELTA},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", **_EXPERTS, **_SHARED, **_DELTA},
}
FAMILIES = tuple(TEXT_CONFIGS)
HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")


def tiny_model(family: str, *, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal language model of the family, with weights large enough for documents to matter to each other."""
    values = {**_COMMON, **TEXT_CONFIGS[family], "num_hidden_layers": layers, "tie_word_embeddings": False, **changes}
    if "layer_types" in values:
        pattern = values["layer_types"]
        values["layer_types"] = [pattern[i % len(pattern)] for i in range(layers)]
    model_type = values.pop("model_type")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    return randomised(model, seed).to(dtype)


def tiny_conditional(family: str = "qwen3_5", *, layers: int = 2, seed: int = 0) -> Any:
    """A ``*ForConditionalGeneration`` of the family with a small vision tower."""
    text = {**_COMMON, **TEXT_CONFIGS[family], "num_hidden_layers": layers}
    text.pop("model_type")
    pattern = text.get("layer_types")
    if pattern:
        text["layer_types"] = [pattern[i % len(pattern)] for i in range(layers)]
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=False)
    return randomised(AutoModelForImageTextToText.from_config(config), seed)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights at a scale where every token's influence is visible, and decay slow enough to carry it far."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.fill_(torch.tensor(0.05).log())
            elif name.endswith("dt_bias"):
                parameter.fill_(-1.0)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "conv1d" in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def documents(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Random token ids, one tensor a document."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator) for n in lengths]
