"""Asking and scoring: greedy, in order, right only to the letter."""

from __future__ import annotations

import pytest

from deltatune.demo.checkpoint import make_tokenizer
from deltatune.demo.conversations import Conversation, ask, exact_match, make_conversations

CONVERSATIONS = make_conversations(30, seed=0)
ASKED = Conversation("likes", "Ann likes figs.", (("What does Ann like?", "I read that Ann likes figs."),))


class Parrot:
    """A model that knows one answer for every prompt, given by its rendered text."""

    def __init__(self, tokenizer, conversations) -> None:
        self.tokenizer = tokenizer
        self.answers = {self.key(c): c.turns[-1][1] for c in conversations}

    def key(self, conversation: Conversation) -> str:
        return self.tokenizer.apply_chat_template(
            conversation.messages[:-1], add_generation_prompt=True, tokenize=False
        )

    def eval(self) -> None:
        pass

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        import torch

        assert not do_sample
        prompts = [self.tokenizer.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        answers = [self.answers[prompt] + "<|im_end|>" for prompt in prompts]
        ids = self.tokenizer(answers, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
        assert ids.shape[1] <= max_new_tokens
        return torch.cat([input_ids, ids], dim=1)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("I read that Ann likes figs.", True),
        (" I read that Ann likes figs.\n", True),
        ("I read that Ann likes figs", False),
        ("I read that Ann likes plums.", False),
        ("I read that Ann likes figs. Yes.", False),
        ("", False),
    ],
)
def test_an_answer_is_right_to_the_letter_or_wrong(text, right) -> None:
    assert exact_match([ASKED], [text]) == {"likes": right, "all": right}


def test_the_score_is_the_share_of_right_answers() -> None:
    right, other = ASKED.turns[-1][1], Conversation("lists", "", (("", "yes"),))
    assert exact_match([ASKED] * 4, [right, "no", "no", "no"]) == {"likes": 0.25, "all": 0.25}
    assert exact_match([ASKED, ASKED, ASKED, other], [right, "", "", "yes"]) == {"likes": 1 / 3, "lists": 1, "all": 0.5}


def test_answers_come_in_the_order_of_the_questions() -> None:
    tokenizer = make_tokenizer(CONVERSATIONS)
    answers = ask(Parrot(tokenizer, CONVERSATIONS), tokenizer, CONVERSATIONS)
    assert answers == [conversation.turns[-1][1] for conversation in CONVERSATIONS]
