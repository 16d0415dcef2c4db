import json
import subprocess
import sys

import pytest

from deltatune.data.sources import load_rows
from deltatune.errors import DataError

ROWS = [{"text": "one"}, {"text": "two", "id": 2}, {"text": "three"}]


def read_all(rows):
    return list(rows.read(0, len(rows)))


def test_lines_are_read_in_any_range_as_they_are(write_jsonl):
    rows = load_rows(str(write_jsonl(ROWS)))
    assert read_all(rows) == ROWS
    assert list(rows.read(1, 2)) == ROWS[1:2]
    assert rows.columns == ("text", "id")


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    rows = load_rows(str(path))
    assert read_all(rows) == [{"text": "a"}, {"text": "b"}]
    assert rows.where(1) == f"{path}, line 4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"line 2 is not valid JSON: .* at column"),
        (b'{"a": 1}\n[1]\n', "line 2 is a JSON list; expected one JSON object per line"),
        (b'{"a": "\xff"}\n', "line 1 is not UTF-8"),
        (b"", "is empty; expected at least one row"),
        (b"\n \n", "holds blank lines only"),
    ],
)
def test_broken_lines_are_named(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"rows\.jsonl.*{message}"):
        load_rows(str(path))


def test_a_json_file_holds_a_list(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    rows = load_rows(str(path))
    assert read_all(rows) == ROWS
    assert rows.where(2) == f"{path}, row 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a" 2}]', "line 2 is not valid JSON"),
        ('{"a": 1}', "is a JSON dict; expected a list"),
        ("[1]", "row 1 is a JSON int"),
        ("[]", "holds no rows"),
    ],
)
def test_broken_json_files_are_named(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(path))


@pytest.fixture
def cached_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def test_parquet_files_are_read(tmp_path, cached_datasets):
    path = tmp_path / "rows.parquet"
    cached_datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).to_parquet(str(path))
    rows = load_rows(str(path))
    assert read_all(rows) == [{"text": "one"}, {"text": "two"}]
    assert rows.columns == ("text",)
    assert rows.where(1) == f"{path}, row 2"


@pytest.mark.parametrize("content", [b"no parquet", b""])
def test_broken_parquet_files_are_named(tmp_path, content, cached_datasets):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet (cannot be read as Parquet|is empty)"):
        load_rows(str(path))


def test_parquet_without_rows_is_named(tmp_path, cached_datasets):
    path = tmp_path / "rows.parquet"
    cached_datasets.Dataset.from_dict({"text": []}).to_parquet(str(path))
    with pytest.raises(DataError, match=r"rows\.parquet .*holds no rows"):
        load_rows(str(path))


@pytest.mark.parametrize("path", ["{}", "{}/*.jsonl", "{}/rows[12].jsonl"])
def test_folders_and_patterns_chain_their_files(tmp_path, write_jsonl, path):
    write_jsonl(ROWS, "rows1.jsonl")
    second = write_jsonl([{"text": "four"}], "rows2.jsonl")
    (tmp_path / "notes.txt").write_text("no data")
    rows = load_rows(path.format(tmp_path))
    assert read_all(rows) == [*ROWS, {"text": "four"}]
    assert list(rows.read(2, 4)) == [ROWS[2], {"text": "four"}]
    assert rows.where(3) == f"{second}, line 1"


def test_limit_takes_the_first_rows(write_jsonl):
    rows = load_rows(str(write_jsonl(ROWS)), limit=2)
    assert (len(rows), list(rows.read(0, 10))) == (2, ROWS[:2])


def test_identity_follows_the_content(write_jsonl):
    first = load_rows(str(write_jsonl(ROWS, "a.jsonl")))
    same = load_rows(str(write_jsonl(ROWS, "b.jsonl")))
    other = load_rows(str(write_jsonl(ROWS[:2], "c.jsonl")))
    limited = load_rows(str(write_jsonl(ROWS, "a.jsonl")), limit=2)
    assert first.identity == same.identity
    assert len({first.identity, other.identity, limited.identity}) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/row.jsonl", "row.jsonl does not exist; did you mean rows.jsonl?"),
        ("{}/none/rows.jsonl", "there is no folder"),
        ("{}/*.parquet", "matches no data file"),
        ("{}/notes.txt", "is no data file: expected .jsonl, .ndjson, .json, .parquet, got .txt"),
        ("{}/empty", "holds no data files"),
    ],
)
def test_missing_files_are_named(tmp_path, write_jsonl, path, message):
    write_jsonl(ROWS)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        load_rows(path.format(tmp_path))
    assert message in str(caught.value)


def test_names_on_the_hub_go_to_datasets(monkeypatch, cached_datasets):
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        if name == "missing":
            raise FileNotFoundError("no such\nconfiguration")
        return cached_datasets.Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(cached_datasets, "load_dataset", load_dataset)
    rows = load_rows("someone/some-data", split="test", name="small")
    assert asked == [("someone/some-data", "small", "test")]
    assert rows.where(0) == "someone/some-data (small, split test), row 1"
    with pytest.raises(DataError, match="neither a local file nor a data set on the Hub: no such configuration"):
        load_rows("someone/some-data", name="missing")


def test_json_lines_need_no_datasets(write_jsonl):
    code = f"""
import sys
sys.modules["datasets"] = None
from deltatune.data.sources import load_rows
assert len(load_rows({str(write_jsonl(ROWS))!r})) == 3
try:
    load_rows("someone/some-data")
except ValueError as error:
    assert "pip install 'deltatune[train]'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
