import pytest

from deltatune.data.messages import Layout, read_conversation, resolve_format
from deltatune.errors import DataError

CHAT = Layout("chat")
HELLO = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "messages"], "chat"),
        (["conversations"], "chat"),
        (["prompt", "completion"], "prompt_completion"),
        (["text", "url"], "text"),
        (["messages", "text"], "chat"),
    ],
)
def test_auto_reads_the_format_from_the_columns(columns, expected):
    assert resolve_format("auto", columns, {}, "x").format == expected


def test_an_explicit_format_wins_over_the_columns():
    assert resolve_format("text", ["messages", "text"], {}, "x").format == "text"


def test_columns_may_go_by_other_names():
    layout = resolve_format("auto", ["dialogue"], {"messages": "dialogue"}, "x")
    assert (layout.format, layout.column("messages"), layout.column("tools")) == ("chat", "dialogue", "tools")


@pytest.mark.parametrize(
    ("requested", "columns", "renamed", "message"),
    [
        ("auto", ["a", "b"], {}, "x.jsonl fits no format: .* got a, b"),
        ("chat", ["message"], {}, r"no column 'messages' \(did you mean message\?\), which format chat needs"),
        ("prompt_completion", ["prompt"], {}, "no column 'completion'"),
        ("auto", ["texts"], {"text": "txt"}, r"no column 'txt' for text"),
    ],
)
def test_missing_columns_are_named(requested, columns, renamed, message):
    with pytest.raises(DataError, match=message):
        resolve_format(requested, columns, renamed, "x.jsonl")


def test_sharegpt_turns_are_read():
    layout = resolve_format("auto", ["conversations"], {}, "x")
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    messages = read_conversation({"conversations": turns}, layout, "x").messages
    assert messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]


def test_absent_values_are_left_out_at_every_depth():
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    row = {"messages": [{"role": "assistant", "content": None, "name": None, "tool_calls": [call]}], "tools": None}
    conversation = read_conversation(row, CHAT, "x")
    assert conversation.messages == [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    ]
    assert conversation.tools is None


def test_text_parts_are_kept():
    parts = [{"type": "text", "text": "a", "image": None}]
    assert read_conversation({"messages": [{"role": "user", "content": parts}]}, CHAT, "x").messages == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]}
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has no messages; it holds text"),
        ({"messages": None}, "has no messages"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "hi"}, "must be a list of messages, got str 'hi'"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\] has no role"),
        (
            {"messages": [HELLO, {"role": "bot", "content": "a"}]},
            r"messages\[1\] has the unknown role 'bot'.*assistant",
        ),
        ({"messages": [{"role": "asistant", "content": "a"}]}, r"\(did you mean assistant\?\)"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] \(user\) has no content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "has no content"),
        ({"messages": [{"role": "user", "content": 4}]}, "must be a string or a list of text parts, got int 4"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text parts"),
        ({"messages": [HELLO], "tools": "[{"}, "tools are not JSON"),
        ({"messages": [HELLO], "tools": [1]}, "tools must be a list of JSON schemas"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments of a tool call are not JSON",
        ),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(DataError, match=f"x.jsonl, line 7.*{message}"):
        read_conversation(row, CHAT, "x.jsonl, line 7")
