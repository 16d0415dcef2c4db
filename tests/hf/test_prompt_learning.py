"""Virtual tokens in front of a row have no place in a pack: refused at prepare, and by boundaries that do not fit."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from deltatune import prepare
from packed_cases import packed_call
from tiny import tiny_model

CONFIGS: dict[str, Any] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
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
def test_boundaries_no_longer_fit_where_they_came_later(kind: str, text_model_alone: bool) -> None:
    model = tiny_model("qwen3")
    prepare(model.model if text_model_alone else model)
    wrapped = peft.get_peft_model(model, CONFIGS[kind]())
    call = {"input_ids": packed_call()["input_ids"], "cu_seq_lens_q": packed_call()["sequences"].cu_seqlens}
    with pytest.raises(ValueError, match=r"must end at the number of tokens|cannot hold packed documents"):
        wrapped(**call)
    with torch.no_grad():
        model(**call)  # the model inside is as it was


def test_lora_and_embeddings_by_hand_are_no_virtual_tokens() -> None:
    model = peft.get_peft_model(tiny_model("qwen3"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    prepare(model)
    call = as_collators_emit()
    expected = model(**call).loss
    embeds = model.get_input_embeddings()(call.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **call).loss, expected)
