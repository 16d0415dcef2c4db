"""The demo's checkpoint is one that stock transformers loads, and its template marks what trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5ForCausalLM

from deltatune.demo.checkpoint import make_tokenizer, save_checkpoint
from deltatune.demo.conversations import make_conversations

CONVERSATIONS = make_conversations(60, seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    save_checkpoint(folder, CONVERSATIONS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_it_loads_as_a_hybrid_of_three_linear_layers_to_one_of_attention(checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(model, Qwen3_5ForCausalLM)
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]


def test_the_weights_are_always_the_same_and_the_process_is_left_alone(checkpoint, tmp_path) -> None:
    torch.rand(3)
    state = torch.random.get_rng_state()
    save_checkpoint(tmp_path / "same", CONVERSATIONS)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same = ((folder / "model.safetensors").read_bytes() for folder in (checkpoint, tmp_path / "same"))
    assert first == same


def test_any_text_survives_the_tokenizer(tokenizer) -> None:
    text = "Ann's kite — 12 ☂, tabs\tand\nlines"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_reloaded_tokenizer_is_the_one_that_was_made(tokenizer) -> None:
    made = make_tokenizer(CONVERSATIONS)
    text = CONVERSATIONS[0].messages[0]["content"]
    assert tokenizer.is_fast
    assert tokenizer(text)["input_ids"] == made(text)["input_ids"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_words_of_the_data_are_single_tokens(tokenizer) -> None:
    tokens = tokenizer.tokenize("Today Ann likes plums and Ben likes figs.")
    assert len(tokens) == 9


@pytest.mark.parametrize("conversation", CONVERSATIONS[:6], ids=lambda conversation: conversation.kind)
def test_the_template_marks_the_assistants_turns_alone(tokenizer, conversation) -> None:
    rendered = tokenizer.apply_chat_template(
        conversation.messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    marked = [token for token, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mask]
    answers = [message["content"] + "<|im_end|>" for message in conversation.messages if message["role"] == "assistant"]
    assert tokenizer.decode(marked) == "".join(answers)


def test_the_generation_prompt_is_what_stands_before_an_answer(tokenizer) -> None:
    messages = CONVERSATIONS[0].messages
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + messages[-1]["content"] + "<|im_end|>\n"
