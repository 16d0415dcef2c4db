"""Asking a model the last question of each conversation, and counting the answers that are right to the letter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltatune.demo.conversations import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "ask", "exact_match"]

# longer than any right answer, so that a model which never ends its turn is cut off soon
_MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """What a model said to the last question of a conversation."""

    conversation: Conversation
    text: str

    @property
    def right(self) -> bool:
        """Whether it is the conversation's last turn, spaces around it aside."""
        return self.text.strip() == self.conversation.turns[-1][1]

    @property
    def printable(self) -> str:
        """The text without what drives a terminal: an untrained model writes any bytes."""
        return "".join(character if character.isprintable() else "·" for character in self.text.strip())


def ask(model: Any, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[Answer]:
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
    texts = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
    return [Answer(conversation, text) for conversation, text in zip(conversations, texts, strict=True)]


def exact_match(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of right answers for each kind of conversation, and for ``all``."""
    kinds: dict[str, list[bool]] = {}
    for answer in answers:
        kinds.setdefault(answer.conversation.kind, []).append(answer.right)
    kinds["all"] = [answer.right for answer in answers]
    return {kind: sum(right) / len(right) for kind, right in kinds.items()}
