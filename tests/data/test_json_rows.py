import json
import os
import pickle
from contextlib import contextmanager

import pytest

from deltatune.data import json_rows
from deltatune.data.json_rows import json_file, json_lines, text_lines
from deltatune.errors import DataError

ROWS = [{"text": "one"}, {"text": "zwei ü", "id": 2}, {"text": "three"}]
NAME = "rows"


def read_all(rows):
    return list(rows.read(0, len(rows)))


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "content"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_lines_are_read_in_any_range_as_they_are(write_jsonl):
    rows = json_lines(write_jsonl(ROWS), NAME)
    assert read_all(rows) == ROWS
    assert list(rows.read(1, 2)) == ROWS[1:2]
    assert list(rows.read(2, 9)) == ROWS[2:]
    assert list(rows.read(5, 9)) == []
    assert rows.columns == ("text", "id")


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', [1, 2]),
        (b'{"text": "a"}\n{"text": "b"}', [1, 2]),
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', [1, 2]),
        (b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}', [1, 4]),
        (b'\n\n{"text": "a"}\n\x0c\n\n{"text": "b"}\n\n', [3, 6]),
        (b'  {"text": "a"} \n\xef\xbb\xbf{"text": "b"}\n', [1, 2]),
    ],
)
def test_blank_lines_ends_of_lines_and_byte_order_marks(write, content, lines):
    rows = json_lines(write(content), NAME)
    assert read_all(rows) == [{"text": "a"}, {"text": "b"}]
    assert [rows.where(index) for index in range(2)] == [f"rows, line {line}" for line in lines]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"line 2 is not valid JSON: .* at column 6; expected one JSON object per line"),
        ('{"a": 1}\n3\n', "line 2 is a JSON number; expected one JSON object per line"),
        ('{"a": 1}\nnull\n', "line 2 is a JSON null; expected"),
        ('[{"a": 1}]\n', r"line 1 begins a JSON list; .* \(a list of objects belongs in a .json file\)"),
        ('[\n{"a": 1}\n]', "line 1 begins a JSON list"),
        (b'{"a": "\xff"}\n', "line 1 is not UTF-8: .* at byte 7; save the file as UTF-8"),
        ('{"a": 1}\n'.encode("utf-16"), "^rows is UTF-16 or UTF-32 text; save the file as UTF-8"),
        ('{"a": 1}\n'.encode("utf-16-le"), "^rows is UTF-16 or UTF-32 text"),
        ("\n \n", "holds blank lines only"),
        ("[" * 100_000, "line 1 begins a JSON list"),
        ('{"a": ' * 100_000, "line 1: values are nested deeper than 100 levels"),
        ('{"a": ' + "9" * 5000 + "}", "line 1: a whole number has more than 4300 digits"),
    ],
)
def test_broken_lines_are_named(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_all(json_lines(write(content), NAME))
    assert "\n" not in str(caught.value)


def test_a_broken_line_beyond_the_first_is_named_when_it_is_read(write, monkeypatch):
    monkeypatch.setattr(json_rows, "ROWS_FOR_COLUMNS", 2)
    rows = json_lines(write('{"a": 1}\n{"b": 1}\n\n{"c": 1\n{"d": 1}\n'), NAME)
    assert rows.columns == ("a", "b")
    assert list(rows.read(3, 4)) == [{"d": 1}]
    with pytest.raises(DataError, match="rows, line 4 is not valid JSON"):
        read_all(rows)


def test_nothing_is_read_after_the_limit(write):
    content = '{"text": "a"}\n' * 10 + "broken\n" * 100_000
    rows = json_lines(write(content), NAME, limit=10)
    assert read_all(rows) == [{"text": "a"}] * 10
    assert rows.identity == json_lines(write('{"text": "a"}\n' * 10), NAME).identity


def test_the_scan_stops_at_the_limit(write, monkeypatch):
    path, read = write('{"text": "a"}\n' * 1_000_000), []

    @contextmanager
    def counted(file):
        with file.open("rb") as stream:
            yield stream
            read.append(stream.tell())

    monkeypatch.setattr(json_rows, "open_data", counted)
    assert len(json_lines(path, NAME, limit=10)) == 10
    assert max(read) <= 10 * len('{"text": "a"}\n')


def test_an_index_costs_two_numbers_a_row(write):
    rows = json_lines(write('{"text": "a"}\n' * 100_000), NAME)
    assert len(pickle.dumps(rows)) < 17 * 100_000


@pytest.mark.parametrize("change", ["shrink", "grow", "touch"])
def test_a_file_that_changes_under_the_index_is_named(write_jsonl, change):
    path = write_jsonl(ROWS)
    rows = json_lines(path, NAME)
    status = path.stat()
    if change == "touch":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        path.write_text('{"text": "a"}\n' * (1 if change == "shrink" else 100))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="rows has changed since it was opened; start again"):
        read_all(rows)


