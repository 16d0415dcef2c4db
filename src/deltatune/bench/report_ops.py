"""Markdown of a record of an op: a table for each shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from deltatune.bench.records import Record

__all__ = ["heading", "markdown_table", "ops_section"]

_DIRECTIONS: Final = {"forward": "forward", "forward+backward": "fwd + bwd"}
_MIB: Final = 2**20


def ops_section(record: Record) -> str:
    """The record's tables, a heading before them that says where it is, what ran and how it was timed."""
    lines = heading(record)
    for config in record.configs:
        lines += ["", *_shape(config)]
    return "\n".join(lines) + "\n"


def heading(record: Record) -> list[str]:
    """A title, the file, the versions and the way of timing."""
    versions = ", ".join(f"{name} {version}" for name, version in record.data["versions"].items())
    method = record.data["method"].split(";")[0]
    name = record.kind if record.kind.startswith("ops/") else f"{record.kind} of {record.subject}"
    if record.size:
        name += ", {} layers, {} tokens in {} documents".format(*record.size)
    return [
        f"### {name}: {record.device}, {record.data['date']}{' (interrupted)' if record.interrupted else ''}",
        "",
        f"`{record.path.as_posix()}`; {_source(record)}; {versions}. Times are {method}: median (p20 to p80), ms.",
    ]


def _source(record: Record) -> str:
    """The commit that was measured, and whether what ran was more than that."""
    commit = str(record.data.get("commit") or "unknown")[:7]
    changed = record.data.get("dirty") or record.data.get("worktree")
    return f"commit {commit} with changes that are not in it" if changed else f"commit {commit}"


def markdown_table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Lines of a table; columns that are empty in every row are left out."""
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] not in ("", "-") for row in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _shape(config: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{name} {value}" for name, value in config["config"].items() if not isinstance(value, list))
    allowed = f"Allowed error: twice {max(config['error_budget'].values()):.1e}."
    by_name: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in config["results"]:
        by_name.setdefault(result["impl"], {})[result["what"]] = result
    header = ["", *(f"{short}{of}" for short in _DIRECTIONS.values() for of in ("", ", of floor")), "peak MiB"]
    rows = [_row(name, results, config) for name, results in by_name.items()]
    return [
        " ".join([f"{sizes}.", *_ceilings(config), allowed]),
        "",
        *markdown_table((*header, "worst relative error", ""), rows),
    ]


def _ceilings(config: Mapping[str, Any]) -> list[str]:
    found = config.get("ceilings") or {}
    words = []
    if found.get("copy_bytes_per_second"):
        words.append(f"copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    if found.get("gemm_flops_per_second"):
        words.append(f"GEMM {found['gemm_flops_per_second'] / 1e12:.0f} TFLOP/s")
    text = ", ".join(words)
    return [f"{text[0].upper()}{text[1:]}; `auto` takes `{config['auto']}`."] if text else []


def _row(name: str, results: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> list[str]:
    cells = [name]
    for what in _DIRECTIONS:
        result = results.get(what, {})
        cells += [_cell(result, "median_ms", lambda _, r=result: _times(r)), _cell(result, "of_floor", _percent)]  # type: ignore[misc]
    last = results.get("forward+backward", {})
    errors = [error for error in config["errors"].get(name, {}).values() if error is not None]
    cells += [_cell(last, "peak_bytes", lambda peak: f"{peak / _MIB:.0f}"), f"{max(errors):.1e}" if errors else "-"]
    return [*cells, _remark(last)]


def _cell(result: Mapping[str, Any], key: str, form: Callable[[Any], str]) -> str:
    return "-" if result.get(key) is None else form(result[key])


def _times(result: Mapping[str, Any]) -> str:
    return f"{result['median_ms']:.3f} ({result['p20_ms']:.3f} to {result['p80_ms']:.3f})"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _remark(result: Mapping[str, Any]) -> str:
    """What became of a variant that was not timed, or that is less exact than allowed."""
    status = result.get("status", "ok")
    if status == "ok":
        return ""
    return f"{status}: {result.get('reason') or '-'}".replace("|", "\\|")
