"""One small file of each project, written for this test, and the recipe that it becomes."""

import json

import pytest
import yaml

from deltatune.config.load import load_recipe
from deltatune.importing.read import read_foreign
from deltatune.importing.recipe import convert

AXOLOTL = """
base_model: Qwen/Qwen3-0.6B
chat_template: qwen3
datasets:
  - path: data/talks.jsonl
    ds_type: json
    type: chat_template
    split: train
    field_messages: dialogue
    message_property_mappings: {role: speaker, content: text}
    roles: {assistant: [bot], user: [visitor]}
    roles_to_train: [gpt, assistant]
val_set_size: 0.05
dataset_prepared_path: prepared
output_dir: ./outputs/talks
adapter: lora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 2048
sample_packing: true
micro_batch_size: 4
gradient_accumulation_steps: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: "2e-4"
warmup_ratio: 0.1
evals_per_epoch: 1
saves_per_epoch: 4
bf16: auto
flash_attention: true
gradient_checkpointing: true
special_tokens: {pad_token: <|end|>}
deepspeed:
"""
OF_AXOLOTL = """
model:
  {name_or_path: Qwen/Qwen3-0.6B, chat_template: qwen3, special_tokens: {pad_token: <|end|>}, dtype: bfloat16}
data:
  train:
    - path: data/talks.jsonl
      format: chat
      columns: {messages: dialogue}
      message_fields: {role: speaker, content: text}
  roles: {bot: assistant, visitor: user}
  train_on: assistant
  val_size: 0.05
  cache_dir: prepared
  max_length: 2048
  overlong: drop
packing: {tokens_per_batch: 8192}
lora: {r: 8, lora_alpha: 16, lora_dropout: 0.05, target_modules: all-linear}
checkpointing: layer
training:
  output_dir: ./outputs/talks
  gradient_accumulation_steps: 2
  num_train_epochs: 2
  optim: adamw_bnb_8bit
  lr_scheduler_type: cosine
  learning_rate: 0.0002
  warmup_steps: 0.1
  eval_strategy: epoch
  save_strategy: steps
  save_steps: 0.125
"""

LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-0.6B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: talks,lessons
template: qwen3
max_samples: 500
cutoff_len: 1024
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
plot_loss: true
output_dir: saves/talks
"""
DATASET_INFO = {
    "talks": {
        "file_name": "talks.json",
        "formatting": "sharegpt",
        "columns": {"messages": "dialogue"},
        "tags": {"role_tag": "speaker", "content_tag": "text", "user_tag": "visitor", "assistant_tag": "gpt"},
    },
    "lessons": {"hf_hub_url": "school/lessons", "columns": {"prompt": "question", "response": "answer"}},
}
OF_LLAMA_FACTORY = """
model: {name_or_path: Qwen/Qwen3-0.6B, chat_template: qwen3, dtype: bfloat16}
data:
  train:
    - path: FOLDER/talks.json
      format: chat
      columns: {messages: dialogue}
      message_fields: {role: speaker, content: text}
      limit: 500
    - path: school/lessons
      format: alpaca
      columns: {instruction: question, output: answer}
      limit: 500
  roles: {visitor: user}
  max_length: 1024
  overlong: truncate
packing: {tokens_per_batch: 2048}
lora: {r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}
checkpointing: layer
training:
  output_dir: saves/talks
  gradient_accumulation_steps: 8
  learning_rate: 0.0001
  num_train_epochs: 3.0
  lr_scheduler_type: cosine
  warmup_steps: 0.1
"""

TRL = """
#!/bin/bash
export MODEL=Qwen/Qwen3-0.6B
# LENGTH=4096
accelerate launch --num_processes 2 trl/scripts/sft.py \\
    --model_name_or_path $MODEL \\
    --dataset_name owner/talks --dtype bfloat16 \\
    --max_length 2048 --packing --packing_strategy wrapped \\
    --per_device_train_batch_size 2 --learning_rate=1e-5 \\
    --assistant_only_loss --eval_strategy steps --eval_steps 50 \\
    --use_peft --lora_target_modules q_proj v_proj \\
    --output_dir out > log.txt
"""
OF_TRL = """
model: {name_or_path: Qwen/Qwen3-0.6B, dtype: bfloat16}
data:
  train: [{path: owner/talks}]
  eval: [{path: owner/talks, split: test}]
  train_on: assistant
  max_length: 2048
  overlong: split
packing: {tokens_per_batch: 4096}
lora: {r: 16, lora_alpha: 32, lora_dropout: 0.05, target_modules: [q_proj, v_proj]}
checkpointing: layer
training: {learning_rate: 0.00001, eval_strategy: steps, eval_steps: 50, output_dir: out}
"""

UNSLOTH = """
!pip install unsloth
from unsloth import FastLanguageModel
max_seq_length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="unsloth/Qwen3-0.6B-unsloth-bnb-4bit", max_seq_length=max_seq_length, dtype=None, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64, target_modules=["q_proj", "lm_head"],
    use_gradient_checkpointing="unsloth", random_state=3407)
