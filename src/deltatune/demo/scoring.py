"""Asking a model the last question of each conversation, and counting the answers that are right to the letter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deltatune.demo.conversations import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "ask", "exact_match", "exact_match_by_kind"]

# longer than any right answer, so that a model which never ends its turn is cut off soon
_MAX_NEW_TOKENS = 24
_BATCH_SIZE = 64


@dataclass(frozen=True)
class Answer:
    """What a model said to the last question of a conversation.

    Attributes:
        conversation: with the right answer in its last turn.
        text: the model's answer.
    """

    conversation: Conversation
    text: str

    @property
    def expected(self) -> str:
        """The right answer."""
        return self.conversation.turns[-1][1]

    @property
    def right(self) -> bool:
        """Whether the two are equal, spaces around them aside."""
        return self.text.strip() == self.expected


def ask(model: Any, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[Answer]:
    """The model's greedy answers to the last question of each conversation, the turns before it given.

    Args:
        model: a causal language model, stock or prepared; it generates with its cache and is left in evaluation mode.
        tokenizer: with a chat template.
        conversations: in any order; the answers come in the same.
    """
    model.eval()
    prompts = [_prompt(tokenizer, conversation) for conversation in conversations]
    answers: dict[int, Answer] = {}
    # neighbours of like length need little padding
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(order), _BATCH_SIZE):
        members = order[first : first + _BATCH_SIZE]
        texts = _generate(model, tokenizer, [prompts[index] for index in members])
        answers.update((index, Answer(conversations[index], text)) for index, text in zip(members, texts, strict=True))
    return [answers[index] for index in range(len(prompts))]


def exact_match(answers: Iterable[Answer]) -> float:
    """The share of right answers; 0 for none at all."""
    right = [answer.right for answer in answers]
    return sum(right) / max(len(right), 1)


def exact_match_by_kind(answers: Iterable[Answer]) -> dict[str, float]:
    """The share of right answers for each kind of conversation."""
    kinds: dict[str, list[Answer]] = {}
    for answer in answers:
        kinds.setdefault(answer.conversation.kind, []).append(answer)
    return {kind: exact_match(members) for kind, members in kinds.items()}


def _prompt(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    text = tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=_MAX_NEW_TOKENS,
            do_sample=False,
        )
    texts: list[str] = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
