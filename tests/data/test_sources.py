import bz2
import gzip
import json
import lzma
import subprocess
import sys

import pytest

from deltatune.data import json_rows, sources
from deltatune.data.sources import load_rows
from deltatune.errors import DataError

ROWS = [{"text": "one"}, {"text": "two", "id": 2}, {"text": "three"}]


def read_all(rows):
    return list(rows.read(0, len(rows)))


def texts(rows):
    return [row["text"] for row in read_all(rows)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def cached_datasets(tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    return datasets


def lines(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


FILES = {
    "rows.jsonl": lines("a", "b"),
    "rows.ndjson": lines("a", "b"),
    "ROWS.JSONL": lines("a", "b"),
    "rows.json": b'[{"text": "a"}, {"text": "b"}]',
    "lines.json": lines("a", "b"),
    "rows.txt": b"a\nb\n",
    "rows.csv": b"text,id\na,1\nb,2\n",
    "rows.tsv": b"text\tid\na\t1\nb\t2\n",
    "rows.jsonl.gz": gzip.compress(lines("a", "b")),
    "rows.jsonl.xz": lzma.compress(lines("a", "b")),
    "rows.jsonl.bz2": bz2.compress(lines("a", "b")),
    "rows.json.gz": gzip.compress(b'[{"text": "a"}, {"text": "b"}]'),
    "rows.csv.gz": gzip.compress(b"text\na\nb\n"),
    "rows.txt.gz": gzip.compress(b"a\nb\n"),
}


@pytest.mark.parametrize(("name", "content"), FILES.items(), ids=FILES)
@pytest.mark.parametrize("limit", [None, 1])
def test_files_of_every_kind_are_read(tmp_path, name, content, limit):
    (tmp_path / name).write_bytes(content)
    rows = load_rows(str(tmp_path / name), limit=limit)
    assert texts(rows) == ["a", "b"][:limit]
    assert rows.where(0).startswith(f"{tmp_path / name}, ")


def test_tables_are_read(tmp_path, cached_datasets):
    table = cached_datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    table.to_parquet(str(tmp_path / "rows.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "rows.arrow")
    table.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "rows.parquet", arrow, tmp_path / "saved"):
        assert texts(load_rows(str(path))) == ["a", "b"]
        assert texts(load_rows(str(path), limit=1)) == ["a"]


@pytest.mark.parametrize("path", ["{}", "{}/*.jsonl", "{}/rows[12].jsonl", "{}/**/rows*"])
def test_folders_and_patterns_chain_their_files(tmp_path, write_jsonl, path):
    write_jsonl(ROWS, "rows1.jsonl")
    second = write_jsonl([{"text": "four"}], "rows2.jsonl")
    (tmp_path / "notes.txt").write_text("no data")
    rows = load_rows(path.format(tmp_path))
    assert read_all(rows) == [*ROWS, {"text": "four"}]
    assert list(rows.read(2, 4)) == [ROWS[2], {"text": "four"}]
    assert rows.where(3) == f"{second}, line 1"


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(write_jsonl):
    assert read_all(load_rows(str(write_jsonl(ROWS, "rows[1].jsonl")))) == ROWS


def test_a_folder_whose_name_looks_like_a_file_is_a_folder(tmp_path, write_jsonl):
    (tmp_path / "x.jsonl").mkdir()
    write_jsonl(ROWS, "x.jsonl/rows.jsonl")
    assert read_all(load_rows(str(tmp_path / "x.jsonl"))) == ROWS


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, write_jsonl):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(ROWS)
    assert read_all(load_rows("~/rows.jsonl")) == read_all(load_rows("~/r*.jsonl")) == ROWS


def test_the_limit_stops_before_later_files(tmp_path, write_jsonl):
    write_jsonl(ROWS, "1.jsonl")
    (tmp_path / "2.jsonl").write_text('{"text": "four"}\nbroken')
    (tmp_path / "3.jsonl").write_text("")
    assert read_all(load_rows(str(tmp_path), limit=2)) == ROWS[:2]
    assert texts(load_rows(str(tmp_path), limit=4)) == ["one", "two", "three", "four"]
    with pytest.raises(DataError, match=r"2\.jsonl, line 2 is not valid JSON"):
        read_all(load_rows(str(tmp_path), limit=5))


def test_identity_follows_the_content(write_jsonl):
    identities = [
        load_rows(str(write_jsonl(rows, name)), limit=limit).identity
        for rows, name, limit in [(ROWS, "a.jsonl", None), (ROWS[1:], "c.jsonl", None), (ROWS, "a.jsonl", 2)]
    ]
    assert len(set(identities)) == 3
    assert load_rows(str(write_jsonl(ROWS, "b.jsonl"))).identity == identities[0]


SPLIT_FILES = {"train-1": list("abcdef"), "train-2": list("ghij"), "validation": list("klmn"), "notes": ["x"]}
SPLITS = {
    "train": "abcdefghij",
    "validation": "klmn",
    "train+validation": "abcdefghijklmn",
    "all": "abcdefghijklmn",
    "train[:10%]": "a",
    "train[90%:]": "j",
    "train[5:7]": "fg",
    "train[-2:]": "ij",
    "train[:0]+validation[1:2]+train[:1]": "la",
    "train[:1] + validation": "aklmn",
}


@pytest.fixture
def split_folder(tmp_path, write_jsonl):
    for name, values in SPLIT_FILES.items():
        write_jsonl([{"text": value} for value in values], f"{name}.jsonl")
    return tmp_path


@pytest.mark.parametrize(("split", "expected"), SPLITS.items())
@pytest.mark.parametrize("limit", [None, 3])
def test_splits_of_a_folder_and_slices_of_them(split_folder, cached_datasets, split, expected, limit):
    rows = load_rows(str(split_folder), split=split, limit=limit)
    assert "".join(texts(rows)) == expected[:limit]


def test_splits_of_a_saved_data_set(tmp_path, cached_datasets):
    rows = {name: cached_datasets.Dataset.from_list([{"text": name}] * 4) for name in ("train", "test")}
    cached_datasets.DatasetDict(rows).save_to_disk(str(tmp_path))
    assert texts(load_rows(str(tmp_path))) == ["train"] * 4
    assert texts(load_rows(str(tmp_path), split="test")) == ["test"] * 4
    assert texts(load_rows(str(tmp_path), split="train[3:]+test[:50%]")) == ["train", "test", "test"]


def test_rows_of_a_slice_keep_their_lines(split_folder, cached_datasets):
    rows = load_rows(str(split_folder), split="train[5:8]")
    assert [rows.where(index) for index in range(2)] == [
        f"{split_folder}/train-1.jsonl, line 6",
        f"{split_folder}/train-2.jsonl, line 1",
    ]


def test_slices_divide_a_lone_file(write_jsonl, cached_datasets):
    path = str(write_jsonl(ROWS))
    first, rest = load_rows(path, split="train[:67%]"), load_rows(path, split="train[67%:]")
    assert read_all(first) + read_all(rest) == ROWS
    assert (len(first), first.identity == rest.identity) == (2, False)


def test_the_train_split_is_read_unless_another_is_asked_for_and_says_so(split_folder, caplog):
    assert "".join(texts(load_rows(str(split_folder)))) == SPLITS["train"]
    assert caplog.messages == [f"{split_folder}: split train is read, and not validation; set split to choose"]


def test_a_lone_split_is_read_whatever_its_name(tmp_path, write_jsonl, caplog):
    write_jsonl(ROWS, "test.jsonl")
    assert read_all(load_rows(str(tmp_path))) == ROWS
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("", {"split": "valid"}, r"has no split valid \(did you mean validation\?\); it has train, validation$"),
        ("", {"split": "train[:10%"}, "split: .* is no slice: Unrecognized instruction format"),
        ("", {"split": "train[:200%]"}, "split: .* is no slice: Percent slice boundaries"),
        ("", {"split": "train[:0]"}, "holds no rows; expected at least one"),
        ("", {"name": "en"}, "name: en cannot act on .*: it has no README.md that lists configurations"),
        ("", {"revision": "main"}, "revision: main cannot act on .*, which is not on the Hub; leave it out"),
        ("notes.jsonl", {"split": "train"}, r"split: train cannot act on .*, .*; leave it out, or take a slice"),
        ("notes.jsonl", {"split": "test[:1]"}, "has no split test; it has train"),
        ("notes.jsonl", {"name": "en"}, "name: en cannot act on .*: files have no configurations; leave it out"),
        ("notes.jsonl", {"revision": "main"}, "revision: main cannot act"),
        ("*.jsonl", {"split": "train"}, "split: train cannot act on"),
    ],
)
def test_settings_that_cannot_act_are_errors(split_folder, cached_datasets, path, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(f"{split_folder}/{path}", **settings)
    assert "\n" not in str(caught.value)


def test_splits_without_train_are_listed(tmp_path, write_jsonl):
    write_jsonl(ROWS, "test.jsonl")
    write_jsonl(ROWS, "dev.jsonl")
    with pytest.raises(DataError, match="has the splits validation, test; choose one with split"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{}/row.jsonl", "row.jsonl does not exist; did you mean rows.jsonl"),
        ("{}/none/rows.jsonl", "there is no folder"),
        ("~nobody-of-this-name/rows.jsonl", "~nobody-of-this-name/rows.jsonl names no file or folder: "),
        ("{}/r**.jsonl", "is no pattern: Invalid pattern"),
        ("/dev/null", "/dev/null is neither a file nor a folder"),
        ("https://huggingface.co/datasets/a/b", "is a URL; expected a local path, or the name of a data set"),
        ("{}/row.jsonl.gz", "row.jsonl.gz does not exist"),
        ("{}/*.arrow", "matches no data file; expected .jsonl"),
        ("{}/rows.py", "is no data file: expected .jsonl, .ndjson, .json, .parquet, .arrow, .csv, .tsv, .txt, got .py"),
        ("{}/rows", "is no data file: expected .jsonl"),
        ("{}/empty", "holds no data files"),
        ("{}/empty.jsonl", "is empty; expected at least one row"),
        ("{}/empty.csv", "is empty"),
        ("{}/pointer.parquet", "is a pointer of Git LFS, not the data; run `git lfs pull`"),
        ("{}/link.jsonl", "/link.jsonl is a link to {}/nothing, which does not exist"),
        ("{}/" + "x" * 300 + ".jsonl", "cannot be read: File name too long"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, write_jsonl, path, message):
    write_jsonl(ROWS)
    for name in ("rows.py", "rows"):
        (tmp_path / name).write_text("x")
    for name in ("empty.jsonl", "empty.csv"):
        (tmp_path / name).touch()
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        load_rows(path.format(tmp_path))
    assert message.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows.csv", "rows.jsonl.gz", "rows.arrow"])
def test_a_file_without_permission_is_named(tmp_path, monkeypatch, name):
    from pathlib import Path

    (tmp_path / name).write_text("x")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=rf"{name} cannot be read: Permission denied"):
        load_rows(str(tmp_path / name))


def test_columns_that_only_later_rows_have_are_looked_for(write_jsonl, monkeypatch):
    monkeypatch.setattr(json_rows, "ROWS_FOR_COLUMNS", 1)
    path = str(write_jsonl(ROWS))
    assert load_rows(path).columns == ("text",)
    assert load_rows(path, needed=["id", "none"]).columns == ("text", "id")


@pytest.mark.parametrize("split", [None, "test[:5%]"])
def test_names_on_the_hub_go_to_the_hub(monkeypatch, write_jsonl, split):
    asked, there = [], load_rows(str(write_jsonl(ROWS)))

    def hub_rows(*args):
        asked.append(args)
        return there

    monkeypatch.setattr(sources, "hub_rows", hub_rows)
    rows = load_rows("someone/some-data", split=split, name="small", revision="v1", limit=2)
    assert read_all(rows) == ROWS[:2]
    assert asked == [("someone/some-data", split or "train", "small", "v1")]


def test_files_of_lines_need_no_datasets(tmp_path, write_jsonl):
    write_jsonl(ROWS)
    (tmp_path / "rows.csv").write_text("text\na\n")
    code = f"""
import sys
sys.modules["datasets"] = sys.modules["pyarrow"] = None
from deltatune.data.sources import load_rows
assert len(load_rows({str(tmp_path / "rows.jsonl")!r})) == 3
assert len(load_rows({str(tmp_path)!r})) == 4
for path, split in (("someone/some-data", None), ({str(tmp_path)!r}, "train[:1]")):
    try:
        load_rows(path, split=split)
    except ValueError as error:
        assert "pip install 'deltatune[train]'" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
