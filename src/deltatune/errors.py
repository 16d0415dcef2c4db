"""The exceptions that mean: the recipe or the input is at fault, not the program."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "DataError",
    "InterruptedRunError",
    "RankFailedError",
    "RecipeKeyError",
    "UserError",
    "first_line",
    "is_missing",
    "is_users",
    "near_files",
    "nearest",
    "one_line",
    "user_path",
]

_PACKAGE = Path(__file__).parent
# what the extra `train` installs, by import name
_TRAIN_PACKAGES = ("accelerate", "datasets", "jinja2", "peft", "pydantic", "rich", "yaml")


class UserError(ValueError):
    """Something the user can mend: the message says what was expected, what came, and the remedy.

    The command line prints it as one line and exits with status 2.
    """


class RecipeKeyError(UserError):
    """About one key of a recipe, found where its file is no longer known: the command line adds the place."""

    def __init__(self, key: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.key = key


class DataError(UserError):
    """A row, file or data option that cannot be trained on; one line that names where it is and the remedy."""


class InterruptedRunError(Exception):
    """A run that a signal ended, with a checkpoint. The message says how to go on.

    The command line prints it and exits with ``status``, 128 and the number of the signal.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RankFailedError(Exception):
    """A run of several processes that another rank's failure, or its end, has ended.

    The message is a line, with the traceback of that rank below where it had one. It was shown once for all ranks, so
    the command line exits with ``status`` and says nothing.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_interruption(self) -> bool:
        """Whether a signal has ended the other rank."""
        return self.status > 128


def is_users(error: BaseException) -> bool:
    """Whether an error is about the input rather than a fault of this program.

    Ours say so. A bare ValueError or ImportError counts when our own code raised it, where it is a check; from the
    inside of a library it is a surprise, and its traceback is needed. An OSError is the machine's or the path's.
    """
    if not isinstance(error, ValueError | OSError | ImportError):
        return False
    if isinstance(error, UserError | OSError) or is_missing(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(_PACKAGE)


def is_missing(error: BaseException) -> bool:
    """Whether a package that training needs is not installed."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _TRAIN_PACKAGES


def user_path(name: str | Path) -> Path:
    """A path as a user writes it: ``~`` and ``~NAME`` stand for home directories.

    Raises:
        UserError: no user has that name.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        user = Path(name).parts[0].removeprefix("~")
        why = f"there is no user {user}" if user else "this user has no home directory"
        raise UserError(f"{name} names no file or folder: {why}") from error


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message that holds anything; reports of compilers and loaders are long."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# what people write -> what is meant, where that is known and not spelled alike
_MEANT = {
    "adam": "adamw_torch",
    "adamw": "adamw_torch",
    "alpha": "lora_alpha",
    "batch_size": "tokens_per_batch",
    "bf16": "bfloat16",
    "dropout": "lora_dropout",
    "epochs": "num_train_epochs",
    "fp16": "float16",
    "fp32": "float32",
    "lr": "learning_rate",
    "rank": "r",
    "steps": "max_steps",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean x?)"`` for the closest known name, or nothing when none is close."""
    names = list(known)
    meant = _MEANT.get(name)
    matches = [meant] if meant in names else difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def near_files(path: Path) -> str:
    """What the folder of a missing file or folder holds instead, to follow the words that it is missing."""
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {folder}"
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir() if entry != path], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; {folder.resolve()} holds nothing of a like name"
