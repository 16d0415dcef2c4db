"""Small mixtures of experts that are no families of their own, one of each layout of experts and kind of router."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tiny import randomised, tiny_conditional, tiny_model

OTHERS = ["mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "gemma4_text", "aria_text"]
_VALUES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "sliding_window": None},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 24,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
    },
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 24,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    # experts beside a dense MLP in the layer, and a router that norms the residual itself
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24,
        "intermediate_size": 48, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7,
        "global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
    },
    # stored transposed, in halves, without biases
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "intermediate_size": 24},
}  # fmt: skip
_VALUES |= {"deepseek_v2": _VALUES["deepseek_v3"], "glm4_moe_lite": _VALUES["deepseek_v3"] | {"n_group": 1}}


def mixture(family: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """One of ``OTHERS``, or a family of our own; of Qwen3-VL-MoE with its tower."""
    if family == "qwen3_vl_moe":
        return tiny_conditional(family).to(dtype)
    if family not in _VALUES:
        return tiny_model(family, dtype=dtype, layers=layers)
    values = {"vocab_size": 96, "hidden_size": 32, "pad_token_id": 0, "head_dim": 16}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, **_VALUES[family]}
    values["num_hidden_layers"] = layers + values.get("first_k_dense_replace", 0) * (layers == 1)
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][:layers]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **values)
    return randomised(transformers.AutoModelForCausalLM.from_config(config), 0).to(dtype)
