"""What a model says at each evaluation: a few prompts, completed, kept and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from deltatune.hf.model import in_mode
from deltatune.phases import phase
from deltatune.training.console import RunConsole
from deltatune.training.export import write_text
from deltatune.training.packs import padding_token
from deltatune.training.prompts import SAMPLES_FILE, SHOWN, Prompt, shortened

__all__ = ["Samples"]


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
        generating = phase("generating samples", len(self._prompts))
        with torch.no_grad(), in_mode(model, training=False), generating as advance:
            for done, prompt in enumerate(self._prompts):
                advance(done)
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
            f"sample: {shortened(entry['prompt'][-SHOWN:])} -> {shortened(entry['completion'])}", highlight=False
        )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def _entry(prompt: Prompt, completion: str) -> dict[str, str]:
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "prompt": prompt.text, "completion": completion}
    return entry if prompt.reference is None else {**entry, "reference": prompt.reference}
