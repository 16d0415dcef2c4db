"""The committed records: read, and sorted so that the newest of a kind is found first."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deltatune.errors import UserError

__all__ = ["RECORDS", "Record", "load_records", "newest_of_each"]

RECORDS: Final = Path("bench/records")

_SIZE: Final = ("layers", "tokens", "documents")

# kind-subject-device-date.json, and -2, -3, ... for what was measured later on the same day
_NUMBER: Final = re.compile(r"\d{4}-\d\d-\d\d(?:-(\d+))?$")


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        path: its file.
        data: what it holds; see ``deltatune.bench.protocol.head``.
    """

    path: Path
    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``"train"``, ``"frontier"``, ``"ops/<op>"`` and so on."""
        return str(self.data["kind"])

    @property
    def subject(self) -> str:
        """The model or the op."""
        return str(self.data.get("subject") or self.kind.rpartition("/")[2])

    @property
    def device(self) -> str:
        """The device's own name."""
        return str(self.data["device"])

    @property
    def configs(self) -> Sequence[Mapping[str, Any]]:
        """One entry for each configuration."""
        configs: Sequence[Mapping[str, Any]] = self.data["configs"]
        return configs

    @property
    def size(self) -> tuple[int, ...]:
        """Layers, tokens and documents of what trained; nothing for ops, whose records hold all their sizes."""
        about = self.configs[0].get("config", {}) if self.configs else {}
        return tuple(about[name] for name in _SIZE) if set(_SIZE) <= about.keys() else ()

    @property
    def measured(self) -> frozenset[tuple[object, ...]]:
        """What it has figures of: a system or a variant, and all that its configuration says but for a few names."""
        return frozenset(
            (*_setting(config.get("config", {})), result.get("name") or result.get("impl"))
            for config in self.configs
            for result in config.get("results", ())
            if result.get("status") == "ok"
        )

    @property
    def interrupted(self) -> bool:
        """Whether samples are missing."""
        return bool(self.data.get("interrupted"))

    @property
    def age(self) -> tuple[str, int]:
        """Sorts records by when they were made."""
        number = _NUMBER.search(self.path.stem)
        return str(self.data["date"]), int(number[1] or 1) if number else 1


def load_records(folder: Path) -> list[Record]:
    """All records of a folder, the newest first; of one age, in the order of their names.

    Raises:
        UserError: a file that is no record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}") from error
        missing = {"kind", "device", "date", "configs"} - (data.keys() if isinstance(data, dict) else set())
        if missing:
            raise UserError(f"{path} is no benchmark record: it lacks {', '.join(sorted(missing))}")
        records.append(Record(path, data))
    return sorted(records, key=lambda record: record.age, reverse=True)


def _setting(about: Mapping[str, Any]) -> tuple[object, ...]:
    """A configuration's plain values; not the names of models of one shape, nor how many samples were taken."""
    left_out = {"model", "gate_tokens", "warmup", "steps", "rounds", "loss", "baseline"}
    plain = {name: value for name, value in about.items() if not isinstance(value, list | dict)}
    return tuple(sorted((name, str(value)) for name, value in plain.items() if name not in left_out))


def newest_of_each(records: Sequence[Record]) -> list[Record]:
    """Those that newer ones do not make up for, by kind, subject, device and size.

    Newer ones do where they hold all of a record's figures, of the same kind or, for those of training steps, in a
    frontier: a run of other systems or at another shape is no newer version of it, nor is one that was interrupted.
    """
    known: dict[tuple[str, str, str], set[tuple[object, ...]]] = {}
    found = []
    for record in records:
        same = [record.kind, "frontier"] if record.kind == "train" else [record.kind]
        newer = set().union(*(known.get((kind, record.subject, record.device), ()) for kind in same))
        if newer and record.measured <= newer:
            continue
        found.append(record)
        if not record.interrupted:
            known.setdefault((record.kind, record.subject, record.device), set()).update(record.measured)
    return sorted(found, key=lambda record: (record.kind, record.subject, record.device, record.size))
