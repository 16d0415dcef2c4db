"""What the documentation points to exists, and its code parses."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks.records import load_records
from benchmarks.tables import PAGES as TABLES
from benchmarks.tables import rendered
from deltatune import cli
from deltatune.config.inductor import INDUCTOR_OPTIONS
from deltatune.config.load import load_recipe
from deltatune.demo.checkpoint import save_checkpoint
from deltatune.demo.conversations import make_conversations, write_conversations
from tiny import tiny_conditional

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# pages whose python is run, not only parsed
RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

_LINK = re.compile(r"\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND_LINE = re.compile(r"^(?:\.venv/bin/)?deltatune ([^#\n]+)", re.MULTILINE)
_COMMAND_IN_TEXT = re.compile(r"`deltatune ([^`\n]+)`")
_RECIPE = re.compile(r"\brecipes/[\w.-]+\.yaml")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in _FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_parses(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the names in the docs are files: a small checkpoint and a few conversations, and what comes of it.

    The checkpoint is of a model with images, as Qwen ships it. ``outputs/mine`` and ``outputs/merged`` are those of the
    README's recipe and commands, after one step.
    """
    folder = tmp_path_factory.mktemp("workplace")
    base = folder / "Qwen" / "Qwen3.5-2B"
    conversations = make_conversations(50, seed=0)
    save_checkpoint(base, conversations)
    (base / "model.safetensors").unlink()
    model = tiny_conditional()
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(base)))
    model.save_pretrained(base)
    write_conversations(folder / "data" / "train.jsonl", conversations)
    (folder / "mine.yaml").write_text(blocks(ROOT / "README.md", "yaml")[0], encoding="utf-8")
    on_a_cpu = next(line for line in command_lines(ROOT / "README.md") if "compile=false" in line)
    small = ["training.max_steps=1", "training.use_cpu=true", "training.learning_rate=0.1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*on_a_cpu, *(word for each in small for word in ("--set", each))]) == 0
        assert cli.main(["merge", "outputs/mine", "--output", "outputs/merged"]) == 0
    return folder


# the steps that adding an op or a model takes are code of a checkout
PROGRAMS = [(p.name, i) for p in RUN for i in range(len(blocks(p, "python"))) if not p.name.startswith("adding-")]


@pytest.mark.parametrize(("name", "number"), PROGRAMS)
def test_python_runs(name: str, number: int, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    code = blocks(next(page for page in RUN if page.name == name), "python")[number]
    code = re.sub(r'(?<!from_pretrained\()"outputs/\w+",', r"\g<0> use_cpu=True,", code)
    # the same graphs, without generated code
    code = code.replace("CompileOptions()", 'CompileOptions(backend="aot_eager")')
    (workplace / "program.py").write_text(code, encoding="utf-8")
    made = runpy.run_path("program.py")
    loaded = re.search(r'from_pretrained\("outputs/(mine|merged)"', code)
    if loaded is not None:
        assert_is_what_was_trained(made["model"])


def assert_is_what_was_trained(model: Any) -> None:
    """The logits of the adapter on the class that it was trained on, which are not the base's."""
    base = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen3.5-2B")
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        before, found = (each.eval()(input_ids=ids).logits for each in (base, model))
        expected = PeftModel.from_pretrained(base, "outputs/mine").eval()(input_ids=ids).logits
    assert (expected - before).norm() > 0.05 * before.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_every_program_that_loads_what_was_trained_is_run() -> None:
    run = {blocks(page, "python")[i] for page in RUN for name, i in PROGRAMS if page.name == name}
    every = {
        code for page in PAGES for code in blocks(page, "python") if "outputs/" in code and "from_pretrained" in code
    }
    assert every
    assert every <= run


def test_code_imports_public_names() -> None:
    import deltatune

    imported = {
        alias.name
        for page in PAGES
        for code in blocks(page, "python")
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.module == "deltatune"
        for alias in node.names
    }
    assert imported
    assert imported <= set(deltatune.__all__)


def command_lines(page: Path) -> list[list[str]]:
    """The words after ``deltatune`` in every command line of a page's shell blocks."""
    return [line.split() for code in blocks(page, "bash") for line in _COMMAND_LINE.findall(code)]


def commands() -> Iterator[tuple[str, list[str]]]:
    """The name and arguments of every ``deltatune`` command, in blocks and in sentences."""
    for page in PAGES:
        in_text = _COMMAND_IN_TEXT.findall(page.read_text(encoding="utf-8"))
        for name, *words in command_lines(page) + [line.split() for line in in_text]:
            if name != "--help":
                yield name, words


def choices_of(parser: argparse.ArgumentParser, name: str) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's commands."""
    choices = next(action.choices for action in parser._actions if action.dest == name)
    assert isinstance(choices, dict)
    return choices


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_commands_and_their_options_exist() -> None:
    choices = choices_of(cli._parser(), "command")
    found = list(commands())
    assert {name for name, _ in found} == set(choices), "the docs name every command and no other"
    for name, words in found:
        assert {word for word in words if word.startswith("--")} <= options_of(choices[name]), (name, words)


def test_complete_command_lines_parse() -> None:
    lines = command_lines(ROOT / "README.md")
    assert lines
    for line in lines:
        cli._parser().parse_args(line)


def test_recipes_exist() -> None:
    named = {name for page in PAGES for name in _RECIPE.findall(page.read_text(encoding="utf-8"))}
    assert named
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_the_recipe_in_the_readme_is_valid(tmp_path: Path) -> None:
    recipes = blocks(ROOT / "README.md", "yaml")
    assert recipes
    for text in recipes:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        assert load_recipe(tmp_path / "recipe.yaml").warnings == []


def test_every_compile_option_is_described() -> None:
    text = (ROOT / "docs" / "compile.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", text, re.MULTILINE))
    assert {key: rows.get(key) for key in INDUCTOR_OPTIONS} == INDUCTOR_OPTIONS


def test_the_packages_are_those_of_the_import_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [f"deltatune.{name}" for name in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)] == contract["layers"]


