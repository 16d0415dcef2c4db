"""A sample as text in which the tokens that train stand out."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.visible import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["preview"]

_GREEN, _DIM, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def preview(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, color: bool = True) -> str:
    """The text of a sample, its trained stretches in green, or between « and » without ANSI colours.

    A document's first token counts as untrained, since nothing stands before it to predict it.
    """
    trained = sample.labels != IGNORE_INDEX
    trained[:1] = False
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(sample)]
    stretches = []
    for start, end in pairwise(edges):
        tokens = sample.input_ids[start:end].tolist()
        # stretches are decoded whole: a character may be spread over several tokens
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = visible(text)  # the escape sequences are ours alone
        if color:
            # a colour that spans lines is lost in pagers
            style = _GREEN if trained[start] else _DIM
            text = "\n".join(f"{style}{line}{_RESET}" if line else line for line in text.split("\n"))
        elif trained[start]:
            text = f"«{text}»"
        stretches.append(text)
    return "".join(stretches)
