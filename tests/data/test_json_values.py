import pytest

from deltatune.data.chat import Renderer
from deltatune.data.documents import tokenize
from deltatune.data.formats import Layout
from deltatune.data.json_values import check_values, parse_json
from deltatune.data.sources import load_rows
from deltatune.errors import DataError

HALF = "\ud83d"


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": f"cut {HALF}"}, r"line 7: text holds half a character: '\\ud83d' .* at the end of 'cut \\ud83d'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "messages holds half a char"),
        ({"text": "a", "meta": {HALF: 1}}, "meta holds half a character"),
        ({HALF: 1}, "line 7 holds half a character"),
        ({"text": "a", "id": 10**5000}, "id: a whole number has more than 4300 digits"),
        ({"text": "a", "id": nested(101)}, "id: values are nested deeper than 100 levels"),
    ],
)
def test_broken_values_are_named(row, message):
    with pytest.raises(DataError, match=message):
        check_values(row, "x.jsonl, line 7")


@pytest.mark.parametrize("value", ["a\0b", "🙂", "日本", 10**4000, True, None, 1.5, nested(90), b"\xff"])
def test_other_values_pass(value):
    check_values({"text": value}, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 7: tools are not JSON"),
        ("[" * 100_000 + "]" * 100_000, "line 7: tools: values are nested deeper"),
        ("9" * 5000, "line 7: tools: a whole number has more than 4300 digits"),
        ('"\\ud83d"', "line 7: tools holds half a character"),
        ("[" * 150 + "]" * 150, "line 7: tools: values are nested deeper"),
    ],
)
def test_json_text_inside_a_row_is_checked_too(text, message):
    with pytest.raises(DataError, match=message):
        parse_json(text, "x.jsonl, line 7: tools")


def tokenized(path, tokenizer):
    return tokenize(load_rows(str(path)), Layout("text"), Renderer(tokenizer))


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "x \\ud83d"}',
        '{"text": "a", "note": "\\udc00"}',
        '{"text": "a", "id": ' + "9" * 5000 + "}",
        '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"text": "a", "x": ' + "[" * 150 + "]" * 150 + "}",
    ],
    ids=["half", "half unused", "digits", "depth", "less depth"],
)
def test_a_broken_line_of_a_file_is_one_error_that_names_it(line, tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: "):
        tokenized(path, tokenizer)


def test_text_of_a_parquet_file_that_is_no_utf8_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    offsets, content = pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, content])
    parquet.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet, row 1 holds text that is not UTF-8"):
        list(load_rows(str(tmp_path / "rows.parquet")).read(0, 1))
