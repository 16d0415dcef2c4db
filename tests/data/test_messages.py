import json
from dataclasses import replace

import pytest

from deltatune.data.formats import Layout
from deltatune.data.messages import read_conversation
from deltatune.data.notes import Notes
from deltatune.errors import DataError

CHAT, PAIR, ALPACA = Layout("chat"), Layout("prompt_completion"), Layout("alpaca")
SYSTEM = {"role": "system", "content": "s"}
QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def test_sharegpt_turns_are_read():
    layout = Layout("chat", {"messages": "conversations"})
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert read_conversation({"conversations": turns}, layout, "x").messages == [SYSTEM, QUESTION, ANSWER]


def test_a_conversation_keeps_what_each_message_says_of_training():
    marked = [{**QUESTION, "train": True}, {**ANSWER, "weight": 0}, QUESTION, ANSWER]
    conversation = read_conversation({"messages": marked}, CHAT, "x")
    assert conversation.messages == [QUESTION, ANSWER, QUESTION, ANSWER]
    assert conversation.trains == (True, False, None, None)


def test_marks_stay_with_their_messages_after_a_system_column():
    row = {"system": "s", "messages": [QUESTION, {**ANSWER, "train": False}]}
    assert read_conversation(row, CHAT, "x").trains == (None, None, False)


