import pytest
from template_cases import (
    ALWAYS_A_HEADER,
    CALL,
    CHATML,
    CLOSED_REASONING,
    NEXT_HEADER,
    QUESTIONS,
    R1,
    STRIPPING_BLOCKS,
    SYSTEM_IN_THE_LAST_QUESTION,
    rendered,
    shipped_template,
    tokenizer_for,
)

from deltatune.data.notes import Notes
from deltatune.errors import DataError

USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chatml():
    return tokenizer_for(CHATML)


@pytest.mark.parametrize("name", ["tokenizer", "marked_tokenizer"])
@pytest.mark.parametrize(
    ("trains", "train_on", "expected"),
    [
        ((None, False, None, None), "assistant", ["A2"]),
        ((None, False), "assistant", ["A2"]),
        ((None, None, None, False), "assistant", ["A1"]),
        ((True, None, None, None), "assistant", ["Q1", "A1", "A2"]),
        ((None, True, None, None), "last", ["A1", "A2"]),
        ((None, None, True, False), "last", ["Q2"]),
        ((None, True, None, None), ["user"], ["Q1", "A1", "Q2"]),
        ((None, None, False, None), ["user", "assistant"], ["Q1", "A1", "A2"]),
    ],
)
def test_marks_of_messages_come_before_train_on(name, trains, train_on, expected, request):
    tokenizer = request.getfixturevalue(name)
    (text,) = rendered(tokenizer, QUESTIONS, trains=trains, train_on=train_on)
    turns = [f"{m['content']}<|im_end|>" for m in QUESTIONS]
    marked = [f"«{turn}»" if turn[:2] in expected else turn for turn in turns]
    assert text == "".join(f"<|im_start|>{m['role']}\n{turn}\n" for m, turn in zip(QUESTIONS, marked, strict=True))


def test_a_turn_that_must_not_train_is_left_out_of_all(chatml):
    (text,) = rendered(chatml, QUESTIONS, trains=(None, False, False, None), train_on="all")
    # a first token has nothing before it to predict it, so it never trains
    assert text == (
        f"<|im_start|>«user\nQ1<|im_end|>\n{ASSISTANT}»A1<|im_end|>«\n{USER}»Q2<|im_end|>«\n{ASSISTANT}A2<|im_end|>\n»"
    )


def test_a_stripped_turn_is_left_out_of_all_as_the_history_shows_it(thinking_tokenizer):
    messages = [{**m, "reasoning_content": "why"} if m["role"] == "assistant" else m for m in QUESTIONS]
    (text,) = rendered(thinking_tokenizer, messages, trains=(None, False), train_on="all")
    assert f"{ASSISTANT}»A1<|im_end|>«\n" in text


def test_nothing_trains_where_every_turn_is_marked_so(chatml):
    with pytest.raises(DataError, match="line 1 trains nothing"):
        rendered(chatml, QUESTIONS, trains=(None, False, None, False))


def test_a_mark_in_the_prompt_does_not_train(chatml):
    (text,) = rendered(chatml, QUESTIONS, trains=(True, True), num_prompt=2)
    assert text.count("«") == 1
    assert "«A2<|im_end|>»" in text


def test_roles_that_train_and_are_not_there_are_named(chatml):
    with pytest.raises(DataError, match="no tool or system turn in its conversation"):
        rendered(chatml, QUESTIONS, train_on=["tool", "system"])


def test_the_results_of_tools_train_with_their_end_where_they_have_one():
    template = shipped_template("qwen3_instruct_2507")
    results = [{"role": "tool", "content": content} for content in ("T1", "T2")]
    messages = [QUESTIONS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, *results]
    (text,) = rendered(tokenizer_for(template), messages, train_on=["tool"])
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n«T1»\n</tool_response>\n<tool_response>\n«T2\n</tool_response><|im_end|>»\n"
    )


