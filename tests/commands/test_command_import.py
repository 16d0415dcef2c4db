import subprocess
import sys

import pytest

from deltatune.cli import main
from deltatune.config.load import load_recipe

TEXT = "base_model: owner/model\nlearning_rate: 1e-4\nadapter: lora\nload_in_8bit: true\ndatasets:\n  - path: d.jsonl\n"


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs.yml"
    path.write_text(TEXT)
    return path


def test_recipe_on_the_output_and_table_on_the_error_output(theirs, tmp_path, capsys):
    assert main(["import", str(theirs)]) == 0
    out, err = capsys.readouterr()
    (tmp_path / "recipe.yaml").write_text(out)
    assert load_recipe(tmp_path / "recipe.yaml").recipe.model.name_or_path == "owner/model"
    assert "5 keys: 4 carried, 0 changed, 1 not supported, 0 no effect here, 0 unknown" in err


def test_recipe_names_what_is_left_out(theirs, capsys):
    main(["import", str(theirs)])
    left_out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# left out: ")]
    assert [line.split(": ")[1] for line in left_out] == ["load_in_8bit"]


def test_recipe_in_a_new_file_and_table_on_the_output(theirs, tmp_path, capsys):
    assert main(["import", str(theirs), "--output", str(tmp_path / "ours.yaml")]) == 0
    out, err = capsys.readouterr()
    assert load_recipe(tmp_path / "ours.yaml").recipe.training.learning_rate == 1e-4
    assert ("load_in_8bit" in out, err) == (True, "")


def test_a_file_is_never_overwritten(theirs, tmp_path, capsys):
    (tmp_path / "ours.yaml").write_text("mine")
    assert main(["import", str(theirs), "--output", str(tmp_path / "ours.yaml")]) == 2
    assert (tmp_path / "ours.yaml").read_text() == "mine"
    assert "expects a new file" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(theirs, tmp_path, capsys):
    output = tmp_path / "none" / "ours.yaml"
    assert main(["import", str(theirs), "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"error: --output {output}: there is no folder {output.parent}\n"


def test_further_commands_of_a_script_are_not_supported(tmp_path, capsys):
    (tmp_path / "run.sh").write_text("trl sft --model_name_or_path m --dataset_name d\ntrl dpo --model_name_or_path n")
    assert main(["import", str(tmp_path / "run.sh")]) == 0
    out, _ = capsys.readouterr()
    assert "# left out: trl dpo (command 2): a recipe is one run" in out


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys):
    assert main(["import", str(tmp_path / "none.yml")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_torch_is_not_loaded(theirs):
    code = (
        "import sys; from deltatune.cli import main; "
        f"status = main(['import', {str(theirs)!r}]); sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