tokenizer = get_chat_template(tokenizer, chat_template="qwen3")
data = load_dataset("owner/talks", split="train[:1000]").map(render)
trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=data,
    args=SFTConfig(per_device_train_batch_size=2, max_steps=60, learning_rate=2e-4, optim="adamw_8bit",
        output_dir=folder, bf16=is_bfloat16_supported(), report_to="none"))
trainer = train_on_responses_only(trainer)
if False:
    FastLanguageModel.from_pretrained(model_name="trained")
"""
OF_UNSLOTH = """
model: {name_or_path: unsloth/Qwen3-0.6B, dtype: bfloat16, chat_template: qwen3, quantization: {type: nf4}}
data:
  train: [{path: owner/talks, split: "train[:1000]"}]
  train_on: assistant
  max_length: 2048
  overlong: truncate
packing: {tokens_per_batch: 4096}
lora: {r: 32, lora_alpha: 64, target_modules: [q_proj], modules_to_save: [lm_head]}
checkpointing: layer
activation_offloading: true
training:
  max_steps: 60
  learning_rate: 0.0002
  optim: adamw_8bit
  report_to: none
  # what Unsloth takes where a script says nothing
  gradient_accumulation_steps: 2
  weight_decay: 0.01
  seed: 3407
  logging_steps: 1
