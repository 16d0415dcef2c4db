import subprocess
import sys

import pytest

from deltatune.cli import main


@pytest.fixture
def finished(write_recipe, tmp_path):
    assert main(["train", str(write_recipe())]) == 0
    return tmp_path / "output"


def test_the_page_of_a_run_is_written_beside_its_record_without_torch(finished, capsys) -> None:
    command = f"import sys; from deltatune.cli import main; main(['report', {str(finished)!r}]); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    report, modules = said.splitlines()
    assert report == f"the report is in {finished / 'report.html'}"
    assert not {"torch", "transformers"} & set(modules.split())
    html = (finished / "report.html").read_text()
    for heading in ("Legs", "Data and packing", "Kernels", "Memory of a device", "Independence of documents"):
        assert f"<h3>{heading}</h3>" in html
    assert "deltatune" in html


def test_folders_that_hold_no_run_are_one_line(tmp_path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "run.json").write_text("{")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "no" / "page.html")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error.split(":")[0] for error in errors] == ["error"] * 3
    assert "holds no run" in errors[0]
    assert "there is no folder" in errors[2]


def test_what_cannot_be_read_is_said(tmp_path, capsys) -> None:
    (tmp_path / "run.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 0
    assert "run.json is not whole" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main(["report", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert f"is a folder; name a file, such as {tmp_path / 'report.html'}\n" in capsys.readouterr().err
    (tmp_path / "report.html").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path), "--output", str(tmp_path / ("n" * 300))]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error.split(":")[0] for error in errors] == ["error", "error"]
    assert errors[1].endswith("cannot be written: File name too long; choose another file with --output")


def test_a_page_takes_the_place_of_a_page_alone(tmp_path, capsys) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "run.json")]) == 2
    assert "run.json is there and no page; name a new file" in capsys.readouterr().err
    assert (tmp_path / "run.json").read_text() == "{}"
    assert [main(["report", str(tmp_path)]) for _ in range(2)] == [0, 0]


def test_names_of_files_may_hold_any_bytes(tmp_path) -> None:
    (tmp_path / "run.json").write_text(r'{"legs": [{"command": "train caf\udce9.yaml"}]}')
    assert main(["report", str(tmp_path)]) == 0
    assert r"train caf\udce9.yaml" in (tmp_path / "report.html").read_text()


def test_a_file_is_not_told_its_own_name(tmp_path, capsys) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "row.jsonl").touch()
    assert main(["report", str(tmp_path / "rows.jsonl")]) == 2
    assert capsys.readouterr().err.endswith("; did you mean row.jsonl?\n")
