"""Training on pairs of answers: what other projects' files become, and rows that they are for."""

import json

import pytest
import yaml

from deltatune.config.load import load_recipe, parse_recipe
from deltatune.data.formats import resolve_format
from deltatune.data.pairs import read_pair
from deltatune.importing.read import read_foreign
from deltatune.importing.recipe import convert

AXOLOTL = """
base_model: m
rl: {rl}
datasets:
  - path: pairs.jsonl
    type: {type}
    field_chosen: better
    field_rejected: worse
sequence_len: 1024
micro_batch_size: 2
"""
LLAMA_FACTORY = """
model_name_or_path: m
stage: dpo
finetuning_type: full
pref_loss: {loss}
dataset: mine
cutoff_len: 1024
per_device_train_batch_size: 1
"""


def imported(tmp_path, text, name="theirs.yaml"):
    """The recipe, and the rows of the table by key."""
    file = tmp_path / name
    file.write_text(text)
    found = convert(read_foreign(file))
    return yaml.safe_load(found.text), {row.key: row.outcome for row in found.rows}


@pytest.mark.parametrize(
    ("rl", "extra", "expected"),
    [
        ("dpo", "rl_beta: 0.2\ndpo_label_smoothing: 0.1\n", {"loss": "dpo", "beta": 0.2, "label_smoothing": 0.1}),
        ("ipo", "", {"loss": "ipo"}),
        ("orpo", "orpo_alpha: 0.05\nsimpo_gamma: 3\n", {"loss": "orpo", "beta": 0.05}),
        ("simpo", "rl_beta: 2\nsimpo_gamma: 1.5\ncpo_alpha: 0\n", {"loss": "simpo", "beta": 2.0, "gamma": 1.5}),
        ("simpo", "", {"loss": "simpo", "beta": 0.1, "gamma": 0.5}),
    ],
)
def test_axolotls_losses(tmp_path, rl, extra, expected):
    recipe, rows = imported(tmp_path, AXOLOTL.format(rl=rl, type="chat_template.default") + extra)
    assert recipe["preference"] == expected
    source = {"path": "pairs.jsonl", "format": "preference"}
    assert recipe["data"]["train"] == [
        {**source, "columns": {"prompt": "messages", "chosen": "better", "rejected": "worse"}}
    ]
    assert recipe["packing"]["tokens_per_batch"] == 2 * 2 * 1024
    # TRL adds the likelihood of the chosen answer to simpo unless it is told not to
    assert rows["rl"].verdict == ("changed" if rl == "simpo" and not extra else "carried")


def test_other_ways_to_train_on_answers_are_refused(tmp_path):
    recipe, rows = imported(tmp_path, AXOLOTL.format(rl="kto", type="chat_template") + "rl_beta: 0.2\n")
    assert "preference" not in recipe
    assert (rows["rl"].verdict, rows["rl_beta"].verdict) == ("not supported", "no effect here")
    _, rows = imported(tmp_path, AXOLOTL.format(rl="dpo", type="zephyr.nectar"))
    assert rows["datasets.0.type"].verdict == "not supported"


@pytest.mark.parametrize(
    ("strategy", "row"),
    [
        ("chatml.intel", {"system": "", "question": "Sky?", "chosen": "Blue", "rejected": "Green"}),
        ("llama3.prompt_pairs", {"prompt": "Sky?", "chosen": "Blue", "rejected": "Green"}),
        (
            "chatml.ultra",
            {
                "prompt": "Sky?",
                "chosen": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue"}],
                "rejected": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Green"}],
            },
        ),
    ],
)
def test_axolotls_strategies_read_the_rows_that_they_are_for(tmp_path, strategy, row):
    text = AXOLOTL.format(rl="dpo", type=strategy).replace("    field_chosen: better\n    field_rejected: worse\n", "")
    recipe, _ = imported(tmp_path, text)
    source = recipe["data"]["train"][0]
    layout = resolve_format(source["format"], row, source.get("columns", {}), "x")
    chosen, rejected = read_pair(row, layout, "line 1")
    said = [[message["content"] for message in side.messages] for side in (chosen, rejected)]
    assert said == [["Sky?", "Blue"], ["Sky?", "Green"]]
    assert chosen.messages[0]["role"] == "user"