def test_a_file_that_goes_away_is_named(write_jsonl):
    path = write_jsonl(ROWS)
    rows = json_lines(path, NAME)
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: No such file"):
        read_all(rows)


def test_rows_travel_to_other_processes(write_jsonl):
    rows = pickle.loads(pickle.dumps(json_lines(write_jsonl(ROWS), NAME)))
    assert read_all(rows) == ROWS


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2, ensure_ascii=False),
        "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False) + "\r\n",
        "\n".join(json.dumps(row) for row in ROWS),
    ],
)
def test_a_json_file_holds_a_list_or_lines(write, content):
    rows = json_file(write(content), NAME)
    assert read_all(rows) == ROWS
    assert list(rows.read(1, 2)) == ROWS[1:2]
    assert rows.columns == ("text", "id")


def test_rows_of_a_list_have_numbers(write):
    assert json_file(write(json.dumps(ROWS)), NAME).where(2) == "rows, row 3"


def test_a_list_is_read_to_the_limit(write):
    rows = json_file(write('[{"a": 1}, {"a": 2}, broken'), NAME, limit=2)
    assert read_all(rows) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a" 2}]', "line 2 is not valid JSON: Expecting ':' delimiter at column 6; expected a list"),
        ('[{"a": 1}\n{"a": 2}]', "line 2 is not valid JSON: Expecting ',' delimiter at column 1"),
        ('[{"a": 1},]', "is not valid JSON: Expecting value at column 11"),
        ('[{"a": 1}', "is not valid JSON: Expecting ',' delimiter at column 10"),
        ('[{"a": 1}] x', "is not valid JSON: Extra data"),
        ("[", "is not valid JSON: Expecting value at column 2"),
        ("[1]", "row 1 is a JSON number; expected an object"),
        ('[{"a": 1}, [2]]', "row 2 is a JSON list; expected an object"),
        ("[]", "holds no rows"),
        ("3", "is a JSON number; expected a list of objects"),
        ("x", "is not valid JSON"),
        ("", "is not valid JSON"),
        ('{"version": 1, "data": [{}]}', "is one JSON object with the keys version, data; expected a list of objects; "
         "save the list under data as a file of its own"),
        ('{"a": 1}', "is one JSON object with the keys a; expected a list of objects$"),
        ('{"a": 1}\n{"a" 2}', "line 2 is not valid JSON"),
        ('{"a": 1', "line 1 is not valid JSON"),
        (b'[{"a": "\xff"}]', "is not UTF-8"),
        ("[{}]".encode("utf-16"), "is UTF-16 or UTF-32 text"),
    ],
)  # fmt: skip
def test_broken_json_files_are_named(write, content, message):
    with pytest.raises(DataError, match=rf"^rows.*{message}") as caught:
        read_all(json_file(write(content), NAME))
    assert "\n" not in str(caught.value)


def test_text_is_a_row_per_line(write):
    rows = text_lines(write("\ufeff one\r\n\n \ntwo \n"), NAME)
    assert read_all(rows) == [{"text": " one"}, {"text": "two "}]
    assert (rows.columns, rows.where(1)) == (("text",), "rows, line 4")


def test_identity_follows_the_content_and_what_it_is_read_as(write):
    content = '{"text": "a"}\n{"text": "b"}\n'
    lines, text = json_lines(write(content), NAME), text_lines(write(content), NAME)
    listed = json_file(write('[{"text": "a"}, {"text": "b"}]'), NAME)
    other = json_lines(write(content.replace("b", "c")), NAME)
    assert len({rows.identity for rows in (lines, text, listed, other)}) == 4
    assert json_lines(write(content), "other name").identity == lines.identity
