"""Ranks that fail, are killed or are stopped, and those that are not."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from test_ranks import join
from training_cases import make_recipe, save_checkpoint

from deltatune.commands.quiet import quiet_libraries
from deltatune.config.schema import Recipe
from deltatune.errors import RankFailedError
from deltatune.training.heartbeat import BEAT, Heartbeat
from deltatune.training.ranks import RankWatch
from deltatune.training.run import train
from deltatune.training.trainer import PackedTrainer
from forked import FORKED, free_port, settle

TIMEOUT_S = 10


def recipe(folder: Path, **training: Any) -> Recipe:
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        save_checkpoint(checkpoint)
    return make_recipe(
        folder,
        checkpoint,
        training={"save_strategy": "steps", "save_steps": 1, **training},
        verify={"enabled": False, "lengths": None},
        parallel={"timeout_s": TIMEOUT_S},
    )


def started(folder: Path, at_step_2: Callable[[int], None]) -> list[Any]:
    (folder / "recipe.json").write_text(recipe(folder, max_steps=3).model_dump_json(exclude_unset=True))
    port = free_port()
    ranks = [FORKED.Process(target=rank_main, args=(rank, str(folder), port, at_step_2)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    return ranks


def ended(folder: Path, ranks: list[Any]) -> list[tuple[int | None, str]]:
    """Exit codes and error outputs; no code of one that hangs."""
    end, codes = time.monotonic() + 60, []
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
        codes.append(process.exitcode)
        process.kill()
    return [(code, (folder / f"stderr{rank}").read_text()) for rank, code in enumerate(codes)]


def rank_main(rank: int, folder: str, port: int, at_step_2: Callable[[int], None]) -> None:
    settle()
    join(rank, 2, port)
    begin = PackedTrainer.get_batch_samples

    def get_batch_samples(self: PackedTrainer, *args: Any) -> Any:
        if self.state.global_step == 1:
            at_step_2(rank)
        return begin(self, *args)

    PackedTrainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
    told = Recipe.model_validate_json(Path(folder, "recipe.json").read_text())
    status = 0
    with Path(folder, f"stderr{rank}").open("w") as stderr, redirect_stderr(stderr), quiet_libraries():
        try:
            train(told)
        except RankFailedError as error:
            status = error.status
    os._exit(status)  # as the command does


def leg_of(folder: Path) -> dict[str, Any]:
    leg: dict[str, Any] = json.loads((folder / "output" / "run.json").read_text())["legs"][-1]
    return leg


def break_rank_1(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("the heart of it")


def miss_a_file_on_rank_1(rank: int) -> None:
    if rank == 1:
        Path("/there/is/none").read_text()


def kill_rank_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_rank_0(rank: int) -> None:
    if rank == 0:
        time.sleep(4 * BEAT)  # the others have heard where it runs
        os.kill(os.getpid(), signal.SIGKILL)


def stop_rank_1(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_rank_0(rank: int) -> None:
    """With the store, which it hosts."""
    if rank == 0:
        time.sleep(4 * BEAT)
        os.kill(os.getpid(), signal.SIGSTOP)


def be_slow_on_rank_1(rank: int) -> None:
    if rank == 1:
        time.sleep(TIMEOUT_S + 3)


#: what either of two ranks does before its second step; one of the first says nothing for longer than others wait
SILENT = {"stopped 1": stop_rank_1, "stopped 0": stop_rank_0, "slow": be_slow_on_rank_1}
FAILING = {
    "broken": break_rank_1,
    "missing file": miss_a_file_on_rank_1,
    "killed 1": kill_rank_1,
    "killed 0": kill_rank_0,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[tuple[int | None, str]]]]:
    """The folder of each two ranks, and how they ended. The others run while the silent ones wait."""
    acts = {**SILENT, **FAILING}
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in acts}
    groups = {name: started(folders[name], acts[name]) for name in SILENT}
    ends = {name: ended(folders[name], started(folders[name], acts[name])) for name in FAILING}
    ends |= {name: ended(folders[name], groups[name]) for name in SILENT}
    return {name: (folders[name], ends[name]) for name in acts}


@pytest.mark.slow
def test_the_traceback_of_the_rank_that_failed_is_told_once(found: Any) -> None:
    folder, ((status, said), (_, said_there)) = found["broken"]
    assert status == 1
    first, _, trace = said.partition("\n")
    assert first.startswith("error: rank 1 on ")
    assert first.endswith(": RuntimeError: the heart of it; go on from checkpoint-1 with --resume, in 2 processes")
    assert trace.startswith("Traceback")
    assert trace.endswith("\nRuntimeError: the heart of it\n")
    assert "Connection closed" not in trace
    assert said_there == ""
    assert (folder / "output" / "train.log").read_text().endswith(f"failed: {said.removeprefix('error: ')}")
    leg = leg_of(folder)
    assert (leg["status"], f"error: {leg['reason']}") == ("failed", first)


@pytest.mark.slow
def test_a_users_error_on_one_rank_is_one_line(found: Any) -> None:
    _, ((status, said), _) = found["missing file"]
    assert status == 2
    assert said.count("\n") == 1, said
    line = said.rstrip("\n")
    assert line.startswith("error: rank 1 on ")
    assert line.endswith("No such file or directory: '/there/is/none'")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0])
def test_a_killed_rank_is_named_by_the_other(found: Any, lost: int) -> None:
    folder, ends = found[f"killed {lost}"]
    assert ends[lost][0] == -signal.SIGKILL
    status, said = ends[1 - lost]
    assert status == 1
    assert said.count("\n") == 1, said
    line = said.rstrip("\n")
    assert line.startswith(f"error: rank {lost} on ")
    assert line.endswith("its process is gone; go on from checkpoint-1 with --resume, in 2 processes")
    leg = leg_of(folder)
    assert (leg["status"], f"error: {leg['reason']}") == ("failed", line)
    assert line.removeprefix("error: ") in (folder / "output" / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_stopped_rank_is_missed_and_ended(found: Any, lost: int) -> None:
    folder, ends = found[f"stopped {lost}"]
    status, said = ends[1 - lost]
    assert (status, ends[lost][0]) == (1, -signal.SIGKILL)
    assert said.startswith(f"error: rank {lost} on ")
    assert f"was lost: nothing was heard of it for {TIMEOUT_S} s" in said
    assert leg_of(folder)["status"] == "failed"
    # from the checkpoint of the step before to what is written of the end
    began = (folder / "output" / "checkpoint-1" / "trainer_state.json").stat().st_mtime
    assert (folder / "output" / "train.log").stat().st_mtime - began < TIMEOUT_S + 4 * BEAT + 15


@pytest.mark.slow
def test_a_rank_that_works_for_long_is_waited_for(found: Any) -> None:
    folder, ends = found["slow"]
    assert ends == [(0, ""), (0, "")]
    assert leg_of(folder)["status"] == "finished"


def test_a_run_of_several_ranks_leaves_no_process_group_and_another_may_follow(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipe(tmp_path, max_steps=2).model_dump_json(exclude_unset=True))
    port = free_port()
    ranks = [FORKED.Process(target=twice_main, args=(rank, str(tmp_path), port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]


def twice_main(rank: int, folder: str, port: int) -> None:
    settle()
    join(rank, 2, port)
    told = Recipe.model_validate_json(Path(folder, "recipe.json").read_text())
    for steps in (2, 3):
        training = told.training.model_copy(update={"max_steps": steps})
        train(told.model_copy(update={"training": training}), resume="auto")
        assert not dist.is_initialized()


def test_a_process_that_was_itself_suspended_blames_nobody(tmp_path: Path) -> None:
    heart: Any = Heartbeat(None, 0, 2)  # type: ignore[arg-type]
    watch = RankWatch(heart, 0, 2, TIMEOUT_S, tmp_path)
    heart.excuse(-3 * TIMEOUT_S)
    assert watch._missed() is not None
    heart.excuse(3 * TIMEOUT_S)
    assert watch._missed() is None


def test_a_late_store_blames_no_rank_but_its_host(tmp_path: Path) -> None:
    heart: Any = Heartbeat(None, 1, 3)  # type: ignore[arg-type]
    watch = RankWatch(heart, 1, 3, TIMEOUT_S, tmp_path)
    heart.excuse(-0.8 * TIMEOUT_S)
    heart.heard[0] -= TIMEOUT_S
    assert watch._missed() is None
    heart.excuse(-TIMEOUT_S)
    lost = watch._missed()
    assert lost is not None
    assert lost.rank == 0


@pytest.mark.parametrize("ended", [True, False])
def test_a_store_that_goes_after_all_have_ended_is_no_loss(tmp_path: Path, ended: bool) -> None:
    """Rank 0 may be gone, and the store with it, before a slow rank has read that all have ended."""
    heart: Any = Heartbeat(None, 1, 2)  # type: ignore[arg-type]
    watch = RankWatch(heart, 1, 2, TIMEOUT_S, tmp_path)
    heart.broken = "Connection closed by peer"
    if ended:
        heart.end()
    assert (watch._lost() is None) == ended
