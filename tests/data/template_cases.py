"""Chat templates with the control structure of public ones, and conversations under them as marked text."""

import importlib.util
import re
from pathlib import Path

import pytest

from deltatune.data.chat import Renderer
from deltatune.data.messages import Conversation
from deltatune.data.preview import preview

CHATML = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# the first Llama-3: the next header is always there
ALWAYS_A_HEADER = """
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"""

# GLM-4: nothing ends a turn but the header of the next message
NEXT_HEADER = """[gMASK]<sop>
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|user|>\\n' + m.content }}
{%- elif m.role == 'tool' %}{{- '<|observation|>\\n' + m.content }}
{%- else %}{{- '<|assistant|>\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{- call.function.name + '\\n' + call.function.arguments | tojson }}{%- endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

# DeepSeek-R1: the prompt opens the reasoning, and the history holds answers alone
R1 = """{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<User>' + m.content }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
{{- '<Assistant>' + content + '<end>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant><think>\\n' }}{%- endif %}"""

# DeepSeek-V3: calls beside null alone, arguments added to a string
NULL_CALLS = """
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<User>' + m['content'] }}
{%- elif m['content'] is none %}{{- '<Assistant>' }}
{%- for c in m['tool_calls'] %}{{- '<call>' + c['function']['name'] + '\\n' + c['function']['arguments'] }}{%- endfor %}
{{- '<end>' }}
{%- else %}{{- '<Assistant>' + m['content'] + '<end>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant>' }}{%- endif %}"""

# reasoning is taken out of earlier turns, within the generation block
STRIPPING_BLOCKS = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}
{%- if loop.index0 > ns.last %}{{- '<think>' + (m.reasoning_content or '') + '</think>' }}{%- endif %}
{{- m.content + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}{{- m.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# SmolVLM: content is a list of parts
PARTS_ALONE = """
{%- for m in messages %}{{- m.role + ': ' }}
{%- for part in m.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""

# DeepSeek-V3.1: reasoning is closed where there is none
CLOSED_REASONING = """{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<User>' + m.content }}
{%- else %}{{- '<Assistant></think>' + m.content.split('</think>')[-1] + '<end>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant>' + ('<think>' if thinking else '</think>') }}{%- endif %}"""

# Mistral Nemo: the system message stands in the question that is asked now, and in no other
SYSTEM_IN_THE_LAST_QUESTION = """{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST]' + (system if loop.last else '') + m.content + '[/INST]' }}
{%- else %}{{- m.content + eos_token }}
{%- endif %}
{%- endfor %}"""

QUESTIONS = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]

CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is two plus two? Four, of course!",
    "user assistant system tool <think>\n\n</think> Hello there\n\nGood morning. Paris Rome Berlin",
]


def build_tokenizer(template, *, trim_offsets=False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


def tokenizer_for(template, *, eos="<eos>"):
    """A tokenizer whose control tokens are all that look like one in the template."""
    tokenizer = build_tokenizer(template)
    looks = r"<\|[^|<>'\s]+\|>|<\uff5c[^\uff5c]+\uff5c>|</?\w+>|\[/?[A-Z_]+\]|\[gMASK\]|<\|turn>|<turn\|>"
    tokenizer.add_tokens(sorted({*re.findall(looks, template or ""), "<bos>", eos}), special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = "<bos>", eos
    return tokenizer


def rendered(tokenizer, messages, *, trains=(), tools=None, num_prompt=0, notes=None, **options):
    """The samples of a conversation as text, trained stretches between « and »."""
    conversation = Conversation(messages, tools, num_prompt, trains)
    samples = Renderer(tokenizer, **options).render_conversation(conversation, "rows.jsonl, line 1", notes)
    return [preview(sample, tokenizer, color=False) for sample in samples]


def shipped_template(name):
    """A public template that TRL ships."""
    found = importlib.util.find_spec("trl")
    path = Path(found.origin).parent / "chat_templates" / f"{name}.jinja" if found else Path()
    if not path.is_file():
        pytest.skip(f"needs the template {name} of trl")
    return path.read_text(encoding="utf-8")
