"""Asking a model the last question of each conversation, and counting the answers that are right to the letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltatune.demo.conversations import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ask", "exact_match"]

# longer than any right answer, so that a model which never ends its turn is cut off soon
_MAX_NEW_TOKENS = 24


def ask(model: Any, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[str]:
    """The model's greedy answers to the last question of each conversation, the turns before it given.

    Args:
        model: a causal language model, stock or prepared; it generates with its cache and is left in evaluation mode.
        tokenizer: with a chat template.
        conversations: all are asked in one batch.
    """
    model.eval()
    batch: Any = tokenizer.apply_chat_template(
        [conversation.messages[:-1] for conversation in conversations],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    answers: list[str] = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    return answers


def exact_match(conversations: Sequence[Conversation], answers: Sequence[str]) -> dict[str, float]:
    """The share of answers equal to the right ones, spaces around them aside: by kind of conversation, and ``all``."""
    kinds: dict[str, list[bool]] = {}
    for conversation, answer in zip(conversations, answers, strict=True):
        for kind in (conversation.kind, "all"):
            kinds.setdefault(kind, []).append(answer.strip() == conversation.turns[-1][1])
    return {kind: sum(right) / len(right) for kind, right in kinds.items()}