def test_a_message_that_the_template_moves_still_trains():
    template = shipped_template("gemma3")
    messages = [{"role": "system", "content": "Be brief."}, *QUESTIONS[:2]]
    (text,) = rendered(tokenizer_for(template), messages, train_on=["system"])
    assert text.startswith("<bos><start_of_turn>user\n«Be brief.»\n\nQ1<end_of_turn>\n")


def test_a_message_that_is_not_rendered_cannot_train():
    template = "{% for m in messages if m.role != 'user' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(DataError, match=r"content of message 0 \(user\) cannot be found"):
        rendered(tokenizer_for(template), QUESTIONS, train_on=["user"])


def test_a_header_that_is_always_there_does_not_train():
    (text,) = rendered(tokenizer_for(ALWAYS_A_HEADER), QUESTIONS)
    user, assistant = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    assert text == (
        f"{user}Q1<|eot_id|>{assistant}«A1<|eot_id|>»{user}Q2<|eot_id|>{assistant}«A2<|eot_id|>»{assistant}"
    )


def test_a_plain_header_that_is_always_there_does_not_train():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' }}"
    notes = Notes()
    (text,) = rendered(tokenizer_for(template), QUESTIONS, notes=notes)
    assert text == "user: Q1\nassistant: «A1»\nuser: Q2\nassistant: «A2»\nassistant: "
    assert [note for note in notes if "no control token ends an assistant turn" in note]


def test_an_end_that_the_tokenizer_would_split_is_noted():
    tokenizer = tokenizer_for(None)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|stop|>")
    notes = Notes()
    (text,) = rendered(tokenizer, QUESTIONS[:2], notes=notes)
    assert "«A1<|stop|>" in text
    assert [note for note in notes if r"which writes '<|stop|>\n' alone: no single token" in note]


def test_an_end_of_text_that_closes_every_conversation_does_not_train():
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}{% endfor %}{{ eos_token }}"
    (text,) = rendered(tokenizer_for(template), QUESTIONS)
    # no header asks for a turn, so the model writes it
    assert text == "<|user|>Q1<|im_end|>«<|assistant|>A1<|im_end|>»<|user|>Q2<|im_end|>«<|assistant|>A2<|im_end|>»<eos>"


def test_phi_closes_a_conversation_with_an_end_of_text_that_does_not_train():
    (text,) = rendered(tokenizer_for(shipped_template("phi3")), QUESTIONS)
    assert text == (
        "<|user|>\nQ1<|end|>\n<|assistant|>\n«A1<|end|>»\n<|user|>\nQ2<|end|>\n<|assistant|>\n«A2<|end|>»\n<eos>"
    )


def test_every_token_of_an_end_trains():
    (text,) = rendered(tokenizer_for(shipped_template("cohere2")), QUESTIONS[:2])
    assert text.endswith("<|START_RESPONSE|>«A1<|END_RESPONSE|><|END_OF_TURN_TOKEN|>»")


def test_the_header_of_the_next_message_ends_a_turn():
    (text,) = rendered(tokenizer_for(NEXT_HEADER), QUESTIONS)
    # at the end of a conversation no message follows: the token that a question would begin with is added
    assert text == "[gMASK]<sop><|user|>\nQ1<|assistant|>\n«A1<|user|>»\nQ2<|assistant|>\n«A2<|user|>»"