def test_decisions_have_a_number_each() -> None:
    numbers = [path.name[:4] for path in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == [f"{number:04}" for number in range(1, len(numbers) + 1)]


def test_tested_versions_are_those_of_the_environment() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (torch|transformers|peft|trl|triton) \| ([\d.]+)", text, re.MULTILINE))
    pins = dict(
        re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert rows == {name: pins[name] for name in ("torch", "transformers", "peft", "trl", "triton")}


def test_the_lowest_versions_are_those_that_the_package_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    test = [one for one in project["optional-dependencies"]["test"] if one.startswith("trl")]
    named = [*project["dependencies"], *project["optional-dependencies"]["train"], *test]
    floors = dict(re.fullmatch(r"(\w+)>=([\d.]+)(?:,.*)?", one).groups() for one in named)
    lowest = (ROOT / "constraints" / "lowest.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^(\w+)==(\S+)$", lowest, re.MULTILINE))
    assert pins.keys() == floors.keys()
    for name in floors.keys() - {"torch"}:  # the lowest of torch runs on a GPU, see Tested versions
        assert Version(pins[name]) == Version(floors[name]), name


def test_every_family_and_its_experimental_features_are_in_the_readme() -> None:
    from deltatune.models.registry import ANY, FAMILIES

    rows = dict(re.findall(r"^\| `(\w+)` \|(.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    words = {"router_loss": "router loss"}
    for family in (*FAMILIES, ANY):
        experimental = [name for name, text in family.features.items() if text.startswith("experimental: ")]
        assert all(words.get(name, name) in rows[family.name] for name in experimental), family.name
        assert ("experimental" in rows[family.name]) == bool(experimental), family.name
    assert rows.keys() == {family.name for family in (*FAMILIES, ANY)}


def test_every_implementation_of_an_op_is_listed() -> None:
    from deltatune.models.registry import FAMILIES

    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    for op in {op for family in FAMILIES for op in family.ops}:
        row = next(row for row in rows if f"`{op}`" in row)
        providers = importlib.import_module(f"deltatune.ops._{op}.providers")
        spec = getattr(providers, providers.__all__[0])
        assert all(f"`{provider.name}`" in row for provider in spec.providers), op


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_records(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert rendered(page, name, load_records()) == page, "make docs makes them"


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([\w-]+)", "\n".join(code_of(page)))}
    assert named
    assert named <= targets


def code_of(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [*re.findall(r"`(make [^`\n]+)`", text), *blocks(page, "bash")]


#: Words that nobody outside would know, and what is said in their place.
OWN_WORDS = {
    r"doors?|admit(s|ted)?": "resolve packing metadata",
    r"border(s|ed)?": "a weight is a plain contiguous Parameter",
    r"reclass(es|ed)?|g[ai]ves? back|give[sn]? (it|them|\w+s) back": "swap a class, restore",
    r"judges?|laps|races?": "check, samples, timing",
    r"dials?": "memory budget, activation checkpointing",
    r"way (in|out)|honest(ly)?": "what it does",
}


@pytest.mark.parametrize("words", OWN_WORDS)
def test_words_are_those_of_the_field(words: str) -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(rf"\b({words})\b", line, re.IGNORECASE)
    ]
    assert found == [], f"say: {OWN_WORDS[words]}"
