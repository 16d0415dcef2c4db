"""What a model is given to complete at evaluations: the recipe's own prompts, and beginnings of held-out documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltatune.config.schema import Recipe
from deltatune.data.dataset import PackedDataset
from deltatune.data.template import TEMPLATE_ERRORS
from deltatune.errors import UserError, one_line
from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.visible import visible

__all__ = ["SAMPLES_FILE", "SHOWN", "Prompt", "prompts_of", "samples_lines", "shortened"]

SAMPLES_FILE = "samples.jsonl"
SHOWN = 60  # characters of a prompt and of a completion in the terminal


@dataclass(frozen=True)
class Prompt:
    """What is completed."""

    text: str
    ids: Sequence[int]
    reference: str | None = None  # how the row goes on that it is from


def prompts_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, held_out: PackedDataset | None) -> list[Prompt]:
    """The recipe's own prompts, then beginnings of held-out documents, spread over all of them; none without a section.

    A prompt is a user's turn in the chat template, up to where the answer begins; or plain text under
    ``samples.chat: false`` and where the tokenizer has no template. A document is cut where its first trained stretch
    begins, or in the middle if it trains from its start.

    Raises:
        UserError: a prompt that the chat template refuses.
    """
    section = recipe.samples
    if section is None:
        return []
    kwargs = recipe.data.chat_template_kwargs
    asks = _asks(recipe, tokenizer)
    found = [_asked(prompt, tokenizer, kwargs) if asks else _plain(prompt, tokenizer) for prompt in section.prompts]
    if held_out is not None and section.held_out:
        pieces = np.linspace(0, len(held_out.lengths) - 1, section.held_out).round().astype(int)
        found += [_begun(_piece(held_out, int(piece)), tokenizer) for piece in dict.fromkeys(pieces.tolist())]
    return found


def samples_lines(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a plan and a run say of them.

    Raises:
        UserError: a prompt that the chat template refuses.
    """
    section = recipe.samples
    if section is None:
        return []
    prompts_of(recipe, tokenizer, None)
    how = ""
    if section.prompts:
        plain = "samples.chat: false" if not section.chat else "the tokenizer has no chat template"
        asked = "as a user's turn in the chat template"
        how = f"; samples.prompts go {asked if _asks(recipe, tokenizer) else f'as plain text ({plain})'}"
    count = len(section.prompts) + section.held_out
    return [
        f"samples: up to {section.max_new_tokens} tokens after {count} prompts at each evaluation, {SAMPLES_FILE}{how}"
    ]


def shortened(text: str) -> str:
    """The first ``SHOWN`` characters of a text, on one line of a terminal; control characters as escapes."""
    line = " ".join(text.split())
    return visible(line if len(line) <= SHOWN else f"{line[: SHOWN - 3]}...")


def _asks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> bool:
    return recipe.samples is not None and recipe.samples.chat and bool(tokenizer.chat_template)


def _plain(prompt: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    ids = tokenizer(prompt)["input_ids"]
    # a tokenizer may end every text, and nothing follows an end
    return Prompt(prompt, ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids)


def _asked(prompt: str, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> Prompt:
    question = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **kwargs)
    except TEMPLATE_ERRORS as error:
        raise UserError(
            f"samples.prompts: the chat template cannot ask {shortened(prompt)!r}: {one_line(error)}; leave prompts "
            "out and complete held-out rows with samples.held_out, or begin with plain text by samples.chat: false"
        ) from error
    return Prompt(prompt, tokenizer(text, add_special_tokens=False)["input_ids"])


def _piece(data: PackedDataset, number: int) -> Sample:
    start, length = int(data.starts[number]), int(data.lengths[number])
    return data.documents[int(data.sources[number])].sample(start, start + length)


def _begun(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    trained = np.flatnonzero(sample.labels[1:] != IGNORE_INDEX) + 1  # nothing predicts the first token
    first = int(trained[0]) if trained.size and trained[0] > 1 else max(1, len(sample) // 2)
    stretch = np.flatnonzero(sample.labels[first:] == IGNORE_INDEX)
    end = first + int(stretch[0]) if stretch.size else len(sample)
    ids = sample.input_ids.tolist()
    return Prompt(
        tokenizer.decode(ids[:first]), ids[:first], tokenizer.decode(ids[first:end], skip_special_tokens=True)
    )
