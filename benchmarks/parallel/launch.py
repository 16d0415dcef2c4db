"""Starts the ranks of a launch, reads their lines as they come, and ends them when one failed or time is up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch._C._distributed_c10d import TCPStore

from benchmarks.parallel.meeting import environment_of
from benchmarks.parallel.spec import CHECK, Item, Spec

__all__ = ["Launcher"]

_ROOT: Final = Path(__file__).parents[2]
_POLL_S: Final = 0.1
Line = dict[str, Any]
"""A line of a record, or what it ended with."""
#: What ranks have after one of them failed, to say what they know themselves.
_LEAVING_S: Final = 3.0
#: What a rank that is ended has to print its stacks.
_STACKS_S: Final = 1.0


class Launcher:
    """Launches, one after the other."""

    def __init__(self, folder: Path, *, deadline: float, timeout_s: float, say: Callable[[str], None]) -> None:
        """``folder``: where logs of failed ranks go; ``deadline``: by ``time.monotonic``; ``timeout_s``: of an item."""
        self._folder, self._deadline, self._timeout_s, self._say = folder, deadline, timeout_s, say

    def run(self, spec: Spec, world: int, environment: Mapping[str, str], keep: Callable[[Line], None]) -> None:
        """Gives ``keep`` a line for each item as it comes; ranks that failed are started again for those behind."""
        left = list(spec.items)
        while left:
            done, ended = self._launched(replace(spec, items=tuple(left)), world, environment, keep)
            left = left[done:]
            if ended is not None:
                over = [item for item in left if _is_over(item, left[0], str(ended["status"]))]
                for item in over:
                    self._say(f"  {item.name}: {ended['status']}: {ended['reason']}")
                    keep(item.to_dict() | ended)
                left = [item for item in left if item not in over]

    def _launched(
        self, spec: Spec, world: int, environment: Mapping[str, str], keep: Callable[[Line], None]
    ) -> tuple[int, Line | None]:
        """How many items one start did, and with what the one behind them ended; None where all were done."""
        if time.monotonic() > self._deadline:
            return 0, {"status": "not run", "reason": "time was up"}
        self._say(f"{world} ranks: {', '.join(item.name for item in spec.items)}")
        with tempfile.TemporaryDirectory() as temporary:
            watched = _Watched(Path(temporary), keep, self._say)
            started = replace(spec, started=time.time())
            (watched.folder / "spec.json").write_text(started.to_json(), encoding="utf-8")
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            ranks: list[subprocess.Popen[bytes]] = []
            try:
                for rank in range(world):
                    ranks.append(self._rank(rank, world, store.port, watched.folder, environment))
                ended = self._watch(ranks, watched, len(spec.items))
                watched.look()
            finally:
                _kill(ranks)
            if ended is not None and watched.lines < len(spec.items):
                self._keep_logs(watched.folder, spec.items[watched.lines])
            del store
        return watched.lines, ended if watched.lines < len(spec.items) else None

    def _rank(
        self, rank: int, world: int, port: int, folder: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        cores = max(1, len(os.sched_getaffinity(0)) // world)
        shared = {"OMP_NUM_THREADS": str(cores), "TORCHINDUCTOR_COMPILE_THREADS": str(min(cores, 32)), **os.environ}
        paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
        env = {**shared, **environment, **environment_of(rank, world, port), "PYTHONPATH": paths}
        command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.parallel.worker", str(folder)]
        with (folder / f"rank-{rank}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def _watch(self, ranks: Sequence[subprocess.Popen[bytes]], watched: _Watched, items: int) -> Line | None:
        """Until every line is there, a rank failed, or time is up."""
        lines, since = 0, time.monotonic()
        while True:
            codes = [rank.poll() for rank in ranks]
            watched.look()
            now = time.monotonic()
            if watched.lines > lines:
                lines, since = watched.lines, now
            if lines == items:
                return None  # what ranks do to end is not waited for
            if any(codes):
                return self._failed(ranks, watched.folder)
            if all(code == 0 for code in codes):
                return {"status": "failed", "reason": "the ranks ended without a word"}
            if now > self._deadline:
                return {"status": "not run", "reason": "time was up"}
            if now - since > self._timeout_s:
                _abort(ranks)
                return {"status": "failed", "reason": f"no line for {self._timeout_s:.0f} s"}
            time.sleep(_POLL_S)

    def _failed(self, ranks: Sequence[subprocess.Popen[bytes]], folder: Path) -> Line:
        """What the rank that failed first said."""
        until = time.monotonic() + _LEAVING_S
        while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
            time.sleep(_POLL_S)
        told = {int(path.stem.split("-")[1]): path for path in folder.glob("failed-*.json")}
        dead = [n for n, rank in enumerate(ranks) if rank.poll() and n not in told]
        if dead:  # without a word: what the others say comes of it
            log = (folder / f"rank-{dead[0]}.log").read_text(encoding="utf-8", errors="replace")
            last = (log.strip().splitlines() or [""])[-1]
            return {"status": "failed", "reason": f"rank {dead[0]}: exit status {ranks[dead[0]].poll()}; {last}"[:500]}
        words = [json.loads(path.read_text(encoding="utf-8")) for path in told.values()]
        first = min(words, key=lambda one: float(one["time"]))
        return {"status": first["status"], "reason": first["reason"]}

    def _keep_logs(self, folder: Path, item: Item) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("rank-*.log"):
            shutil.copy(path, self._folder / f"failed-{item.name.replace(' ', '-')}-{path.name}")


class _Watched:
    """What ranks leave in their folder, each line and each word of rank 0 passed on once."""

    def __init__(self, folder: Path, keep: Callable[[Line], None], say: Callable[[str], None]) -> None:
        self.folder, self.lines = folder, 0
        self._keep, self._say, self._said = keep, say, 0

    def look(self) -> None:
        """Passes on what is new."""
        said = _whole_lines(self.folder / "progress")
        for words in said[self._said :]:
            self._say(f"  {words}")
        self._said = len(said)
        lines = _whole_lines(self.folder / "lines.jsonl")
        for text in lines[self.lines :]:
            self.lines += 1
            line = json.loads(text)
            self._say(f"  {line['name']}: {line['status']} {_short(line)}")
            self._keep(line)


def _is_over(item: Item, first: Item, status: str) -> bool:
    """What ends with ``first``: all when time is up, and a system that could not be checked."""
    same = item.system == first.system
    return item == first or status == "not run" or (first.gpus == CHECK and same)


def _whole_lines(path: Path) -> list[str]:
    """Without one that is being written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _abort(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ranks that hang print where, by Python's fault handler."""
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signal.SIGABRT)
    time.sleep(_STACKS_S)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """The ranks and what they started, compilers among them."""
    for rank in ranks:
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for rank in ranks:
        rank.wait()


def _short(line: Mapping[str, Any]) -> str:
    if line["status"] != "ok":
        return str(line["reason"])
    if "median_ms" not in line:
        return f"first step {line['since_start_seconds']:.1f} s" if "since_start_seconds" in line else ""
    peak = f", {line['peak_bytes'] / 2**30:.1f} GiB" if line.get("peak_bytes") else ""
    return f"{line['median_ms']:.1f} ms, {line['tokens_per_second_per_gpu']:.0f} tokens/s a GPU{peak}"
