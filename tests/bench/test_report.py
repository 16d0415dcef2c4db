"""Pages made from made-up records."""

from __future__ import annotations

import pytest
from record_cases import failed, op_record, op_result, step, training_record, write

from deltatune.bench import report
from deltatune.cli import main


def rows_of(page: str) -> dict[str, list[str]]:
    """First cell -> the others, of every table row."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A working directory with the two pages and no records."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text(
        "before\n<!-- records: begin -->\nold\n<!-- records: end -->\nafter\n", encoding="utf-8"
    )
    (tmp_path / "README.md").write_text("read\n<!-- speed: begin -->\n<!-- speed: end -->\nme\n", encoding="utf-8")
    return tmp_path


def a_step_record(**more):
    results = [
        step("stock as shipped", "layer", 700, 7.9),
        step("stock", "layer", 540, 7.5),
        step("deltatune", "none", 250, 32),
        step("deltatune", "auto", 251, 32, checkpointing_taken="none"),
        failed("stock compiled", "none", "timeout", "not compiled | after 300 s"),
    ]
    return training_record(results, **more)


def a_profile():
    return {
        "name": "deltatune none qkvo",
        "targets": "qkvo",
        "step_ms": 250.0,
        "busy_ms": 240.0,
        "groups": [
            {"group": "copy", "ms": 10.0, "launches": 5, "floor_ms": None},
            {"group": "GEMM", "ms": 180.0, "launches": 300, "floor_ms": 150.0},
        ],
        "rows": [
            {"kernel": "Memcpy DtoD", "op": None, "group": "copy", "ms": 10.0, "launches": 5},
            {"kernel": "nvjet_sm90", "op": None, "group": "GEMM", "ms": 180.0, "launches": 300},
            # a group of its own once, by the name of today another one
            {"kernel": "_powers", "op": None, "group": "other", "ms": 20.0, "launches": 8},
        ],
    }


@pytest.mark.parametrize(
    ("dirty", "says"), [(None, "commit c0ffee1;"), (True, "commit c0ffee1 with changes that are not in it;")]
)
def test_a_page_says_which_source_was_measured(tmp_path, dirty, says) -> None:
    write(tmp_path, "train.json", a_step_record() | {"commit": "c0ffee1234", "dirty": dirty})
    assert says in report.render(tmp_path)


def test_a_record_of_an_op_becomes_a_table(tmp_path) -> None:
    results = [
        op_result("triton", "forward", 0.8),
        op_result("triton", "forward+backward", 0.5),
        {"impl": "FLA", "by": "library", "what": "forward", "status": "unavailable", "reason": "No module"},
        {"impl": "FLA", "by": "library", "what": "forward+backward", "status": "unavailable", "reason": "No module"},
    ]
    path = write(tmp_path, "causal_conv-h200-2026-01-02.json", op_record("causal_conv", [({"T": 64, "D": 8}, results)]))
    page = report.render(tmp_path)
    assert f"`{path.as_posix()}`" in page
    assert "### ops/causal_conv: NVIDIA H200, 2026-01-02" in page
    assert "T 64, D 8. Copy 4.00 TB/s; `auto` takes `triton`. Allowed error: twice 1.7e-03." in page
    rows = rows_of(page)
    assert rows["triton"] == ["1.250 (1.000 to 2.000)", "80%", "2.000 (1.000 to 2.000)", "50%", "1024", "1.7e-03", ""]
    assert rows["FLA"][-1] == "unavailable: No module"


def test_a_record_without_floors_has_no_columns_for_them(tmp_path) -> None:
    plain = {"impl": "fla", "what": "forward", "median_ms": 1.5, "p20_ms": 1.4, "p80_ms": 1.6}
    record = op_record("gated_delta_rule", [({"T": 64}, [plain])])
    for key in ("auto", "ceilings"):
        del record["configs"][0][key]
    del record["schema"], record["subject"]
    write(tmp_path, "gated_delta_rule-h200-2026-01-02.json", record)
    page = report.render(tmp_path)
    assert rows_of(page)["fla"] == ["1.500 (1.400 to 1.600)"]
    assert "of floor" not in page


def test_a_training_record_becomes_a_table(tmp_path) -> None:
    record = a_step_record()
    record["configs"][0] |= {
        "gates": [
            {"name": "token losses", "subject": "deltatune none qkvo", "ok": True, "figure": 1e-3, "limit": 2e-3},
            {"name": "no host sync", "subject": "deltatune none qkvo", "ok": False, "detail": "item() in the loss"},
        ],
        "floor": {"targets": "qkvo", "total_ms": 200.0, "groups": {"gemm": 150.0, "delta rule": 50.0}, "parts": []},
        "kernels": [a_profile()],
    }
    write(tmp_path, "train-qwen3.5-2b-h200-2026-01-02.json", record)
    page = report.render(tmp_path)
    rows = rows_of(page)
    assert rows["deltatune none qkvo"] == ["250.0 (249.0 to 251.0)", "65,536", "32.0", "80.0%", "40.0%", "30.0", ""]
    assert rows["deltatune auto qkvo"][-1] == "takes none"
    assert "timeout: not compiled \\| after 300 s" in page
    assert "Arithmetic floor, adapters on qkvo: 200.0 ms (gemm 150.0, delta rule 50.0)." in page
    assert "kernels run for 240.0 of 250.0 ms" in page
    assert page.index("| GEMM | 180.0 | 300 | 150.0 |") < page.index("| copy | 10.0 | 5 | - |")
    assert "| cross-entropy | 20.0 | 8 | - |" in page
    assert "2 gates, 1 red:\n\n- deltatune none qkvo: no host sync: item() in the loss" in page


def test_each_choice_of_targets_has_a_table_of_kernels_and_the_floor_only_its_own(tmp_path) -> None:
    without = [group | {"floor_ms": None} for group in a_profile()["groups"]]
    other = a_profile() | {"name": "deltatune none all", "targets": "all", "step_ms": 260.0, "groups": without}
    record = a_step_record()
    record["configs"][0]["kernels"] = [a_profile(), other]
    write(tmp_path, "train.json", record)
    page = report.render(tmp_path)
    first, _, second = page.partition("Where the time of deltatune none all goes (kernels run for 240.0 of 260.0 ms)")
    assert "Where the time of deltatune none qkvo goes (kernels run for 240.0 of 250.0 ms)" in first
    assert "| GEMM | 180.0 | 300 | 150.0 |" in first
    assert "floor, ms" not in second
    assert "| GEMM | 180.0 | 300 |" in second


def test_what_adapters_on_all_linears_add_is_told_by_parts(tmp_path) -> None:
    ours = [step("deltatune", "none", 250, 32), step("deltatune", "none", 280, 40, targets="all")]
    record = training_record([result | {"lora": "auto"} for result in ours])
    names = [result["name"] for result in record["configs"][0]["results"]]
    narrow = {"kernel": "nvjet_sm90_tst_64x128_64x8_NNN", "op": None, "group": "GEMM", "ms": 4.0, "launches": 9}
    wide = {"kernel": "nvjet_sm90_tst_256x128_64x4_NNT", "op": None, "group": "GEMM", "ms": 180.0, "launches": 9}
    own = {"kernel": "_parts", "op": "lora_up_backward", "group": "GEMM", "ms": 3.0, "launches": 9}
    activation = {"kernel": "_write_extended", "op": "lora_gated_act", "group": "GEMM", "ms": 2.5, "launches": 9}
    few, every = a_profile() | {"name": names[0]}, a_profile() | {"name": names[1], "targets": "all"}
    peft = step("deltatune", "none", 300, 40, targets="all", lora="stock", name="deltatune none all stock")
    record["configs"][0]["results"].append(peft)
    few["rows"], every["rows"] = [wide], [wide | {"ms": 190.0}, narrow, own, activation]
    record["configs"][0]["kernels"] = [few]
    write(tmp_path, "train.json", record)
    assert "Adapters on all linears beside" not in report.render(tmp_path)
    record["configs"][0]["kernels"] = [few, every, every | {"name": peft["name"]}]
    write(tmp_path, "train.json", record)
    page = report.render(tmp_path)
    assert "| | none: q, k, v, o | none: all | none: more |".replace("| |", "|  |") in page
    rows = rows_of(page.partition("Adapters on all linears beside")[2])
    assert rows["wide products"] == ["180.0", "190.0", "+10.0"]
    assert rows["narrow products"] == ["0.0", "7.0", "+7.0"]
    assert rows["norm and elementwise"] == ["0.0", "2.5", "+2.5"]
    assert rows["all kernels"] == ["180.0", "199.5", "+19.5"]


@pytest.mark.parametrize(("kernels", "tables"), [(a_profile(), 1), (None, 0), ([], 0)])
def test_a_record_may_hold_one_table_of_kernels_or_none(tmp_path, kernels, tables) -> None:
    record = a_step_record()
    record["configs"][0]["kernels"] = kernels
    write(tmp_path, "train.json", record)
    assert report.render(tmp_path).count("Where the time of") == tables


def test_the_newest_record_is_shown_and_the_others_are_named(tmp_path) -> None:
    write(tmp_path, "train-qwen3.5-2b-h200-2026-01-02.json", a_step_record())
    write(tmp_path, "train-qwen3.5-2b-h200-2026-01-02-2.json", a_step_record())
    page = report.render(tmp_path)
    shown, _, earlier = page.partition("### Earlier records")
    assert "2026-01-02-2.json`;" in shown
    assert "2026-01-02.json`" not in shown
    assert "2026-01-02.json`" in earlier


def shown(folder) -> list[str]:
    """Names of the records whose tables a page has."""
    page = report.render(folder).partition("### Earlier records")[0]
    return [path.name for path in sorted(folder.glob("*.json")) if f"{path.name}`;" in page]


def test_a_record_of_other_systems_is_no_newer_version(tmp_path) -> None:
    ours, theirs = step("deltatune", "none", 250, 32), step("stock", "layer", 540, 7.5)
    write(tmp_path, "train-x-h200-2026-01-02.json", training_record([ours, theirs]))
    write(tmp_path, "train-x-h200-2026-01-02-2.json", training_record([ours]))
    assert len(shown(tmp_path)) == 2
    write(tmp_path, "train-x-h200-2026-01-02-3.json", training_record([theirs]))
    assert shown(tmp_path) == ["train-x-h200-2026-01-02-2.json", "train-x-h200-2026-01-02-3.json"]


def test_a_frontier_makes_up_for_a_run_of_its_systems_and_not_the_other_way_round(tmp_path) -> None:
    results = [step("deltatune", "none", 250, 32), step("deltatune", "layer", 300, 8)]
    write(tmp_path, "train-x-h200-2026-01-02.json", training_record(results[:1]))
    write(tmp_path, "frontier-x-h200-2026-01-03.json", training_record(results, kind="frontier", date="2026-01-03"))
    assert shown(tmp_path) == ["frontier-x-h200-2026-01-03.json"]
    write(tmp_path, "train-x-h200-2026-01-04.json", training_record(results, date="2026-01-04"))
    assert shown(tmp_path) == ["frontier-x-h200-2026-01-03.json", "train-x-h200-2026-01-04.json"]


def test_a_failure_is_made_up_for_by_what_ran(tmp_path) -> None:
    ran, lost = step("deltatune", "none", 250, 32), failed("deltatune", "layer", "out_of_memory", "no room")
    write(tmp_path, "train-x-h200-2026-01-02.json", training_record([ran, lost]))
    write(tmp_path, "train-x-h200-2026-01-03.json", training_record([ran], date="2026-01-03"))
    assert shown(tmp_path) == ["train-x-h200-2026-01-03.json"]


def test_an_op_at_another_shape_is_no_newer_version(tmp_path) -> None:
    results = [op_result("triton", "forward", 0.8)]
    for number, width in ((1, 8), (2, 16), (3, 8)):
        name = f"causal_conv-h200-2026-01-0{number}.json"
        record = op_record("causal_conv", [({"T": 64, "D": width}, results)]) | {"date": f"2026-01-0{number}"}
        write(tmp_path, name, record)
    assert shown(tmp_path) == ["causal_conv-h200-2026-01-02.json", "causal_conv-h200-2026-01-03.json"]


def test_the_pages_are_rewritten_between_their_marks(checkout) -> None:
    write(checkout / "bench" / "records", "train-qwen3.5-2b-h200-2026-01-02.json", a_step_record())
    assert main(["bench", "report", "--no-plots"]) == 0
    page = (checkout / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page.startswith("before\n<!-- records: begin -->\n")
    assert page.endswith("<!-- records: end -->\nafter\n")
    assert "old" not in page
    rows = rows_of((checkout / "README.md").read_text(encoding="utf-8"))
    assert rows["qwen3.5-2b"] == ["deltatune auto qkvo", "251", "65,275", "32.0", "2.15x"]
    first = page
    assert report.main(["--no-plots"]) == 0
    assert (checkout / "docs" / "performance.md").read_text(encoding="utf-8") == first, "once is enough"


@pytest.mark.parametrize("folder", ["bench/records", "nowhere"])
def test_no_records_empty_no_page(checkout, capsys, folder) -> None:
    before = (checkout / "docs" / "performance.md").read_text(encoding="utf-8")
    assert main(["bench", "report", "--no-plots", "--records", folder]) == 2
    assert f"error: {folder} holds no records" in capsys.readouterr().err
    assert (checkout / "docs" / "performance.md").read_text(encoding="utf-8") == before


@pytest.mark.parametrize("record", [a_step_record(tokens=4096), {**a_step_record(), "device": "cpu: x86_64"}])
def test_the_readme_shows_no_other_figures(checkout, record) -> None:
    before = (checkout / "README.md").read_text(encoding="utf-8")
    write(checkout / "bench" / "records", "train-qwen3.5-2b-2026-01-02.json", record)
    assert main(["bench", "report", "--no-plots"]) == 0
    assert (checkout / "README.md").read_text(encoding="utf-8") == before


def test_elsewhere_it_says_where_to_go(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "report"]) == 2
    assert "run this in a checkout" in capsys.readouterr().err


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the marks"):
        report.with_tables("no marks", "tables")
