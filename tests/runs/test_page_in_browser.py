"""The page in a real browser: nothing is fetched, nothing is wrong, and there is something to see."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_cases import DIFFERENCES_SHOWN, MARKUP, SAMPLES_SHOWN, entry, leg, recipe, write_run, write_unlike_runs

from deltatune.runs.folder import read_run
from deltatune.runs.page import page

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium or Chrome; test_page.py has what the page says, not how it looks")
    flags = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    # root has no sandbox
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def look(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the page of some runs; at the end nothing but that page may have been asked for, and nothing said."""
    seen: list[str] = []

    def opening(*folders: Path, **settings: Any) -> Any:
        file = tmp_path / "report.html"
        file.write_text(page([read_run(folder) for folder in folders]), encoding="utf-8")
        tab = browser.new_page(**settings)
        tab.on("request", lambda request: seen.append(request.url))
        tab.on("console", lambda message: seen.append(message.text))
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.on("dialog", lambda dialog: seen.append(dialog.message))
        tab.goto(file.as_uri())
        seen.remove(file.as_uri())
        return tab

    yield opening
    assert seen == []


def sizes(tab: Any, selector: str) -> list[tuple[float, float]]:
    script = "all => all.map(e => e.getBoundingClientRect()).map(box => [box.width, box.height])"
    return [(width, height) for width, height in tab.eval_on_selector_all(selector, script)]


def luminance(color: str) -> float:
    """Of a color of CSS, from 0 to 1, as WCAG 2 has it."""
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_runs_of_every_fate_are_drawn_over_each_other(tmp_path: Path, look: Any) -> None:
    long = [entry(step, 5.0 - step / 200) for step in range(1, 900)]
    held_out = [{"leg": 1, "step": step, "eval_loss": 3.0 - step / 300} for step in range(100, 900, 100)]
    folders = [
        write_run(tmp_path / "long", entries=[*long, *held_out]),
        write_run(tmp_path / "resumed", leg("killed"), leg(from_step=3), entries=[entry(4, 3.0), entry(5, 1.0, leg=2)]),
        write_run(tmp_path / "running", leg("running"), tail='{"leg": 1, "ste'),
        write_run(tmp_path / "empty", leg("failed"), entries=[]),
        write_run(tmp_path / "<script>alert(1)", leg(command=MARKUP), recipe=recipe(run_name=MARKUP), log=MARKUP),
    ]
    tab = look(*folders)
    drawn = sizes(tab, "svg")
    assert len(drawn) == 6
    assert all(width > 300 and height > 100 for width, height in drawn)
    curves = sizes(tab, ".curve path:not(.faint)")
    assert len(curves) == 5 * 3 + 1, "one run has a held-out loss, one has no entry, one a lone point"
    assert all(width > 1 for width, _ in curves)
    falling = sizes(tab, "svg[aria-label^='Loss'] .curve[data-run='0'] path")
    assert all(width > 300 and height > 100 for width, height in falling)
    assert len(falling) == 2, "as logged, and its mean"
    assert sizes(tab, "svg[aria-label^='Loss'] .curve[data-run='3'] path") == [], "there is nothing of an empty run"
    tab.locator("details").last.evaluate("all => all.closest('details.run').open = true")
    assert "<script>alert(1)" in tab.inner_text("body")


def test_pointing_reads_the_values_and_a_box_hides_a_run(tmp_path: Path, look: Any) -> None:
    folders = [
        write_run(tmp_path / name, entries=[entry(1, 5.0 + more), entry(2, 3.0 + more)])
        for name, more in (("a", 0.0), ("b", 0.25))
    ]
    tab = look(*folders)
    chart = tab.locator("svg").first
    chart.hover(position={"x": chart.bounding_box()["width"] - 20, "y": 50})
    assert tab.locator("output").first.inner_text() == "step 2 · a 3 · b 3.25"
    tab.locator("input[data-run='1']").uncheck()
    assert sizes(tab, "svg[aria-label^='Loss'] .curve[data-run='1'] path") == [(0, 0)]
    chart.hover(position={"x": 80, "y": 60})
    assert tab.locator("output").first.inner_text() == "step 1 · a 5"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_it_reads_in_light_and_dark_and_fits_the_window(tmp_path: Path, look: Any, scheme: str, width: int) -> None:
    run = write_run(tmp_path / ("long-name-" * 12))
    tab = look(run, color_scheme=scheme, viewport={"width": width, "height": 800})
    paper = luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.1) == (scheme == "dark")
    for selector in ("h1", "td", "figcaption", ".quiet", "pre"):
        ink = luminance(tab.eval_on_selector(selector, "e => getComputedStyle(e).color"))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 4.5, selector
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def cells_shown(table: Any) -> list[list[str]]:
    """The text of a table's rows as a reader sees it, each of them with room of its own."""
    rows = [row.locator("th, td").all() for row in table.locator("tr").all()]
    assert all(cell.is_visible() for row in rows for cell in row if cell.inner_text())
    return [[cell.inner_text().lstrip() for cell in row] for row in rows]  # a header begins with its run's colour


@pytest.mark.parametrize("width", [390, 1280])
def test_what_differs_and_samples_are_seen_as_text(tmp_path: Path, look: Any, width: int) -> None:
    tab = look(*write_unlike_runs(tmp_path), viewport={"width": width, "height": 800})
    differs = tab.locator("section", has=tab.get_by_role("heading", name="Recipes: what differs"))
    assert cells_shown(differs.locator("table")) == DIFFERENCES_SHOWN
    heading = tab.get_by_role("heading", name="Samples")
    assert not heading.is_visible(), "of several runs the details open on a click"
    tab.locator("details.run > summary").first.click()
    assert heading.is_visible()
    assert cells_shown(heading.locator("xpath=following-sibling::div[1]//table")) == SAMPLES_SHOWN
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # what is wider than the window can be scrolled to, and no cell lies over its neighbour
    for box in tab.locator(".scroll:visible").all():
        inner, outer = box.evaluate("e => [e.scrollWidth, e.clientWidth]")
        assert inner <= outer or box.evaluate("e => getComputedStyle(e).overflowX") == "auto"
        over = "cells => cells.filter(cell => cell.scrollWidth > cell.clientWidth + 1).length"
        assert box.locator("td").evaluate_all(over) == 0
