"""Two answers to one prompt: which rows are read how, and which are refused."""

import pytest

from deltatune.data.chat import Renderer
from deltatune.data.formats import resolve_format
from deltatune.data.notes import Notes
from deltatune.data.pairs import TextPair, read_pair
from deltatune.errors import DataError
from deltatune.packing.sample import IGNORE_INDEX

ASKED = {"role": "user", "content": "Sky?"}
BLUE, GREEN = ({"role": "assistant", "content": colour} for colour in ("Blue.", "Green."))


def pair(row, requested="auto", **renamed):
    return read_pair(row, resolve_format(requested, row, renamed, "x"), "line 1")


def conversations(row, **renamed):
    """What is said in both, and where the prompt ends."""
    found = pair(row, **renamed)
    assert not isinstance(found, TextPair)
    return [([message["content"] for message in side.messages], side.num_prompt) for side in found]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": "Sky?", "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [ASKED], "chosen": "Blue.", "rejected": "Green."},
        {"prompt": [ASKED], "chosen": BLUE, "rejected": GREEN},
        {"messages": [ASKED], "chosen": BLUE, "rejected": GREEN},
        {"chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"prompt": "Sky?", "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"prompt": [ASKED], "chosen": [ASKED, BLUE], "rejected": [ASKED, GREEN]},
        {"instruction": "Sky?", "input": "", "chosen": "Blue.", "rejected": "Green."},
        {
            "conversations": [{"from": "human", "value": "Sky?"}],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green."},
        },
    ],
)
def test_a_prompt_and_two_answers_of_messages(row):
    assert conversations(row) == [(["Sky?", "Blue."], 1), (["Sky?", "Green."], 1)]


def test_a_system_prompt_comes_first_and_makes_turns_of_strings():
    row = {"system": "Brief.", "prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}
    assert conversations(row) == [(["Brief.", "Sky?", "Blue."], 2), (["Brief.", "Sky?", "Green."], 2)]


def test_turns_in_common_are_the_prompt_answers_among_them():
    again = {"role": "user", "content": "And now?"}
    row = {"chosen": [ASKED, BLUE, again, BLUE], "rejected": [ASKED, BLUE, again, GREEN]}
    assert [num_prompt for _, num_prompt in conversations(row)] == [3, 3]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Sky? ", "chosen": "Blue", "rejected": "Grey"}, TextPair("Sky? ", "Blue", "Grey")),
        ({"chosen": "Q: Sky? A: Blue", "rejected": "Q: Sky? A: Grey"}, TextPair("Q: Sky? A:", " Blue", " Grey")),
    ],
)
def test_a_prompt_and_two_answers_of_text(row, expected):
    assert pair(row) == expected


def test_a_question_under_another_name_is_no_text_that_nobody_reads():
    row = {"question": "Sky?", "chosen": "The sky is blue", "rejected": "The sky is green"}
    with pytest.raises(DataError, match=r"line 1 has no prompt; name its column, as in columns: {prompt: question}"):
        pair(row)
    assert pair(row, prompt="question").prompt == "Sky?"
    assert pair(row, "preference").prompt == "The sky is"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "has no rejected; a pair needs both"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "has no chosen; a pair needs both"),
        ({"prompt": [ASKED], "chosen": [BLUE], "rejected": []}, "has no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"are equal \(.*b.*\), so neither is preferred"),
        ({"prompt": [ASKED], "chosen": [BLUE], "rejected": [BLUE]}, "are equal .*so neither is preferred"),
        ({"chosen": [ASKED], "rejected": [ASKED]}, "are equal and nothing but a prompt"),
        ({"chosen": "Sky", "rejected": "Sky blue"}, "one answer is the beginning of the other"),
        ({"chosen": [ASKED, BLUE], "rejected": [ASKED]}, "one answer is the beginning of the other"),
        ({"chosen": "Blue", "rejected": "Green"}, "has no prompt, and its answers have no beginning in common"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "has no prompt, and its answers have no beginning in common"),
        ({"prompt": [ASKED], "chosen": [BLUE], "rejected": 3}, "rejected must be a list of messages, got int 3"),
    ],
)
def test_rows_that_are_no_pair_are_named(row, message):
    with pytest.raises(DataError, match=f"line 1.*{message}"):
        pair(row)


@pytest.mark.parametrize("of_messages", [False, True])
def test_a_pair_is_two_samples_whose_answers_train(tokenizer, of_messages):
    """The tokens are those that each answer has as a completion."""
    row = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Dark green."}
    if of_messages:
        row |= {"prompt": [ASKED], "chosen": [BLUE], "rejected": [{"role": "assistant", "content": "Dark green."}]}
    renderer = Renderer(tokenizer)
    samples = renderer.render(row, resolve_format("auto", row, {}, "x"), "line 1")
    assert len(samples) == 2
    for role, sample in zip(("chosen", "rejected"), samples, strict=True):
        single = {"prompt": row["prompt"], "completion": row[role]}
        (expected,) = renderer.render(single, resolve_format("auto", single, {}, "x"), "line 1")
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.labels.tolist() == expected.labels.tolist()
        answer = "Blue." if role == "chosen" else "Dark green."
        assert tokenizer.decode(sample.input_ids[sample.labels != IGNORE_INDEX]).startswith(answer)


def test_tools_beside_plain_text_are_left_out_and_said(tokenizer):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "look"}]}
    notes = Notes()
    Renderer(tokenizer).render(row, resolve_format("auto", row, {}, "x"), "line 1", notes)
    assert "tools are left out" in str([*notes])


def test_an_answer_that_a_template_takes_apart_is_refused(thinking_tokenizer):
    """Its first turn is shown with reasoning when it is asked for, and without once another question follows."""
    second = [{"role": "user", "content": "And now?"}, BLUE]
    row = {"prompt": [ASKED], "chosen": [BLUE, *second], "rejected": [GREEN, *second]}
    layout = resolve_format("auto", row, {}, "x")
    with pytest.raises(DataError, match="line 1: chosen has 2 assistant turns that the chat template shows otherwise"):
        Renderer(thinking_tokenizer).render(row, layout, "line 1")
    assert len(Renderer(thinking_tokenizer, train_on="last").render(row, layout, "line 1")) == 2
