import json

import pytest

from deltatune.errors import UserError
from deltatune.importing.read import read_foreign


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.yml", "base_model: m\nlearning_rate: 1", "axolotl"),
        ("l.yaml", "model_name_or_path: m\nstage: sft", "llamafactory"),
        ("t.yaml", "model_name_or_path: m\ndataset_name: d", "trl"),
        ("h.yaml", "model_name_or_path: m\ndataset_mixer: {d: 1}", "trl"),
        ("t.json", '{\n\t"model_name_or_path": "m", "dataset_name": "d", "learning_rate": 2e-4}', "trl"),
        ("l.json", '{"model_name_or_path": "m", "stage": "sft"}', "llamafactory"),
        ("t.sh", "trl sft --model_name_or_path m", "trl"),
        ("u.py", "FastLanguageModel.from_pretrained('m')", "unsloth"),
    ],
)
def test_kind_is_told_by_the_file(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text)
    assert read_foreign(tmp_path / name).table.name == kind


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("both.yaml", "base_model: m\nstage: sft", "more than one fits: axolotl by base_model; llamafactory by stage"),
        ("none.yaml", "learning_rate: 1", "none of their own keys is there"),
        ("ours.yaml", "model: {name_or_path: m}\ndata: {}", "deltatune's own already"),
        ("list.yaml", "- 1", "expected a mapping of keys, got list"),
        ("broken.yaml", "a: [", "broken YAML"),
        ("none.sh", "echo trl", "expected a command line with trl sft"),
        ("none.py", "print(1)", "expected calls of from_pretrained"),
        ("broken.py", "def", "broken Python"),
        ("nothing.py", "\0", "nothing.py: broken Python"),
        ("long.py", "x = " + "+".join("1" * 20_000), "too long to be read"),
        ("deep.ipynb", "[" * 100_000, "expected a notebook"),
        ("deep.json", "[" * 100_000, "broken JSON"),
        ("deep.yaml", "[" * 100_000, "deep.yaml"),
        ("broken.json", '{"a": 1,}', "broken JSON"),
        ("twice.json", '{"stage": "sft", "a": {"b": 1, "b": 2}}', "twice.json: b is given twice"),
        ("list.sh", "trl sft --config list.yaml", "list.yaml: expected a mapping of keys, got list"),
        ("text.sh", "trl sft --config text.yaml", "text.yaml: expected a mapping of keys, got str"),
        ("bytes.sh", "trl sft --config bytes.yaml", "bytes.yaml: expected a text file, got bytes"),
        ("broken.ipynb", "{}", "expected a notebook"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, message):
    for config, content in (("list.yaml", b"- 1"), ("text.yaml", b"text"), ("bytes.yaml", b"\xff\xfe")):
        (tmp_path / config).write_bytes(content)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_foreign(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", '{"stage": "sft"}'), ("a.yaml", "stage: sft"), ("a.py", "FastModel.from_pretrained('m')")],
)
def test_mark_at_the_beginning_is_none_of_the_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    expected = read_foreign(tmp_path / name).settings
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_foreign(tmp_path / name).settings == expected


def test_home_folder_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("stage: sft")
    assert read_foreign("~/a.yaml").settings == {"stage": "sft"}


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_foreign(tmp_path / "a.yaml")


def test_from_decides(tmp_path):
    (tmp_path / "a.yaml").write_text("base_model: m\nstage: sft")
    assert read_foreign(tmp_path / "a.yaml", "axolotl").table.name == "axolotl"


def test_from_must_fit_the_file(tmp_path):
    (tmp_path / "a.py").write_text("FastLanguageModel.from_pretrained('m')")
    with pytest.raises(UserError, match="--from axolotl cannot be"):
        read_foreign(tmp_path / "a.py", "axolotl")


def test_config_of_a_command_line_comes_first(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1\nmax_length: 8")
    (tmp_path / "run.sh").write_text("trl sft --config c.yaml --learning_rate 2")
    assert read_foreign(tmp_path / "run.sh").settings == {"learning_rate": 2, "max_length": 8}


def test_notebook_is_its_code(tmp_path):
    code = ["!pip install x\n", "FastModel.from_pretrained(\n", "    'm')"]
    cells = [
        {"cell_type": "markdown", "source": ["a ("]},
        {"cell_type": "code", "source": ["%%bash\n", "ls ("]},
        {"cell_type": "code", "source": code},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert read_foreign(tmp_path / "n.ipynb").settings["model_name"] == "m"
