"""What every format of rows becomes, from the row to the tokens that train."""

import json

import pytest

from deltatune.data.chat import Renderer
from deltatune.data.formats import Layout, resolve_format
from deltatune.data.notes import Notes
from deltatune.data.preview import preview
from deltatune.errors import DataError

PAIR = {"prompt": "Hello", "completion": " there"}


def previews(row, tokenizer, notes=None):
    layout = resolve_format("auto", row, {}, "rows.jsonl")
    samples = Renderer(tokenizer).render(row, layout, "rows.jsonl, line 1", notes)
    return [preview(sample, tokenizer, color=False) for sample in samples]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "Name a city.", "input": "In Italy", "output": "Rome", "system": "Be brief."},
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a city.\nIn Italy<|im_end|>\n"
            "<|im_start|>assistant\n«Rome<|im_end|>»\n",
        ),
        (
            {"instruction": "And two?", "output": "Two", "history": [["One?", "One"]]},
            "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«One<|im_end|>»\n"
            "<|im_start|>user\nAnd two?<|im_end|>\n<|im_start|>assistant\n«Two<|im_end|>»\n",
        ),
        (
            {
                "system": "You are a pirate.",
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Arr"}],
            },
            "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n«Arr<|im_end|>»\n",
        ),
        (PAIR, "Hello« there<|im_end|>»"),
        ({"text": "The quick"}, "The« quick<|im_end|>»"),
    ],
    ids=["alpaca", "alpaca history", "sharegpt", "pair", "text"],
)
def test_each_format_trains_its_answers(row, expected, tokenizer):
    assert previews(row, tokenizer) == [expected]


def test_tokens_train_as_the_row_says(tokenizer):
    ids = tokenizer("What is two plus two? Four")["input_ids"]
    row = {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:], "attention_mask": [1] * len(ids)}
    assert previews(row, tokenizer) == ["What is two plus two?« Four»"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 10**6]}, "input_ids holds 1000000"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "trains nothing"),
        ({**PAIR, "label": False}, "marks its answer as good or bad"),
        ({**PAIR, "source": "\ud83d"}, "source holds half a character"),
    ],
)
def test_rows_that_cannot_train_are_named(row, message, tokenizer):
    with pytest.raises(DataError, match=f"rows.jsonl, line 1.*{message}"):
        previews(row, tokenizer)


def test_tools_without_a_conversation_are_noted(tokenizer):
    notes = Notes()
    previews({**PAIR, "tools": json.dumps([{"name": "f"}])}, tokenizer, notes)
    previews({**PAIR, "tools": None}, tokenizer, notes)
    (line,) = notes
    assert line.startswith("tools are left out")
    assert line.endswith("(1 row, the first is rows.jsonl, line 1)")


def test_nulls_of_columnar_files_are_noted(tokenizer):
    tools = [{"name": "f", "parameters": {"type": "object", "default": None}}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row, notes = {"messages": messages, "tools": tools}, Notes()
    Renderer(tokenizer).render(row, Layout("chat", columnar=True), "rows.parquet, row 1", notes)
    assert any("taken for absent keys" in line for line in notes)
