import numpy as np
import pytest

from deltatune.data.chat import Renderer
from deltatune.data.messages import Layout
from deltatune.data.notes import EMPTY_TARGET, Notes
from deltatune.errors import DataError
from deltatune.packing.sample import IGNORE_INDEX

CHAT, PAIR, TEXT = Layout("chat"), Layout("prompt_completion"), Layout("text")
PARTS = """
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}{{- message.content[0].text }}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
CALLS = """
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
ANSWERS = ["Four, of course!\n<|im_end|>", "Paris<|im_end|>"]


def trained_stretches(sample, tokenizer):
    """The texts of maximal runs of trained tokens."""
    trained = np.concatenate([[False], sample.labels != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(np.diff(trained.astype(int)))
    return [tokenizer.decode(sample.input_ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def render_one(renderer, row, layout=CHAT):
    (sample,) = renderer.render(row, layout, "rows.jsonl, line 1")
    assert np.array_equal(sample.labels[sample.labels != -100], sample.input_ids[sample.labels != -100])
    return sample


@pytest.mark.parametrize("name", ["tokenizer", "marked_tokenizer"])
def test_assistant_turns_train_up_to_the_end_of_turn(name, conversation, request):
    tokenizer = request.getfixturevalue(name)
    sample = render_one(Renderer(tokenizer), {"messages": conversation})
    assert trained_stretches(sample, tokenizer) == ANSWERS
    assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(conversation, tokenize=False)


def test_templates_with_and_without_a_mask_give_the_same_labels(tokenizer, marked_tokenizer, conversation):
    plain = render_one(Renderer(tokenizer), {"messages": conversation})
    marked = render_one(Renderer(marked_tokenizer), {"messages": conversation})
    assert np.array_equal(plain.input_ids, marked.input_ids)
    assert np.array_equal(plain.labels, marked.labels)


def test_labels_equal_the_mask_that_transformers_computes(marked_tokenizer, conversation):
    sample = render_one(Renderer(marked_tokenizer), {"messages": conversation})
    expected = marked_tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sample.input_ids.tolist() == expected["input_ids"]
    assert (sample.labels != IGNORE_INDEX).astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("name", ["tokenizer", "marked_tokenizer"])
@pytest.mark.parametrize("content", ["\n\nGood\n\n", "  two ", "日本 é 🙂", "<|im_start|>", ""])
def test_any_content_trains_exactly(name, content, request):
    tokenizer = request.getfixturevalue(name)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": content}]
    sample = render_one(Renderer(tokenizer), {"messages": messages})
    trained = sample.input_ids[sample.labels != IGNORE_INDEX]
    assert trained.tolist() == tokenizer(content + "<|im_end|>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_no_token_reaches_across_the_beginning_of_a_turn(trim_offsets, make_tokenizer, conversation):
    # the prompt ends in a space, which would merge with the word after it
    template = """{%- for message in messages %}{{- message.role + ': ' + message.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    assert tokenizer.tokenize(" Paris") == ["ĠParis"]
    conversation[2]["content"] = "\nFour\n\n plus two \n "
    sample = render_one(Renderer(tokenizer), {"messages": conversation})
    assert trained_stretches(sample, tokenizer) == ["\nFour\n\n plus two \n <|im_end|>", "Paris<|im_end|>"]
    prompt = tokenizer.apply_chat_template(conversation[:4], add_generation_prompt=True, return_dict=False)
    trained = (sample.labels != IGNORE_INDEX).tolist()
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert trained[len(prompt) - 1] is False
    assert all(trained[len(prompt) :])


def test_end_of_turn_right_after_a_generation_block_trains(make_tokenizer, conversation):
    template = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{%- generation %}{{- message.content }}{%- endgeneration %}
{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"""
    tokenizer = make_tokenizer(template)
    assert trained_stretches(render_one(Renderer(tokenizer), {"messages": conversation}), tokenizer) == ANSWERS
    conversation[4]["content"] = ""
    sample = render_one(Renderer(tokenizer), {"messages": conversation})
    assert trained_stretches(sample, tokenizer) == [ANSWERS[0], "<|im_end|>"]


@pytest.mark.parametrize("name", ["tokenizer", "marked_tokenizer"])
def test_last_trains_the_last_turn_only(name, conversation, request):
    tokenizer = request.getfixturevalue(name)
    sample = render_one(Renderer(tokenizer, train_on="last"), {"messages": conversation})
    assert trained_stretches(sample, tokenizer) == ANSWERS[1:]


def test_all_trains_every_token(tokenizer, conversation):
    sample = render_one(Renderer(tokenizer, train_on="all"), {"messages": conversation})
    assert np.array_equal(sample.labels, sample.input_ids)


def test_turns_after_the_last_answer_stay_untrained(tokenizer, conversation):
    sample = render_one(Renderer(tokenizer), {"messages": conversation[:4]})
    assert trained_stretches(sample, tokenizer) == ANSWERS[:1]
    assert tokenizer.decode(sample.input_ids).endswith("And a city?<|im_end|>\n")


def test_adjacent_answers_train_one_by_one(tokenizer):
    messages = [{"role": "user", "content": "Hello"}, *({"role": "assistant", "content": c} for c in "ab")]
    sample = render_one(Renderer(tokenizer), {"messages": messages})
    assert trained_stretches(sample, tokenizer) == ["a<|im_end|>", "b<|im_end|>"]


def test_turns_that_history_shows_otherwise_train_in_samples_of_their_own(thinking_tokenizer, conversation):
    conversation[2]["reasoning_content"] = "sum"
    conversation[4]["reasoning_content"] = "map"
    samples = Renderer(thinking_tokenizer).render({"messages": conversation}, CHAT, "row")
    stretches = [trained_stretches(sample, thinking_tokenizer) for sample in samples]
    assert stretches == [["sum\n</think>\n\nFour, of course!\n<|im_end|>"], ["map\n</think>\n\nParis<|im_end|>"]]
    texts = [thinking_tokenizer.decode(sample.input_ids) for sample in samples]
    assert texts == [
        thinking_tokenizer.apply_chat_template(conversation[:3], tokenize=False),
        thinking_tokenizer.apply_chat_template(conversation, tokenize=False),
    ]


def test_turns_between_the_same_questions_share_a_sample(thinking_tokenizer, conversation):
    messages = [*conversation[:3], {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Yes"}]
    sample = render_one(Renderer(thinking_tokenizer), {"messages": messages})
    assert trained_stretches(sample, thinking_tokenizer) == [
        "\n</think>\n\nFour, of course!\n<|im_end|>",
        "\n</think>\n\nYes<|im_end|>",
    ]


def test_template_variables_move_the_empty_reasoning_into_the_prompt(thinking_tokenizer, conversation):
    renderer = Renderer(thinking_tokenizer, template_kwargs={"enable_thinking": False})
    samples = renderer.render({"messages": conversation}, CHAT, "row")
    assert [trained_stretches(sample, thinking_tokenizer) for sample in samples] == [[ANSWERS[0]], [ANSWERS[1]]]


def test_a_prompt_that_the_turn_does_not_continue_is_named(make_tokenizer, conversation):
    template = """{%- for message in messages %}{{- message.role + ': ' + message.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'model: ' }}{%- endif %}"""
    with pytest.raises(DataError, match=r"line 1: the template asks for message 2 .*enable_thinking: true or false"):
        render_one(Renderer(make_tokenizer(template)), {"messages": conversation})


def test_a_refusing_template_is_quoted(make_tokenizer, conversation):
    tokenizer = make_tokenizer("{{ raise_exception('no system turns here') }}")
    with pytest.raises(DataError, match=r"line 1: the chat template cannot render .*no system turns here"):
        render_one(Renderer(tokenizer), {"messages": conversation})


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{{ messages[0].content[0:1].index('?') }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"],
)
def test_a_failing_template_is_quoted(make_tokenizer, conversation, template):
    with pytest.raises(DataError, match=r"line 1: the chat template cannot render"):
        render_one(Renderer(make_tokenizer(template)), {"messages": conversation})


def test_a_missing_template_is_named(make_tokenizer, conversation):
    with pytest.raises(DataError, match=r"no chat template; set model.chat_template"):
        render_one(Renderer(make_tokenizer(None)), {"messages": conversation})


def test_another_template_may_be_given(make_tokenizer, tokenizer, conversation):
    renderer = Renderer(make_tokenizer(None), chat_template=tokenizer.chat_template)
    assert trained_stretches(render_one(renderer, {"messages": conversation}), tokenizer) == ANSWERS


def test_tools_reach_the_template(make_tokenizer):
    template = """{%- for tool in tools or [] %}{{- 'tool: ' + tool.name + '<|im_end|>' }}{%- endfor %}
{%- for message in messages %}{{- message.role + ':' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{- call.function.arguments | tojson }}{%- endfor %}
{{- '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""
    tokenizer = make_tokenizer(template)
    row = {
        "messages": [
            {"role": "user", "content": "add"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
        ],
        "tools": '[{"name": "add"}]',
    }
    sample = render_one(Renderer(tokenizer), row)
    assert tokenizer.decode(sample.input_ids).startswith("tool: add<|im_end|>")
    assert trained_stretches(sample, tokenizer) == ['{"a": 2}<|im_end|>']


def test_completion_and_end_of_text_train(tokenizer):
    sample = render_one(Renderer(tokenizer), {"prompt": "What is two plus two?", "completion": " Four"}, PAIR)
    assert trained_stretches(sample, tokenizer) == [" Four<|im_end|>"]
    prompt = tokenizer("What is two plus two?")["input_ids"]
    assert sample.input_ids[: len(prompt)].tolist() == prompt


def test_the_prompt_keeps_the_tokens_it_has_at_inference(tokenizer):
    prompt, completion = "the qu", "ick"
    joint = tokenizer(prompt + completion)["input_ids"]
    alone = tokenizer(prompt)["input_ids"]
    assert joint[: len(alone)] != alone
    sample = render_one(Renderer(tokenizer), {"prompt": prompt, "completion": completion}, PAIR)
    assert sample.input_ids[: len(alone)].tolist() == alone
    assert trained_stretches(sample, tokenizer) == ["ick<|im_end|>"]


@pytest.mark.parametrize("name", ["tokenizer", "marked_tokenizer"])
@pytest.mark.parametrize("as_messages", [True, False])
def test_only_the_completions_turns_train(name, as_messages, conversation, request):
    tokenizer = request.getfixturevalue(name)
    completion = conversation[4:] if as_messages else "Paris"
    sample = render_one(Renderer(tokenizer), {"prompt": conversation[:4], "completion": completion}, PAIR)
    assert trained_stretches(sample, tokenizer) == ANSWERS[1:]


def test_text_trains_whole_with_an_end(tokenizer):
    sample = render_one(Renderer(tokenizer), {"text": "The quick brown fox"}, TEXT)
    assert trained_stretches(sample, tokenizer) == ["The quick brown fox<|im_end|>"]


def test_an_end_that_is_there_is_not_doubled(tokenizer):
    sample = render_one(Renderer(tokenizer), {"text": "fox<|im_end|>"}, TEXT)
    assert sample.input_ids.tolist().count(tokenizer.eos_token_id) == 1


def test_special_tokens_that_the_tokenizer_adds_are_kept(make_tokenizer):
    from tokenizers import processors

    tokenizer = make_tokenizer(None)
    bos, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", bos), ("<|im_end|>", eos)]
    )
    sample = render_one(Renderer(tokenizer), {"prompt": "Hello", "completion": " there"}, PAIR)
    assert tokenizer.decode(sample.input_ids) == "<|im_start|>Hello there<|im_end|>"
    assert trained_stretches(sample, tokenizer) == [" there<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "layout", "message"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, CHAT, "no assistant turn"),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "user", "content": "x"}]}, PAIR,
         "no assistant turn in its completion"),
        ({"prompt": "a", "completion": ""}, PAIR, "completion is empty"),
        ({"prompt": "a"}, PAIR, "has no completion"),
        ({"text": ""}, TEXT, "text is empty"),
        ({"text": 3}, TEXT, "text must be a string, got int 3"),
    ],
)  # fmt: skip
def test_rows_that_train_nothing_are_named(row, layout, message, tokenizer):
    with pytest.raises(DataError, match=f"rows.jsonl, line 1.*{message}"):
        render_one(Renderer(tokenizer), row, layout)


def asked(*answers, **keys):
    """A conversation in which each question has one of these answers."""
    turns = [
        ({"role": "user", "content": "hi"}, {"role": "assistant", "content": answer, **keys}) for answer in answers
    ]
    return {"messages": [turn for pair in turns for turn in pair]}


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}}
PREFERENCE, TOKENS = Layout("preference"), Layout("tokens")


@pytest.mark.parametrize("name", ["tokenizer", "marked_tokenizer", "thinking_tokenizer"])
@pytest.mark.parametrize(
    ("row", "layout", "settings", "noted"),
    [
        (asked(""), CHAT, {}, True),
        (asked(" \n"), CHAT, {}, True),
        (asked("", "Paris"), CHAT, {}, True),
        (asked("", "Paris"), CHAT, {"train_on": "last"}, False),
        (asked("Paris", ""), CHAT, {"train_on": "all"}, True),
        (asked([{"type": "text", "text": ""}]), CHAT, {"template_kwargs": {}}, True),
        (asked("<think>\n</think>\n\n"), CHAT, {}, True),
        (asked("<think>\nWhy?\n</think>\n\n"), CHAT, {}, False),
        (asked("", reasoning_content="Why?"), CHAT, {}, False),
        (asked("Paris"), CHAT, {}, False),
        ({"messages": [*asked("Paris")["messages"], *asked("", train=False)["messages"]]}, CHAT, {}, False),
        ({"prompt": "a", "completion": " "}, PAIR, {}, True),
        ({"prompt": "a", "completion": " b"}, PAIR, {}, False),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": ""}, PAIR, {}, True),
        ({"text": " \n "}, TEXT, {}, True),
        ({"text": " fox"}, TEXT, {}, False),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, PREFERENCE, {}, True),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, PREFERENCE, {}, False),
    ],
)  # fmt: skip
def test_answers_that_say_nothing_train_and_are_noted(name, row, layout, settings, noted, request):
    renderer, notes = Renderer(request.getfixturevalue(name), **settings), Notes()
    if isinstance(row.get("messages", [{}])[-1].get("content"), list):
        renderer = Renderer(renderer.tokenizer, chat_template=PARTS)
    assert all(sample.num_trained for sample in renderer.render(row, layout, "line 1", notes))
    assert (EMPTY_TARGET in notes.to_dict()) == noted


def test_a_call_is_no_empty_answer(tokenizer):
    notes = Notes()
    Renderer(tokenizer, chat_template=CALLS).render(asked("", tool_calls=[CALL]), CHAT, "line 1", notes)
    assert EMPTY_TARGET not in notes.to_dict()


@pytest.mark.parametrize(
    ("answer", "noted"), [("<|im_end|>", True), (" \n<|im_end|>", True), ("Paris<|im_end|>", False)]
)
def test_tokens_that_say_nothing_are_noted(tokenizer, answer, noted):
    prompt, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("hi", f"{answer}<|im_end|>"))
    notes, row = Notes(), {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}
    assert Renderer(tokenizer).render(row, TOKENS, "line 1", notes)[0].num_trained == len(ids)
    assert (EMPTY_TARGET in notes.to_dict()) == noted


def test_a_template_that_marks_nothing_is_named(make_tokenizer, conversation):
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    )
    with pytest.raises(DataError, match="line 1 trains nothing"):
        render_one(Renderer(make_tokenizer(template)), {"messages": conversation})


def test_a_tokenizer_without_offsets_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="use a fast tokenizer"):
        Renderer(Slow())