@pytest.mark.parametrize(
    ("loss", "extra", "expected"),
    [
        ("sigmoid", "pref_beta: 0.2\n", {"loss": "dpo", "beta": 0.2}),
        ("simpo", "simpo_gamma: 0.7\n", {"loss": "simpo", "gamma": 0.7, "beta": 0.1}),
        ("orpo", "pref_ftx: 0.5\n", {"loss": "orpo", "beta": 0.1}),
    ],
)
@pytest.mark.parametrize("formatting", ["sharegpt", "alpaca"])
def test_llama_factorys_pairs(tmp_path, loss, extra, expected, formatting):
    columns = {"chosen": "good", "rejected": "bad"}
    columns |= {"messages": "talk"} if formatting == "sharegpt" else {"prompt": "ask", "query": "about"}
    entry = {"file_name": "pairs.json", "formatting": formatting, "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    recipe, rows = imported(tmp_path, LLAMA_FACTORY.format(loss=loss) + extra)
    assert recipe["preference"] == expected
    assert recipe["packing"]["tokens_per_batch"] == 2 * 1024
    if "pref_ftx" in extra:
        assert rows["pref_ftx"].verdict == "not supported"
    source = recipe["data"]["train"][0]
    said = {"sharegpt": {"talk": [{"from": "human", "value": "Sky?"}]}, "alpaca": {"ask": "Sky?", "about": ""}}
    answers = [{"from": "gpt", "value": text} if formatting == "sharegpt" else text for text in ("Blue", "Green")]
    row = {**said[formatting], "good": answers[0], "bad": answers[1]}
    layout = resolve_format(
        source["format"], row, source["columns"], "x", message_fields=source.get("message_fields", {})
    )
    chosen, _ = read_pair(row, layout, "line 1")
    assert [message["content"] for message in chosen.messages] == ["Sky?", "Blue"]


def test_llama_factorys_other_stages_read_no_loss_over_pairs(tmp_path):
    recipe, rows = imported(tmp_path, LLAMA_FACTORY.format(loss="sigmoid").replace("stage: dpo", "stage: sft"))
    assert "preference" not in recipe
    assert rows["pref_loss"].verdict == "no effect here"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.sh", "trl dpo --model_name_or_path m --dataset_name d --max_length 512 --beta 0.3"),
        ("theirs.yaml", "model_name_or_path: m\ndataset_name: d\nmax_length: 512\nbeta: 0.3\n"),
        ("other.yaml", "model_name_or_path: m\ndataset_name: d\nmax_length: 512\nbeta: 0.3\nloss_type: [sigmoid]\n"),
    ],
)
def test_trls_dpo(tmp_path, name, text):
    recipe, _ = imported(tmp_path, text, name)
    assert recipe["preference"] == {"loss": "dpo", "beta": 0.3}
    assert recipe["training"]["learning_rate"] == 1e-6
    assert "train_on" not in recipe["data"]
    assert recipe["packing"]["tokens_per_batch"] == 8 * 2 * 512


@pytest.mark.parametrize(
    ("trainer", "config", "expected"),
    [
        ("ORPO", "beta=0.2", {"loss": "orpo", "beta": 0.2}),
        ("DPO", "beta=0.2", {"loss": "dpo", "beta": 0.2}),
        ("DPO", "loss_type='ipo'", {"loss": "ipo"}),
    ],
)
@pytest.mark.parametrize("model", ["FastModel", "AutoModelForCausalLM"])
def test_trainers_of_pairs_in_scripts(tmp_path, trainer, config, expected, model):
    text = (
        f"model = {model}.from_pretrained('m', max_seq_length=2048)\nPatch{trainer}Trainer()\n"
        f"{trainer}Trainer(model, train_dataset=d, args={trainer}Config({config}, max_length=512))"
    )
    recipe, rows = imported(tmp_path, text, "theirs.py")
    assert recipe["preference"] == expected
    assert recipe["data"]["max_length"] == 512
    assert recipe["packing"]["tokens_per_batch"] == (4 if model == "FastModel" else 8) * 2 * 512
    assert recipe["training"].get("learning_rate") == (None if model == "FastModel" else 1e-6)
    assert not any(key.startswith("Patch") for key in rows)


def test_what_is_written_loads(tmp_path):
    text = AXOLOTL.format(rl="dpo", type="chat_template.default") + "train_on_inputs: true\n"
    recipe, rows = imported(tmp_path, text)
    assert rows["train_on_inputs"].verdict == "not supported", "answers alone are compared"
    file = tmp_path / "ours.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert load_recipe(file).recipe.preference is not None
    assert parse_recipe(yaml.safe_dump(recipe), "recipe").recipe.preference.loss == "dpo"


@pytest.mark.parametrize(
    ("when", "strategy"),
    [
        ("", "epoch"),
        ("evals_per_epoch: null\n", "epoch"),
        ("eval_steps: 5\n", "steps"),
        ("eval_strategy: 'no'\n", "no"),
    ],
)
def test_axolotl_evaluates_once_an_epoch_where_nothing_says_when(tmp_path, when, strategy):
    text = AXOLOTL.format(rl="dpo", type="chat_template.default") + f"val_set_size: 0.1\n{when}"
    recipe, _ = imported(tmp_path, f"{text}early_stopping_patience: 2\n" if strategy != "no" else text)
    assert recipe["training"].get("eval_strategy", "no") == strategy
    assert recipe["training"].get("early_stopping_patience") == (None if strategy == "no" else 2)


def test_axolotl_evaluates_nothing_without_held_out_data(tmp_path):
    recipe, _ = imported(tmp_path, AXOLOTL.format(rl="dpo", type="chat_template.default"))
    assert "eval_strategy" not in recipe["training"]
