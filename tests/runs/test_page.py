"""Pages of runs of every fate, of several at once, and of text that would be HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_cases import DIFFERENCES_SHOWN, SAMPLES_SHOWN, entry, leg, recipe, write_run, write_unlike_runs

from deltatune.config.rewards import REWARDS
from deltatune.runs.compare import differences
from deltatune.runs.folder import read_run
from deltatune.runs.page import page

HOSTILE = """</script></style><script>alert(1)</script><img src="https://x.example/a.png" onerror='alert(2)'>"""


class Tables(HTMLParser):
    """The tables of a page, by the heading before each, as rows of texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._heading, self._text = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("h1", "h2", "h3", "th", "td"):
            self._text = ""
        if tag == "table":
            self.found[self._heading] = []
        if tag == "tr":
            self.found[self._heading].append([])

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "h2", "h3"):
            self._heading = self._text
        if tag in ("th", "td"):
            self.found[self._heading][-1].append(self._text.strip() if tag == "th" else self._text)


def page_of(*folders: Path) -> str:
    return page([read_run(folder) for folder in folders])


@pytest.mark.parametrize("status", ["finished", "interrupted", "failed", "killed", "running"])
def test_a_run_of_any_fate_has_a_page(tmp_path: Path, status: str) -> None:
    html = page_of(write_run(tmp_path, leg(status, reason="no room"), tail='{"leg": 1'))
    assert html.count("<figure>") == 5
    assert f"<td>{status}" in html
    assert ("last heard of" in html) == (status == "running")


def test_a_run_without_a_log_entry_has_one_too(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path, leg("failed", first_loss=None, last_loss=None, tokens=None), entries=[]))
    assert "There is no log entry yet." in html
    assert "<svg" not in html


@pytest.mark.parametrize("kept", ["run.json", "run.jsonl", "config.yaml", "report.json"])
def test_one_file_of_a_run_is_enough(tmp_path: Path, kept: str) -> None:
    folder = write_run(tmp_path)
    for path in folder.iterdir():
        if path.name != kept:
            path.unlink()
    assert page_of(folder).startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("junk", [3, "x", None, [1], {"a": {"b": []}}], ids=str)
def test_records_that_hold_something_else_make_no_traceback(tmp_path: Path, junk: Any) -> None:
    report = dict.fromkeys(("prepare", "data", "memory_estimate", "verify", "predicted_peak_bytes"), junk)
    broken = {name: junk for name in leg() if name != "status"}
    folder = write_run(tmp_path, {"status": "killed", **broken}, report=report, recipe={"lora": junk})
    assert "killed" in page_of(folder)
    nested = {"prepare": {"compile": {"graphs": junk, "breaks": junk}, "kernels": [junk, {"op": junk}]}}
    data = {"data": {"train": {"remarks": junk, "fill": junk}}, "verify": {"rows": [{"ok": 1}], "notes": junk}}
    assert "killed" in page_of(write_run(tmp_path, leg("killed"), report={**nested, **data}))


def test_text_from_files_is_never_markup(tmp_path: Path) -> None:
    entries = [entry(1, 2.0), entry(2, HOSTILE), entry(3, 1.0)]
    legs = leg(command=HOSTILE, changes=[HOSTILE], device=HOSTILE, data={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE})
    report = {"prepare": {"kernels": [{"op": HOSTILE, "reason": HOSTILE}]}, "data": {"train": {"remarks": [HOSTILE]}}}
    given = {"report": report, "recipe": recipe(run_name=HOSTILE), "log": HOSTILE, "entries": entries}
    html = page_of(write_run(tmp_path / "<script>alert(3)", legs, **given), write_run(tmp_path / "b&b", legs))
    assert html.count("<script>") == html.count("</script>") == 1
    assert html.count("</style>") == 1
    assert "<img" not in html
    assert "&lt;script&gt;alert(3)" in html
    assert re.findall(r"(?:src|href)=[\"'](?!data:)", html) == []


DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))


def test_control_characters_are_shown_and_never_raw(tmp_path: Path) -> None:
    controls = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160), *DIRECTIONS]))
    folder = write_run(tmp_path, leg(device=controls), log=f"\x1b[2Jlog{controls}")
    sample = {"step": 1, "completion": f"a\tb\n\x1b]0;<i>\x07{controls}"}
    (folder / "samples.jsonl").write_text(json.dumps(sample))
    html = page_of(folder)
    assert not set(controls) & set(html)
    assert r"\x1b[2Jlog" in html
    assert r"\u202e" in html
    assert "a\tb\n\\x1b]0;&lt;i&gt;\\x07" in html


def test_recipes_are_compared_by_what_differs() -> None:
    first = recipe(learning_rate=0.1, seed=1)
    second = {**recipe(learning_rate=0.2, seed=1), "compile": {"scope": "layer"}}
    second["training"]["output_dir"] = "elsewhere"
    assert differences([first, second]) == [("training.learning_rate", "0.1", "0.2"), ("compile.scope", "-", "layer")]
    assert differences([first, first]) == []


def test_what_differs_and_samples_are_tables_of_text(tmp_path: Path) -> None:
    """As test_page_in_browser.py sees them."""
    html = page_of(*write_unlike_runs(tmp_path))
    tables = Tables(html).found
    assert tables["Recipes: what differs"] == DIFFERENCES_SHOWN
    assert tables["Samples"] == SAMPLES_SHOWN
    assert html.count("<script>") == 1
    assert "<img" not in html


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", recipe=recipe(learning_rate=0.5))
    html = page_of(one, two)
    assert html.count("<figure>") == 5
    assert html.count('<g class="curve') == 10
    assert html.index("learning_rate") < html.index('<details class="run">'), "what differs stands before the details"
    assert "Recipes: what differs" not in page_of(one)


def test_a_run_on_pairs_has_curves_of_its_rewards(tmp_path: Path) -> None:
    figures = {"rewards/accuracies": 0.75, "rewards/margins": 0.5, "logps/chosen": -12.0, "logps/rejected": -14.0}
    html = page_of(write_run(tmp_path, entries=[{**entry(step, 2.0), **figures} for step in (1, 2)]))
    assert html.count("<figure>") == 5 + len(figures)
    for title in ("pairs in the right order", "chosen answer over", "ability of the chosen", "ability of the rejected"):
        assert title in html
    assert figures.keys() < set(REWARDS), "by the names that are logged"


def test_updates_that_were_left_out_are_named(tmp_path: Path) -> None:
    skipped = {"leg": 1, "step": 2, "skipped": "the loss is nan at step 2", "rows": ["rows.jsonl:7"]}
    html = page_of(write_run(tmp_path, entries=[entry(1, 2.0), skipped, entry(3, 1.0)]))
    assert "<h3>Updates that were left out</h3>" in html
    assert "<td>2</td><td>the loss is nan at step 2</td>" in html
    assert "Updates that were left out" not in page_of(write_run(tmp_path / "other"))


def test_the_log_is_shown_from_its_end(tmp_path: Path) -> None:
    log = "".join(f"line {number}\n" for number in range(1000))
    html = page_of(write_run(tmp_path, log=log))
    assert "(600 lines before)\nline 600\n" in html
    assert "line 999" in html
