"""What a run's page tells besides curves: tables and texts, each under a title."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from deltatune.config.yaml_text import dump_yaml
from deltatune.runs import words
from deltatune.runs.folder import RunFolder, items, mapping, number, rows

__all__ = ["Section", "sections"]

_LOG_LINES = 400  # of train.log that a page shows


@dataclass(frozen=True)
class Section:
    """A table, a text, or both; ``folded`` ones open on a click."""

    title: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    text: str = ""
    folded: bool = False


def sections(run: RunFolder) -> Iterator[Section]:
    """All that the run's files tell; what they do not tell is left out."""
    found = (
        _problems(run),
        _legs(run),
        _commands(run),
        _skipped(run),
        _data(run),
        _sources(run),
        *_plan(run),
        _compile(run),
        _memory(run),
        *_verify(run),
        _samples(run),
        _versions(run),
        Section("Recipe, with every default", text=dump_yaml(run.recipe) if run.recipe else "", folded=True),
        _log(run),
    )
    yield from (section for section in found if section.rows or section.text)


def _table(title: str, header: tuple[str, ...], cells: Iterable[Iterable[Any]], *, folded: bool = False) -> Section:
    return Section(title, header, tuple(tuple(map(words.text, row)) for row in cells), folded=folded)


def _problems(run: RunFolder) -> Section:
    return Section("Files that could not be read whole", text="\n".join(run.problems))


def _legs(run: RunFolder) -> Section:
    header = ("leg", "status", "started", "took", "steps", "loss", "held-out loss", "trained tokens", "on", "changes")
    cells = []
    for place, leg in enumerate(run.legs, start=1):
        begin, end = words.figure(leg.get("first_loss")), words.figure(leg.get("last_loss"))
        cells.append(
            (
                place,
                ": ".join(str(leg[name]) for name in ("status", "reason") if leg.get(name)),
                words.moment(leg.get("started")),
                words.duration(words.seconds_between(leg.get("started"), leg.get("ended"))),
                f"{words.text(leg.get('from_step'))} → {words.text(leg.get('to_step'))}",
                f"{begin} → {end}",
                words.figure(leg.get("eval_loss")),
                words.count(leg.get("trained_tokens")),
                f"{words.text(leg.get('device'))}, {words.text(leg.get('host'))}",
                "\n".join(map(str, items(leg.get("changes")))),
            )
        )
    return _table("Legs", header, cells)


def _commands(run: RunFolder) -> Section:
    cells = (
        (
            place,
            leg.get("command"),
            leg.get("folder"),
            leg.get("git"),
            " ".join(str(part) for part in mapping(leg.get("deltatune")).values() if part),
        )
        for place, leg in enumerate(run.legs, start=1)
    )
    return _table("Commands", ("leg", "command", "in", "commit there", "deltatune"), cells)


def _skipped(run: RunFolder) -> Section:
    left_out = [entry for entry in run.entries if "skipped" in entry]
    cells = ((entry.get("step"), entry["skipped"]) for entry in left_out)
    return _table("Updates that were left out", ("step", "why"), cells)


def _data(run: RunFolder) -> Section:
    reports = {name: report for name in ("train", "eval") if (report := mapping(run.report.get("data")).get(name))}
    packs = {name: mapping(report) for name, report in reports.items()}
    shown = {
        "rows": words.count,
        "documents": words.count,
        "tokens": words.count,
        "trained_tokens": words.count,
        "longest": words.count,
        "packs": words.count,
        "tokens_per_batch": words.count,
        "fill": words.share,
        "variance_between_packs": words.share,
        "one_source_packs": words.share,
        "split": words.count,
        "truncated": words.count,
        "dropped": words.count,
        "unlabelled": words.count,
    }
    cells = [
        (name.replace("_", " "), *(show(report.get(name)) for report in packs.values()))
        for name, show in shown.items()
        if any(report.get(name) for report in packs.values())
    ]
    remarks = [str(line) for report in packs.values() for line in items(report.get("remarks"))]
    table = _table("Data and packing", ("", *packs), cells)
    return Section(table.title, table.header, table.rows, "\n".join(remarks))


def _sources(run: RunFolder) -> Section:
    found = mapping(run.legs[-1].get("data")) if run.legs else {}
    return _table("Sources", ("source", "digest of the rows"), found.items())