def test_a_call_ends_with_the_header_of_its_result():
    messages = [QUESTIONS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    (text,) = rendered(tokenizer_for(NEXT_HEADER), messages)
    assert text.endswith('<|assistant|>\n«weather\n{"city": "Paris"}<|observation|>»')


def test_a_second_answer_is_no_stop():
    (text,) = rendered(tokenizer_for(NEXT_HEADER), [*QUESTIONS[:2], {"role": "assistant", "content": "more"}])
    assert text == "[gMASK]<sop><|user|>\nQ1<|assistant|>\n«A1»<|assistant|>\n«more<|user|>»"


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ({"content": "<think>\nR\n</think>\n\nA"}, "R\n</think>\n\nA"),
        ({"content": "R\n</think>A"}, "R\n</think>A"),
        ({"content": "A", "reasoning_content": "R"}, "R\n</think>\n\nA"),
        ({"content": "A"}, "\n</think>\n\nA"),
    ],
    ids=["in tags", "as generated", "apart", "none"],
)
def test_reasoning_that_the_prompt_opens_trains_after_it(answer, written):
    question, last = QUESTIONS[0], {"role": "user", "content": "Q2"}
    messages = [question, {"role": "assistant", **answer}, last, {"role": "assistant", **answer}]
    notes = Notes()
    texts = rendered(tokenizer_for(R1), messages, notes=notes)
    shown = answer["content"].split("</think>")[-1]
    assert texts == [
        f"<bos><User>Q1<Assistant><think>\n«{written}<end>»",
        f"<bos><User>Q1<Assistant>{shown}<end><User>Q2<Assistant><think>\n«{written}<end>»",
    ]
    has_none = answer == {"content": "A"}
    assert len([note for note in notes if "train with an empty one, </think> first (1 row" in note]) == has_none
    assert not [note for note in notes if "does not read" in note]


def test_reasoning_that_the_template_writes_in_another_form_continues_the_prompt():
    messages = QUESTIONS[:2]
    (text,) = rendered(tokenizer_for(shipped_template("nemotron_3_nano")), messages)
    assert text.endswith("<|im_start|>assistant\n<think>\n«</think>A1<|im_end|>»\n")


@pytest.mark.parametrize(
    ("thinking", "content", "expected"),
    [
        (False, "A1", "</think>«A1<end>»"),
        (True, "A1", "<think>«</think>A1<end>»"),
        (True, "<think>R</think>A1", "<think>«R</think>A1<end>»"),
    ],
)
def test_reasoning_that_the_history_closes_trains_after_the_prompt(thinking, content, expected):
    messages = [QUESTIONS[0], {"role": "assistant", "content": content}]
    (text,) = rendered(tokenizer_for(CLOSED_REASONING), messages, template_kwargs={"thinking": thinking})
    assert text == f"<bos><User>Q1<Assistant>{expected}"


def test_a_turn_trains_after_the_prompt_even_where_that_changes_with_the_answer():
    notes = Notes()
    messages = [{"role": "system", "content": "S"}, *QUESTIONS]
    texts = rendered(tokenizer_for(SYSTEM_IN_THE_LAST_QUESTION), messages, notes=notes)
    assert texts == ["<bos>[INST]S\n\nQ1[/INST]«A1<eos>»", "<bos>[INST]Q1[/INST]A1<eos>[INST]S\n\nQ2[/INST]«A2<eos>»"]
    assert list(notes) == []


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%+ generation %}", "{%generation%}"])
@pytest.mark.parametrize("eos", ["<|im_end|>", "<eos>"])
def test_an_end_of_turn_after_the_block_trains_whatever_the_end_of_text(tag, eos):
    template = f"""{{%- for m in messages %}}{{{{- '<|im_start|>' + m.role + '\\n' }}}}
{{%- if m.role == 'assistant' %}}{tag}{{{{- m.content }}}}{{%- endgeneration %}}{{%- else %}}{{{{- m.content }}}}
{{%- endif %}}{{{{- '<|im_end|>\\n' }}}}{{%- endfor %}}"""
    (text,) = rendered(tokenizer_for(template, eos=eos), QUESTIONS)
    assert text == (f"{USER}Q1<|im_end|>\n{ASSISTANT}«A1<|im_end|>»\n{USER}Q2<|im_end|>\n{ASSISTANT}«A2<|im_end|>»\n")


