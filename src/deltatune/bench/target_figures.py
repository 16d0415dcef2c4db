"""The figures that targets are about, taken from records: None where a record does not hold one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from deltatune.bench.records import Record

__all__ = [
    "Figure",
    "all_linears",
    "as_shipped",
    "auto_choice",
    "breaks",
    "first_step",
    "graphs",
    "host_syncs",
    "loss_memory",
    "loss_time",
    "memory_free",
    "of_copy",
    "of_floor",
    "points",
    "prediction",
    "same_memory",
    "second_run",
]

TOKENS: Final = 16384
_VOCABULARY: Final = 248320

_Config: TypeAlias = Mapping[str, Any]
_Result: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure, where in the record it comes from, and whether what it was measured on passed its gate."""

    value: float
    note: str = ""
    green: bool = True


def of_floor(record: Record) -> Figure | None:
    """The largest share of the arithmetic floor that a setting reaches, adapters on q/k/v/o."""
    return _best(record, lambda config: _named(_ours(config), lambda r: r.get("of_floor")), max)


def same_memory(record: Record) -> Figure | None:
    """Leak-free stock with layer checkpointing over the fastest of ours in no more memory; 0 where all need more."""

    def ratios(config: _Config) -> Iterator[tuple[float, str]]:
        for stock in _stock_layer(config):
            ours, room = _ours(config), stock["peak_bytes"] or 0
            fitting = [r for r in ours if (r["peak_bytes"] or 0) <= room]
            if ours and not fitting:
                least = min(r["peak_bytes"] or 0 for r in ours)
                yield 0.0, f"the least of ours takes {least / 2**30:.2f} GiB, stock {room / 2**30:.2f}"
            yield from _named(fitting, lambda r, stock=stock: stock["median_ms"] / r["median_ms"])  # type: ignore[misc]

    return _best(record, ratios, max)


def memory_free(record: Record) -> Figure | None:
    """Leak-free stock with layer checkpointing over the fastest of ours."""
    return _speed_over(record, _stock_layer)


def as_shipped(record: Record) -> Figure | None:
    """Stock as shipped, with layer checkpointing like the leak-free one, over the fastest of ours."""

    def shipped(config: _Config) -> list[_Result]:
        return [r for r in _taken(config) if r["system"] == "stock as shipped" and r["checkpointing"] == "layer"]

    return _speed_over(record, shipped)


def all_linears(record: Record) -> Figure | None:
    """Adapters on all linears over those on q/k/v/o, the slowest of the checkpointing settings that have both."""

    def ratios(config: _Config) -> Iterator[tuple[float, str]]:
        few = _fastest_by_checkpointing(_ours(config))
        every = _fastest_by_checkpointing(_ours(config, "all"))
        for setting in few.keys() & every.keys():
            yield every[setting] / few[setting], f"checkpointing {setting}"

    return _best(record, ratios, max)


def host_syncs(record: Record) -> Figure | None:
    """The most host syncs of a step of ours, of those that were watched."""
    return _best(record, lambda config: _named(_ours(config, None), lambda r: r.get("host_syncs")), max)


def graphs(record: Record) -> Figure | None:
    """The most graphs that a layer type of ours compiled to."""
    return _best(record, lambda config: _named(_ours(config, None), _most_graphs), max)


def breaks(record: Record) -> Figure | None:
    """The most graph breaks and recompiles together."""

    def both(r: _Result) -> float | None:
        return None if r.get("breaks") is None else r["breaks"] + (r.get("recompiles") or 0)

    return _best(record, lambda config: _named(_ours(config, None), both), max)


def first_step(record: Record) -> Figure | None:
    """The longest way from ``prepare`` to the end of the first optimizer step, graphs compiled anew."""
    return _best(record, lambda config: _named(_cold(config, warm=False), lambda r: r.get("first_step_seconds")), max)


def second_run(record: Record) -> Figure | None:
    """The same with the graphs of an earlier run in the caches on disk."""
    return _best(record, lambda config: _named(_cold(config, warm=True), lambda r: r.get("first_step_seconds")), max)


def points(record: Record) -> Figure | None:
    """Settings of ours between little memory and much."""

    def count(config: _Config) -> Iterator[tuple[float, str]]:
        settings = {str(r["checkpointing"]) for r in _ours(config) if r["checkpointing"] != "auto"}
        if settings:
            yield float(len(settings)), ""

    return _best(record, count, max)


def prediction(record: Record) -> Figure | None:
    """How far the predicted peak is from the measured one, ``auto``'s, as a share of the measured one."""

    def error(r: _Result) -> float | None:
        predicted, peak = r.get("predicted_bytes"), r.get("peak_bytes")
        return abs(predicted - peak) / peak if r["checkpointing"] == "auto" and predicted and peak else None

    return _best(record, lambda config: _named(_ours(config), error), max)


def auto_choice(record: Record) -> Figure | None:
    """The speed of what ``auto`` took over that of the fastest setting: all that ran did fit."""

    def shares(config: _Config) -> Iterator[tuple[float, str]]:
        ours = _ours(config)
        for auto in (r for r in ours if r["checkpointing"] == "auto"):
            # the setting it took, where that was measured too: the same step must not lose to itself by noise
            same = [r for r in ours if r["checkpointing"] == auto.get("checkpointing_taken")] or [auto]
            fastest = min(float(r["median_ms"]) for r in ours)
            yield fastest / min(float(r["median_ms"]) for r in same), f"takes {auto.get('checkpointing_taken')}"

    return _best(record, shares, min)


