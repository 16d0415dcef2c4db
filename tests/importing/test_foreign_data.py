"""Data sets of Axolotl and LLaMA-Factory, key by key."""

import json
from pathlib import Path

import pytest

from deltatune.errors import UserError
from deltatune.importing.axolotl import AXOLOTL
from deltatune.importing.llama_factory import LLAMA_FACTORY
from deltatune.importing.trl import TRL
from deltatune.importing.unsloth import UNSLOTH


def of_axolotl(entry):
    rows = AXOLOTL.sections["datasets"]([entry], {}, Path("a.yml"))
    return {key: value for row in rows for key, value in row.outcome.writes.items()}, rows


@pytest.mark.parametrize(
    ("entry", "writes"),
    [
        ({"type": "alpaca"}, {"format": "alpaca"}),
        ({"type": "completion", "field": "body"}, {"format": "text", "columns.text": "body"}),
        ({"path": "json", "data_files": "x.jsonl"}, {"path": "x.jsonl"}),
        ({"ds_type": "json", "data_files": ["x.jsonl"]}, {"path": "x.jsonl"}),
        ({"path": "./d", "data_files": ["x.jsonl"]}, {"path": "./d/x.jsonl"}),
        ({"path": "owner/d", "data_files": ["x.jsonl"]}, {"path": "owner/d"}),
        ({"path": "x.jsonl", "split": "train"}, {"path": "x.jsonl"}),
        ({"path": "x.jsonl", "split": "train[:5%]"}, {"path": "x.jsonl", "split": "train[:5%]"}),
        ({"path": "owner/v1.0", "split": "train"}, {"path": "owner/v1.0", "split": "train"}),
        ({"name": "main", "revision": "v1"}, {"name": "main", "revision": "v1"}),
        ({"message_field_role": "from"}, {"message_fields.role": "from"}),
    ],
)
def test_axolotl_entry(entry, writes):
    assert of_axolotl(entry)[0] == {f"data.train.0.{key}": value for key, value in writes.items()}


@pytest.mark.parametrize(
    "entry", [{"type": "alpaca_w_system.load_open_orca"}, {"type": {"format": "{instruction}"}}, {"shards": 4}]
)
def test_axolotl_entry_that_is_not_supported(entry):
    writes, rows = of_axolotl(entry)
    assert ([row.outcome.verdict for row in rows], writes) == (["not supported"], {})


def test_unknown_key_of_an_entry():
    assert [row.outcome.verdict for row in of_axolotl({"colour": "red"})[1]] == ["unknown"]


def test_pretraining_data_is_streamed():
    rows = AXOLOTL.sections["pretraining_dataset"]([{"path": "owner/text", "type": "pretrain"}], {}, Path("a.yml"))
    writes = {key: value for row in rows for key, value in row.outcome.writes.items()}
    assert writes == {"data.train.0.path": "owner/text", "data.train.0.format": "text", "data.streaming": True}


def test_name_that_no_registry_has(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"other": {"file_name": "o.json"}}))
    rows = LLAMA_FACTORY.sections["dataset"]("mine", {}, tmp_path / "l.yaml")
    assert [(row.key, row.outcome.verdict, dict(row.outcome.writes)) for row in rows] == [
        ("mine", "not supported", {"data.train.0.path": "data/mine.json"})
    ]


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_registry_that_is_no_json_is_said_in_one_line(tmp_path, text):
    (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset_info\.json: broken JSON"):
        LLAMA_FACTORY.sections["dataset"]("mine", {}, tmp_path / "l.yaml")


def test_registry_of_pictures_says_what_is_lost(tmp_path):
    entry = {"file_name": "m.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"m": entry}))
    rows = LLAMA_FACTORY.sections["dataset"]("m", {}, tmp_path / "l.yaml")
    assert [row.key for row in rows if row.outcome.verdict == "not supported"] == ["m.columns.images"]


def of_trl(section, value):
    rows = TRL.sections[section](value, {}, Path("t.yaml"))
    return {key: value for row in rows for key, value in row.outcome.writes.items()}, rows


@pytest.mark.parametrize(
    ("section", "value", "writes"),
    [
        ("datasets", [{"path": "owner/d", "name": "main"}], {"path": "owner/d", "name": "main"}),
        ("dataset_mixture", {"datasets": [{"id": "owner/d", "config": "main"}]}, {"path": "owner/d", "name": "main"}),
        ("dataset_mixture", {"datasets": [{"id": "owner/d", "weight": 1.0}]}, {"path": "owner/d"}),
        ("datasets", [{"path": "json", "data_files": "x.jsonl"}], {"path": "x.jsonl"}),
        ("datasets", [{"path": "owner/d", "data_files": "x.jsonl"}], {"path": "owner/d"}),
        ("dataset_mixer", {"owner/d": 0.5}, {"path": "owner/d"}),
    ],
)
def test_trl_sources(section, value, writes):
    assert of_trl(section, value)[0] == {f"data.train.0.{key}": value for key, value in writes.items()}


def test_a_mixer_takes_each_name_in_all_splits():
    settings = {"dataset_splits": ["train_a", "train_b", "test_a"], "evaluation_strategy": "epoch"}
    rows = TRL.sections["dataset_mixer"]({"o/d": 1, "o/e": 1}, settings, Path("t.yaml"))
    writes = {key.removeprefix("data."): value for row in rows for key, value in row.outcome.writes.items()}
    train = [("o/d", "train_a"), ("o/d", "train_b"), ("o/e", "train_a"), ("o/e", "train_b")]
    held_out = [("o/d", "test_a"), ("o/e", "test_a")]
    assert writes == {
        f"{part}.{place}.{key}": value
        for part, sources in (("train", train), ("eval", held_out))
        for place, source in enumerate(sources)
        for key, value in zip(("path", "split"), source, strict=True)
    }
    rows = TRL.sections["dataset_mixer"]({"o/d": 1}, {**settings, "evaluation_strategy": "no"}, Path("t.yaml"))
    assert not any(key.startswith("data.eval") for row in rows for key in row.outcome.writes)


def test_fractions_are_shares_of_documents():
    assert of_trl("datasets", [{"fraction": 0.5}])[0] == {"data.train.0.weight": 0.5, "data.weight_by": "documents"}


def test_a_part_of_the_rows_is_not_a_weight():
    assert [row.outcome.verdict for row in of_trl("datasets", [{"weight": 0.1}])[1]] == ["not supported"]


@pytest.mark.parametrize(
    ("files", "verdict", "writes"),
    [
        ("a.jsonl", "carried", {"train": "a.jsonl"}),
        ({"train": "a.jsonl"}, "carried", {"train": "a.jsonl"}),
        ({"train": "a.jsonl", "test": "b.jsonl"}, "carried", {"train": "a.jsonl", "eval": "b.jsonl"}),
        ({"test": "b", "validation": "c", "train": "a"}, "not supported", {"train": "a", "eval": "c"}),
        ({"train": ["a", "b"], "test": "c"}, "not supported", {"train": "a", "eval": "c"}),
        (["a.jsonl", "b.jsonl"], "not supported", {"train": "a.jsonl"}),
    ],
)
def test_files_of_load_dataset(files, verdict, writes):
    outcome = UNSLOTH.rules["data_files"](files, {"path": "json", "data_files": files})
    assert outcome.verdict == verdict
    assert dict(outcome.writes) == {f"data.{part}.0.path": file for part, file in writes.items()}
