"""Folders of checkpoints: whole with their manifest, in their place or not there."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deltatune.errors import UserError
from deltatune.training import sealed
from deltatune.training.sealed import (
    ORDER,
    clear_leftovers,
    commit,
    manifest,
    next_place,
    problem_of,
    resume_point,
    rotate,
    seal,
    staged_checkpoint,
)

FILES = {"adapter_model.safetensors": b"weights" * 99, "optimizer.pt": b"moments" * 999, "trainer_state.json": b"{}"}


def checkpoint(output_dir: Path, step: int, content: bytes = b"", *, saved_as: int | None = None) -> Path:
    with staged_checkpoint(output_dir, step) as staging:
        folder = staging / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name, given in FILES.items():
            (folder / name).write_bytes(given + content)
        seal(folder, {"step": step, ORDER: next_place(output_dir) if saved_as is None else saved_as})
        commit(folder, output_dir / folder.name)
        staging.rmdir()
    return output_dir / f"checkpoint-{step}"


def test_a_checkpoint_is_whole_and_tells_of_itself(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 3)
    assert problem_of(folder) is None
    assert manifest(folder)["step"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_name_is_on_the_disk_before_what_it_replaces_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses its power keeps what was synced."""
    place, seen = checkpoint(tmp_path, 3), []
    monkeypatch.setattr(
        sealed, "sync", lambda path: seen.append((path, (tmp_path / ".replaced-checkpoint-3").exists()))
    )
    checkpoint(tmp_path, 3, b"anew")
    assert seen[-1] == (place.parent, True)


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest after the files that it tells of, and then the folder, which holds their names."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(sealed, "sync", lambda path: seen.append((path.name, path.stat().st_size)))
    folder = checkpoint(tmp_path, 3)
    files = sorted(FILES)
    assert [name for name, _ in seen] == [*files, "manifest.json", "checkpoint-3", tmp_path.name]
    assert seen[: len(files) + 1] == [(name, (folder / name).stat().st_size) for name in (*files, "manifest.json")]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["removed", "cut", "other bytes"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, name: str, damage: str) -> None:
    whole, broken = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    content = (broken / name).read_bytes()
    if damage == "removed":
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(content[:1] if damage == "cut" else b"!" + content[1:])
    found, said = resume_point(tmp_path, True)
    assert found == whole
    assert len(said) == 1
    assert said[0].startswith(f"{broken} is passed over: ")
    with pytest.raises(UserError, match="checkpoint-6 is no whole checkpoint: "):
        resume_point(tmp_path, str(broken))


@pytest.mark.parametrize(
    ("resume", "steps", "expected"),
    [(None, [], None), (True, [9, 10], 10), ("auto", [9, 10], 10), ("auto", [], None), ("checkpoint-9", [9, 10], 9)],
)
def test_where_a_run_goes_on(tmp_path: Path, resume: Any, steps: list[int], expected: int | None) -> None:
    for step in steps:
        checkpoint(tmp_path, step)
    given = str(tmp_path / resume) if isinstance(resume, str) and resume != "auto" else resume
    found, said = resume_point(tmp_path, given)
    assert found == (None if expected is None else tmp_path / f"checkpoint-{expected}")
    assert said == []


@pytest.mark.parametrize(
    ("resume", "steps", "broken", "message"),
    [
        (None, [3], [], "holds checkpoints of an earlier run; continue it with --resume"),
        (True, [], [], "holds no checkpoint to resume from; start without --resume, or say --resume auto"),
        (True, [], [3], "holds no whole checkpoint; .*checkpoint-3 is passed over: .*; remove the checkpoints"),
        ("auto", [], [3], "holds no whole checkpoint; .*checkpoint-3 is passed over"),
    ],
)
def test_a_run_that_cannot_go_on_says_what_to_do(
    tmp_path: Path, resume: Any, steps: list[int], broken: list[int], message: str
) -> None:
    for step in steps:
        checkpoint(tmp_path, step)
    for step in broken:
        (checkpoint(tmp_path, step) / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=message):
        resume_point(tmp_path, resume)


def test_a_model_alone_cannot_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FILES, "optimizer.pt")
    checkpoint(tmp_path, 3)
    with pytest.raises(UserError, match=r"no optimizer's state .*, so nothing can go on from it"):
        resume_point(tmp_path, True)


class Killed(BaseException):
    """A process that ends here, without a handler."""


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the process end before the given one of all calls that change the disk."""
    calls = iter(range(10_000))

    def killing(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (Path, "rename"),
        (Path, "rmdir"),
        (sealed, "sync"),
    ):
        monkeypatch.setattr(owner, name, killing(getattr(owner, name)))
    monkeypatch.setattr(sealed, "shutil", SimpleNamespace(rmtree=killing(shutil.rmtree), disk_usage=shutil.disk_usage))


@pytest.mark.parametrize("number", range(40))
def test_killed_at_any_write_the_checkpoint_before_or_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Saved over a checkpoint of the same step, as a run does that went on from an older one."""
    before = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    finished = False
    with monkeypatch.context() as patch:
        killed_at(number, patch)
        try:
            checkpoint(tmp_path, 6, b"new")
            finished = True
        except Killed:
            pass
    assert resume_point(tmp_path, "auto") == (before[1], [])
    content = (before[1] / "optimizer.pt").read_bytes()
    assert content in (FILES["optimizer.pt"], FILES["optimizer.pt"] + b"new")
    if finished:
        assert content.endswith(b"new")
        assert number > 15, "every write was tried"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize("number", range(12))