def test_a_header_right_after_a_closed_block_does_not_train():
    template = """{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>' }}
{%- if m.role == 'assistant' %}{%- generation %}{{- m.content + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}{{- m.content + '<|eot_id|>' }}{%- endif %}{%- endfor %}"""
    (text,) = rendered(tokenizer_for(template), QUESTIONS)
    assert "«A1<|eot_id|>»<|start_header_id|>" in text


HEADED_BLOCKS = """{{%- for m in messages %}}{{{{- '<|' + m.role + '|>' if m.role != 'tool' else '<|result|>' }}}}
{{%- if m.role == 'assistant' %}}{{%- generation %}}{{{{- m.content + {} }}}}{{%- endgeneration %}}{{{{- {} }}}}
{{%- else %}}{{{{- m.content + '<|im_end|>' }}}}{{%- endif %}}{{%- endfor %}}"""
HEADERS = ("<|user|>", "<|assistant|>", "<|result|>", "<|eom|>")


@pytest.mark.parametrize(
    ("within", "after", "expected"),
    [
        ("'<|im_end|>'", "''", "«A1<|im_end|>»<|result|>"),
        ("''", "'<|im_end|>'", "«A1<|im_end|>»<|result|>"),
        ("''", "' <|im_end|>'", "«A1 <|im_end|>»<|result|>"),
        ("''", "'<|eom|>' if m.last else '<|im_end|>'", "«A1<|eom|>»<|result|>"),
    ],
    ids=["within", "after", "after a space", "of another kind"],
)
def test_what_ends_a_block_trains_and_no_header_after_it(within, after, expected):
    tokenizer = tokenizer_for(HEADED_BLOCKS.format(within, after))
    tokenizer.add_tokens(list(HEADERS), special_tokens=True)
    messages = [QUESTIONS[0], {**QUESTIONS[1], "last": True}, {"role": "tool", "content": "T"}, QUESTIONS[3]]
    (text,) = rendered(tokenizer, messages)
    assert expected in text


def test_a_header_after_a_block_that_nothing_ends_does_not_train():
    tokenizer = tokenizer_for(HEADED_BLOCKS.format("''", "'' if m.last else '<|im_end|>'"))
    tokenizer.add_tokens(list(HEADERS), special_tokens=True)
    messages = [QUESTIONS[0], {**QUESTIONS[1], "last": True}, *QUESTIONS[2:]]
    (text,) = rendered(tokenizer, messages)
    assert "«A1»<|user|>Q2<|im_end|><|assistant|>«A2<|im_end|>»" in text


def test_a_block_with_the_end_of_text_that_closes_a_conversation_needs_no_sample_of_its_own():
    (text,) = rendered(tokenizer_for(shipped_template("phi3_5_training")), QUESTIONS)
    assert text == (
        "<|user|>\nQ1<|end|>\n<|assistant|>\n«A1<|end|>\n»<|user|>\nQ2<|end|>\n<|assistant|>\n«A2<|end|>\n<eos>»"
    )


def test_a_last_turn_may_end_in_a_token_of_its_own():
    notes = Notes()
    texts = rendered(tokenizer_for(shipped_template("gptoss")), QUESTIONS, notes=notes)
    for text, answer in zip(texts, ("A1", "A2"), strict=True):
        assert text.endswith(f"<|start|>assistant«<|channel|>final<|message|>{answer}<|return|>»")
    assert list(notes) == []


def test_an_answer_after_a_call_trains_behind_the_reasoning_that_it_was_asked_with():
    """gpt-oss drops the reasoning before a call once the answer is there, which the model saw when it answered."""
    messages = [
        QUESTIONS[0],
        {"role": "assistant", "content": "", "thinking": "why call", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "A1", "thinking": "why so"},
    ]
    (text,) = rendered(tokenizer_for(shipped_template("gptoss")), messages)
    analysis = "<|channel|>analysis<|message|>why call<|end|>"
    call = '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
    assert text.endswith(
        f"<|start|>user<|message|>Q1<|end|><|start|>assistant«{analysis}{call}»"
        '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|><|start|>assistant'
        "«<|channel|>analysis<|message|>why so<|end|><|start|>assistant<|channel|>final<|message|>A1<|return|>»"
    )


