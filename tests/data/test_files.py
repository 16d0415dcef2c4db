from pathlib import Path

import pytest

from deltatune.data.files import data_suffix, files_below, files_matching
from deltatune.errors import DataError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(folder, files):
    return [file.relative_to(folder).as_posix() for file in files]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.jsonl", ".jsonl"),
        ("A.JSONL", ".jsonl"),
        ("a.jsonl.gz", ".jsonl"),
        ("a.json.zst", ".json"),
        ("a.v2.csv.xz", ".csv"),
        ("a.txt.bz2", ".txt"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("jsonl", None),
        ("a.py", None),
    ],
)
def test_the_suffix_says_what_a_file_holds(name, suffix):
    assert data_suffix(Path(name)) == suffix


@pytest.mark.parametrize(
    ("present", "found"),
    [
        (["b.jsonl", "a.parquet", "c/d.csv.gz"], ["a.parquet", "b.jsonl", "c/d.csv.gz"]),
        (["a.jsonl", ".a.jsonl", "._a.jsonl", "__a.jsonl"], ["a.jsonl"]),
        (["a.jsonl", ".cache/x.jsonl", ".ipynb_checkpoints/x.jsonl", "__MACOSX/x.jsonl"], ["a.jsonl"]),
        (["a.json", "dataset_info.json", "state.json", "config.json", "dataset_dict.json"], ["a.json"]),
        (["a.jsonl", "README.md", "LICENSE.txt", "load.py"], ["a.jsonl"]),
        (["a.txt", "b/c.txt"], ["a.txt", "b/c.txt"]),
        (["x.jsonl/a.jsonl"], ["x.jsonl/a.jsonl"]),
    ],
)
def test_what_counts_as_data_in_a_folder(tmp_path, present, found):
    touch(tmp_path, *present)
    assert names(tmp_path, files_below(tmp_path)) == found


def test_hidden_folders_on_the_way_do_not_hide_a_folder(tmp_path):
    touch(tmp_path, ".cache/data/a.jsonl")
    assert names(tmp_path, files_below(tmp_path / ".cache" / "data")) == [".cache/data/a.jsonl"]


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "else/a.jsonl", "else/b.jsonl")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "else")
    (folder / "c.jsonl").symlink_to(tmp_path / "else" / "a.jsonl")
    (folder / "gone.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "else" / "back").symlink_to(folder)
    assert names(folder, files_below(folder)) == ["c.jsonl", "linked/a.jsonl", "linked/b.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "c/d.jsonl"]),
        ("c/**", ["c/d.jsonl"]),
        ("c/*", ["c/d.jsonl"]),
        (".*.jsonl", [".h.jsonl"]),
        ("__x/*", ["__x/e.jsonl"]),
    ],
)
def test_patterns_match_hidden_files_only_by_name(tmp_path, pattern, found):
    touch(tmp_path, "a.jsonl", "b.jsonl", "c/d.jsonl", ".h.jsonl", ".g/d.jsonl", "__x/e.jsonl", "c/notes.md")
    assert names(tmp_path, files_matching(tmp_path, pattern)) == found


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.jsonl", "closed/b.jsonl")
    monkeypatch.setattr("os.scandir", _refusing(tmp_path / "closed", __import__("os").scandir))
    with pytest.raises(DataError, match="closed cannot be read: Permission denied"):
        files_below(tmp_path)


def _refusing(closed, scandir):
    def scan(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    return scan
