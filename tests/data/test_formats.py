import pytest

from deltatune.data.formats import Layout, check_row, resolve_format, unused_columns
from deltatune.errors import DataError


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "messages"], "chat"),
        (["conversations"], "chat"),
        (["prompt", "completion"], "prompt_completion"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["text", "url"], "text"),
        (["messages", "text"], "chat"),
        (["input_ids", "attention_mask", "labels"], "tokens"),
        (["input_ids", "special_tokens_mask"], "tokens"),
        (["input_ids", "text"], "text"),
        (["text", "label"], "text"),
    ],
)
def test_auto_reads_the_format_from_the_columns(columns, expected):
    assert resolve_format("auto", columns, {}, "x").format == expected


def test_an_explicit_format_wins_over_the_columns():
    assert resolve_format("text", ["messages", "text"], {}, "x").format == "text"


def test_auto_takes_a_format_that_reads_the_renamed_columns():
    assert resolve_format("auto", ["messages", "body"], {"text": "body"}, "x").format == "text"


def test_columns_may_go_by_other_names():
    layout = resolve_format("auto", ["dialogue"], {"messages": "dialogue"}, "x")
    assert (layout.format, layout.column("messages"), layout.column("tools")) == ("chat", "dialogue", "tools")


def test_dolly_is_alpaca_under_other_names():
    columns = ["instruction", "context", "response", "category"]
    layout = resolve_format("auto", columns, {"input": "context", "output": "response"}, "x")
    assert layout.format == "alpaca"


def test_names_of_speakers_and_keys_are_part_of_the_layout():
    layout = resolve_format(
        "chat", ["messages"], {}, "x", roles={"bot": "assistant"}, message_fields={"content": "text"}, columnar=True
    )
    assert layout == Layout(
        "chat", roles={"bot": "assistant"}, message_fields={"content": "text"}, columnar=True, explicit=True
    )


@pytest.mark.parametrize(
    ("requested", "columns", "renamed", "message"),
    [
        ("auto", ["a", "b"], {}, "x.jsonl fits no format: .* got a, b"),
        ("chat", ["message"], {}, r"no column 'messages' \(did you mean message\?\), which format chat needs"),
        ("prompt_completion", ["prompt"], {}, "no column 'completion'"),
        ("alpaca", ["instruction", "outputs"], {}, r"no column 'output' \(did you mean outputs\?\)"),
        ("auto", ["texts"], {"text": "txt"}, r"no column 'txt' for text"),
        ("auto", ["input_ids", "loss_mask"], {}, "column 'loss_mask', which format tokens does not know.*loss_mask}"),
    ],
)
def test_missing_columns_are_named(requested, columns, renamed, message):
    with pytest.raises(DataError, match=message):
        resolve_format(requested, columns, renamed, "x.jsonl")


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        (["prompt", "chosen", "rejected", "messages"], "prompt"),
        (["chosen", "rejected"], "prompt"),
        (["conversations", "chosen", "rejected"], "conversations"),
        (["messages", "chosen", "rejected"], "messages"),
        (["instruction", "input", "output", "chosen", "rejected"], "prompt"),
    ],
)
def test_two_answers_are_a_pair_whatever_asks_for_them(columns, prompt):
    layout = resolve_format("auto", columns, {}, "x.jsonl")
    assert (layout.format, layout.column("prompt")) == ("preference", prompt)


@pytest.mark.parametrize("requested", ["auto", "prompt_completion"])
def test_the_better_answers_may_be_named(requested):
    columns = ["prompt", "chosen", "rejected"]
    layout = resolve_format(requested, columns, {"completion": "chosen"}, "x")
    assert (layout.format, unused_columns(layout, columns)) == ("prompt_completion", ("rejected",))


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "a", "completion": "b", "label": False}, Layout("prompt_completion")),
        ({"messages": [], "label": True}, Layout("chat")),
        ({"instruction": "a", "output": "b", "kto_tag": True}, Layout("alpaca")),
    ],
)
def test_answers_marked_good_or_bad_are_refused(row, layout):
    with pytest.raises(DataError, match=r"line 3 marks its answer as good or bad .*in pairs alone"):
        check_row(row, layout, "x.jsonl, line 3")


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "a", "completion": "b", "label": False}, Layout("prompt_completion", explicit=True)),
        ({"messages": [], "label": "sports"}, Layout("chat")),
        ({"text": "a", "label": True}, Layout("text")),
    ],
)
def test_other_labels_are_no_preference(row, layout):
    check_row(row, layout, "x")


@pytest.mark.parametrize(
    ("layout", "columns", "expected"),
    [
        (Layout("chat"), ["id", "messages", "tools", "source"], ("id", "source")),
        (Layout("chat", {"messages": "conversations"}), ["conversations", "system", "messages"], ("messages",)),
        (Layout("prompt_completion"), ["prompt", "completion", "system"], ("system",)),
        (Layout("alpaca", {"output": "response"}), ["instruction", "input", "response", "output"], ("output",)),
        (Layout("text"), ["text", "tools"], ("tools",)),
        (Layout("tokens"), ["input_ids", "labels", "attention_mask", "length"], ("length",)),
    ],
)
def test_columns_that_nothing_reads_are_listed(layout, columns, expected):
    assert unused_columns(layout, columns) == expected
