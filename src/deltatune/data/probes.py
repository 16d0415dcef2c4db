"""Small conversations that tell what a chat template makes of a message."""

from __future__ import annotations

import re
from typing import Any

from deltatune.data.messages import Message
from deltatune.data.template import ChatTemplate, RenderError

__all__ = ["PROBE", "PROBE_CALL", "Probes", "as_parts"]

# content that no template trims, translates or contains: where it stands tells what is written around a message
PROBE = "zqvprobe"
PROBE_CALL = {"id": "zqvcall01", "type": "function", "function": {"name": PROBE, "arguments": {"zqvkey": "zqvvalue"}}}


class Probes:
    """Renders messages of a kind in the shortest conversation that a template takes."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._wants_parts: dict[str, bool] = {}

    def render(self, *messages: Message, generation_prompt: bool = False) -> str | None:
        """The messages as text; ``None`` where the template refuses them."""
        try:
            return self.template.render(messages, generation_prompt=generation_prompt)
        except RenderError:
            return None

    def last(self, role: str, content: Any) -> str | None:
        """A conversation that ends in a message of this role with this content."""
        question, message = {"role": "user", "content": "zqvquestion"}, {"role": role, "content": content}
        if role == "assistant":
            return self.render(question, message)
        if role == "tool":
            call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
            result = {**message, "tool_call_id": PROBE_CALL["id"], "name": PROBE}
            text = self.render(question, call, result)
            return self.render(question, result) if text is None else text
        text = self.render(message)
        return self.render(message, question) if text is None else text

    def message(self, role: str, text: str = PROBE) -> Message:
        """A message in the form in which the template shows its text."""
        return {"role": role, "content": as_parts(text) if self.wants_parts(role) else text}

    def wants_parts(self, role: str) -> bool:
        """Whether the template shows text of this role in a list of parts alone."""
        if role not in self._wants_parts:
            self._wants_parts[role] = not self.shows(role, PROBE) and self.shows(role, as_parts(PROBE))
        return self._wants_parts[role]

    def shows(self, role: str, content: Any) -> bool:
        """Whether the template renders the probe's text from this content, and not by printing a list."""
        text = self.last(role, content)
        return text is not None and PROBE in text and not re.search(rf"""['"]text['"]: ?['"]{PROBE}""", text)


def as_parts(text: str) -> list[Message]:
    """Text as a list of one part."""
    return [{"type": "text", "text": text}]
