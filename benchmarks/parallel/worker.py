"""One rank of a launch: checks and times its items with the others; rank 0 writes a line for each.

``python -m benchmarks.parallel.worker FOLDER`` with the environment of a launcher: the folder holds ``spec.json``, and
gets ``lines.jsonl``, ``progress`` and, of a rank that fails, ``failed-RANK.json``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.parallel.checks import check
from benchmarks.parallel.measuring import measured
from benchmarks.parallel.meeting import Meeting
from benchmarks.parallel.spec import CHECK, Item, Spec
from benchmarks.parallel.systems import SYSTEMS
from benchmarks.worker import failures, outcome_of

__all__ = ["main"]

_WAIT_S = 3600.0  # the launcher ends ranks long before
Say = Callable[[str], None]


def main(arguments: list[str]) -> int:
    """A line for each item; what fails on all ranks together ends them, what fails on one GPU is a line."""
    folder = Path(arguments[0])
    spec = Spec.of_json((folder / "spec.json").read_text(encoding="utf-8"))
    meeting = Meeting(_WAIT_S)
    say = _saying(folder / "progress") if meeting.rank == 0 else lambda _: None
    try:
        device = _joined(spec, meeting)
        say(f"{meeting.world} ranks met {time.time() - spec.started:.1f} s after their start")
        red: dict[str, str] = {}
        for item in spec.items:
            line = _line(spec, item, device, meeting, say, red)
            if meeting.rank == 0:
                with (folder / "lines.jsonl").open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(line, allow_nan=False) + "\n")
            meeting.gather()
            _free()
    except failures() as error:
        status, reason = outcome_of(error)
        traceback.print_exc()
        told = {"status": status, "reason": f"rank {meeting.rank}: {reason}", "time": time.time()}
        whole = folder / f"failing-{meeting.rank}"
        whole.write_text(json.dumps(told), encoding="utf-8")
        whole.rename(folder / f"failed-{meeting.rank}.json")
        sys.stderr.flush()
        os._exit(1)  # what other ranks wait in is not waited for
    if meeting.rank == 0:
        say("done")
    dist.destroy_process_group()
    return 0


def _joined(spec: Spec, meeting: Meeting) -> torch.device:
    device = torch.device(spec.device)
    if device.type == "cuda":
        device = torch.device("cuda", meeting.rank)
        torch.cuda.set_device(device)
    meeting.join("nccl" if device.type == "cuda" else "gloo")
    return device


def _saying(path: Path) -> Say:
    def say(what: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(what + "\n")

    return say


def _line(
    spec: Spec, item: Item, device: torch.device, meeting: Meeting, say: Say, red: dict[str, str]
) -> dict[str, Any]:
    """Rank 0's line; ``red``: system -> which checks did not hold, the same on every rank."""
    found: dict[str, Any] = item.to_dict() | {"status": "ok", "reason": None}
    found["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if item.system in red:
        return found | {"status": "red check", "reason": red[item.system]}
    if item.gpus == CHECK:
        checks = check(spec, SYSTEMS[item.system], device, meeting)
        found["checks"] = [one.to_dict() for one in checks]
        for one in checks:
            figure = "-" if one.figure is None else f"{one.figure:.2e} of {one.limit:.2e}"
            say(f"{item.name}: {'ok ' if one.ok else 'RED'} {one.name}: {figure} {one.detail}")
        names = meeting.gather([one.name for one in checks if not one.ok])[0]
        if names:
            red[item.system] = f"not timed: {', '.join(names)}"
            found |= {"status": "red check", "reason": red[item.system]}
    elif item.gpus > 1:
        found |= measured(spec, item, device, meeting, say)
    elif meeting.rank == 0:
        found |= _on_one(spec, item, device, meeting, say)
    return found


def _on_one(spec: Spec, item: Item, device: torch.device, meeting: Meeting, say: Say) -> dict[str, Any]:
    """On rank 0 alone, the others wait; a document that does not fit is halved until it does."""
    tokens = item.tokens
    while True:
        try:
            found = measured(spec, Item(item.system, tokens, 1), device, meeting, say)
        except failures() as error:
            status, reason = outcome_of(error)
            traceback.print_exc()
        else:
            return found | ({"one_gpu_tokens": tokens} if tokens != item.tokens else {})
        say(f"{item.name}: {status} with {tokens} tokens: {reason[:200]}")
        _free()
        tokens //= 2
        if not SYSTEMS[item.system].shares_pack or status != "out_of_memory" or tokens < 1024:
            return {"status": status, "reason": reason}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
