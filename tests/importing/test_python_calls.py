from pathlib import Path

import pytest

from deltatune.importing.python_calls import calls_in
from deltatune.importing.read import read_foreign
from deltatune.importing.recipe import convert
from deltatune.importing.unsloth import settings_of_script
from deltatune.importing.values import NotLiteral


def arguments(source):
    return next(call.named for call in calls_in(Path("s.py"), source) if call.name == "f")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("f(a=-1, b=[1, 'x'])", {"a": -1, "b": [1, "x"]}),
        ("n = 3\nf(a=n)", {"a": 3}),
        ("f(a=torch.bfloat16)", {"a": "bfloat16"}),
        ("c = {'r': 8}\nf(a=c['r'])", {"a": 8}),
        ("c = {'r': 8}\nf(**c)", {"r": 8}),
        ("f(a=g())", {"a": NotLiteral("g()")}),
        ("n = 4096\nf(a=128 * 2, b=n // 2)", {"a": 256, "b": 2048}),
        ("f(a=1 // 0, b='x' * 2)", {"a": NotLiteral("1 // 0"), "b": NotLiteral("'x' * 2")}),
        ("n = 'x'\nf(a={'train': n}, b=[n, (n,)])", {"a": {"train": "x"}, "b": ["x", ("x",)]}),
        ("f(a={**g()}, b=[n])", {"a": NotLiteral("{**g()}"), "b": NotLiteral("[n]")}),
        ("n = 3\nn = 4\nf(a=n)", {"a": NotLiteral("n")}),
        ("for n in (1, 2):\n    f(a=n)", {"a": NotLiteral("n")}),
        ("n = 1\nn += 1\nf(a=n)", {"a": NotLiteral("n")}),
        ("def g(n):\n    f(a=n)", {"a": NotLiteral("n")}),
    ],
)
def test_arguments(source, expected):
    assert arguments(source) == expected


def test_a_parameter_hides_a_constant():
    assert arguments("n = 1\ndef g(n):\n    f(a=n)") == {"a": NotLiteral("n")}


def test_calls_that_never_run_are_passed_over():
    assert [call.name for call in calls_in(Path("s.py"), "if False:\n    f()\nelse:\n    g()")] == ["g"]


def test_nothing_is_run(tmp_path):
    source = f"open({str(tmp_path / 'made')!r}, 'w')\nFastModel.from_pretrained('m')"
    settings_of_script(Path("s.py"), source)
    assert not (tmp_path / "made").exists()


def test_a_later_call_wins_and_the_earlier_is_kept():
    source = "FastModel.from_pretrained('m', max_seq_length=1)\nSFTTrainer(max_seq_length=2)"
    found = settings_of_script(Path("s.py"), source)
    assert (found["max_seq_length"], found["from_pretrained.max_seq_length"]) == (2, 1)


def test_a_call_in_a_helper_gives_way_to_one_outside():
    source = "def reload():\n    FastModel.from_pretrained('merged')\nFastModel.from_pretrained('m')"
    found = settings_of_script(Path("s.py"), source)
    assert (found["model_name"], "from_pretrained (line 2)" in found) == ("m", True)
    alone = "def main():\n    FastModel.from_pretrained('m')\nSFTConfig(seed=1)"
    assert settings_of_script(Path("s.py"), alone)["model_name"] == "m"


def test_arguments_by_place_are_read_or_named():
    found = settings_of_script(Path("s.py"), "SFTTrainer(m, a, None, rows, None, 'more')")
    assert found["train_dataset"] == NotLiteral("rows")
    assert found["SFTTrainer, argument 6"] == "more"


@pytest.mark.parametrize("name", ["SFTTrainer", "GRPOTrainer"])
def test_further_trainers_are_named(name):
    found = settings_of_script(Path("s.py"), f"SFTTrainer(packing=True)\n{name}(beta=1)")
    assert list(found) == ["packing", f"{name} (line 2)"]


def test_the_trainers_model_may_be_a_name():
    assert settings_of_script(Path("s.py"), "SFTTrainer('owner/m')\nSFTConfig()")["model_name"] == "owner/m"
    assert "model_name" not in settings_of_script(Path("s.py"), "SFTTrainer(model)\nSFTConfig()")


@pytest.mark.parametrize(
    ("call", "verdict", "why"),
    [
        ("model.save_pretrained('lora')", "no effect here", "training.output_dir"),
        ("trainer.save_model()", "no effect here", "training.output_dir"),
        ("model.save_pretrained_merged('m', tokenizer, save_method='merged_16bit')", "not supported", "merge"),
        ("model.push_to_hub_merged('o/m', tokenizer)", "not supported", "merge"),
        ("model.save_pretrained_gguf('m', tokenizer, quantization_method='q4_k_m')", "not supported", "convert_hf_to"),
        ("model.push_to_hub('o/m')", "not supported", "training.push_to_hub"),
    ],
)
def test_what_becomes_of_the_model_is_told(tmp_path, call, verdict, why):
    (tmp_path / "s.py").write_text(f"FastModel.from_pretrained('m')\nif False: model.save_pretrained('x')\n{call}")
    rows = {row.key: row.outcome for row in convert(read_foreign(tmp_path / "s.py")).rows}
    told = [outcome for key, outcome in rows.items() if key.endswith("(line 3)")]
    assert [outcome.verdict for outcome in told] == [verdict]
    assert why in told[0].why
    assert not any(key.endswith("(line 2)") for key in rows)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SFTTrainer", "a recipe is one run: the first such call is taken"),
        ("DPOTrainer", "a recipe is one run: the first such call is taken"),
        ("GRPOTrainer", "supervised fine-tuning, DPO and ORPO alone"),
    ],
)
def test_why_a_further_trainer_is_left_out(tmp_path, name, why):
    (tmp_path / "s.py").write_text(f"FastModel.from_pretrained('m')\nSFTTrainer(packing=True)\n{name}(args=a)")
    rows = {row.key: row.outcome for row in convert(read_foreign(tmp_path / "s.py")).rows}
    assert rows[f"{name} (line 3)"].why == why
