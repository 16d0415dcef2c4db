import pytest
from template_cases import CALL, QUESTIONS, rendered, shipped_template, tokenizer_for

from deltatune.data.well_known import WELL_KNOWN, read_template
from deltatune.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}

EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    "«A1<|im_end|>»\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>»\n",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nQ1<end_of_turn>\n<start_of_turn>model\n«A1<end_of_turn>»\n"
    "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n«A2<end_of_turn>»\n",
    "llama2": "<bos>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ1 [/INST]« A1 <eos>»<bos>[INST] Q2 [/INST]« A2 <eos>»",
    "llama3": "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "«A1<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«A2<|eot_id|>»",
    "mistral": "<bos>[INST] Be brief.\n\nQ1 [/INST]« A1<eos>»[INST] Q2 [/INST]« A2<eos>»",
    "phi": "<|system|>\nBe brief.<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n«A1<|end|>»\n"
    "<|user|>\nQ2<|end|>\n<|assistant|>\n«A2<|end|>»\n<eos>",
    "phi4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Q1<|im_end|>"
    "<|im_start|>assistant<|im_sep|>«A1<|im_end|>»<|im_start|>user<|im_sep|>Q2<|im_end|>"
    "<|im_start|>assistant<|im_sep|>«A2<|im_end|>»",
}


def named_tokenizer(name):
    tokenizer = tokenizer_for(WELL_KNOWN[name].source)
    tokenizer.add_tokens(list(WELL_KNOWN[name].tokens), special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("name", EXPECTED)
def test_text_and_trained_tokens_of_a_named_format(name):
    assert rendered(named_tokenizer(name), [SYSTEM, *QUESTIONS]) == [EXPECTED[name]]


def test_qwen3_trains_each_turn_with_its_reasoning():
    messages = [{**m, "reasoning_content": f"R{i}"} if i % 2 else m for i, m in enumerate(QUESTIONS)]
    first = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(named_tokenizer("qwen3"), messages) == [
        f"{first}«<think>\nR1\n</think>\n\nA1<|im_end|>»\n",
        f"{first}A1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nR3\n</think>\n\nA2<|im_end|>»\n",
    ]


def test_every_named_format_is_tested():
    assert {*EXPECTED, "qwen3"} == set(WELL_KNOWN)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CONVERSATIONS = {
    "two": QUESTIONS,
    "system": [SYSTEM, *QUESTIONS],
    "spaces": [{**message, "content": f"\n {message['content']} \n"} for message in QUESTIONS],
    "reasoning": [{**m, "reasoning_content": "\nR\n"} if m["role"] == "assistant" else m for m in QUESTIONS],
    "in tags": [{**m, "content": f"<think>\nR\n</think>\n\n{m['content']}"} for m in QUESTIONS],
    "question again": [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0], QUESTIONS[1]],
    "tools": [
        SYSTEM,
        QUESTIONS[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "T1"},
        {"role": "tool", "content": "T2"},
        QUESTIONS[1],
        {"role": "user", "content": "<tool_response>x</tool_response>"},
        {"role": "assistant", "content": "again", "tool_calls": [CALL]},
    ],
}
SAME = [
    *(("qwen3", "qwen3", kind) for kind in CONVERSATIONS),
    *(("llama3", "llama3", kind) for kind in ("two", "system", "spaces")),
    *(("gemma", "gemma3", kind) for kind in ("two", "system", "spaces")),
    *(("phi", "phi3", kind) for kind in ("two", "system", "spaces")),
]


@pytest.mark.parametrize("asked", [False, True], ids=["whole", "asked"])
@pytest.mark.parametrize(("name", "public", "kind"), SAME)
def test_a_named_format_renders_as_the_public_template(name, public, kind, asked):
    tokenizer = named_tokenizer(name)
    for messages in (CONVERSATIONS[kind], CONVERSATIONS[kind][:-1]):
        tools = TOOLS if kind == "tools" else None
        texts = [
            tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=asked
            )
            for source in (WELL_KNOWN[name].source, shipped_template(public))
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["gemma", "llama2", "mistral"])
def test_formats_of_two_speakers_refuse_others(name):
    from deltatune.errors import DataError

    with pytest.raises(DataError, match="must alternate"):
        rendered(named_tokenizer(name), [*QUESTIONS[:2], *QUESTIONS[1:2]])


def test_a_name_a_file_and_a_text_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chatml").write_text("file")
    (tmp_path / "mine.jinja").write_text("mine")
    tokenizer = named_tokenizer("chatml")
    assert read_template("chatml", tokenizer) == WELL_KNOWN["chatml"].source
    assert read_template("./chatml", tokenizer) == "file"
    assert read_template("mine.jinja", tokenizer) == "mine"
    assert read_template("{{ messages }}", tokenizer) == "{{ messages }}"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "chatmll",
            r"chatmll is neither a known template \(did you mean chatml\?\) nor a file; expected one of chatml, ",
        ),
        ("nothing.jinja", "cannot read nothing.jinja: No such file or directory"),
        ("folder/chatml", "cannot read folder/chatml: .*there is no folder folder"),
    ],
)
def test_what_is_neither_is_named(setting, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"model.chat_template: {message}"):
        read_template(setting, named_tokenizer("chatml"))


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "mine.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"cannot read .*mine.jinja: it is no UTF-8 text"):
        read_template(str(tmp_path / "mine.jinja"), named_tokenizer("chatml"))


def test_a_tokenizer_without_the_control_tokens_is_refused():
    with pytest.raises(UserError, match=r"llama3 writes <\|start_header_id\|>, .*<\|eot_id\|>, which this"):
        read_template("llama3", named_tokenizer("chatml"))


def test_a_tokenizer_without_an_end_of_text_is_refused():
    tokenizer = named_tokenizer("mistral")
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="mistral writes bos_token"):
        read_template("mistral", tokenizer)
