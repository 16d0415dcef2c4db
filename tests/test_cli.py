import os
import subprocess
import sys
import time

import pytest

from deltatune.cli import main
from deltatune.errors import UserError

COMMANDS = ("train", "preprocess", "plan", "verify", "doctor", "merge")


def seconds(*command: str) -> float:
    """The fastest of a few runs: what it takes on a machine that is not busy with something else."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_importing_takes_no_time_and_no_torch() -> None:
    code = "import sys, deltatune; assert not {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)"
    assert seconds(sys.executable, "-c", code) - seconds(sys.executable, "-c", "pass") < 0.3


def test_help_takes_no_time_and_no_torch() -> None:
    code = (
        "import sys\nfrom deltatune.cli import main\n"
        "for words in (['--help'], ['doctor', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "assert not {'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)"
    )
    assert seconds(sys.executable, "-c", code) < 0.5


def test_help_names_every_command(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    page = capsys.readouterr().out
    assert all(f"    {command}" in page for command in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "COMMAND"),
        (["tran"], "tran"),
        (["train"], "RECIPE"),
        (["train", "r.yaml", "--sett", "a=b"], "--sett"),
        (["train", "r.yaml", "--set", "training.max_steps", "3"], "expected KEY=VALUE, such as training.max_steps=100"),
        (["verify", "m", "--lengths", "5"], "at least two lengths"),
        (["preprocess", "r.yaml", "--show", "many"], "a whole number"),
        (["merge", "adapter"], "--output"),
        (["bench"], "invalid choice: 'bench'"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, argv, named) -> None:
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert named in message
    assert message.count("\n") == 1


def test_the_installed_command_reports_in_one_line(tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name_or_path: m\n")
    done = subprocess.run(
        [sys.executable, "-m", "deltatune", "plan", str(recipe)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {recipe}:2: broken YAML")
    assert done.stderr.count("\n") == 1


def command_that_raises(monkeypatch, error: BaseException) -> None:
    class Command:
        @staticmethod
        def run(args):
            raise error

    monkeypatch.setattr("importlib.import_module", lambda name: Command)  # "doctor" reads no recipe


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("two\nlines"), "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x.bin"), "error: [Errno 2] No such file: 'x.bin'\n"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            "error: the package peft is missing: pip install 'deltatune[train]'\n",
        ),
    ],
)
def test_errors_of_users_are_one_line(monkeypatch, capsys, error, message) -> None:
    command_that_raises(monkeypatch, error)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), ValueError("raised by no check of ours"), ModuleNotFoundError("x", name="ours")],
)
def test_errors_of_the_program_keep_their_traceback(monkeypatch, error) -> None:
    command_that_raises(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["doctor"])


@pytest.mark.parametrize("package", ["yaml", "pydantic"])
def test_a_missing_package_is_one_line_with_its_remedy(package) -> None:
    code = (
        f"import sys\nsys.modules[{package!r}] = None\n"
        "from deltatune.cli import main\nsys.exit(main(['plan', 'r.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'deltatune[train]'" in done.stderr


@pytest.mark.parametrize(("given", "said"), [((), "interrupted\n"), (("with words",), "with words\n")])
def test_interrupted(monkeypatch, capsys, given, said) -> None:
    command_that_raises(monkeypatch, KeyboardInterrupt(*given))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == said
    monkeypatch.setenv("RANK", "1")
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "", "rank 0 says it"


def test_a_locale_that_lacks_a_character_ends_no_command(tmp_path) -> None:
    (tmp_path / "läuft").mkdir()
    (tmp_path / "läuft" / "run.json").write_text("{}")
    command = [sys.executable, "-m", "deltatune", "report", str(tmp_path / "läuft")]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"the report is in {tmp_path}/l?uft/report.html".encode() in done.stdout
