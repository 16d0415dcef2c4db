import pytest

from deltatune.data.delimited_rows import delimited_rows
from deltatune.errors import DataError

NAME = "rows.csv"


@pytest.fixture
def read(tmp_path):
    def read(content, delimiter=",", limit=None):
        path = tmp_path / "content"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return delimited_rows(path, NAME, delimiter, tmp_path / "cache", limit=limit)

    return read


def read_all(rows):
    return list(rows.read(0, len(rows)))


@pytest.mark.parametrize(
    ("content", "delimiter", "expected"),
    [
        ("text,id\none,1\ntwo,02\n", ",", [{"text": "one", "id": "1"}, {"text": "two", "id": "02"}]),
        ("text\tid\r\na,b\t1\r\n", "\t", [{"text": "a,b", "id": "1"}]),
        ('text,id\n"two\nlines, ""quoted""",NA\n', ",", [{"text": 'two\nlines, "quoted"', "id": "NA"}]),
        ("\ufefftext\n007\n\nnull\n1e5\n", ",", [{"text": "007"}, {"text": "null"}, {"text": "1e5"}]),
        ("prompt,completion\nü,\n", ",", [{"prompt": "ü", "completion": ""}]),
        (f"text\n{'x' * 1_000_000}\n", ",", [{"text": "x" * 1_000_000}]),
    ],
)
def test_fields_are_text_as_they_are_written(read, content, delimiter, expected):
    rows = read(content, delimiter)
    assert read_all(rows) == expected
    assert (rows.columns, rows.columnar) == (tuple(expected[0]), True)
    assert rows.where(len(rows) - 1) == f"rows.csv, row {len(expected)}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", "line 3 ends a row of 1 fields; expected a, b"),
        ('a,b\n"x\ny",2\n1,2,3\n', "line 4 ends a row of 3 fields"),
        ("a,b,a\n1,2,3\n", "line 1 names a column twice: a, b, a; give each its own name"),
        ('a\n"open\n', "line 2 is no valid CSV: unexpected end of data"),
        ('a\n"x"y\n', "line 2 is no valid CSV"),
        (b"a\nb\n\xff\n", "line 3 is not UTF-8: .*; save the file as UTF-8"),
        ("a\nb\n".encode("utf-16"), "is UTF-16 or UTF-32 text"),
        ("a,b\n", "holds no rows below its header"),
    ],
)
def test_broken_files_are_named(read, content, message):
    with pytest.raises(DataError, match=f"^rows.csv.*{message}") as caught:
        read(content)
    assert "\n" not in str(caught.value)


def test_nothing_is_read_after_the_limit(read):
    assert read_all(read('a\n1\n2\n"broken', limit=2)) == [{"a": "1"}, {"a": "2"}]


def test_content_and_delimiter_name_what_is_kept(read):
    assert read_all(read("a,b\n1,2\n")) == [{"a": "1", "b": "2"}]
    assert read_all(read("a,b\n1,2\n", "\t")) == [{"a,b": "1,2"}]
    assert read_all(read("a,b\n3,4\n")) == [{"a": "3", "b": "4"}]


def test_the_limit_of_the_csv_module_is_as_before(read):
    import csv

    before = csv.field_size_limit()
    read("a\n1\n")
    assert csv.field_size_limit() == before
