"""Chat templates by the names that other projects give them."""

from __future__ import annotations

from typing import Any

from deltatune.data.well_known import WELL_KNOWN
from deltatune.importing.rules import Outcome
from deltatune.importing.values import is_off, text

__all__ = ["named_template"]

# theirs, in small letters with _ for - and . -> ours, where both render the same
_SAME = {
    "chatml": "chatml",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma_3": "gemma",
    "llama2": "llama2",
    "llama3": "llama3",
    "llama_3": "llama3",
    "mistral_v1": "mistral",
    "phi": "phi",
    "phi3": "phi",
    "phi_3": "phi",
    "phi_35": "phi",
    "phi4": "phi4",
    "phi_4": "phi4",
    "qwen3": "qwen3",
}
_OWN = ("tokenizer_default", "tokenizer_default_fallback_chatml", "default")


def named_template(value: Any) -> Outcome:
    """The template of this name where we have it; otherwise the checkpoint's own stays."""
    if is_off(value):
        return Outcome("no effect here", why="not set")
    name = text(value)
    if name in _OWN:
        return Outcome("no effect here", why="the checkpoint's own template is the default here")
    if "{{" in name or "{%" in name or name.endswith((".jinja", ".jinja2")):
        return Outcome("carried", {"model.chat_template": name})
    ours = _SAME.get(name.lower().replace("-", "_").replace(".", "_"))
    if ours in WELL_KNOWN:
        return Outcome("carried", {"model.chat_template": ours}, "deltatune preprocess --show prints what it renders")
    return Outcome(
        "changed", why="no template of this name here: the checkpoint's own is used, or a file in model.chat_template"
    )
