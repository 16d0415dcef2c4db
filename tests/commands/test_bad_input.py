"""Whatever is wrong with the input: exit status 2, one line, no traceback, nothing written."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import pytest

from deltatune.cli import main

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}
GOOD = {"messages": [USER, ASSISTANT]}

# rows -> the file named, and what else the line must hold
BAD_ROWS = {
    "empty file": ([], "rows.jsonl"),
    "broken line": ([GOOD, '{"messages": ['], "2"),
    "not an object": ([GOOD, GOOD, "[1]"], "3"),
    "no messages": ([GOOD, {"messages": None}], "messages"),
    "empty conversation": ([GOOD, {"messages": []}], "2"),
    "missing column": ([{"text_": "x"}], "text_"),
    "unknown role": ([{"messages": [{"role": "robot", "content": "x"}, ASSISTANT]}], "robot"),
    "no assistant": ([GOOD, {"messages": [USER]}], "assistant"),
    "too long": ([GOOD, {"messages": [USER, {"role": "assistant", "content": "x" * 500}]}], "tokens_per_batch=128"),
}


@pytest.fixture
def fails(capsys, tmp_path):
    def fails(*argv, status=2):
        capsys.readouterr()  # what building the input printed
        assert main([str(word) for word in argv]) == status
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1, message
        assert "Traceback" not in message
        assert not (tmp_path / "output").exists()
        return message

    return fails


@pytest.mark.parametrize("command", ["preprocess", "train"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(fails, write_recipe, write_rows, tmp_path, case, command) -> None:
    rows, named = BAD_ROWS[case]
    message = fails(command, write_recipe(write_rows(*rows)))
    assert "rows.jsonl" in message
    assert named in message.replace("rows.jsonl", "", 1) or case == "empty file"
    assert not any((tmp_path / "cache").glob("*")) or case == "too long"


@pytest.mark.parametrize(
    "words",
    [
        *(
            f"plan RECIPE --set {key}=~nobody-at-all/x"
            for key in (
                *("model.name_or_path", "model.tokenizer", "model.chat_template", "lora.name_or_path"),
                *("data.train.0.path", "data.cache_dir", "training.output_dir"),
            )
        ),
        "plan ~nobody-at-all/x", "train ~nobody-at-all/x", "preprocess ~nobody-at-all/x",
        "train RECIPE --resume ~nobody-at-all/x", "plan RECIPE --resume ~nobody-at-all/x",
        "preprocess RECIPE --set data.train.0.path=~nobody-at-all/x", "verify ~nobody-at-all/x",
        "merge ~nobody-at-all/x --output m", "merge RUN --output ~nobody-at-all/x",
        "export ~nobody-at-all/x --output m --layout per-expert",
        "report ~nobody-at-all/x", "report RUN --output ~nobody-at-all/x.html",
        "import ~nobody-at-all/x.yaml", "import FOREIGN --output ~nobody-at-all/x",
    ],
)  # fmt: skip
def test_the_home_of_nobody_is_one_line_in_every_path(fails, write_recipe, tmp_path, words) -> None:
    run, foreign = tmp_path / "run", tmp_path / "axolotl.yaml"
    run.mkdir()
    (run / "run.json").write_text('{"legs": []}')
    (run / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/base"}')
    foreign.write_text("base_model: a/b\nmicro_batch_size: 1\nsequence_len: 8\ndatasets: [{path: a.jsonl}]\n")
    places = {"RECIPE": write_recipe(), "RUN": run, "FOREIGN": foreign}
    said = fails(*(places.get(word, word) for word in words.split()))
    assert "~nobody-at-all/x" in said
    assert "there is no user nobody-at-all" in said
    if "--set" in words:
        assert f"{words.split()[-1].partition('=')[0]}: expected a path" in said


def test_a_model_without_a_name_is_one_line(fails) -> None:
    assert "MODEL: name_or_path: expected text that is not empty" in fails("verify", "")


def test_the_path_of_a_recipe_may_begin_at_home(fails, write_recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(write_recipe().parent))
    assert "adamw_torhc is unknown" in fails("plan", "~/recipe.yaml", "--set", "training.optim=adamw_torhc")


@pytest.mark.parametrize("command", ["plan", "preprocess", "train"])
def test_several_bad_rows_are_one_line(fails, write_recipe, write_rows, command) -> None:
    other = {"messages": [{"role": "robot", "content": "x"}, ASSISTANT]}
    message = fails(command, write_recipe(write_rows(GOOD, {"messages": []}, other, GOOD, "[1]", {"messages": []})))
    assert "rows.jsonl: 4 of 6 rows cannot be trained on: line 2 (also line 6): messages is empty" in message
    assert "line 3: messages[0] has the unknown role 'robot'" in message
    assert "; line 5 " in message
    assert message.endswith("; data.on_bad_row: drop leaves such rows out\n")


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"prompt": "x", "completion": ""}, {"format": "prompt_completion"}),
        ({"text": ""}, {"format": "text"}),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, {"format": "chat", "columns": {"messages": "m"}}),
    ],
)
def test_samples_without_labels_and_missing_columns(fails, write_recipe, write_rows, row, source) -> None:
    path = write_rows(row)
    assert "rows.jsonl" in fails("train", write_recipe(data={"train": [{"path": str(path), **source}]}))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.r=100000000", r"the first save needs .* [GT]iB, and .*, or lower the ranks of adapters \(lora\.r, "),
        ("lora={r: 1000000000, init_lora_weights: mica}", "the first save needs "),
        ("lora={r: 1000000000, use_dora: true}", "the first save needs "),
        ("packing.tokens_per_batch=100000000000000", "tokens_per_batch: expected a number below 2147483648"),
        ("data.train.0.repeat=1000000000", "an epoch would take 3,000,000,000 documents"),
        ("parallel.shard=100000000", "parallel.shard: expected 'auto' or a number of at most 1048576"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_numbers_beyond_sense(fails, write_recipe, write_rows, monkeypatch, command, word, message) -> None:
    usage = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=2**36))
    monkeypatch.setattr("deltatune.training.space.shutil", usage)
    begin = time.perf_counter()
    said = fails(command, write_recipe(write_rows(GOOD, GOOD, GOOD)), "--set", word)
    assert re.search(message, said), said
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize("command", ["plan", "train"])
def test_adapters_that_no_device_holds(fails, write_recipe, write_rows, monkeypatch, command) -> None:
    monkeypatch.setattr("deltatune.training.planned.device_memory", lambda _: 2**20)
    said = fails(command, write_recipe(write_rows(GOOD, GOOD, GOOD)), "--set", "lora.r=4000")
    assert "lora: adapters and what trains beside them take " in said
    assert "lower lora.r" in said


def test_no_such_data(fails, write_recipe, tmp_path) -> None:
    assert "nothing.jsonl" in fails("train", write_recipe(data={"train": [{"path": str(tmp_path / "nothing.jsonl")}]}))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainin.max_steps=3", "did you mean training?"),
        ("training.maximum_steps=3", "did you mean max_steps?"),
        ("training.optim=adamv", "adamv"),
        ("training.lr_scheduler_type=cosin", "cosin"),
        ("lora.target_modules=[q_prj]", "q_proj"),
        ("checkpointing=0.5", "compile"),
        ("kernels={gated_delta_rule: flash_qla}", "flash_qla"),
        ("kernels={gated_delta_rule: fast}", "fast"),
        ("compile={options: {shape_paddin: true}}", "shape_padding"),
        ("model.name_or_path=/no/such/folder", "/no/such/folder"),
        ("packing.tokens_per_batch=0", "at least 2"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_bad_settings(fails, write_recipe, command, override, named) -> None:
    assert named in fails(command, write_recipe(), "--set", override)


@pytest.mark.parametrize("command", ["plan", "preprocess"])
def test_an_unknown_training_name_is_named_where_it_stands(fails, write_recipe, command) -> None:
    path = write_recipe()
    assert fails(command, path, "--set", "training.lr=3").startswith("error: --set training.lr=3: training.lr: unknown")
    path.write_text(path.read_text().replace("training:", "training:\n  lr: 3", 1))
    line = path.read_text().split("\n").index("  lr: 3") + 1
    assert f"{path}:{line}: training.lr: unknown (did you mean learning_rate?)" in fails(command, path)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_ranks_of_a_pack_are_checked_before_rows_are_read(fails, write_recipe, write_rows, command) -> None:
    rows = write_rows(*[GOOD] * 1000, {"messages": 3})  # after those that are looked at first
    assert "rows.jsonl, line 1001" in fails(command, write_recipe(rows))
    assert "set sequence to one of 1, 2" in fails(command, write_recipe(rows), "--set", "parallel.sequence=64")


def test_no_recipe(fails, tmp_path) -> None:
    assert "no such recipe" in fails("train", tmp_path / "nothing.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "the recipe is empty" in fails("plan", tmp_path / "empty.yaml")


def test_nothing_to_resume(fails, write_recipe) -> None:
    assert "resume" in fails("train", write_recipe(), "--resume")


def test_a_change_is_allowed_to_a_run_that_goes_on(fails, write_recipe) -> None:
    assert "--allow-change cannot act without --resume" in fails("train", write_recipe(), "--allow-change")


@pytest.mark.parametrize("command", ["verify", "train", "plan"])
def test_a_folder_that_is_no_checkpoint(fails, write_recipe, tmp_path, command) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments = [folder] if command == "verify" else [write_recipe(model={"name_or_path": str(folder)})]
    assert "config.json" in fails(command, *arguments)


@pytest.mark.parametrize("command", ["verify", "train", "plan"])
def test_an_unsupported_model(fails, write_recipe, checkpoint, tmp_path, command) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path / "mamba"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)
    sections = {"model": {"name_or_path": str(folder)}, "lora": None}
    arguments = [folder] if command == "verify" else [write_recipe(**sections)]
    assert "Mamba" in fails(command, *arguments)


def test_an_unknown_model_type(fails, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    assert "unheard_of" in fails("verify", tmp_path)


def test_a_device_that_is_not_there(fails, checkpoint) -> None:
    assert "--device" in fails("verify", checkpoint, "--device", "cuda:63")
    assert "--device" in fails("verify", checkpoint, "--device", "abacus")


def test_merging_what_is_no_adapter(fails, checkpoint, tmp_path) -> None:
    assert "adapter" in fails("merge", checkpoint, "--output", tmp_path / "output")


def test_debug_shows_where(capsys, tmp_path) -> None:
    assert main(["train", str(tmp_path / "nothing.yaml"), "--debug"]) == 2
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.splitlines()[-1].startswith("error: ")
