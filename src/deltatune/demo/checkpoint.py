"""A small checkpoint of the Qwen3.5 architecture, with a tokenizer and a chat template of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from deltatune.demo.conversations import Conversation

__all__ = ["CHAT_TEMPLATE", "make_tokenizer", "save_checkpoint"]

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE: Final = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# the proportions of the real ones: three linear layers to one of attention, gated q, a quarter of each head rotated
_SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.09,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}

# A head forgets by a factor exp(-A softplus(a + dt_bias)) a token. The stock draw, A up to 16, gives random heads a
# memory of a token or less; trained ones remember for hundreds. Rates on a logarithmic scale span both.
_SLOWEST_DECAY, _FASTEST_DECAY = 0.01, 2.0
# with these a recall task is learned in fewer steps than with the stock ones
_EMBEDDING_STD, _CONV_STD = 0.3, 0.5


def save_checkpoint(folder: Path, conversations: Iterable[Conversation]) -> None:
    """Writes a random Qwen3.5 model, always the same, and a tokenizer that learns its words from the conversations."""
    tokenizer = make_tokenizer(conversations)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3_5TextConfig(vocab_size=len(tokenizer), **_SHAPE, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen3_5ForCausalLM(config)
        _widen(model)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def make_tokenizer(conversations: Iterable[Conversation]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be written in it, and the words of these conversations are one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    messages = (message for conversation in conversations for message in conversation.messages)
    backend.train_from_iterator((f"{message['role']}\n{message['content']}" for message in messages), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=_SHAPE["max_position_embeddings"],
    )


def _widen(model: Any) -> None:
    """Draws some weights at scales that suit a model this narrow, which the stock ones do not."""
    ends = math.log(_SLOWEST_DECAY), math.log(_FASTEST_DECAY)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.copy_(torch.linspace(*ends, weight.numel()))
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(std=_EMBEDDING_STD)
            elif name.endswith("conv1d.weight"):
                weight.normal_(std=_CONV_STD)
