"""The tables of the documentation, made of the records.

    python -m benchmarks.tables              # rewrites them in README.md, docs/performance.md and parallelism.md
    python -m benchmarks.tables RECORD ...   # prints all that these records hold instead

A table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` of a page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.card import card
from benchmarks.figures import GIB, Steps, newest_full, newest_ops, of_bound, roofline_of, steps_of
from benchmarks.op_cases import CASES
from benchmarks.parallel.figures import scalings
from benchmarks.records import OURS, RECORDS, Record, load_records
from benchmarks.shapes import BASES
from benchmarks.targets import DEVICE, evaluate

__all__ = ["MODELS", "PAGES", "main", "rendered", "with_table"]

_ROOT: Final = Path(__file__).parents[1]
MODELS: Final = ("qwen3.5-2b", "qwen3.5-9b")
_DIRECTIONS: Final = ("forward", "forward+backward")
#: Keys of an op's config that the table shows.
_SIZES: Final = (*"DEHGKNMV", "experts", "top_k", "hidden", "inner")


def speed(records: Sequence[Record]) -> list[str]:
    """Of each model the newest record with a baseline and ours at full depth: what a user chooses between."""
    rows, files = [], []
    for model in MODELS:
        steps = _with_stock(records, model)
        if steps is None:
            continue
        stock = steps.find("stock", "layer")[0]
        shown = [
            ("stock", "layer", "stock, made leak-free"),
            ("stock liger", "layer", "the same with Liger"),
            ("stock as shipped", "layer", "stock as shipped (leaks)"),
            (OURS, "layer", "**deltatune**"),
            (OURS, "none", "**deltatune**"),
        ]
        for system, how, name in shown:
            for result in steps.find(system, how):
                against = f"{stock['median_ms'] / result['median_ms']:.2f}x"
                rows.append([model, name, f"`{how}`", *_step_cells(result), against])
        files.append(steps.record)
    header = ("model", "system", "checkpointing", "ms a step", "tokens a second", "peak GiB", "against stock")
    return [*_markdown(header, rows), "", _sources(files)]


def summary(records: Sequence[Record]) -> list[str]:
    """A row a model of what ``speed`` shows, without what leaks."""
    found = [steps for model in MODELS if (steps := _with_stock(records, model))]
    shown = (("stock", "layer"), ("stock liger", "layer"), (OURS, "layer"), (OURS, "none"))
    rows = [[steps.record.subject, *(_of(steps.find(system, how)) for system, how in shown)] for steps in found]
    header = ("model", "stock, `layer`", "with Liger, `layer`", "deltatune, `layer`", "deltatune, `none`")
    return [*_markdown(header, rows), "", _sources([steps.record for steps in found])]


def memory(records: Sequence[Record]) -> list[str]:
    """What recomputation costs and saves: every setting of ours, and its time over that of none."""
    found = [steps for model in MODELS if (steps := _with_stock(records, model))]
    rows: dict[str, list[str]] = {}
    for index, steps in enumerate(found):
        least = min(r["median_ms"] for r in steps.find(OURS))
        for r in steps.find(OURS):
            taken = f", takes `{r['checkpointing_taken']}`" if r["checkpointing"] == "auto" else ""
            setting = f"`{r['checkpointing']}`{taken}"
            cell = f"{r['median_ms']:.0f} ms ({r['median_ms'] / least - 1:+.0%}), {_gib(r)} GiB"
            rows.setdefault(setting, [setting] + ["-"] * len(found))[index + 1] = cell
    header = ("`checkpointing`", *(steps.record.subject for steps in found))
    return [*_markdown(header, list(rows.values())), "", _sources([steps.record for steps in found])]


def adapters(records: Sequence[Record]) -> list[str]:
    """Adapters on all linears against those on q, k, v and o, in one record."""
    rows, files = [], []
    for model in MODELS:
        both = (s for s in newest_full(records, model, DEVICE) if s.find(OURS, targets="all") and s.find(OURS))
        steps = next(both, None)
        for every in steps.find(OURS, targets="all") if steps else ():
            for few in steps.find(OURS, every["checkpointing"]) if steps else ():
                ratio = f"{every['median_ms'] / few['median_ms']:.3f}x"
                pair = [f"{r['median_ms']:.0f} ms, {_gib(r)} GiB" for r in (few, every)]
                rows.append([model, f"`{every['checkpointing']}`", *pair, ratio])
        files += [steps.record] if steps else []
    header = ("model", "`checkpointing`", "q, k, v, o", "all linears", "step")
    return [*_markdown(header, rows), "", _sources(files)]


def bases(records: Sequence[Record]) -> list[str]:
    """Ours on weights in few bits, and on 16 bits beside them: the newest record of each model and base."""
    rows, files = dict[tuple[str, ...], list[str]](), list[Record]()
    for steps in steps_of(records):
        for base in BASES if steps.full and DEVICE in steps.record.device and steps.config["tokens"] == 16384 else ():
            for r, ratio in steps.over_16_bits(base):
                size = (steps.record.subject, base, str(r["checkpointing"]))
                if size in rows:
                    continue
                files += [steps.record] if steps.record not in files else []
                (plain,) = (_of([one]) for one in steps.find(OURS, r["checkpointing"], "all"))
                about = "yes" if steps.checked else "timed alone"
                rows[size] = [size[0], f"`{base}`", f"`{size[2]}`", plain, _of([r]), f"{1 / ratio:.2f}x", about]
    header = ("model", "base", "checkpointing", "16 bits", "few bits", "speed", "values checked in the same run")
    return [*_markdown(header, [rows[size] for size in sorted(rows)]), "", _sources(files)]


def shapes(records: Sequence[Record]) -> list[str]:
    """Other models and packs, stock with layer checkpointing and ours; fewer layers where it says so."""
    rows, seen = [], set()
    for steps in steps_of(records):
        about = steps.config
        size = (about["model"], about["layers"], about["tokens"], about["documents"])
        stock, ours = steps.find("stock", "layer"), steps.find(OURS)
        if size in seen or not stock or not ours or DEVICE not in steps.record.device:
            continue
        if steps.full and about["model"] in MODELS:
            continue
        seen.add(size)
        cells = [_of(stock), *(_of(steps.find(OURS, how)) for how in ("layer", "none"))]
        depth = f"{about['layers']} of {about['full_layers']}"
        rows.append([about["model"], depth, f"{about['tokens']:,} in {about['documents']}", *cells])
    header = ("model", "layers", "tokens in documents", "stock, `layer`", "ours, `layer`", "ours, `none`")
    return _markdown(header, sorted(rows))


def experts(records: Sequence[Record]) -> list[str]:
    """Mixtures with adapters on all experts, stock with PEFT beside them, and what 8-bit optimizer state would hold."""
    rows, files = {}, {}
    for steps in steps_of(records):
        about = steps.config
        for r in steps.find(OURS, targets="experts"):
            size = (about["model"], about["layers"], about["tokens"], str(r["checkpointing"]))
            if size in rows or not steps.full or DEVICE not in steps.record.device or not _has_wide_moments(about):
                continue
            # two moments of 4 bytes become two of 1
            small = (r["peak_bytes"] - 6 * r["trainable_parameters"]) / GIB
            trained = f"{r['trainable_parameters'] / 1e6:,.0f} M"
            cells = [about["model"], str(about["layers"]), f"{about['tokens']:,}", f"`{r['checkpointing']}`", trained]
            stock = _of(steps.find("stock", r["checkpointing"], targets="experts"))
            rows[size], files[steps.record.path] = [*cells, *_step_cells(r), f"{small:.1f}", stock], steps.record
    header = ("model", "layers", "tokens", "checkpointing", "trained", "ms a step", "tokens a second", "peak GiB",
              "with 8-bit state, by arithmetic", "stock with PEFT")  # fmt: skip
    sources = _sources(list(files.values()), [tokens for _, _, tokens, _ in rows])
    return [*_markdown(header, [rows[size] for size in sorted(rows)]), "", sources]


def bound(records: Sequence[Record]) -> list[str]:
    """The roofline of a step, part by part, and the step."""
    rows: dict[str, list[str]] = {}
    totals = []
    found = [steps for model in MODELS if (steps := _with_stock(records, model))]
    for index, steps in enumerate(found):
        parts = roofline_of(steps, "qkvo") or []
        for part in parts:
            rows.setdefault(part.name, [part.name] + ["-"] * len(found))[index + 1] = f"{part.ms:.1f}"
        total = sum(part.ms for part in parts)
        step = min(r["median_ms"] for r in steps.find(OURS))
        totals.append((f"**{total:.1f}**", f"{step:.1f}", f"{total / step:.0%}"))
    lines = [["**all**"], ["a step, measured"], ["of the roofline"]]
    summary = [[*line, *(total[i] for total in totals)] for i, line in enumerate(lines)]
    return _markdown(("ms", *(steps.record.subject for steps in found)), [*rows.values(), *summary])


def ops(records: Sequence[Record]) -> list[str]:
    """Every op, the newest of each shape: ours, Inductor's, the best of the others that are exact enough."""
    rows = []
    for op in CASES:
        for case in newest_ops([r for r in records if DEVICE in r.device], op):
            # of what has no backward forward alone
            what = next((what for what in reversed(_DIRECTIONS) if case.results(what)), _DIRECTIONS[0])
            auto = case.auto(what)
            if auto is None or case.config["T"] != 16384:
                continue
            sizes = " ".join(f"{k} {v}" for k, v in case.config.items() if k in _SIZES)
            cells = [_pair(case.results, "impl", auto["impl"]), _pair(case.results, "by", "compile")]
            others = [r for r in case.results(what) if r.get("by") in ("stock", "library")]
            exact = [r for r in others if r["status"] == "ok" and r["impl"] != "reference"]
            best = min(exact, key=lambda r: r["median_ms"], default=None)
            name = "-" if best is None else best["impl"]
            cells += [_pair(case.results, "impl", name) + (f" ({name})" if best else "")]
            rows.append([f"`{op}`", sizes, f"`{auto['impl']}`", *cells, f"{of_bound(auto):.0%}"])
    header = ("op", "shape", "`auto`", "ours, ms", "compiled reference, ms", "best other, ms", "of bound")
    return _markdown(header, rows)