def test_killed_in_its_first_save_a_run_can_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        killed_at(number, patch)
        with pytest.raises(Killed):
            checkpoint(tmp_path, 3)
    for resume in (None, "auto"):
        try:
            found, _ = resume_point(tmp_path, resume)
        except UserError:
            assert resume is None, "the save was done"
            assert problem_of(tmp_path / "checkpoint-3") is None
        else:
            assert found in (None, tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:858] . unexpected pos 142784 vs 142676"),
        Exception("No space left on device (os error 28)"),  # as tokenizers raises it
    ],
)
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    checkpoint(tmp_path, 3)

    def save() -> None:
        with staged_checkpoint(tmp_path, 6) as staging:
            staging.mkdir()
            (staging / "half").write_text("x")
            raise error

    with pytest.raises(UserError, match=r"checkpoint-6 cannot be saved: .*; make room, then go on"):
        save()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_other_faults_while_saving_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of our own"), staged_checkpoint(tmp_path, 6):
        raise RuntimeError("of our own")


def test_the_oldest_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        checkpoint(tmp_path, step)
    rotate(tmp_path, None, None)
    assert len(list(tmp_path.iterdir())) == 4
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-30"]
    rotate(tmp_path, 1, str(tmp_path / "checkpoint-2"))
    assert len(list(tmp_path.iterdir())) == 2, "the latest is what a run goes on from"


def test_what_was_saved_last_is_gone_on_from_and_stays(tmp_path: Path) -> None:
    """A run that went on from step 3 leaves 4 and 6 of the run before: later steps, of other weights."""
    for place, step in enumerate((3, 4, 6), start=1):
        checkpoint(tmp_path, step, saved_as=place)
    checkpoint(tmp_path, 4, b"anew", saved_as=next_place(tmp_path))
    assert resume_point(tmp_path, True)[0] == tmp_path / "checkpoint-4"
    rotate(tmp_path, 2, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    checkpoint(tmp_path, 5, saved_as=next_place(tmp_path))
    rotate(tmp_path, 2, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_a_damaged_checkpoint_does_not_stay_at_the_cost_of_a_whole_one(tmp_path: Path) -> None:
    """One that was passed over has a later step than those which are saved next."""
    checkpoint(tmp_path, 2, saved_as=1)
    (checkpoint(tmp_path, 4, saved_as=2) / "optimizer.pt").unlink()
    checkpoint(tmp_path, 3, saved_as=next_place(tmp_path))
    rotate(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_links_to_checkpoints_elsewhere_go_and_their_places_stay(tmp_path: Path) -> None:
    output_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    checkpoint(output_dir, 2).rename(elsewhere)
    for content in (b"", b"anew"):
        (output_dir / "checkpoint-2").symlink_to(elsewhere)
        checkpoint(output_dir, 4, content)
        rotate(output_dir, 1, None)
        assert [path.name for path in output_dir.iterdir()] == ["checkpoint-4"]
    assert problem_of(elsewhere) is None


def test_a_link_to_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "gone")
    assert problem_of(checkpoint(tmp_path, 2)) is None
    (tmp_path / "checkpoint-2").rename(tmp_path / ".replaced-checkpoint-2")
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "gone")
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert problem_of(tmp_path / "checkpoint-2") is None


def test_a_checkpoint_that_is_removed_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within, a run would otherwise leave a part of it under its name."""
    for step in (2, 4):
        checkpoint(tmp_path, step)

    def killed(folder: Path, **_: Any) -> None:
        (folder / "optimizer.pt").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(Killed):
            rotate(tmp_path, 1, None)
    assert not (tmp_path / "checkpoint-2").exists()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


_FILE = {"bytes": 1, "crc32": 1}


@pytest.mark.parametrize(
    "content",
    [
        *({"files": files} for files in (None, [], {}, ["optimizer.pt"], {"optimizer.pt": 3}, {"optimizer.pt": {}})),
        {"files": {"optimizer.pt": {"bytes": "1", "crc32": 1}}},
        *({"files": {"optimizer.pt": _FILE}, name: ["x"]} for name in ("recipe", "data", "digests", ORDER)),
        None,
    ],
)
def test_a_manifest_that_says_something_else_is_none(tmp_path: Path, content: Any) -> None:
    whole, broken = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    (broken / "manifest.json").write_text("[" * 100_000 if content is None else json.dumps(content))
    found, said = resume_point(tmp_path, True)
    assert found == whole
    assert said == [f"{broken} is passed over: it holds no manifest.json that can be read"]


def test_what_is_no_leftover_stays(tmp_path: Path) -> None:
    for name in ("checkpoint-final", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps([]))
    clear_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert problem_of(tmp_path) == "it holds no manifest.json that can be read"
