import json

import pytest

from deltatune.data.formats import Layout
from deltatune.data.tools import calls_in_text, read_calls, read_tools
from deltatune.data.turns import read_turn
from deltatune.errors import DataError

CHAT = Layout("chat")
SCHEMA = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"default": None}}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, None),
        ({"tools": None}, None),
        ({"tools": []}, None),
        ({"tools": ""}, None),
        ({"tools": "[]"}, None),
        ({"tools": [TOOL]}, [TOOL]),
        ({"tools": [SCHEMA]}, [SCHEMA]),
        ({"tools": json.dumps([TOOL])}, [TOOL]),
        ({"tools": [json.dumps(TOOL)]}, [TOOL]),
        ({"tools": [{**TOOL, "function": {**SCHEMA, "parameters": json.dumps(SCHEMA["parameters"])}}]}, [TOOL]),
        ({"functions": [SCHEMA]}, [TOOL]),
        ({"functions": json.dumps([SCHEMA]), "tools": []}, [TOOL]),
    ],
)
def test_tools_are_a_list_of_schemas(row, expected):
    assert read_tools(row, CHAT, "x") == expected


def test_tools_may_be_in_a_column_of_another_name():
    assert read_tools({"apis": [TOOL]}, Layout("chat", {"tools": "apis"}), "x") == [TOOL]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "[{"}, r"line 7: tools are not JSON: .* got str '\[\{'"),
        ({"tools": [1]}, "tools must be a list of JSON schemas, got one that is int 1"),
        ({"tools": TOOL}, "tools must be a list of JSON schemas, got dict"),
        ({"tools": [{"type": "function", "function": "f"}]}, "got one that is str 'f'"),
        ({"tools": [{"name": "f", "parameters": "{"}]}, "the parameters of a tool are not JSON"),
        ({"tools": [TOOL], "functions": [SCHEMA]}, "has both tools and functions"),
    ],
)
def test_bad_tools_are_named(row, message):
    with pytest.raises(DataError, match=message):
        read_tools(row, CHAT, "x.jsonl, line 7")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({}, []),
        ({"tool_calls": [CALL]}, [CALL]),
        ({"tool_calls": [{**CALL, "id": "1", "index": None}]}, [{**CALL, "id": "1"}]),
        ({"tool_calls": json.dumps([CALL])}, [CALL]),
        ({"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1, "b": null}'}}]},
         [{"function": {"name": "f", "arguments": {"a": 1, "b": None}}}]),
        ({"tool_calls": [{"name": "f", "arguments": {"a": None}, "id": "1"}]},
         [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": None}}}]),
        ({"tool_calls": [{"function": {"name": "f"}}]}, [{"function": {"name": "f", "arguments": {}}}]),
        ({"function_call": {"name": "f", "arguments": '{"a": 1, "b": null}'}}, [CALL]),
        ({"function_call": json.dumps({"name": "f", "arguments": {"a": 1, "b": None}})}, [CALL]),
    ],
)  # fmt: skip
def test_calls_have_arguments_as_objects(message, expected):
    assert read_calls(message, "x") == expected


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "the arguments of a tool call are not JSON"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, "the arguments of a tool call are not JSON"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, r"\(f\) must be an object, got list \[1\]"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, "must be an object, got int 3"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "must name its function"),
        ({"tool_calls": [{"id": "1"}]}, "must name its function"),
        ({"tool_calls": ["f"]}, "a tool call must be an object, got str 'f'"),
        ({"tool_calls": {"name": "f"}}, "tool_calls must be a list, got dict"),
        ({"tool_calls": "f()"}, "tool_calls are not JSON"),
        ({"function_call": {}}, "must name its function"),
        ({"function_call": {"name": "f", "arguments": "f(1)"}}, "the arguments of a tool call are not JSON"),
        ({"function_call": {"name": "f"}, "tool_calls": [CALL]}, "has both tool_calls and function_call"),
    ],
)
def test_bad_calls_are_named(message, error):
    with pytest.raises(DataError, match=rf"^line 7: messages\[1\].*{error}"):
        read_calls(message, "line 7: messages[1]")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1, "b": null}}', [CALL]),
        ('{"name": "f", "arguments": "{\\"a\\": 1, \\"b\\": null}"}', [CALL]),
        ('[{"name": "f", "arguments": {"a": 1, "b": null}}]', [CALL]),
        ({"name": "f", "arguments": {"a": 1, "b": None}}, [CALL]),
    ],
)
@pytest.mark.parametrize("name", ["function_call", "tool_call"])
def test_a_sharegpt_turn_calls_in_its_text(name, content, expected):
    message = {"role": "assistant", "content": None, "tool_calls": expected}
    assert read_turn({"from": name, "value": content}, CHAT, "x") == (message, None)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("f(1)", "the contents of a call are not JSON"),
        ("3", "a tool call must be an object, got int 3"),
        ("[]", "calls nothing"),
        (None, "calls nothing"),
    ],
)
def test_text_that_is_no_call_is_named(content, error):
    with pytest.raises(DataError, match=f"line 7.*{error}"):
        calls_in_text(content, "line 7")


def test_the_older_form_of_openai_is_read():
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1, "b": null}'}}
    result = {"role": "function", "name": "f", "content": "4"}
    for content in (None, "", "I call."):
        message = {"role": "assistant", "content": content, "tool_calls": [CALL]}
        assert read_turn({**call, "content": content}, CHAT, "x")[0] == message
    assert read_turn(result, CHAT, "x")[0] == {"role": "tool", "name": "f", "content": "4"}
