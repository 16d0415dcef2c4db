"""Markdown of a record of training steps: systems side by side, the floor, where the time goes, the gates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from deltatune.bench.kernels import part_of, regrouped
from deltatune.bench.records import Record
from deltatune.bench.report_ops import heading, markdown_table

__all__ = ["speed_table", "training_section"]

_GIB: Final = 2**30
_TOKENS: Final = 16384


def training_section(record: Record, plot: str | None) -> str:
    """The record's tables, and the picture of its frontier where it has one."""
    lines = heading(record)
    for config in record.configs:
        lines += ["", _setting(config), "", *_systems(config)]
        if plot is not None:
            lines += ["", f"![tokens a second against peak memory of {record.subject}]({plot})"]
        failures = [[f"No table of kernels, {key}: {why}."] for key, why in config.get("kernels_failure", {}).items()]
        tables = [*map(_kernels, _tables(config)), _added_by_adapters(config)]
        for part in (_floor(config), *tables, *failures, _gates(config)):
            lines += ["", *part] if part else []
    return "\n".join(lines) + "\n"


def speed_table(records: Sequence[Record]) -> str:
    """A short table for the README: the newest full-depth records of packs of 16384 tokens beside a baseline.

    Empty without any.
    """
    rows: list[list[str]] = []
    devices: list[str] = []
    for record, config in _newest_full(records):
        found = list(_speed_rows(record.subject, config))
        rows += found
        devices += [f"{record.device} (`{record.path.as_posix()}`)"] if found else []
    if not rows:
        return ""
    header = ("model", "system", "ms a step", "tokens a second", "peak GiB", "against stock")
    table = "\n".join(markdown_table(header, rows))
    return f"Packs of {_TOKENS} tokens. Records: {', '.join(devices)}.\n\n{table}\n"


def _newest_full(records: Sequence[Record]) -> Iterator[tuple[Record, Mapping[str, Any]]]:
    seen: set[str] = set()
    for record in records:
        if record.kind not in ("train", "frontier") or record.subject in seen or record.device.startswith("cpu"):
            continue
        for config in record.configs:
            about = config["config"]
            timed = any(result["status"] == "ok" and result["system"] != "deltatune" for result in config["results"])
            if timed and about["tokens"] == _TOKENS and about["layers"] == about["full_layers"]:
                seen.add(record.subject)
                yield record, config
                break


def _speed_rows(model: str, config: Mapping[str, Any]) -> Iterator[list[str]]:
    taken = [r for r in config["results"] if r["status"] == "ok" and r["targets"] == "qkvo"]
    stock = next((r for r in taken if (r["system"], r["checkpointing"]) == ("stock", "layer")), None)
    for result in taken:
        against = f"{stock['median_ms'] / result['median_ms']:.2f}x" if stock else "-"
        name = result["name"] if result["leak_free"] else f"{result['name']} (leaks)"
        yield [model, name, f"{result['median_ms']:.0f}", _rate(result), _gib(result), against]


def _setting(config: Mapping[str, Any]) -> str:
    about = config["config"]
    depth = f"{about['layers']} of {about['full_layers']} layers"
    documents = f"{about['tokens']} tokens in {about['documents']} documents"
    adapters = f"LoRA r = {about['lora_rank']} in {about['adapter_dtype']}"
    return f"{about['model']}, {depth}, {documents}, {about['dtype']}, {adapters}. Baseline: {about['baseline']}"


def _systems(config: Mapping[str, Any]) -> list[str]:
    header = ("", "step", "tokens/s", "peak GiB", "of floor", "MFU", "first step, s", "")
    return markdown_table(header, [_system(result) for result in config["results"]])


def _system(result: Mapping[str, Any]) -> list[str]:
    if result["status"] != "ok":
        reason = " ".join(str(result.get("reason") or "-").split()).replace("|", "\\|")
        return [result["name"], "-", "-", "-", "-", "-", "-", f"{result['status']}: {reason}"]
    taken = result.get("checkpointing_taken")
    return [
        result["name"],
        f"{result['median_ms']:.1f} ({result['p20_ms']:.1f} to {result['p80_ms']:.1f})",
        _rate(result),
        _gib(result),
        _percent(result.get("of_floor")),
        _percent(result.get("mfu")),
        f"{result['first_step_seconds']:.1f}" if result.get("first_step_seconds") is not None else "-",
        f"takes {taken}" if result["checkpointing"] == "auto" and taken is not None else "",
    ]


