import pytest

from deltatune.data.json_rows import json_lines
from deltatune.data.rows import BadRowError, Part, RowsOf, read_on
from deltatune.errors import DataError


@pytest.fixture
def parts(write_jsonl):
    first = json_lines(write_jsonl([{"a": i} for i in range(4)], "1.jsonl"), "first")
    second = json_lines(write_jsonl([{"b": i} for i in range(3)], "2.jsonl"), "second")
    return [Part(first, 1, 3), Part(second, 2, 2), Part(second, 0, 3), Part(first, 0, 1)]


EXPECTED = [{"a": 1}, {"a": 2}, {"b": 0}, {"b": 1}, {"b": 2}, {"a": 0}]


@pytest.mark.parametrize(("start", "end"), [(0, 6), (0, 99), (1, 3), (2, 5), (4, 6), (3, 3), (9, 12)])
def test_stretches_are_read_one_after_the_other(parts, start, end):
    assert list(RowsOf("all", parts).read(start, end)) == EXPECTED[start:end]


def test_rows_keep_the_names_of_their_files(parts):
    rows = RowsOf("all", parts)
    assert [rows.where(index) for index in (0, 1, 2, 5)] == [
        "first, line 2", "first, line 3", "second, line 1", "first, line 1"
    ]  # fmt: skip
    assert (rows.name, rows.columns, len(rows)) == ("all", ("a", "b"), 6)


def test_identity_follows_stretches_and_content(parts):
    again, other = RowsOf("again", parts), RowsOf("all", [Part(parts[0].rows, 1, 2), *parts[1:]])
    assert RowsOf("all", parts).identity == again.identity != other.identity


def test_reading_goes_on_after_a_broken_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 0}\n{\n{\n{"a": 3}\n{\n')
    rows = json_lines(tmp_path / "rows.jsonl", "rows")
    both = RowsOf("both", [Part(rows, 0, 5), Part(rows, 2, 4)])
    found = [(number, "broken" if isinstance(row, BadRowError) else row) for number, row in read_on(both.read, 1, 7)]
    assert found == [(1, "broken"), (2, "broken"), (3, {"a": 3}), (4, "broken"), (5, "broken"), (6, {"a": 3})]


def test_a_file_that_changes_is_no_broken_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 0}\n{"a": 1}\n')
    rows = json_lines(file, "rows")
    file.write_text('{"a": 0}\n')
    with pytest.raises(DataError, match="has changed"):
        list(read_on(rows.read, 0, 2))