def products(records: Sequence[Record]) -> list[str]:
    """A mixture's grouped products one by one, from the newest record that has quack's beside ours."""
    names = ("default", "torch", "quack", "quack, not tuned")
    for record in records:
        if record.kind != "products" or record.device == "cpu":
            continue
        rows, tokens = [], set[int]()
        for config in record.configs:
            times = {r["impl"]: r["median_ms"] for r in config["results"] if r["status"] == "ok"}
            if "quack" in times:
                rows.append([config["config"]["product"], *(f"{times[n]:.3f}" if n in times else "-" for n in names)])
                tokens.add(config["config"]["T"])
        if rows:
            header = ("product, ms", "ours", "torch", "quack, tile tuned", "quack, its default tile")
            return [*_markdown(header, rows), "", _sources([record], tokens)]
    return ["No record has quack's products yet."]


def missed(records: Sequence[Record]) -> list[str]:
    """The targets that are not met."""
    outcomes = evaluate(records)
    rows = [list(o.cells[:3]) for o in outcomes if o.verdict != "met"]
    met = f"{len(outcomes) - len(rows)} of {len(outcomes)} targets are met."
    return [met, "", *_markdown(("not met", "wanted", "figure"), rows)] if rows else [met]


def changes(records: Sequence[Record]) -> list[str]:
    """Two trees in turns, from the newest record of each model that compares them."""
    rows, seen, files = [], set(), []
    for record in records:
        for config in record.configs if record.kind == "compare" and record.complete else ():
            about = config["config"]
            size = (about["model"], about["layers"], about["tokens"], record.device)
            if size in seen or record.device == "cpu" or not config["ratios"]:
                continue
            seen.add(size)
            files.append(record)
            for r in config["ratios"]:
                each = ", ".join(f"{one:.3f}" for one in r["by_round"])
                inside = f"{r['ratio_of_kernels']:.3f}" if r.get("ratio_of_kernels") else ""
                found = (f"{r['ratio']:.3f}", each, inside)
                rows.append([about["model"], str(about["layers"]), record.device, r["name"], *found])
    header = ("model", "layers", "device", "setting", "after / before", "by round", "inside kernels")
    if not rows:
        return ["No record has whole turns of both trees yet."]
    return [*_markdown(header, rows), "", _sources(files, [tokens for _, _, tokens, _ in seen])]


