import pytest
from template_cases import CHATML, QUESTIONS, rendered, tokenizer_for

from deltatune.data.chat import Renderer
from deltatune.errors import DataError

SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}{{ 'no' }}{% endif %}"


def construct(template, **variables):
    return Renderer(tokenizer_for(template), template_kwargs=variables)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (SWITCH, "enable_thinking"),
        ("{% if not date is defined %}{% set date = 'today' %}{% endif %}{{ date }}", "date"),
        ("{% set effort = effort | default('high') %}{{ effort }}", "effort"),
        ("{% macro show() %}{{ effort }}{% endmacro %}{{ show() }}", "effort"),
        ("{% for m in messages %}{{ documents[0].text }}{% endfor %}", "documents"),
        ("{% for m in messages %}{% generation %}{{ effort }}{% endgeneration %}{% endfor %}", "effort"),
        ("{% for m in messages %}{% if effort %}{% continue %}{% endif %}{% endfor %}", "effort"),
        ("{{ bos_token }}", "bos_token"),
    ],
)  # fmt: skip
def test_a_variable_that_the_template_reads_is_taken(template, name):
    construct(template, **{name: "x"})


def test_a_variable_of_one_of_several_templates_is_taken():
    tokenizer = tokenizer_for(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": SWITCH}
    Renderer(tokenizer, template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize(
    ("template", "name", "message"),
    [
        (SWITCH, "enable_thinkng", r"does not read enable_thinkng \(did you mean enable_thinking\?\); it reads enab"),
        (SWITCH + "{{ effort }}", "temperature", "does not read temperature; it reads effort, enable_thinking"),
        (CHATML, "enable_thinking", "does not read enable_thinking; it reads none"),
        ("{# enable_thinking #}" + CHATML, "enable_thinking", "it reads none"),
        (CHATML, "m", "does not read m;"),
        (CHATML, "messages", "messages is set for every row; remove it"),
        (CHATML, "add_generation_prompt", "add_generation_prompt is set for every row"),
        (CHATML, "continue_final_message", "continue_final_message is set for every row"),
    ],
)  # fmt: skip
def test_a_variable_that_cannot_act_is_refused_before_any_row(template, name, message):
    with pytest.raises(DataError, match=f"data.chat_template_kwargs: .*{message}"):
        construct(template, **{name: False})


def test_a_template_that_is_no_jinja_is_named():
    with pytest.raises(DataError, match="not valid Jinja: Unexpected end of template"):
        rendered(tokenizer_for("{% for m in messages %}"), QUESTIONS)