def test_prompt_and_completion_may_be_text_or_messages():
    row = {"prompt": "q", "completion": [{**ANSWER, "train": True}, QUESTION, ANSWER]}
    conversation = read_conversation(row, PAIR, "x")
    assert conversation.messages == [QUESTION, ANSWER, QUESTION, ANSWER]
    assert (conversation.num_prompt, conversation.trains) == (1, (None, True, None, None))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "s", "messages": [QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        ({"system": None, "messages": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
        ({"system": "", "messages": [SYSTEM, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        ({"system": "s", "messages": [SYSTEM, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
    ],
)
def test_a_system_column_is_the_first_message(row, expected):
    assert read_conversation(row, CHAT, "x").messages == expected


def test_a_system_column_may_go_by_another_name():
    row = {"persona": "s", "messages": [QUESTION, ANSWER]}
    assert read_conversation(row, Layout("chat", {"system": "persona"}), "x").messages[0] == SYSTEM


ASK = [{"role": "user", "content": "i\nn"}, {"role": "assistant", "content": "o"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "input": "n", "output": "o"}, ASK),
        ({"instruction": "i\nn", "input": "", "output": "o"}, ASK),
        ({"instruction": "i\nn", "input": None, "output": "o"}, ASK),
        ({"instruction": "i\nn", "output": "o"}, ASK),
        ({"instruction": "", "input": "i\nn", "output": "o"}, ASK),
        ({"instruction": "i", "input": "n", "output": "o", "system": "s", "history": []}, [SYSTEM, *ASK]),
        ({"instruction": "i", "input": "n", "output": "o", "history": [["q", "a"]]}, [QUESTION, ANSWER, *ASK]),
        ({"instruction": "i", "input": "n", "output": "o", "system": "", "history": " "}, ASK),
        ({"instruction": "i", "input": "n", "output": "o", "history": '[["q", "a"]]'}, [QUESTION, ANSWER, *ASK]),
        ({"instruction": "i", "input": "n", "output": "o", "history": [("q", "a")], "system": "s"},
         [SYSTEM, QUESTION, ANSWER, *ASK]),
    ],
)  # fmt: skip
def test_alpaca_rows_are_conversations(row, expected):
    conversation = read_conversation(row, ALPACA, "x")
    assert conversation.messages == expected
    assert (conversation.num_prompt, conversation.trains) == (0, (None,) * len(expected))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "input": "", "output": "o"}, "instruction is empty, so nothing is asked"),
        ({"output": "o"}, "has no instruction"),
        ({"instruction": "i", "output": ""}, "output is empty"),
        ({"instruction": "i", "output": 3}, "output must be a string, got int 3"),
        ({"instruction": "i", "input": ["n"], "output": "o"}, "input must be a string, got list"),
        ({"instruction": "i", "output": "o", "history": "q"}, "history must be a list of .* pairs, got str 'q'"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, r"history\[0\] must be a \[question, answer\] pair"),
        ({"instruction": "i", "output": "o", "history": [["q", None]]}, r"history\[0\] must be a"),
        ({"instruction": "i", "output": "o", "system": 3}, "system must be a string, got int 3"),
    ],
)
def test_bad_alpaca_rows_are_named(row, message):
    with pytest.raises(DataError, match=f"^x.jsonl, line 7.*{message}"):
        read_conversation(row, ALPACA, "x.jsonl, line 7")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has no messages; it holds text"),
        ({"messages": None}, "has no messages"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "must be a list of messages, got str 'hi'"),
        ({"messages": '[{"role": "user"'}, "messages are not JSON"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [QUESTION, {"role": "bot", "content": "a"}]}, r"messages\[1\] has the unknown role 'bot'"),
        ({"messages": [QUESTION], "tools": "[{"}, "tools are not JSON"),
        ({"system": ["s"], "messages": [QUESTION]}, r"system must be a string, got list \['s'\]"),
        ({"system": "t", "messages": [SYSTEM, QUESTION]}, "has two system prompts: the column system .*'t'.*'s'"),
        ({"system": "t", "messages": [{**SYSTEM, "role": "developer"}, QUESTION]}, "has two system prompts"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(DataError, match=f"^x.jsonl, line 7.*{message}"):
        read_conversation(row, CHAT, "x.jsonl, line 7")


def test_messages_may_be_json_text():
    row = {"messages": json.dumps([QUESTION, calling({"a": None})])}
    for columnar in (False, True):
        messages = read_conversation(row, replace(CHAT, columnar=columnar), "x").messages
        assert messages[0] == QUESTION
        assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def calling(arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("columnar", "arguments", "expected"),
    [
        (False, {"a": 1, "b": None}, {"a": 1, "b": None}),
        (True, {"a": 1, "b": None}, {"a": 1}),
        (True, {"a": {"c": None}}, {"a": {}}),
        (True, '{"a": 1, "b": null}', {"a": 1, "b": None}),
    ],
)
def test_a_null_argument_is_kept_where_it_can_be_told_from_an_absent_one(columnar, arguments, expected):
    row = {"messages": [QUESTION, calling(arguments)]}
    conversation = read_conversation(row, Layout("chat", columnar=columnar), "x")
    assert conversation.messages[1] == calling(expected)


@pytest.mark.parametrize(
    ("columnar", "expected"),
    [
        (False, [{"name": "f", "parameters": {"a": {"default": None}}}]),
        (True, [{"name": "f", "parameters": {"a": {}}}]),
    ],
)
def test_a_null_in_a_schema_is_kept_where_it_can_be_told_from_an_absent_key(columnar, expected):
    row = {"messages": [QUESTION], "tools": [{"name": "f", "parameters": {"a": {"default": None}}}]}
    assert read_conversation(row, Layout("chat", columnar=columnar), "x").tools == expected


@pytest.mark.parametrize("columnar", [False, True])
def test_null_keys_of_a_message_are_absent(columnar):
    filled = {"name": None, "tool_calls": None, "function_call": None, "weight": None}
    row = {"messages": [{**QUESTION, **filled}, {**ANSWER, **filled}], "tools": None, "system": None}
    conversation = read_conversation(row, Layout("chat", columnar=columnar), "x")
    assert (conversation.messages, conversation.tools) == ([QUESTION, ANSWER], None)


@pytest.mark.parametrize(
    ("columnar", "row", "noted"),
    [
        (True, {"messages": [QUESTION, calling({"a": None})]}, True),
        (True, {"messages": [QUESTION], "tools": [{"function": {"name": "f", "parameters": {"a": None}}}]}, True),
        (True, {"messages": [QUESTION, calling({"a": 1})]}, False),
        (True, {"messages": [QUESTION, {**ANSWER, "name": None}]}, False),
        (True, {"messages": [QUESTION, calling('{"a": null}')]}, False),
        (True, {"messages": [QUESTION], "spare": {"arguments": {"a": None}}}, False),
        (False, {"messages": [QUESTION, calling({"a": None})]}, False),
    ],
)
def test_nulls_that_may_have_meant_something_are_noted(columnar, row, noted):
    notes = Notes()
    read_conversation(row, Layout("chat", columnar=columnar), "x.parquet, row 3", notes)
    assert [line for line in notes if "taken for absent keys" in line and "x.parquet, row 3" in line] == list(notes)
    assert bool(notes) is noted