"""


@pytest.fixture
def imported(tmp_path):
    def read(name, text):
        (tmp_path / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
        (tmp_path / name).write_text(text)
        return convert(read_foreign(tmp_path / name))

    return read


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("axolotl.yml", AXOLOTL, OF_AXOLOTL),
        ("llamafactory.yaml", LLAMA_FACTORY, OF_LLAMA_FACTORY),
        ("run.sh", TRL, OF_TRL),
        ("unsloth.py", UNSLOTH, OF_UNSLOTH),
    ],
)
def test_recipe(imported, tmp_path, name, text, expected):
    assert yaml.safe_load(imported(name, text).text) == yaml.safe_load(expected.replace("FOLDER", str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yml", AXOLOTL), ("l.yaml", LLAMA_FACTORY), ("t.sh", TRL), ("u.py", UNSLOTH), ("empty.sh", "trl sft --bf16")],
)
def test_recipe_loads(imported, tmp_path, name, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(imported(name, text).text)
    assert load_recipe(path).recipe.data.train


@pytest.mark.parametrize(
    ("name", "text", "keys"),
    [("a.yml", AXOLOTL, set()), ("l.yaml", LLAMA_FACTORY, set()), ("u.py", UNSLOTH, {"output_dir"})],
)
def test_what_is_not_supported(imported, name, text, keys):
    rows = imported(name, text).rows
    assert {row.key for row in rows if row.outcome.verdict == "not supported"} == keys


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", {"type": "nf4"}),
        (", load_in_4bit=False", None),
        (", load_in_8bit=True", None),
        (", load_in_16bit=True", None),
    ],
)
def test_what_a_script_of_unsloth_says_nothing_of_is_in_4_bits(imported, given, found):
    text = UNSLOTH.replace(", load_in_4bit=True", given).replace("-unsloth-bnb-4bit", "")
    assert yaml.safe_load(imported("u.py", text).text)["model"].get("quantization") == found


@pytest.mark.parametrize(
    ("given", "found"), [("", {"type": "nf4"}), (", load_in_4bit=False", None), (", load_in_16bit=True", None)]
)
def test_bits_of_unsloth_are_load_in_4bit_s_and_not_the_name_s(imported, given, found):
    text = UNSLOTH.replace(", load_in_4bit=True", given)
    assert yaml.safe_load(imported("u.py", text).text)["model"].get("quantization") == found


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("FastLanguageModel.from_pretrained('o/m')", {"type": "nf4"}),
        ("FastLanguageModel.from_pretrained('o/m', quantization_config=BitsAndBytesConfig(load_in_8bit=True))", None),
        ("AutoModelForCausalLM.from_pretrained('o/m')", None),
    ],
)
def test_what_a_trainer_adapts_is_in_4_bits_where_unsloth_loads_it(imported, given, found):
    text = f"import unsloth\nmodel = {given}\nconfig = LoraConfig(r=8)\n"
    assert yaml.safe_load(imported("u.py", text).text)["model"].get("quantization") == found


def test_what_another_key_leaves_without_effect_is_taken_out(imported):
    settings = {"optimizer": "adafactor", "adam_beta2": 0.95, "lr_scheduler": "constant", "warmup_steps": 10}
    changed = yaml.safe_dump(yaml.safe_load(AXOLOTL) | settings)
    given = imported("a.yml", changed)
    found = {row.key: row.outcome for row in given.rows}
    for key, beside in (("adam_beta2", "optim: adafactor"), ("warmup_steps", "lr_scheduler_type: constant")):
        assert found[key].verdict == "no effect here"
        assert f"has no effect with training.{beside}" in found[key].why
        assert key not in yaml.safe_load(given.text)["training"]


def test_every_key_has_a_row(imported):
    rows = [row.key for row in imported("a.yml", AXOLOTL).rows if row.given]
    settings = yaml.safe_load(AXOLOTL)
    expected = [key for key in settings if key != "datasets"] + [f"datasets.0.{key}" for key in settings["datasets"][0]]
    assert sorted(rows) == sorted(expected)


def test_unknown_key_is_named(imported):
    found = {row.key: row.outcome for row in imported("a.yml", AXOLOTL + "sequence_length: 8\n").rows}
    assert found["sequence_length"].verdict == "unknown"


def test_nothing_in_the_file_is_filled_in_openly(imported):
    missing = [row for row in imported("t.sh", "trl sft --bf16").rows if "fill it in" in row.outcome.why]
    assert [row.key for row in missing] == ["model.name_or_path", "data.train.0.path"]


def test_what_does_not_load_is_taken_out_with_its_reason(imported):
    found = imported("t.sh", "trl sft --dataset_name owner/talks --lora_r 8 --weight_decay -1")
    row = next(row for row in found.rows if row.key == "weight_decay")
    assert (row.outcome.verdict, "weight_decay" in found.text) == ("not supported", False)
    assert "expected a number of at least 0.0, got -1" in row.outcome.why


def test_what_a_finding_begins_with_is_taken_out(imported):
    found = imported("t.sh", "trl sft --save_strategy epoch --save_steps 9")
    assert yaml.safe_load(found.text)["training"]["save_strategy"] == "epoch"
    row = next(row for row in found.rows if row.key == "save_steps")
    assert row.outcome.verdict == "not supported"


def test_a_url_is_no_data(imported):
    found = imported("t.sh", "trl sft --dataset_name https://some.where/rows.csv")
    row = next(row for row in found.rows if row.key == "dataset_name")
    assert (row.outcome.verdict, "download it" in row.outcome.why) == ("not supported", True)
    assert yaml.safe_load(found.text)["data"]["train"] == [{"path": "YOUR-DATA.jsonl"}]


@pytest.mark.parametrize("key", ["save_steps", "saves_per_epoch", "other"])
def test_axolotl_saves_once_an_epoch_where_nothing_says_when(imported, key):
    found = imported("a.yml", f"base_model: m\n{key}:\n")
    assert yaml.safe_load(found.text)["training"]["save_strategy"] == "epoch"


def test_two_keys_for_one_of_ours(imported):
    text = "trl sft --model_name_or_path a --model_name b"
    found = imported("t.sh", text)
    row = next(row for row in found.rows if row.key == "model_name")
    assert row.outcome.verdict == "not supported"
    assert yaml.safe_load(found.text)["model"]["name_or_path"] == "a"


def test_what_a_script_computes_is_never_written(imported):
    found = imported("u.py", "FastModel.get_peft_model(m, exclude_modules=choose())\nSFTTrainer()")
    row = next(row for row in found.rows if row.key == "exclude_modules")
    assert (row.outcome.verdict, row.outcome.why) == ("not supported", "no literal: the script computes choose()")


def test_a_default_gives_way_to_the_file(imported):
    found = imported("t.sh", "trl sft --completion_only_loss true")
    assert yaml.safe_load(found.text)["data"]["train_on"] == "assistant"


def test_adapter_of_peft_has_pefts_defaults(imported):
    text = "model = get_peft_model(model, LoraConfig(lora_dropout=0.1))\nSFTTrainer(model='owner/m', train_dataset=d)"
    section = yaml.safe_load(imported("p.py", text).text)["lora"]
    assert section == {"lora_dropout": 0.1, "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def test_adapter_of_trl_has_pefts_targets(imported):
    assert yaml.safe_load(imported("t.sh", "trl sft --use_peft").text)["lora"]["target_modules"] == ["q_proj", "v_proj"]


def test_a_value_that_another_key_reads_is_blamed_on_its_own(imported):
    text = "base_model: m/m\ndatasets: [{path: a.jsonl, type: chat_template}]\nsequence_len: 1e400\n"
    rows = {row.key: row.outcome for row in imported("a.yml", f"{text}micro_batch_size: 1e26\n").rows}
    assert rows["micro_batch_size"].why == "sequence_len: expected a number, got Infinity"
    assert rows["sequence_len"].why == "expected a number, got Infinity"