def several(records: Sequence[Record]) -> list[str]:
    """Steps on several GPUs, the newest of each size, and the rate of a GPU against that of one by itself."""
    rows, files = dict[tuple[Any, ...], list[str]](), list[Record]()
    for one in scalings([record for record in records if record.device != "cpu"]):
        about, r = one.config, one.result
        size = (about["model"], about["layers"], r["system"], r["tokens"], r["gpus"], one.record.device)
        if size in rows:
            continue
        files += [one.record] if one.record not in files else []
        alone = "-" if one.one is None else f"{one.one['median_ms']:,.0f}"
        ratio = "-" if one.ratio is None else f"{one.ratio:.1%}" + (f" ({one.note})" if one.note else "")
        exchange = f"{r['exchange_ms'] / r['profiled_step_ms']:.1%}" if r["exchange_ms"] else "-"
        figures = (alone, f"{r['median_ms']:,.0f}", f"{r['tokens_per_second_per_gpu']:,.0f}", ratio, _gib(r), exchange)
        rows[size] = [about["model"], f"`{r['system']}`", f"{r['tokens']:,}", str(r["gpus"]), *figures]
    if not rows:
        return ["No record of several GPUs yet."]
    header = ("model", "system", "tokens", "GPUs", "ms on one", "ms", "tokens a second of each", "against one",
              "peak GiB", "exchange")  # fmt: skip
    names = ", ".join(f"`{record.path.name}`" for record in files)
    devices = ", ".join(dict.fromkeys(record.device for record in files))
    return [
        *_markdown(header, [rows[size] for size in sorted(rows)]),
        "",
        f"{devices}; {names} in `benchmarks/records`.",
    ]


