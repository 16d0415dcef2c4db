"""What a model says at each evaluation: a few prompts, completed, kept and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from deltatune.config.schema import Recipe
from deltatune.data.dataset import PackedDataset
from deltatune.data.template import TEMPLATE_ERRORS
from deltatune.errors import UserError, one_line
from deltatune.hf.model import in_mode
from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.training.console import RunConsole
from deltatune.training.export import write_text
from deltatune.training.packs import padding_token

__all__ = ["SAMPLES_FILE", "Prompt", "Samples", "prompts_of", "samples_lines"]

SAMPLES_FILE = "samples.jsonl"
_SHOWN = 60  # characters of a prompt and of a completion in the terminal


@dataclass(frozen=True)
class Prompt:
    """What is completed."""

    text: str
    ids: Sequence[int]
    reference: str | None = None  # how the row goes on that it is from


def prompts_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, held_out: PackedDataset | None) -> list[Prompt]:
    """The recipe's own prompts, then beginnings of held-out documents, spread over all of them; none without a section.

    A prompt is a question through the chat template, or plain text where the tokenizer has no template. A document is
    cut where its first trained stretch begins, or in the middle if it trains from its start.

    Raises:
        UserError: a prompt that the chat template refuses.
    """
    section = recipe.samples
    if section is None:
        return []
    kwargs = recipe.data.chat_template_kwargs
    found = [_asked(prompt, tokenizer, kwargs) for prompt in section.prompts]
    if held_out is not None and section.held_out:
        pieces = np.linspace(0, len(held_out.lengths) - 1, section.held_out).round().astype(int)
        found += [_begun(_piece(held_out, int(piece)), tokenizer) for piece in dict.fromkeys(pieces.tolist())]
    return found


def samples_lines(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a plan says of them.

    Raises:
        UserError: a prompt that the chat template refuses.
    """
    section = recipe.samples
    if section is None:
        return []
    prompts_of(recipe, tokenizer, None)
    count = len(section.prompts) + section.held_out
    return [f"samples: up to {section.max_new_tokens} tokens after {count} prompts at each evaluation, {SAMPLES_FILE}"]


class Samples(TrainerCallback):  # type: ignore[misc]
    """Completes prompts whenever the held-out data has been evaluated; greedily, so no random number is drawn.

    A line of ``samples.jsonl`` has ``step``, ``time``, ``prompt``, ``completion`` and, of a held-out document, its own
    ``reference``. Every module is in evaluation mode meanwhile, and in its own again afterwards, whatever happens.

    Args:
        prompts: what is completed.
        tokenizer: decodes.
        max_new_tokens: of a completion, unless the model ends it before.
        output_dir: where the file is.
        from_step: where the run begins or goes on; what the file holds of later steps is dropped.
        console: where a short line of each goes.
        around: contexts of a forward: autocast, and what keeps the time out of the rates of training.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        output_dir: Path,
        from_step: int = 0,
        console: RunConsole,
        around: Sequence[Callable[[], AbstractContextManager[Any]]] = (),
    ) -> None:
        self._prompts, self._tokenizer, self._max_new_tokens = prompts, tokenizer, max_new_tokens
        self._file, self._console, self._around = output_dir / SAMPLES_FILE, console, around
        self._drop_from(from_step + 1)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Completes, keeps and shows."""
        del args, control, kwargs
        self._drop_from(state.global_step)  # of an evaluation before, of the same step
        with torch.no_grad(), in_mode(model, training=False):
            for prompt in self._prompts:
                completion = self._complete(model, prompt.ids)
                self._keep({"step": state.global_step, **_entry(prompt, completion)})

    def _drop_from(self, step: int) -> None:
        """Removes lines of this step and later ones, and those that are no JSON, since a run was killed in them."""
        lines = self._file.read_text(encoding="utf-8").split("\n") if self._file.exists() else []
        kept = [line for line in lines if line and _step_of(line) < step]
        if kept != lines[:-1]:
            write_text(self._file, "".join(f"{line}\n" for line in kept))

    def _complete(self, model: Any, ids: Sequence[int]) -> str:
        with ExitStack() as stack:
            for context in self._around:
                stack.enter_context(context())
            tokens = torch.tensor([list(ids)], device=model.device)
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=padding_token(self._tokenizer),
            )
        return str(self._tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))

    def _keep(self, entry: Mapping[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._console.out(
            f"sample: {_short(entry['prompt'][-_SHOWN:])} -> {_short(entry['completion'])}", highlight=False
        )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def _asked(prompt: str, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> Prompt:
    if not tokenizer.chat_template:
        return Prompt(prompt, tokenizer(prompt)["input_ids"])
    question = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **kwargs)
    except TEMPLATE_ERRORS as error:
        raise UserError(
            f"samples.prompts: the chat template cannot ask {_short(prompt)!r}: {one_line(error)}; leave prompts out "
            "and complete held-out rows with samples.held_out"
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


def _entry(prompt: Prompt, completion: str) -> dict[str, str]:
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "prompt": prompt.text, "completion": completion}
    return entry if prompt.reference is None else {**entry, "reference": prompt.reference}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
