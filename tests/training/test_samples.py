"""Completions at evaluations: kept and shown, with the run around them as if they were not made."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from training_cases import byte_tokenizer, make_recipe, make_trainer, save_checkpoint, write_conversations
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltatune.errors import UserError
from deltatune.training import building
from deltatune.training.console import RunConsole
from deltatune.training.prompts import SHOWN, Prompt, prompts_of, samples_lines, shortened
from deltatune.training.run import train
from deltatune.training.samples import Samples
from tiny import tiny_model

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base")


def recipe(folder: Path, checkpoint: Path, **sections: Any) -> Any:
    held_out = [{"path": str(write_conversations(folder / "eval.jsonl", 6, first=40))}]
    training = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "output_dir": str(folder / "output")}
    lora = {"r": 4, "target_modules": ["q_proj", "in_proj_qkv"], "lora_dropout": 0.2}
    values = {"training": training, "lora": lora, "verify": {"enabled": False, "lengths": None}, **sections}
    return make_recipe(folder, checkpoint, data={"eval": held_out}, **values)


def test_samples_are_kept_and_shown_and_change_nothing(tmp_path: Path, checkpoint: Path) -> None:
    """Dropout draws the same numbers, and the adapter ends in the same bits."""
    for name in ("plain", "sampled"):
        (tmp_path / name).mkdir()
    train(recipe(tmp_path / "plain", checkpoint), console=QUIET)
    console = Console(record=True, width=300, file=(tmp_path / "screen.txt").open("w"))
    section = {"prompts": ["1 + 1?"], "held_out": 2, "max_new_tokens": 5}
    train(recipe(tmp_path / "sampled", checkpoint, samples=section), console=console)
    plain, sampled = (
        load_file(tmp_path / name / "output" / "adapter_model.safetensors") for name in ("plain", "sampled")
    )
    assert [name for name in plain if not torch.equal(plain[name], sampled[name])] == []

    lines = [json.loads(line) for line in (tmp_path / "sampled" / "output" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 2, 4, 4, 4]
    assert lines[0]["prompt"] == "1 + 1?"
    assert lines[1]["prompt"].startswith("<|im_start|>user\n40 + 5?")
    assert lines[1]["prompt"].endswith("<|im_start|>assistant\n")
    assert lines[1]["reference"].endswith("45")
    assert lines[2]["reference"].endswith("48"), "the last of six"
    shown = console.export_text()
    assert "sample: 1 + 1? -> " in shown
    assert "samples.prompts go as a user's turn in the chat template" in shown

    tokenizer = byte_tokenizer()
    asked = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"]
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(checkpoint), str(tmp_path / "sampled" / "output")
    )
    expected = stock.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert lines[3]["completion"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


class Failing(torch.nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"broken, training: {self.training}")


def test_the_model_trains_again_whatever_happens(tmp_path: Path) -> None:
    model = tiny_model("qwen3_5").train()
    model.lm_head.eval()
    model.model.norm = Failing().train()
    tokenizer = byte_tokenizer()
    samples = Samples([Prompt("a", [5, 6])], tokenizer, max_new_tokens=2, output_dir=tmp_path, console=QUIET)
    state = make_trainer(tmp_path).state
    with pytest.raises(RuntimeError, match="broken, training: False"):
        samples.on_evaluate(None, state, None, model=model)
    assert model.training
    assert model.model.norm.training
    assert not model.lm_head.training


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"samples": {}}, "samples has nothing to complete"),
        ({"samples": {"prompts": ["a"]}, "data": {"val_size": None}}, "samples are made at evaluations, and there"),
    ],
)
def test_samples_need_prompts_and_evaluations(
    tmp_path: Path, checkpoint: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_recipe(tmp_path, checkpoint, **sections), console=QUIET)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_a_prompt_is_a_turn_of_the_user_or_plain_text_and_it_is_said_which(
    tmp_path: Path, checkpoint: Path, template: bool, chat: bool
) -> None:
    tokenizer = byte_tokenizer()
    if not template:
        tokenizer.chat_template = None
    asking = recipe(tmp_path, checkpoint, samples={"prompts": ["why?"], "chat": chat})
    (prompt,) = prompts_of(asking, tokenizer, None)
    (line,) = samples_lines(asking, tokenizer)
    assert prompt.text == "why?"
    if template and chat:
        assert tokenizer.decode(prompt.ids) == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
        assert line.endswith("; samples.prompts go as a user's turn in the chat template")
    else:
        assert tokenizer.decode(prompt.ids) == "why?"
        why = "the tokenizer has no chat template" if chat else "samples.chat: false"
        assert line.endswith(f"; samples.prompts go as plain text ({why})")


@pytest.mark.parametrize(
    ("ends", "prompt", "expected"),
    [(True, "why?", "why?"), (False, "why?", "why?"), (False, "<|im_end|>", "<|im_end|>")],
    ids=["ended", "not ended", "nothing else"],
)
def test_a_plain_prompt_does_not_end_where_a_tokenizer_ends_every_text(
    tmp_path: Path, checkpoint: Path, ends: bool, prompt: str, expected: str
) -> None:
    tokenizer = byte_tokenizer()
    if ends:
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
        )
        assert tokenizer(prompt)["input_ids"][-1] == tokenizer.eos_token_id
    asking = recipe(tmp_path, checkpoint, samples={"prompts": [prompt], "chat": False})
    (found,) = prompts_of(asking, tokenizer, None)
    assert tokenizer.decode(found.ids) == expected


def test_a_text_is_cut_between_its_escapes() -> None:
    assert shortened("\x1b" * SHOWN) == "\\x1b" * SHOWN
    assert shortened("\x1b" * (SHOWN + 1)) == "\\x1b" * (SHOWN - 3) + "..."
    assert shortened("a" * (SHOWN - 1) + "\x1b") == "a" * (SHOWN - 1) + "\\x1b"


REFUSED = r"samples.prompts: the chat template cannot ask 'why\?': begin with the system; .* samples\.chat: false"
REFUSING = "{{ raise_exception('begin with the system') }}"


def test_a_question_that_the_template_refuses_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = REFUSING
    asking = recipe(tmp_path, checkpoint, samples={"prompts": ["why?"]})
    for ask in (samples_lines, lambda *given: prompts_of(*given, None)):
        with pytest.raises(UserError, match=REFUSED):
            ask(asking, tokenizer)
    plain = recipe(tmp_path, checkpoint, samples={"prompts": ["why?"], "chat": False})
    assert samples_lines(plain, tokenizer)


def test_a_run_refuses_it_before_rows_are_read(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("rows were read")

    monkeypatch.setattr(building, "load_data", read)
    model = {"name_or_path": str(checkpoint), "chat_template": REFUSING}
    with pytest.raises(UserError, match=REFUSED):
        train(recipe(tmp_path, checkpoint, samples={"prompts": ["why?"]}, model=model), console=QUIET)


def test_steps_that_are_done_again_have_their_samples_once(tmp_path: Path, checkpoint: Path) -> None:
    saves = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    section = {"prompts": ["1 + 1?"], "max_new_tokens": 3}
    folder = tmp_path / "output"
    given = recipe(tmp_path, checkpoint, samples=section, training={**saves, "output_dir": str(folder)})
    train(given, console=QUIET)
    with (folder / "samples.jsonl").open("a") as stream:
        stream.write('{"step": 9, "prom')  # killed there
    train(given, resume=folder / "checkpoint-1", console=QUIET)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_an_evaluation_that_is_made_again_replaces_its_samples(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    samples = Samples([], byte_tokenizer(), max_new_tokens=1, output_dir=tmp_path, from_step=2, console=None)  # type: ignore[arg-type]
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    state, model = SimpleNamespace(global_step=2), torch.nn.Linear(1, 1)
    samples.on_evaluate(None, state, None, model=model)
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 1}\n'


def test_control_characters_are_shown_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completion = "\x1b[2J\x9b1mgone\x07"
    monkeypatch.setattr(Samples, "_complete", lambda *_: completion)
    console = Console(record=True, width=300, file=(tmp_path / "screen.txt").open("w"))
    given: dict[str, Any] = {"max_new_tokens": 1, "output_dir": tmp_path, "console": RunConsole(console)}
    samples = Samples([Prompt("a\x1bb\nc", [5])], byte_tokenizer(), **given)
    samples.on_evaluate(None, SimpleNamespace(global_step=1), None, model=torch.nn.Linear(1, 1))
    assert console.export_text() == "sample: a\\x1bb c -> \\x1b[2J\\x9b1mgone\\x07\n"
    assert json.loads((tmp_path / "samples.jsonl").read_text())["completion"] == completion
