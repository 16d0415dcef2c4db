import pytest

from deltatune.data.formats import Layout
from deltatune.data.turns import read_turn
from deltatune.errors import DataError

CHAT = Layout("chat")
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("marks", "trains"),
    [
        ({}, None),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"training": True}, True),
        ({"training": False}, False),
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),
        ({"weight": 1.0}, True),
        ({"weight": None, "train": None}, None),
        ({"weight": 0, "train": False}, False),
    ],
)
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_marks_are_taken_off_the_message(role, marks, trains):
    assert read_turn({"role": role, "content": "a", **marks}, CHAT, "x") == ({"role": role, "content": "a"}, trains)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"weight": 0.5}, "weight must be 0 or 1, got float 0.5"),
        ({"weight": "0"}, "weight must be 0 or 1, got str '0'"),
        ({"weight": True}, "weight must be 0 or 1, got bool True"),
        ({"weight": 2}, "weight must be 0 or 1, got int 2"),
        ({"train": "no"}, "train must be true or false, got str 'no'"),
        ({"training": 1}, "training must be true or false, got int 1"),
        ({"weight": 1, "train": False}, "train and weight contradict each other"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}, "has train_detail: .*not supported"),
        ({"training_detail": []}, "has training_detail: .*not supported"),
    ],
)
def test_other_marks_are_named(marks, message):
    with pytest.raises(DataError, match=f"^line 7, message 2:? {message}"):
        read_turn({**ANSWER, **marks}, CHAT, "line 7, message 2")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("system", "system"),
        ("developer", "developer"),
        ("human", "user"),
        ("user", "user"),
        ("prompter", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("model", "assistant"),
        ("assistant", "assistant"),
        ("tool", "tool"),
        ("observation", "tool"),
        ("function", "tool"),
        ("tool_response", "tool"),
        ("function_response", "tool"),
    ],
)
def test_names_of_speakers_are_known(name, role):
    expected = ({"role": role, "content": "a"}, None)
    assert read_turn({"from": name, "value": "a"}, CHAT, "x") == expected
    assert read_turn({"role": name, "content": "a"}, CHAT, "x") == expected


@pytest.mark.parametrize(("name", "role"), [("bot", "assistant"), ("gpt", "user"), ("function_call", "assistant")])
def test_other_speakers_are_named_by_the_recipe(name, role):
    layout = Layout("chat", roles={name: role})
    assert read_turn({"from": name, "value": "a"}, layout, "x")[0] == {"role": role, "content": "a"}


@pytest.mark.parametrize(
    ("message", "fields", "expected"),
    [
        ({"speaker": "human", "text": "q"}, {"role": "speaker", "content": "text"}, {"role": "user", "content": "q"}),
        ({"from": "gpt", "text": "q"}, {"content": "text"}, {"role": "assistant", "content": "q"}),
        ({"role": "user", "content": "q"}, {"role": "speaker"}, {"role": "user", "content": "q"}),
        ({"role": "user", "value": "q"}, {}, {"role": "user", "content": "q"}),
        ({"role": "user", "content": "q", "from": "web"}, {}, {"role": "user", "content": "q", "from": "web"}),
        (
            {**ANSWER, "cot": "hm"},
            {"reasoning_content": "cot"},
            {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        ),
    ],
)
def test_keys_may_go_by_other_names(message, fields, expected):
    assert read_turn(message, Layout("chat", message_fields=fields), "x") == (expected, None)


def test_a_mark_may_go_by_another_name():
    layout = Layout("chat", message_fields={"train": "trainable"})
    assert read_turn({**ANSWER, "trainable": False}, layout, "x") == (ANSWER, False)


@pytest.mark.parametrize("more", [{"reasoning_content": "hm"}, {"thinking": "hm"}, {"name": "ann"}])
def test_other_keys_stay(more):
    assert read_turn({**ANSWER, **more}, CHAT, "x")[0] == {**ANSWER, **more}


@pytest.mark.parametrize("absent", [{"content": None}, {}])
def test_a_turn_that_only_calls_has_no_content(absent):
    call = {"function": {"name": "f", "arguments": {}}}
    message = {"role": "assistant", **absent, "tool_calls": [call], "name": None}
    assert read_turn(message, CHAT, "x")[0] == {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_no_key(calls):
    assert read_turn({**ANSWER, "tool_calls": calls, "function_call": None}, CHAT, "x")[0] == ANSWER


def test_empty_text_is_content():
    assert read_turn({"role": "assistant", "content": ""}, CHAT, "x")[0] == {"role": "assistant", "content": ""}


def test_nul_is_text_like_any_other():
    assert read_turn({"role": "user", "content": "a\0b"}, CHAT, "x")[0]["content"] == "a\0b"


def test_text_parts_are_kept():
    parts = [{"type": "text", "text": "a", "image": None}]
    assert read_turn({"role": "user", "content": parts}, CHAT, "x")[0] == {
        "role": "user",
        "content": [{"type": "text", "text": "a"}],
    }


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hi", "must be an object"),
        ({"content": "hi"}, "has no role; .*it holds content.*message_fields"),
        ({"speaker": "Ann", "content": "hi"}, "has no role; .*it holds speaker, content"),
        ({"role": "bot", "content": "a"}, r"has the unknown role 'bot'.*assistant.*data.roles.*{bot: assistant}"),
        ({"from": "Human", "value": "a"}, r"has the unknown role 'Human' \(did you mean human\?\)"),
        ({"role": "asistant", "content": "a"}, r"\(did you mean assistant\?\)"),
        ({"role": 3, "content": "a"}, "has the unknown role 3"),
        ({"role": "user"}, r"\(user\) has no content"),
        ({"role": "tool", "content": None}, r"\(tool\) has no content"),
        ({"role": "assistant", "content": None}, r"\(assistant\) has no content and calls no tool"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "has no content and calls no tool"),
        ({"role": "user", "content": 4}, "must be a string or a list of text parts, got int 4"),
        ({"role": "user", "content": [{"type": "image"}]}, "only text parts .*of type 'image'"),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}]}, "only text parts .*of type 'input_text'"),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}, "of type 'output_text'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "only text parts"),
        ({"role": "user", "content": ["a"]}, "only text parts .* got a part: str 'a'"),
        ({"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, r"\(user\) calls a tool"),
        ({"role": "user", "content": "a", "function_call": {"name": "f"}}, r"\(user\) calls a tool"),
    ],
)
def test_bad_messages_are_named(message, error):
    with pytest.raises(DataError, match=rf"^x.jsonl, line 7: messages\[1\].*{error}"):
        read_turn(message, CHAT, "x.jsonl, line 7: messages[1]")


def test_a_key_under_two_names_is_an_error():
    layout = Layout("chat", message_fields={"content": "text"})
    with pytest.raises(DataError, match="has both text, which message_fields names as its content, and content"):
        read_turn({"role": "user", "content": "a", "text": "b"}, layout, "x")
