import pytest
from template_cases import CALL, CHATML, CLOSED_REASONING, QUESTIONS, R1, rendered, shipped_template, tokenizer_for

from deltatune.data.notes import Notes
from deltatune.data.unrendered import check_calls
from deltatune.errors import DataError


def notes_of(template, messages, **options):
    notes = Notes()
    rendered(tokenizer_for(template), messages, notes=notes, **options)
    return list(notes)


def answer(**more):
    return [QUESTIONS[0], {**QUESTIONS[1], **more}]


@pytest.mark.parametrize(
    ("key", "lost"),
    [("id", ""), ("name", ""), ("refusal", ""), ("reasoning_content", "; that reasoning does not train")],
)
def test_a_key_that_the_template_does_not_read_is_noted(key, lost):
    assert notes_of(CHATML, answer(**{key: "x"})) == [
        f"the chat template does not read {key!r} of assistant messages{lost} (1 row, the first is rows.jsonl, line 1)"
    ]


def test_a_key_is_noted_once_for_each_row():
    notes = notes_of(CHATML, [{**message, "id": "x"} for message in QUESTIONS])
    assert len(notes) == 2
    assert all("(1 row, " in note for note in notes)


def test_rows_are_counted():
    notes = Notes()
    tokenizer = tokenizer_for(CHATML)
    for _ in range(3):
        rendered(tokenizer, answer(id="x"), notes=notes)
    assert [note for note in notes if "(3 rows, the first is" in note]


@pytest.mark.parametrize("shown", ["(m | tojson)", "((m.id or '') + m.content)"])
def test_a_key_that_the_template_reads_is_not_noted(shown):
    assert notes_of(CHATML.replace("m.content", shown), answer(id="x")) == []


def test_tools_that_the_template_does_not_read_are_noted():
    assert [note for note in notes_of(CHATML, QUESTIONS, tools=[CALL]) if "does not read tools (1 row" in note]
    assert notes_of(shipped_template("qwen3"), QUESTIONS, tools=[CALL]) == []


def test_messages_that_the_template_leaves_out_are_noted():
    template = "{% for m in messages if m.role != 'system' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    messages = [{"role": "system", "content": "Be brief."}, *QUESTIONS]
    assert [note for note in notes_of(template, messages) if "does not read 'content' of system messages (" in note]
    assert notes_of(shipped_template("gemma3"), messages) == []


def test_text_that_the_template_leaves_out_beside_a_call_is_noted():
    (note,) = notes_of(shipped_template("llama3_1"), answer(tool_calls=[CALL]))
    assert "does not read 'content' of assistant messages beside tool_calls" in note
    assert notes_of(shipped_template("qwen3"), answer(tool_calls=[CALL])) == []


def test_blank_content_does_not_tell_that_content_is_unread():
    template = CHATML.replace("m.content", "(m.content | trim)")
    assert notes_of(template, [{"role": "user", "content": " \n"}, *QUESTIONS[1:]]) == []


@pytest.mark.parametrize("value", ["", None, []])
def test_an_empty_key_is_not_noted(value):
    assert notes_of(CHATML, answer(id=value)) == []


def test_reasoning_that_history_drops_is_read():
    messages = [{**m, "reasoning_content": "R"} if m["role"] == "assistant" else m for m in QUESTIONS]
    assert notes_of(shipped_template("qwen3"), messages) == []
    assert notes_of(R1, messages) == []


@pytest.mark.parametrize(("thinking", "count"), [(False, 1), (True, 0)])
def test_reasoning_in_content_that_the_template_drops_is_noted(thinking, count):
    notes = notes_of(CLOSED_REASONING, answer(content="<think>\nR\n</think>A1"), template_kwargs={"thinking": thinking})
    assert len([note for note in notes if "drops the reasoning in the content of answers" in note]) == count


def test_reasoning_that_no_block_holds_is_noted():
    notes = notes_of(shipped_template("deepseek_r1_distill_training"), answer(reasoning_content="R"))
    assert [note for note in notes if "that reasoning does not train" in note]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_call_that_is_not_rendered_is_an_error(train_on):
    with pytest.raises(DataError, match=r"line 1: message 1: .* not render tool call 0 \(weather\)"):
        rendered(tokenizer_for(CHATML), answer(tool_calls=[CALL]), train_on=train_on)


def test_a_call_in_a_turn_that_does_not_train_is_noted_alone():
    messages = [*answer(tool_calls=[CALL]), *QUESTIONS[2:]]
    assert [note for note in notes_of(CHATML, messages, train_on="last") if "'tool_calls' of assistant" in note]


def test_arguments_that_are_not_rendered_are_an_error():
    template = CHATML.replace("m.content", "(m.tool_calls[0].function.name if m.tool_calls else m.content)")
    with pytest.raises(DataError, match=r"does not render the arguments of tool call 0 \(weather\)"):
        rendered(tokenizer_for(template), answer(tool_calls=[CALL]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Zürich", '{"city": "Z\\u00fcrich"}'),
        ("a\nb", '{"city": "a\\nb"}'),
        ("both ' and \"", "f(city='both \\' and \"')"),
        (True, "f(city=True)"),
        (2.5, "<arg>2.5</arg>"),
        ({"deep": ["x", "Paris"]}, "Paris"),
    ],
)
def test_arguments_are_found_however_they_are_written(value, text):
    check_calls([{"function": {"name": "f", "arguments": {"city": value}}}], text, "row")


def test_a_call_in_the_question_is_no_call_in_the_answer():
    messages = [{"role": "user", "content": "weather in Paris"}, {**QUESTIONS[1], "tool_calls": [CALL]}]
    with pytest.raises(DataError, match="does not render tool call 0"):
        rendered(tokenizer_for(CHATML), messages)


@pytest.mark.parametrize(
    ("shown", "noted"),
    [
        ("{% generation %}{{ m.content | trim + '<|im_end|>' }}{% endgeneration %}", False),
        ("{{ m.content }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}", True),
        ("{% generation %}{{ m.content.replace('answer', '42') + '<|im_end|>' }}{% endgeneration %}", True),
    ],
)
def test_text_of_an_answer_that_does_not_train_is_noted(shown, noted):
    question = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    notes = notes_of(question + shown + "{% endif %}{% endfor %}", answer(content="answer\n"))
    assert any(note.startswith("text of answers is changed") for note in notes) == noted
