import pytest
from template_cases import CALL, CHATML, NULL_CALLS, PARTS_ALONE, QUESTIONS, rendered, shipped_template, tokenizer_for

ASSISTANT = "<|im_start|>assistant\n"


def asked(calls, content=None):
    return [QUESTIONS[0], {"role": "assistant", "content": content, "tool_calls": calls}]


@pytest.mark.parametrize("content", [None, ""])
def test_calls_beside_null_alone_are_rendered_with_their_arguments_as_text(content):
    (text,) = rendered(tokenizer_for(NULL_CALLS), asked([CALL], content))
    assert text == '<User>Q1<Assistant>«<call>weather\n{"city": "Paris"}<end>»'


@pytest.mark.parametrize("content", [None, ""])
def test_calls_of_deepseek_are_rendered(content):
    (text,) = rendered(tokenizer_for(shipped_template("deepseekv3")), asked([CALL], content))
    assert '>weather\n```json\n{"city": "Paris"}\n```<' in text
    assert "None" not in text


def test_calls_without_arguments_are_rendered_beside_null():
    template = """{%- for m in messages %}{%- if m.role == 'assistant' and m['content'] is none %}{{- 'A:' }}
{%- for c in m.tool_calls %}{{- c.function.name }}{%- endfor %}{{- '<|im_end|>' }}
{%- elif m.role == 'assistant' %}{{- 'A:' + m['content'] + '<|im_end|>' }}{%- else %}{{- 'U:' + m['content'] }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- 'A:' }}{%- endif %}"""
    call = {"type": "function", "function": {"name": "get", "arguments": {}}}
    assert rendered(tokenizer_for(template), asked([call])) == ["U:Q1A:«get<|im_end|>»"]


@pytest.mark.parametrize("shown", ["m.content ~ ''", "m.content | string"])
def test_null_is_not_printed(shown):
    template = CHATML.replace("m.content +", f"{shown} + (m.tool_calls or '') | string +")
    (text,) = rendered(tokenizer_for(template), asked([CALL]))
    assert "None" not in text


def test_the_word_none_that_a_template_writes_is_no_null():
    template = "{{- 'Tools: None ' }}" + NULL_CALLS
    (text,) = rendered(tokenizer_for(template), asked([CALL]))
    assert "<call>weather" in text


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'], ids=["object", "text"])
@pytest.mark.parametrize(
    "shown",
    [
        "m.tool_calls[0].function.arguments | tojson",
        "m.tool_calls[0].function.arguments",
        "m.tool_calls[0].function.arguments | string",
        "(m.tool_calls[0].function.arguments if m.tool_calls[0].function.arguments is string else 'x')",
    ],
)
def test_arguments_are_json_whichever_form_the_template_takes(shown, arguments):
    template = CHATML.replace(
        "m.content +", f"(m.tool_calls[0].function.name + {shown} if m.tool_calls else m.content) +"
    )
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    (text,) = rendered(tokenizer_for(template), asked([call]))
    assert text.endswith(f'{ASSISTANT}«weather{{"city": "Paris"}}<|im_end|>»\n')


def test_arguments_that_are_nested_without_end_stay_text():
    template = CHATML.replace("m.content +", "(m.tool_calls[0].function.arguments | string if m.tool_calls else 'x') +")
    deep = "[" * 100_000
    (text,) = rendered(tokenizer_for(template), asked([{**CALL, "function": {"name": "weather", "arguments": deep}}]))
    assert deep in text


PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
    "shown",
    ["m.content", "m.content | string", "(m.content if m.content is string else '')", "(m.content | trim)"],
    ids=["added", "printed", "dropped", "filtered"],
)
def test_parts_are_joined_where_the_template_reads_text(shown):
    messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}]
    (text,) = rendered(tokenizer_for(CHATML.replace("m.content", shown)), messages)
    assert text == f"<|im_start|>user\none two<|im_end|>\n{ASSISTANT}«one two<|im_end|>»\n"


def test_text_becomes_a_part_where_the_template_reads_parts_alone():
    (text,) = rendered(tokenizer_for(PARTS_ALONE), QUESTIONS[:2])
    assert text == "user: Q1<|im_end|>\nassistant: «A1<|im_end|>»\n"


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "smolvlm", "llama3", "qwen3"])
def test_text_and_one_part_of_it_render_alike(name):
    tokenizer = tokenizer_for(shipped_template(name))
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in QUESTIONS]
    assert rendered(tokenizer, parts) == rendered(tokenizer, QUESTIONS)


@pytest.mark.parametrize("within", [True, False])
def test_reasoning_in_the_content_is_not_written_after_an_empty_one(within):
    reasoned = {"content": "<think>\nwhy\n</think>\n\nA1"} if within else {"content": "A1", "reasoning_content": "why"}
    messages = [QUESTIONS[0], {"role": "assistant", **reasoned}]
    (text,) = rendered(tokenizer_for(shipped_template("qwen3_8")), messages)
    assert text.endswith("<|im_start|>assistant\n<think>\n«why\n</think>\n\nA1<|im_end|>»\n")
