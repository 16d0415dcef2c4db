"""Virtual tokens in front of a row have no place in a pack: refused at prepare, and at calls of a later adapter."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from deltatune import prepare
from packed_cases import LENGTHS, packed_call
from tiny import documents, tiny_model

CONFIGS: dict[str, Any] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


METADATA: dict[str, Any] = {
    "cu_seq_lens_q": lambda: {"cu_seq_lens_q": packed_call()["sequences"].cu_seqlens},
    "position_ids": lambda: {"position_ids": packed_call()["sequences"].positions.long()[None]},
    "indexed mask": lambda: {
        "attention_mask": torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS))[None]
    },
}


def as_collators_emit() -> dict[str, Any]:
    call = packed_call()
    positions = call["sequences"].positions.long()[None]
    return {"input_ids": call["input_ids"], "labels": call["input_ids"], "position_ids": positions}


@pytest.mark.parametrize("kind", CONFIGS)
def test_refused_at_prepare(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"adapter 'default' is of type {kind}.*use LoRA"):
        prepare(peft.get_peft_model(tiny_model("qwen3"), CONFIGS[kind]()))


@pytest.mark.parametrize("text_model_alone", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("metadata", METADATA)
def test_refused_at_the_call_where_they_came_later(metadata: str, kind: str, text_model_alone: bool) -> None:
    model = tiny_model("qwen3").train()
    prepare(model.model if text_model_alone else model)
    wrapped = peft.get_peft_model(model, CONFIGS[kind]())
    call = {"input_ids": packed_call()["input_ids"], "labels": packed_call()["input_ids"], **METADATA[metadata]()}
    with pytest.raises(ValueError, match=rf"of type {kind}.*use LoRA|cannot hold packed documents"):
        wrapped(**call)
    with torch.no_grad(), wrapped.disable_adapter():
        wrapped(**call)  # the model inside is as it was


def test_a_row_of_one_document_is_generated_after_virtual_tokens() -> None:
    model = tiny_model("qwen3").eval()
    wrapped = peft.get_peft_model(model, CONFIGS["PROMPT_TUNING"]())
    call = {"input_ids": documents([7])[0][None], "max_new_tokens": 4, "do_sample": False}
    expected = {use_cache: wrapped.generate(**call, use_cache=use_cache) for use_cache in (True, False)}
    prepare(model)
    for use_cache, tokens in expected.items():
        assert torch.equal(wrapped.generate(**call, use_cache=use_cache), tokens)


def test_lora_and_embeddings_by_hand_are_no_virtual_tokens() -> None:
    model = peft.get_peft_model(tiny_model("qwen3"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    prepare(model)
    call = as_collators_emit()
    expected = model(**call).loss
    embeds = model.get_input_embeddings()(call.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **call).loss, expected)
