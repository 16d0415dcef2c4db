"""Whether two models are one function, on text: the logits of every token, within what rounding explains."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deltatune.data.template import TEMPLATE_ERRORS
from deltatune.errors import UserError
from deltatune.verification.rounding import limits_of

__all__ = ["Compared", "compare", "difference", "logits_of", "probe_tokens"]

_TEXT: Final = (
    "Rain fell on the harbour for 17 days, and on the 18th the ferry left at 6:45 with twelve passengers.\n"
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)  # an empty list fails\n"
    "Où est la gare ? Die Brücke über den Fluß ist gesperrt. 今天的会议改到三点。 Сколько? $4.99 + 8% = $5.39\n"
)
_QUESTION: Final = "Which of these lines is code, and what does it do?"
_MOST_TOKENS: Final = 256

#: Relative, as the independence probe has them (verification/probe.py).
_TOLERANCE: Final = 1e-5
_TOLERANCE_OF_16_BITS: Final = 2e-2


@dataclass(frozen=True)
class Compared:
    """Two models' logits on a text."""

    num_tokens: int
    difference: float  # the mean over tokens; see ``difference``
    limit: float
    worst: dict[int, float]  # the places of the tokens that differ most, and by how much

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= self.limit


def probe_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Ids ``[1, T]`` of a text in several scripts, in the chat template where there is one.

    Raises:
        UserError: no id is within the vocabulary.
    """
    text = _TEXT + _QUESTION
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": _TEXT}]
    # a template that takes no such conversation is none to compare on
    with suppress(*TEMPLATE_ERRORS):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token < vocabulary]
    if not ids:
        raise UserError(f"the tokenizer gives no token of the model's {vocabulary:,}; pass the right base with --base")
    return torch.tensor([ids[:_MOST_TOKENS]])


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits ``[T, V]`` in float32."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float()


def compare(model: nn.Module, ids: Tensor, expected: Tensor) -> Compared:
    """A model against the logits that it should have.

    The limit is a tolerance of the dtype, or more where rounding alone changes the model's logits by more, as measured.
    """
    found = logits_of(model, ids)
    narrow = torch.finfo(next(model.parameters()).dtype).bits < 32
    tolerance = _TOLERANCE_OF_16_BITS if narrow else _TOLERANCE
    each = _differences(found, expected)
    worst = each.nan_to_num(torch.inf).topk(min(3, len(each)))
    apart = float(each.mean())

    def differ(one: Tensor, other: Tensor) -> tuple[float]:
        return (difference(one, other),)

    (limit,) = limits_of((apart,), tolerance, lambda: logits_of(model, ids), differ, found)
    return Compared(ids.shape[1], apart, limit, dict(zip(worst.indices.tolist(), worst.values.tolist(), strict=True)))


def difference(found: Tensor, expected: Tensor) -> float:
    """The mean over tokens of the length of the difference, over the mean length of a token's logits."""
    return float(_differences(found, expected).mean())


def _differences(found: Tensor, expected: Tensor) -> Tensor:
    """Of each token."""
    apart: Tensor = (found - expected).norm(dim=-1)
    scale: Tensor = expected.norm(dim=-1).mean()
    return apart / scale