def test_an_answer_that_goes_on_in_a_closed_turn_trains_its_end():
    """Gemma 4 closes a turn whose calls have text beside them, asks for nothing, and writes the answer into it."""
    messages = [
        QUESTIONS[0],
        {"role": "assistant", "content": "Let me see. ", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "sunny"},
        QUESTIONS[1],
    ]
    text = rendered(tokenizer_for(shipped_template("gemma4_v5")), messages, train_on="last")[-1]
    assert text.endswith("<tool_response|>Let me see.«A1<turn|>»\n")


def test_blocks_that_the_next_header_ends_train_it():
    (text,) = rendered(tokenizer_for(shipped_template("glm4moe_training")), QUESTIONS)
    assert text == (
        "[gMASK]<sop><|user|>\nQ1<|assistant|>«\n<think></think>\nA1<|user|>»\n"
        "Q2<|assistant|>«\n<think></think>\nA2<|user|>»"
    )


@pytest.mark.parametrize("comment", ["{# {% generation %} ... {% endgeneration %} #}", "{{- '{% generation %}'[:0] }}"])
def test_a_tag_that_is_only_mentioned_marks_no_block(comment):
    (text,) = rendered(tokenizer_for(CHATML + comment), QUESTIONS[:2])
    assert text == f"{USER}Q1<|im_end|>\n{ASSISTANT}«A1<|im_end|>»\n"


def test_a_block_that_history_strips_trains_as_it_was_asked_for():
    tokenizer = tokenizer_for(STRIPPING_BLOCKS)
    messages = [{**m, "reasoning_content": "why"} if m["role"] == "assistant" else m for m in QUESTIONS]
    texts = [
        f"{USER}Q1<|im_end|>\n{ASSISTANT}«<think>why</think>A1<|im_end|>»\n",
        f"{USER}Q1<|im_end|>\n{ASSISTANT}A1<|im_end|>\n{USER}Q2<|im_end|>\n{ASSISTANT}«<think>why</think>A2<|im_end|>»\n",
    ]
    assert rendered(tokenizer, messages) == texts
    assert rendered(tokenizer, messages, train_on="last") == texts[1:]


def test_blocks_are_looked_at_once_for_each_shape(monkeypatch):
    from deltatune.data import template as module

    calls = []
    render = module.render_jinja_template
    monkeypatch.setattr(module, "render_jinja_template", lambda **kw: calls.append(1) or render(**kw))
    tokenizer = tokenizer_for(shipped_template("qwen2_5_training"))
    from deltatune.data.chat import Conversation, Renderer

    renderer = Renderer(tokenizer)
    counts = []
    for word in ("a", "b", "c"):
        calls.clear()
        messages = [{**message, "content": message["content"] + word} for message in QUESTIONS]
        renderer.render_conversation(Conversation(messages), "row")
        counts.append(len(calls))
    assert counts[1:] == [1, 1]


def test_several_blocks_in_one_turn_are_told_apart_by_what_came_before():
    template = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content }}{%- endgeneration %}{{- ' hidden ' }}
{%- generation %}{{- '!<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}"""
    (text,) = rendered(tokenizer_for(template), QUESTIONS, train_on="last")
    assert text.count("«") == 2
    assert text.endswith(f"{ASSISTANT}«A2» hidden «!<|im_end|>»\n")


def test_a_token_that_takes_the_space_after_it_along_ends_a_turn():
    from tokenizers import AddedToken

    tokenizer = tokenizer_for(None)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|end|>")
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)
    (text,) = rendered(tokenizer, QUESTIONS[:2])
    assert "«A1<|end|>»" in text.replace("\n»", "»")
