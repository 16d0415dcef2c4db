"""The formats of training rows: the columns that each reads, and what a message may hold."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["KNOWN_ROLES", "REQUIRED_COLUMNS", "ROLES", "ColumnRole", "Format", "MessageField", "Role", "columns_of"]

Format = Literal["preference", "chat", "prompt_completion", "alpaca", "text", "tokens"]
ColumnRole = Literal[
    "messages", "system", "tools", "functions", "prompt", "completion", "chosen", "rejected", "instruction", "input",
    "output", "history", "text", "input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks",
    "position_ids", "seq_lengths",
]  # fmt: skip
Role = Literal["system", "developer", "user", "assistant", "tool"]
MessageField = Literal[
    "role", "content", "reasoning_content", "thinking", "tool_calls", "tool_call_id", "name", "train", "weight"
]
ROLES: tuple[Role, ...] = get_args(Role)
KNOWN_ROLES: dict[str, Role] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response"), "tool"),
}
"""Names that files give their speakers, ShareGPT's and OpenAI's among them -> roles."""

# in the order in which `auto` tries them
REQUIRED_COLUMNS: dict[Format, tuple[ColumnRole, ...]] = {
    # first: the other columns of such rows are its prompt, in the form of any of the others
    "preference": ("chosen", "rejected"),
    "chat": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    # before text: the first Alpaca file also has a text column, its rows in a template of their own
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
_OPTIONAL_COLUMNS: dict[Format, tuple[ColumnRole, ...]] = {
    "preference": ("prompt", "instruction", "input", "history", "system", "tools", "functions"),
    "chat": ("system", "tools", "functions"),
    "prompt_completion": ("tools", "functions"),
    "alpaca": ("input", "history", "system", "tools", "functions"),
    "text": (),
    "tokens": ("labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "seq_lengths"),
}


def columns_of(row_format: Format) -> tuple[ColumnRole, ...]:
    """All columns that a format reads, those that it needs first."""
    return REQUIRED_COLUMNS[row_format] + _OPTIONAL_COLUMNS[row_format]