def _plan(run: RunFolder) -> Iterator[Section]:
    prepared = mapping(run.report.get("prepare"))
    yield _table(
        "Kernels",
        ("op", "runs on", "because"),
        ((row.get("op"), row.get("impl"), row.get("reason")) for row in rows(prepared.get("kernels"))),
    )
    layers = rows(prepared.get("lora_layers"))
    yield _table(
        "Adapters", ("run", "because", "layers"), ((r.get("mode"), r.get("reason"), r.get("layers")) for r in layers)
    )
    swaps = rows(prepared.get("swaps"))
    yield _table(
        "Layers",
        ("stock class", "becomes", "expected", "found"),
        ((row.get("stock"), row.get("layer"), row.get("expected"), row.get("found")) for row in swaps),
        folded=True,
    )
    trainable = rows(prepared.get("trainable"))
    yield _table(
        "Trained parameters",
        ("pattern", "tensors", "elements"),
        ((row.get("pattern"), row.get("tensors"), words.count(row.get("elements"))) for row in trainable),
        folded=True,
    )


def _compile(run: RunFolder) -> Section:
    prepared = mapping(run.report.get("prepare"))
    reason = prepared.get("checkpointing_reason")
    cells: list[tuple[Any, Any]] = []
    if "checkpointing" in prepared:
        cells.append(("checkpointing", f"{prepared['checkpointing']}{f': {reason}' if reason else ''}"))
    compiled = mapping(prepared.get("compile"))
    if "compile" in prepared and not compiled:
        cells.append(("compile", "off"))
    if compiled:
        cells.append(("scope", compiled.get("scope")))
        cells += [(f"graphs of {name}", number) for name, number in mapping(compiled.get("graphs")).items()]
        cells += [("took", words.duration(compiled.get("seconds")))]
        cells += [(name, line) for name in ("breaks", "recompiles") for line in items(compiled.get(name)) or ["none"]]
    return _table("Compiling", ("", ""), cells)


def _memory(run: RunFolder) -> Section:
    estimate = mapping(run.report.get("memory_estimate"))
    cells = [(f"estimate: {name}", words.memory(size)) for name, size in estimate.items()]
    if predicted := number(run.report.get("predicted_peak_bytes")):
        cells.append(("predicted peak of the setting that was taken", words.memory(predicted)))
    peaks = [value for _, value in run.series("peak_memory_gib") if value == value]
    if peaks:
        cells.append(("measured peak", words.memory(max(peaks) * 2**30)))
    return _table("Memory of a device", ("", ""), cells)


def _verify(run: RunFolder) -> Iterator[Section]:
    probe = mapping(run.report.get("verify"))
    if not probe:
        return
    columns = ("forward", "input_grad", "parameter_grads", "cross_document_gradient", "perturbation")
    cells = [
        (row.get("name"), row.get("layers"), *(row.get(name) for name in columns), "ok" if row.get("ok") else "FAILED")
        for row in rows(probe.get("rows"))
    ]
    names = tuple(name.replace("_", " ") for name in columns)
    table = _table("Independence of documents", ("probed", "layers", *names, "verdict"), cells)
    notes = [probe.get("verdict"), *(f"{check.get('name')}: {_ok(check)}" for check in rows(probe.get("checks")))]
    notes += items(probe.get("notes"))
    yield Section(table.title, table.header, table.rows, "\n".join(words.text(note) for note in notes))


def _ok(check: dict[str, Any]) -> str:
    return "ok" if check.get("ok") else "FAILED"


def _samples(run: RunFolder) -> Section:
    names = tuple(dict.fromkeys(str(name) for sample in run.samples for name in sample))
    return _table("Samples", names, ((sample.get(name) for name in names) for sample in run.samples))


def _versions(run: RunFolder) -> Section:
    names = dict.fromkeys(name for leg in run.legs for name in mapping(leg.get("versions")))
    cells = ((name, *(mapping(leg.get("versions")).get(name) for leg in run.legs)) for name in names)
    legs = range(1, len(run.legs) + 1)
    header = tuple(f"leg {place}" for place in legs) if len(legs) > 1 else ("version",)
    return _table("Versions", ("package", *header), cells, folded=True)


def _log(run: RunFolder) -> Section:
    lines = run.log.splitlines()
    left_out = len(lines) - _LOG_LINES
    head = [f"({left_out:,} lines before)"] if left_out > 0 else []
    return Section("train.log", text="\n".join([*head, *lines[-_LOG_LINES:]]), folded=True)