def of_copy(what: str, sizes: Mapping[str, int], tokens: Sequence[int]) -> Callable[[Record], Figure | None]:
    """The share of copy bandwidth of ours or of the compiled reference, at the worst of some token counts."""

    def figure(record: Record) -> Figure | None:
        best = [_best_of_op(record, what, {**sizes, "T": count}) for count in tokens]
        found = [one for one in best if one is not None]
        return min(found, key=lambda one: one.value) if len(found) == len(tokens) else None

    return figure


def loss_memory(width: int) -> Callable[[Record], Figure | None]:
    """The peak of the default, inputs included, over the lowest of all that are exact enough."""

    def figure(held: int, auto: _Result, others: Sequence[_Result]) -> tuple[float, str]:
        lowest = min(others, key=lambda r: int(r["peak_bytes"]))
        share = (held + auto["peak_bytes"]) / (held + lowest["peak_bytes"])
        return share, f"{auto['impl']}, lowest {lowest['impl']}"

    return lambda record: _loss(record, width, figure)


def loss_time(width: int) -> Callable[[Record], Figure | None]:
    """The time of the default over that of the fastest whose peak, inputs included, is within 5% of the lowest."""

    def figure(held: int, auto: _Result, others: Sequence[_Result]) -> tuple[float, str]:
        limit = 1.05 * (held + min(int(r["peak_bytes"]) for r in others))
        small = [r for r in others if held + r["peak_bytes"] <= limit]
        fastest = min(small, key=lambda r: float(r["median_ms"]))
        return auto["median_ms"] / fastest["median_ms"], f"{auto['impl']}, fastest {fastest['impl']}"

    return lambda record: _loss(record, width, figure)


def _best(
    record: Record,
    values: Callable[[_Config], Iterator[tuple[float, str]]],
    choose: Callable[..., tuple[float, str]],
) -> Figure | None:
    """The best of a record's full-depth configs at the targets' token count; a red gate leaves no result to choose.

    Nor does an interrupt: samples are missing then.
    """
    if record.interrupted:
        return None
    found = [
        (value, note)
        for config in record.configs
        if config["config"]["tokens"] == TOKENS and config["config"]["layers"] == config["config"]["full_layers"]
        for value, note in values(config)
    ]
    return Figure(*choose(found, key=lambda one: one[0])) if found else None


def _taken(config: _Config) -> list[_Result]:
    return [r for r in config["results"] if r["status"] == "ok"]


def _ours(config: _Config, targets: str | None = "qkvo") -> list[_Result]:
    return [r for r in _taken(config) if r["system"] == "deltatune" and targets in (None, r["targets"])]


def _stock_layer(config: _Config) -> list[_Result]:
    wanted = ("stock", "layer", "qkvo", True)
    keys = ("system", "checkpointing", "targets", "leak_free")
    return [r for r in _taken(config) if tuple(r.get(key) for key in keys) == wanted]


def _cold(config: _Config, *, warm: bool) -> list[_Result]:
    return [r for r in _ours(config, None) if r.get("caches") == ("warm" if warm else "cold")]


def _named(results: Sequence[_Result], value: Callable[[_Result], float | int | None]) -> Iterator[tuple[float, str]]:
    for result in results:
        found = value(result)
        if found is not None:
            yield float(found), str(result["name"])


def _speed_over(record: Record, stock: Callable[[_Config], Sequence[_Result]]) -> Figure | None:
    def ratios(config: _Config) -> Iterator[tuple[float, str]]:
        for slow in stock(config):
            yield from _named(_ours(config), lambda r, slow=slow: slow["median_ms"] / r["median_ms"])  # type: ignore[misc]

    return _best(record, ratios, max)


def _fastest_by_checkpointing(results: Sequence[_Result]) -> dict[str, float]:
    found: dict[str, float] = {}
    for result in results:
        setting, ms = str(result["checkpointing"]), float(result["median_ms"])
        found[setting] = min(ms, found.get(setting, ms))
    return found


def _most_graphs(result: _Result) -> float | None:
    counts = result.get("graphs")
    return max(counts.values()) if counts else None


def _op_configs(record: Record, sizes: Mapping[str, int]) -> Iterator[_Config]:
    for config in record.configs:
        if all(config["config"].get(name) == size for name, size in sizes.items()):
            yield config


def _best_of_op(record: Record, what: str, sizes: Mapping[str, int]) -> Figure | None:
    found = [
        Figure(float(r["of_floor"]), str(r["impl"]))
        for config in _op_configs(record, sizes)
        for r in config["results"]
        if r["what"] == what
        and r.get("by") in ("deltatune", "compile")
        and r.get("status") == "ok"
        and r.get("of_floor") is not None
    ]
    return max(found, key=lambda figure: figure.value, default=None)


def _loss(
    record: Record, width: int, figure: Callable[[int, _Result, Sequence[_Result]], tuple[float, str]]
) -> Figure | None:
    for config in _op_configs(record, {"T": TOKENS, "E": width, "V": _VOCABULARY}):
        results = [r for r in config["results"] if r["what"] == "forward+backward" and r.get("median_ms") is not None]
        auto = next((r for r in results if r["impl"] == config["auto"]), None)
        exact = [r for r in results if r["status"] == "ok" and r.get("peak_bytes")]
        held = config.get("input_bytes")
        if auto is not None and exact and auto.get("peak_bytes") and held is not None:
            return Figure(*figure(held, auto, exact), green=auto["status"] == "ok")
    return None
