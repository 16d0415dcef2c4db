import re

import pytest

from deltatune.cli import main


def test_preprocess_reports_and_shows_trained_tokens(capsys, write_recipe, tmp_path) -> None:
    assert main(["preprocess", str(write_recipe()), "--show", "2"]) == 0
    page = capsys.readouterr().out
    assert "train: 24 rows -> 24 documents" in page
    assert "6 packs of 128 tokens" in page
    assert page.count("\nsample ") == 2
    assert len(re.findall(r"assistant\n«\d+<\|im_end\|>»", page)) == 2
    assert not (tmp_path / "output").exists()


def test_preprocess_shows_pairs(capsys, write_recipe, pairs) -> None:
    assert main(["preprocess", str(write_recipe(pairs, preference={})), "--show", "4"]) == 0
    page = capsys.readouterr().out
    assert "train: 12 rows -> 12 pairs" in page
    shown = re.findall(r"\npair (\d), (chosen|rejected): .*\n(.*)\n.*\n.*\n«(.*)<\|im_end\|>»", page)
    assert [place for *place, _, _ in shown] == [["1", "chosen"], ["1", "rejected"], ["2", "chosen"], ["2", "rejected"]]
    assert [answer[0] for *_, answer in shown] == ["y", "n", "y", "n"]


@pytest.mark.parametrize(("choice", "colored"), [("always", True), ("never", False), ("auto", False)])
def test_color_is_for_terminals_unless_asked_for(capsys, write_recipe, choice, colored) -> None:
    assert main(["preprocess", str(write_recipe()), "--show", "1", "--color", choice]) == 0
    assert ("\x1b[" in capsys.readouterr().out) is colored


def test_preprocess_packs_evaluation_data_too(capsys, write_recipe, write_rows) -> None:
    rows = write_rows({"text": "held out"}, name="eval.jsonl")
    recipe = write_recipe()
    assert main(["preprocess", str(recipe), "--set", f"data.eval.0.path={rows}"]) == 0
    assert "eval: 1 row -> 1 document," in capsys.readouterr().out


def test_a_misspelt_training_name_stops_it(capsys, write_recipe) -> None:
    assert main(["preprocess", str(write_recipe()), "--set", "training.adam_bta1=0.8"]) == 2
    assert "did you mean adam_beta1?" in capsys.readouterr().err