PAGES: Final[Mapping[str, Mapping[str, Callable[[Sequence[Record]], list[str]]]]] = {
    "README.md": {"summary": summary},
    "docs/performance.md": {
        "speed": speed,
        "memory": memory,
        "adapters": adapters,
        "bases": bases,
        "shapes": shapes,
        "experts": experts,
        "card": card,
        "bound": bound,
        "ops": ops,
        "products": products,
        "missed": missed,
        "changes": changes,
    },
    "docs/parallelism.md": {"several": several},
}
"""Page -> the name of a table in it -> what makes it."""


def rendered(page: str, name: str, records: Sequence[Record]) -> str:
    """A page with its tables as the records have them."""
    for table, make in PAGES[name].items():
        if f"<!-- {table}: begin -->" in page:
            page = with_table(page, "\n".join(make(records)), table)
    return page


def with_table(page: str, table: str, name: str) -> str:
    """The page with what stands between two of its marks replaced.

    Raises:
        ValueError: a page without the marks.
    """
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page needs the marks {first} and {last}")
    return f"{before}{first}\n\n{table}\n\n{last}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites the pages, or prints records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", nargs="*", type=Path, help="print these instead")
    args = parser.parse_args(argv)
    for path in args.record:
        sys.stdout.write("\n".join(_printed(json.loads(path.read_text(encoding="utf-8")))) + "\n\n")
    if not args.record:
        records = load_records(RECORDS)
        for name in PAGES:
            path = _ROOT / name
            path.write_text(rendered(path.read_text(encoding="utf-8"), name, records), encoding="utf-8")
    return 0


def _printed(data: Mapping[str, Any]) -> Iterator[str]:
    """A record of any layout for a terminal."""
    yield f"{data['kind']} on {data['device']}, {data['date']}, commit {str(data.get('commit'))[:7]}"
    for config in data["configs"]:
        about = {k: v for k, v in config["config"].items() if not isinstance(v, list) and len(str(v)) < 40}
        yield f"  {', '.join(f'{k} {v}' for k, v in about.items())}"
        for r in config["results"]:
            name = " ".join(filter(None, (r.get("name") or r.get("impl"), r.get("label"), r.get("what"))))
            if r.get("median_ms") is None:
                yield f"    {name:58}{r.get('status')}: {r.get('reason')}"
                continue
            times = " ".join(f"{r[key]:10.3f}" for key in ("median_ms", "p20_ms", "p80_ms"))
            peak = f"{r['peak_bytes'] / 2**20:12.1f} MiB" if r.get("peak_bytes") else ""
            yield f"    {name:58}{times}{peak} {'' if r.get('status', 'ok') == 'ok' else r['status']}"
        checks = config.get("checks") or config.get("gates") or []
        yield f"    {len(checks)} checks, {sum(not check['ok'] for check in checks)} red"
        yield from (f"    {r['name']}: after / before {r['ratio']:.4f}" for r in config.get("ratios", ()))


def _with_stock(records: Sequence[Record], model: str) -> Steps | None:
    """The newest of full depth that has stock and ours at several settings."""
    for steps in newest_full(records, model, DEVICE):
        if steps.find("stock", "layer") and len(steps.find(OURS)) > 1:
            return steps
    return None


def _has_wide_moments(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer is torch's AdamW, whose moments have the dtype of the weights, on float32."""
    return str(config["optimizer"]).startswith("torch.optim.AdamW(") and config["adapter_dtype"] == "float32"


def _step_cells(result: Mapping[str, Any]) -> list[str]:
    return [f"{result['median_ms']:.0f}", f"{result['tokens_per_second']:,.0f}", _gib(result)]


def _gib(result: Mapping[str, Any]) -> str:
    return f"{result['peak_bytes'] / GIB:.1f}" if result.get("peak_bytes") else "-"


def _of(results: Sequence[Mapping[str, Any]]) -> str:
    return f"{results[0]['median_ms']:.0f} ms, {_gib(results[0])} GiB" if results else "-"


def _pair(results: Callable[[str], list[Mapping[str, Any]]], key: str, wanted: str) -> str:
    """Forward, and forward with backward."""
    found = [next((r for r in results(what) if r.get(key) == wanted), None) for what in _DIRECTIONS]
    return " / ".join("-" if r is None else f"{r['median_ms']:.2f}" for r in found) if any(found) else "-"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _sources(records: Sequence[Record], tokens: Collection[int] = (16384,)) -> str:
    """Where a table is from; ``tokens``: the sizes of its packs."""
    packs = " or ".join(str(size) for size in sorted(set(tokens)))
    names = ", ".join(f"`{record.path.name}`" for record in records)
    devices = ", ".join(dict.fromkeys(record.device for record in records))
    return f"{devices}, packs of {packs} tokens; {names} in `benchmarks/records`."


if __name__ == "__main__":
    sys.exit(main())
