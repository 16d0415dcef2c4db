import pytest

from deltatune.data.splits import folder_splits, saved_splits
from deltatune.errors import DataError

LAYOUTS = {
    "one_file": (["rows.jsonl"], {"train": ["rows.jsonl"]}),
    "no_split_in_any_name": (["a/x.jsonl", "b.jsonl"], {"train": ["a/x.jsonl", "b.jsonl"]}),
    "file_names": (
        ["train.jsonl", "valid.jsonl", "test.jsonl", "extra.jsonl"],
        {"train": ["train.jsonl"], "validation": ["valid.jsonl"], "test": ["test.jsonl"]},
    ),
    "words_in_file_names": (
        ["my-train-1.jsonl", "my_dev.jsonl", "eval 2.jsonl", "training.v2.jsonl", "contest.jsonl"],
        {"train": ["my-train-1.jsonl", "training.v2.jsonl"], "validation": ["my_dev.jsonl"], "test": ["eval 2.jsonl"]},
    ),
    "a_word_within_a_word_is_none": (["trainer.jsonl", "latest.jsonl"], {"train": ["latest.jsonl", "trainer.jsonl"]}),
    "folders": (
        ["train/0.jsonl", "train/1.jsonl", "validation/0.jsonl", "test_train.jsonl"],
        {"train": ["train/0.jsonl", "train/1.jsonl"], "validation": ["validation/0.jsonl"]},
    ),
    "folders_below": (["data/en-train/x/0.jsonl", "data/dev/0.jsonl"], {
        "train": ["data/en-train/x/0.jsonl"], "validation": ["data/dev/0.jsonl"]
    }),
    "shards": (
        [
            "data/train-00000-of-00002.jsonl",
            "data/train-00001-of-00002-abc.jsonl",
            "data/held_out-00000-of-00001.jsonl",
            "data/other.jsonl",
            "train.jsonl",
        ],
        {
            "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002-abc.jsonl"],
            "held_out": ["data/held_out-00000-of-00001.jsonl"],
        },
    ),
    "shards_elsewhere": (
        ["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"],
        {"train": ["train-00000-of-00001.jsonl"], "test": ["test-00000-of-00001.jsonl"]},
    ),
    "shards_of_no_split": (["x/en-00000-of-00001.jsonl"], {"train": ["x/en-00000-of-00001.jsonl"]}),
    "words_in_folder_names": (["test 1/0.jsonl", "train-en/0.jsonl", "contest/0.jsonl"], {
        "train": ["train-en/0.jsonl"], "test": ["test 1/0.jsonl"]
    }),
    "only_test": (["test.jsonl", "notes.jsonl"], {"test": ["test.jsonl"]}),
    "two_splits_in_a_name": (["train_test.jsonl"], {"train": ["train_test.jsonl"], "test": ["train_test.jsonl"]}),
    "hidden": (["train.jsonl", ".cache/test.jsonl", "__x/test.jsonl"], {"train": ["train.jsonl"]}),
}  # fmt: skip


def write(folder, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "a"}\n')


def relative(folder, splits):
    return {split: sorted(file.relative_to(folder).as_posix() for file in files) for split, files in splits.items()}


@pytest.mark.parametrize(("files", "splits"), LAYOUTS.values(), ids=LAYOUTS)
def test_names_tell_splits(tmp_path, files, splits):
    write(tmp_path, files)
    assert relative(tmp_path, folder_splits(tmp_path, None)) == splits


@pytest.mark.parametrize(("files", "splits"), LAYOUTS.values(), ids=LAYOUTS)
def test_names_tell_the_same_splits_as_the_hub(tmp_path, files, splits):
    data_files = pytest.importorskip("datasets").data_files
    write(tmp_path, files)
    patterns = data_files.get_data_patterns(str(tmp_path))
    resolved = data_files.DataFilesDict.from_patterns(patterns, base_path=str(tmp_path))
    found = {split: {file.removeprefix(f"{tmp_path}/") for file in files} for split, files in resolved.items()}
    assert found == {split: set(files) for split, files in splits.items()}


README = """---
license: mit
configs:
- config_name: small
  data_files:
  - split: train
    path: small/a*.jsonl
  - split: held_out
    path: [small/b.jsonl, "small/c*"]
- config_name: large
  default: true
  data_files: large/*.jsonl
- config_name: below
  data_dir: below
---
# Rows
"""
FILES = ["small/a1.jsonl", "small/a2.jsonl", "small/b.jsonl", "small/c.jsonl", "large/x.jsonl", "below/train/y.jsonl"]


@pytest.mark.parametrize(
    ("config", "splits"),
    [
        (None, {"train": ["large/x.jsonl"]}),
        ("small", {"train": ["small/a1.jsonl", "small/a2.jsonl"], "held_out": ["small/b.jsonl", "small/c.jsonl"]}),
        ("below", {"train": ["below/train/y.jsonl"]}),
    ],
)
def test_a_readme_configures_splits(tmp_path, config, splits):
    write(tmp_path, FILES)
    (tmp_path / "README.md").write_text(README)
    assert relative(tmp_path, folder_splits(tmp_path, config)) == splits


@pytest.mark.parametrize(
    ("readme", "config", "message"),
    [
        (README, "smal", r"has no configuration smal \(did you mean small\?\); it has small, large, below"),
        (README.replace("  default: true\n", ""), None, "has the configurations small, large, below; choose one"),
        ("# no YAML\n", "small", "name: small cannot act on .*: it has no README.md that lists configurations"),
        ("---\nconfigs: [\n---\n", None, "README.md lists its configurations in a way that cannot be read"),
        ("---\nconfigs: [{data_files: x}]\n---\n", None, "README.md lists its configurations in a way that cannot"),
        ("---\nconfigs: [{config_name: a, data_files: 3}]\n---\n", None, r"README.md \(a\): data_files cannot be read"),
        ("---\nconfigs: [{config_name: a, data_files: []}]\n---\n", None, "data_files names no files; expected"),
        ("---\nconfigs: [{config_name: a, data_files: no/*}]\n---\n", None, "names no/\\*, which matches no data file"),
        ("---\nconfigs: [{config_name: a, data_files: 'hf://x/y'}]\n---\n", None, "names hf://x/y; expected files"),
    ],
)
def test_configurations_that_cannot_be_read_are_named(tmp_path, readme, config, message):
    write(tmp_path, FILES)
    (tmp_path / "README.md").write_text(readme)
    with pytest.raises(DataError, match=message):
        folder_splits(tmp_path, config)


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds no data files; expected \.jsonl, "):
        folder_splits(tmp_path, None)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ({"dataset_dict.json": '{"splits": ["train", "test"]}'}, {"train": ["train"], "test": ["test"]}),
        ({"state.json": "{}", "dataset_info.json": "{}"}, {"": ["."]}),
        ({"dataset_info.json": "{}"}, None),
    ],
)
def test_saved_data_sets_are_told_from_other_folders(tmp_path, files, splits):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = saved_splits(tmp_path, None)
    assert (found and relative(tmp_path, found)) == splits


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        ("[]", None, "dataset_dict.json cannot be read"),
        ("[" * 100_000, None, "dataset_dict.json cannot be read"),
        ('{"splits": []}', "en", "name: en cannot act on"),
    ],
)
def test_saved_data_sets_that_cannot_be_read_are_named(tmp_path, content, config, message):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises(DataError, match=message):
        saved_splits(tmp_path, config)
