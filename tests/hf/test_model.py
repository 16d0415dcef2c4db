"""Questions about a model that several rooms ask."""

from __future__ import annotations

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

from deltatune.compile.memory import estimate_memory
from deltatune.hf.model import base_model, compute_dtype, device_of, head_of, is_sharded, text_config, text_model
from tiny import tiny_conditional, tiny_model


def _quantised(model: nn.Module) -> nn.Module:
    """Every layer's linear weights as bytes, which then are most of the model, as bitsandbytes stores 4-bit ones."""
    for module in model.get_decoder().modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros(64 * module.weight.numel(), 1, dtype=torch.uint8), False)
    return model


def test_the_parts_are_found_through_wrappers() -> None:
    causal, conditional = tiny_model("qwen3"), tiny_conditional()
    assert text_model(causal) is causal.model
    assert text_model(causal.model) is causal.model
    assert text_model(conditional) is conditional.model.language_model
    assert text_config(conditional).model_type == "qwen3_5_text"
    assert head_of(conditional) is conditional.lm_head
    assert head_of(causal.model) is None
    adapted = peft.get_peft_model(causal, peft.LoraConfig(target_modules=["q_proj"]))
    assert base_model(adapted) is causal
    assert text_model(adapted) is causal.model
    assert head_of(adapted) is causal.lm_head


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="got Linear without decoder layers"):
        text_model(nn.Linear(2, 2))
    config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="an encoder-decoder"):
        text_model(transformers.T5ForConditionalGeneration(config))
    small = transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(ValueError, match=r"an attribute `layers` .*, got GPT2LMHeadModel whose GPT2Model has no such"):
        text_model(transformers.GPT2LMHeadModel(small))


def test_bytes_of_a_quantised_model_are_no_compute_dtype() -> None:
    model = _quantised(tiny_model("qwen3", dtype=torch.bfloat16))
    assert compute_dtype(model) == torch.bfloat16
    model.get_input_embeddings().to(torch.float8_e4m3fn)
    assert compute_dtype(model) == torch.bfloat16
    both = [estimate_memory(model, tokens_per_batch=64, compute_dtype=given) for given in (None, torch.bfloat16)]
    assert both[0].activations == both[1].activations


def test_offloaded_weights_run_where_accelerate_brings_them() -> None:
    model = tiny_model("qwen3")
    accelerate.cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    assert device_of(model) == torch.device("cpu")


def test_nothing_is_sharded_in_one_process() -> None:
    model = tiny_model("qwen3")
    assert not is_sharded(model)
    assert not is_sharded(model.lm_head.weight)
