"""A chat template under a tokenizer: what it reads, and what it renders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from transformers.utils.chat_template_utils import render_jinja_template

from deltatune.data.messages import Message
from deltatune.errors import DataError, nearest, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TEMPLATE_ERRORS", "ChatTemplate", "RenderError", "Span", "check_variables"]

Span = tuple[int, int]

TEMPLATE_ERRORS: Final = (
    *(TemplateError, TypeError, ValueError),
    *(ArithmeticError, AttributeError, LookupError, RecursionError),
)
"""What rendering raises: a template is a program, and says no by Jinja's errors or fails by Python's."""

# what transformers puts in the place of these variables, whatever the template makes of them
_OURS = ("messages", "tools", "add_generation_prompt")
# arguments of the function that renders, which would take them for its own
_RESERVED = (*_OURS, "chat_template", "conversations", "continue_final_message", "return_assistant_tokens_mask")
_GLOBALS = ("documents", "raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner")


class RenderError(ValueError):
    """The template refuses or fails on some messages; the message is the template's own."""


class ChatTemplate:
    """One template with its variables and the tokenizer's control tokens."""

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
        _variables(source)  # a template that is no Jinja ends here
        self.has_generation_blocks = _has_generation_blocks(source)
        self.source = source
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self.eos = tokenizer.eos_token
        added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
        controls = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self.controls = tuple(controls)
        self.control = re.compile("|".join(map(re.escape, controls)) or "(?!)")
        self.stable_shapes: dict[tuple[Any, ...], bool] = {}  # of conversations: whether later messages change no block

    def reads(self, variable: str) -> bool:
        """Whether the template looks a variable up."""
        return variable in _variables(self.source)

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, generation_prompt: bool = False
    ) -> str:
        """The messages as text, perhaps with the header that asks the model for the next one."""
        return self._render(messages, tools, generation_prompt, blocks=False)[0]

    def render_blocks(self, messages: Sequence[Message], tools: list[Any] | None = None) -> tuple[str, list[Span]]:
        """The messages as text, and where generation blocks lie in it."""
        return self._render(messages, tools, False, blocks=True)

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, generation_prompt: bool, *, blocks: bool
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=blocks,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except TEMPLATE_ERRORS as error:
            raise RenderError(one_line(error)) from error
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def check_variables(sources: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises a ``DataError`` for a variable that none of these templates reads, or that is not the user's to set."""
    known = set().union(*(_variables(source) for source in sources)) - {*_OURS, *_GLOBALS}
    for name in given:
        if name in _RESERVED:
            raise DataError(f"data.chat_template_kwargs: {name} is set for every row; remove it")
        if name not in known and not any(name in _variables(source) for source in sources):
            readable = sorted(name for name in known if not name.endswith("_token"))
            reads = f"it reads {', '.join(readable)}" if readable else "it reads none"
            raise DataError(
                f"data.chat_template_kwargs: the chat template does not read {name}{nearest(name, readable)}; {reads}"
            )


@lru_cache
def _variables(source: str) -> frozenset[str]:
    """The names that a template looks up."""
    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(source)))
    except TemplateError as error:
        raise DataError(f"the chat template is not valid Jinja: {one_line(error)}; mend it") from error


@lru_cache
def _has_generation_blocks(source: str) -> bool:
    """By Jinja's own lexer, so that a comment or a string that mentions the tag is none."""
    tokens = [(kind, text) for _, kind, text in _environment().lex(source) if kind != "whitespace"]
    pairs = pairwise(tokens)
    return any(begin[0] == "block_begin" and tag == ("name", "generation") for begin, tag in pairs)


class _GenerationTag(Extension):
    """Parses the tag that marks what an assistant writes; rendering is left to transformers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@lru_cache
def _environment() -> Environment:
    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
