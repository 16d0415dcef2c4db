"""Tools and their calls, brought to the form that chat templates are written for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltatune.data.formats import Layout, Row
from deltatune.data.json_values import parse_json, shown
from deltatune.errors import DataError

__all__ = ["calls_in_text", "read_calls", "read_tools"]


def read_tools(row: Row, layout: Layout, where: str) -> list[Any] | None:
    """The JSON schemas of a row's tools; ``None`` where there are none.

    A list, or JSON text, which keeps differing schemas out of a Parquet column's type: the whole list, one tool, or
    the parameters of one. ``functions`` is OpenAI's older column, whose schemas stand without their wrapper.

    Raises:
        DataError: no list of schemas, no JSON, or both columns.
    """
    tools, functions = (
        _read_schemas(row.get(layout.column(role)), f"{where}: {role}") for role in ("tools", "functions")
    )
    if tools and functions:
        raise DataError(f"{where} has both tools and functions, its older form; keep one")
    return tools or [{"type": "function", "function": function} for function in functions] or None


def _read_schemas(value: Any, what: str) -> list[Any]:
    if isinstance(value, str):
        value = parse_json(value, what) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list of JSON schemas, got {shown(value)}")
    return [_read_schema(parse_json(tool, what) if isinstance(tool, str) else tool, what) for tool in value]


def _read_schema(tool: Any, what: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise DataError(f"{what} must be a list of JSON schemas, got one that is {shown(tool)}")
    if "function" in tool:
        return {**tool, "function": _read_schema(tool["function"], what)}
    parameters = tool.get("parameters")
    if not isinstance(parameters, str):
        return dict(tool)
    return {**tool, "parameters": parse_json(parameters, f"{what}: the parameters of a tool")}


def read_calls(message: Mapping[str, Any], where: str) -> list[Any]:
    """The calls of a turn, each with ``function: {"name": ..., "arguments": {...}}``; an empty list where it has none.

    ``function_call``, OpenAI's older form, is one call. Arguments that came as JSON text become objects, which
    templates iterate over; a null among them is an argument like others. Absent arguments are none.

    Raises:
        DataError: no list of calls, a call without a name, arguments that are no JSON object, or both forms.
    """
    calls, single = message.get("tool_calls"), message.get("function_call")
    if calls and single is not None:
        raise DataError(f"{where} has both tool_calls and function_call, its older form; keep one")
    if single is not None:
        if isinstance(single, str):
            single = parse_json(single, f"{where}: the contents of function_call")
        return [_read_call(single, where)]
    if isinstance(calls, str):
        calls = parse_json(calls, f"{where}: tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DataError(f"{where}: tool_calls must be a list, got {shown(calls)}")
    return [_read_call(call, where) for call in calls]


def calls_in_text(content: Any, where: str) -> list[Any]:
    """The calls of a ShareGPT turn whose role says that its text is one call in JSON, or a list of them.

    Raises:
        DataError: no text, no JSON, or calls that ``read_calls`` refuses.
    """
    value = parse_json(content, f"{where}: the contents of a call") if isinstance(content, str) else content
    if value is None or value == []:
        raise DataError(f'{where} calls nothing; expected JSON text such as {{"name": ..., "arguments": {{...}}}}')
    return [_read_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise DataError(f"{where}: a tool call must be an object, got {shown(call)}")
    call = {key: value for key, value in call.items() if value is not None}
    if "function" not in call:
        # {"name": ..., "arguments": ...} without the wrapper that most templates look for
        function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        call = {"type": "function", **call, "function": function}
    function = call["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(
            f"{where}: a tool call must name its function, as in "
            f'{{"function": {{"name": "...", "arguments": {{}}}}}}, got {shown(call)}'
        )
    return {**call, "function": {**function, "arguments": _arguments(function, where)}}


def _arguments(function: Mapping[str, Any], where: str) -> Any:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}: the arguments of a tool call")
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"{where}: the arguments of a tool call ({function['name']}) must be an object, got {shown(arguments)}"
        )
    return arguments
