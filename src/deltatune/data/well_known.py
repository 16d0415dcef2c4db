"""Chat templates that recipes name: the public formats of well-known model families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltatune.errors import UserError, near_files, nearest, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["WELL_KNOWN", "WellKnown", "find_template", "read_template"]


@dataclass(frozen=True)
class WellKnown:
    """A format by name."""

    source: str  # Jinja
    tokens: tuple[str, ...] = ()  # that the tokenizer must hold whole
    variables: tuple[str, ...] = ()  # special tokens that the tokenizer must name


def read_template(setting: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of ``model.chat_template``, which may be that text, a name of ``WELL_KNOWN``, or a file.

    Raises:
        UserError: an unknown name, a file that cannot be read, or a tokenizer without the control tokens of the format.
    """
    found = find_template(setting)
    _check_tokens(setting, found, tokenizer)
    return found.source


def find_template(setting: str) -> WellKnown:
    """What ``model.chat_template`` stands for, whatever the tokenizer is.

    Raises:
        UserError: an unknown name, or a file that cannot be read.
    """
    if "{{" in setting or "{%" in setting:
        return WellKnown(setting)
    if setting in WELL_KNOWN:
        return WELL_KNOWN[setting]
    path = user_path(setting)
    if not path.exists() and path.name == setting and not path.suffix:
        names = ", ".join(WELL_KNOWN)
        raise UserError(
            f"model.chat_template: {setting} is neither a known template{nearest(setting, WELL_KNOWN)} nor a file; "
            f"expected one of {names}, a Jinja file, or Jinja text"
        )
    try:
        return WellKnown(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        missing = near_files(path) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"model.chat_template: cannot read {path}: {why}{missing}") from error


def _check_tokens(name: str, template: WellKnown, tokenizer: PreTrainedTokenizerBase) -> None:
    held = tokenizer.added_tokens_encoder
    missing = [token for token in template.tokens if token not in held]
    missing += [variable for variable in template.variables if not getattr(tokenizer, variable)]
    if missing:
        raise UserError(
            f"model.chat_template: {name} writes {', '.join(missing)}, which this tokenizer would split into pieces or "
            "leave out; choose the format that the checkpoint was trained on, or add the tokens to the tokenizer"
        )


_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# the system text opens the first question
_LLAMA2 = """\
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role not in ('user', 'assistant') %}
        {{- raise_exception('after a system message, user and assistant messages must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + message.content).strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Gemma 1 to 3; the system text opens the first question
_GEMMA = """\
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role not in ('user', 'assistant') %}
        {{- raise_exception('after a system message, user and assistant messages must alternate') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('user' if message.role == 'user' else 'model') + '\\n' + (system if loop.first else '') }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""

# Mistral 7B Instruct 0.1 and 0.2; the system text opens the first question
_MISTRAL = """\
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role not in ('user', 'assistant') %}
        {{- raise_exception('after a system message, user and assistant messages must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Phi-3 and Phi-3.5
_PHI = """\
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('the roles are system, user and assistant, got ' + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"""

_PHI4 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|im_sep|>' }}
{%- endif %}"""

# ChatML with tools, and with reasoning in the answers to the last question alone
_QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(question=messages | length - 1) %}
{%- for message in messages %}
    {%- set result = message.content and message.content.startswith('<tool_response>') %}
    {%- if message.role == 'user' and not (result and message.content.endswith('</tool_response>')) %}
        {%- set ns.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.question and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n' if content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

_IM = ("<|im_start|>", "<|im_end|>")

WELL_KNOWN = {
    "chatml": WellKnown(_CHATML, _IM),
    "gemma": WellKnown(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), ("bos_token",)),
    "llama2": WellKnown(_LLAMA2, variables=("bos_token", "eos_token")),
    "llama3": WellKnown(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("bos_token",)),
    "mistral": WellKnown(_MISTRAL, variables=("bos_token", "eos_token")),
    "phi": WellKnown(_PHI, ("<|user|>", "<|assistant|>", "<|end|>"), ("eos_token",)),
    "phi4": WellKnown(_PHI4, (*_IM, "<|im_sep|>")),
    "qwen3": WellKnown(_QWEN3, _IM),
}