def _floor(config: Mapping[str, Any]) -> list[str]:
    floor = config.get("floor")
    if not floor:
        return [f"No arithmetic floor: {config['floor_failure']}."] if "floor_failure" in config else []
    groups = ", ".join(f"{name} {ms:.1f}" for name, ms in floor["groups"].items())
    found = f"Arithmetic floor, adapters on {floor['targets']}: {floor['total_ms']:.1f} ms ({groups})."
    in_turn = floor.get("products_in_turn_ms")
    if in_turn:
        found += f" Its matrix products one after another, as a step has them: {in_turn:.1f} ms."
    return [found]


def _tables(config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """One for each choice of targets; a record may have been made when there was one for all, or null."""
    found = config.get("kernels") or []
    return found if isinstance(found, list) else [found]


def _kernels(found: Mapping[str, Any]) -> list[str]:
    # by the names kernels go by now: a record may be older than one of them
    floor = {group["group"]: group.get("floor_ms") for group in found["groups"]}
    groups = regrouped(found["rows"], floor)
    rows = [
        [g["group"], f"{g['ms']:.1f}", str(g["launches"]), f"{g['floor_ms']:.1f}" if g.get("floor_ms") else "-"]
        for g in groups
    ]
    busy = f"kernels run for {found['busy_ms']:.1f} of {found['step_ms']:.1f} ms"
    header = ("", "ms", "launches", "floor, ms")
    return [f"Where the time of {found['name']} goes ({busy}):", "", *markdown_table(header, rows)]


def _added_by_adapters(config: Mapping[str, Any]) -> list[str]:
    """What a step with adapters on all linears takes over one on q, k, v and o, by parts, where both were profiled."""
    settings = {result["name"]: (result["checkpointing"], result["lora"]) for result in config["results"]}
    sums: dict[tuple[str, str], Counter[str]] = {}
    for table in _tables(config):
        checkpointing, lora = settings.get(table["name"], ("", ""))
        setting = checkpointing if lora == "auto" else f"{checkpointing}, lora {lora}"
        found = sums.setdefault((setting, table.get("targets", "")), Counter())
        for row in table["rows"]:
            found[part_of(row["kernel"], row.get("op") or "")] += row["ms"]
    both = [setting for setting, targets in sums if targets == "qkvo" and (setting, "all") in sums]
    if not both:
        return []
    parts = sorted({part for found in sums.values() for part in found}, key=lambda part: -sums[both[0], "all"][part])
    rows = []
    for part in (*parts, "all kernels"):
        figures = []
        for setting in both:
            few, every = ((found.total() if part == "all kernels" else found[part]) for found in _pair(sums, setting))
            figures += [f"{few:.1f}", f"{every:.1f}", f"{every - few:+.1f}"]
        rows.append([part, *figures])
    header = ("", *(f"{setting}: {what}" for setting in both for what in ("q, k, v, o", "all", "more")))
    return ["Adapters on all linears beside those on q, k, v and o, ms of kernels:", "", *markdown_table(header, rows)]


def _pair(sums: Mapping[tuple[str, str], Counter[str]], setting: str) -> tuple[Counter[str], Counter[str]]:
    return sums[setting, "qkvo"], sums[setting, "all"]


def _gates(config: Mapping[str, Any]) -> list[str]:
    gates = config.get("gates") or []
    red = [gate for gate in gates if not gate["ok"]]
    if not gates:
        return []
    if not red:
        return [f"{len(gates)} gates, all green."]
    lines = [f"{len(gates)} gates, {len(red)} red:", ""]
    return lines + [f"- {gate['subject']}: {gate['name']}: {_against(gate)}" for gate in red]


def _against(gate: Mapping[str, Any]) -> str:
    figures = f"{gate['figure']:.2e} > {gate['limit']:.2e}" if gate.get("figure") is not None else ""
    return " ".join(filter(None, (figures, str(gate.get("detail") or "")))) or "failed"


def _rate(result: Mapping[str, Any]) -> str:
    return f"{result['tokens_per_second']:,.0f}"


def _gib(result: Mapping[str, Any]) -> str:
    return "-" if result.get("peak_bytes") is None else f"{result['peak_bytes'] / _GIB:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
