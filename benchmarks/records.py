"""Records: immutable JSON files of what was measured, on what, of which source. Written once, read for ever.

A record is ``{schema, kind, subject, device, versions, commit, date, argv, method, ok, configs}``. ``kind`` is
``train``, ``frontier``, ``compare``, ``parallel``, ``products``, ``learning`` or ``ops/<op>``; a config has ``config``
(what was asked), ``results`` and, but for single products and learning, ``checks`` and, but for several GPUs,
``ceilings``.
Records of schema 1 call checks gates, and one of the first lacks a few keys.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, Final

__all__ = ["OURS", "RECORDS", "UNCHECKED", "Record", "head", "load_records", "source_of", "write_record"]

RECORDS: Final = Path(__file__).parent / "records"
#: The system of ours, as results name it.
OURS: Final = "deltatune"
#: What the method of a record of steps says that were timed without a check of their values.
UNCHECKED: Final = "; not held to float32 or to the stock path in this run"
_DISTRIBUTIONS: Final = (
    "triton", "transformers", "peft", "fla-core", "flash-qla", "tilelang", "liger-kernel", "cut-cross-entropy",
    "quack-kernels",
)  # fmt: skip
# kind-subject-device-date.json, and -2, -3, ... for what was measured later on the same day
_NUMBER: Final = re.compile(r"\d{4}-\d\d-\d\d(?:-(\d+))?$")


@dataclass(frozen=True)
class Record:
    """One record: its file and what it holds."""

    path: Path
    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``"train"``, ``"ops/<op>"`` and others; see the module."""
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
    def complete(self) -> bool:
        """Whether all samples were taken."""
        return not self.data.get("interrupted")

    @property
    def age(self) -> tuple[str, int]:
        """Sorts records by when they were made."""
        number = _NUMBER.search(self.path.stem)
        return str(self.data["date"]), int(number[1] or 1) if number else 1


def load_records(folder: Path = RECORDS) -> list[Record]:
    """All records of a folder, the newest first.

    Raises:
        ValueError: a file that is no record.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        missing = {"kind", "device", "date", "configs"} - (data.keys() if isinstance(data, dict) else set())
        if missing:
            raise ValueError(f"{path} is no benchmark record: it lacks {', '.join(sorted(missing))}")
        records.append(Record(path, data))
    return sorted(records, key=lambda record: record.age, reverse=True)


def head(kind: str, subject: str, method: str, *, device: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """What every record begins with; ``configs`` comes after it.

    Args:
        kind: see the module.
        subject: the model or the op.
        method: how the figures were taken, in words.
        device: the device's own name.
        source: see ``source_of``.
    """
    return {
        "schema": 2,
        "kind": kind,
        "subject": subject,
        "device": device,
        "versions": _versions(),
        **source,
        "date": datetime.now(UTC).date().isoformat(),
        "argv": _without_folders(sys.argv),
        "method": method,
    }


def source_of(package: Path, commit: str | None = None) -> dict[str, Any]:
    """The commit of a package's source, whether its files differ from it, and a digest of them.

    Args:
        package: the folder of ``deltatune``.
        commit: for a machine that has the files without their history; read from git by default.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    found: dict[str, Any] = {"commit": commit, "dirty": None, "source_sha256": digest.hexdigest()}
    tracked = commit is None and _git(package, "ls-files", "--", str(package))
    if tracked and (head_ := _git(package, "rev-parse", "HEAD")):
        found |= {"commit": head_, "dirty": bool(_git(package, "status", "--porcelain", "--", str(package)))}
    return found


def write_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Writes a record under a name of its own, ``kind-subject-device-date.json``, and never over another.

    Raises:
        ValueError: a value that is not finite: a record holds null where nothing was measured.
    """
    text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    kind, subject = str(record["kind"]), str(record["subject"])
    name = subject if kind.startswith("ops/") else f"{kind}-{subject}"
    device = str(record["device"]).lower()
    words = ["cpu"] if device.startswith("cpu") else device.removeprefix("nvidia ").split()
    stem = "-".join((name, *words, str(record["date"])))
    for number in count(1):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


def _versions() -> dict[str, str]:
    """Name -> version of what is installed, without importing it."""
    found = {"python": platform.python_version()}
    for name in ("torch", *_DISTRIBUTIONS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _without_folders(argv: Sequence[str]) -> list[str]:
    """The command line; folders of the machine it ran on are left out."""
    kept = [Path(argv[0]).name if argv else "", *argv[1:]]
    return ["..." if Path(word).is_absolute() else word for word in kept]
