"""The command line: parses arguments, loads the one command that was asked for, and turns errors into one line.

Exit status: 0 done; 1 a leak was found, or the program failed (with a traceback); 2 the user's input is at fault (one
line, a traceback only with ``--debug``); 130 and 143 interrupted, by Ctrl-C and SIGTERM (one line); 141 nobody read the
output to its end (in silence).
"""

from __future__ import annotations

import argparse
import importlib
import io
import keyword
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeAlias

from deltatune.errors import InterruptedRunError, RecipeKeyError, UserError, is_missing, is_users, one_line
from deltatune.phases import phase, shown_by
from deltatune.pipes import UNREAD, discard, is_unread
from deltatune.signals import Interruption, done_with_signals, interruptible, kept_by

__all__ = ["main"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")

# those for which the machine is looked at before torch is imported
_PREFLIGHT = ("plan", "train")

# what an interrupted command leaves, where nobody knows more
_KEPT = {"preprocess": "what is tokenised is kept", "train": "this command has trained nothing"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Args:
        argv: its words; None for those of this process, which ends with the command.
    """
    status: int | None = None
    read = True
    try:
        with interruptible():
            status = _main(argv)
    except Interruption as error:  # before the command, or as it was over
        if status is None:
            _say_once(str(error))
            status = error.status
    finally:
        if argv is None:
            read = _is_read()
    if argv is None:
        done_with_signals()
    return status if read else status or UNREAD


def _is_read() -> bool:
    """Whether the standard output takes the last of what it was given; else Python would say so as it ends."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        return False
    except (OSError, AttributeError):  # Python says it as it ends; there may be no standard output
        pass
    return True


def _main(argv: Sequence[str] | None) -> int:
    debug = False
    places: dict[tuple[str | int, ...], str] = {}
    _take_all_characters()
    try:
        args = _parser().parse_args(argv)
        debug = args.debug
        _check(args)
        with kept_by(lambda: _kept(args.command)):
            if "recipe" in args:
                with phase("reading the recipe"):
                    _read_recipe(args, places)
            status: int = _command(args).run(args)
    except KeyboardInterrupt as error:
        _say_once(str(error) or "interrupted")
        if not isinstance(error, Interruption):
            return 130
        error.answered = True
        return error.status
    except InterruptedRunError as error:
        _say_once(str(error))
        return error.status
    except (ValueError, OSError, ImportError) as error:
        if not is_users(error):
            raise
        if isinstance(error, BrokenPipeError) and is_unread(sys.stdout):
            return UNREAD
        if debug:
            traceback.print_exception(error)
        missing = f"the package {getattr(error, 'name', '')} is missing: pip install 'deltatune[train]'"
        place = f"{places[error.key]}: " if isinstance(error, RecipeKeyError) and error.key in places else ""
        sys.stderr.write(f"error: {place}{missing if is_missing(error) else one_line(error)}\n")
        return 2
    return status


def _read_recipe(args: argparse.Namespace, places: dict[tuple[str | int, ...], str]) -> None:
    """Puts the recipe in the place of its file, and into ``places`` where its keys are.

    That is before the command, and with it torch, is imported: a typo costs no seconds.
    """
    args.file = args.recipe
    loaded = importlib.import_module("deltatune.config.load").load_recipe(args.file, args.overrides)
    args.recipe, args.warnings = loaded.recipe, loaded.warnings
    places.update(loaded.places)
    if args.command in _PREFLIGHT:
        # nor does a missing file or package
        importlib.import_module("deltatune.training.preflight").preflight(args.recipe, args.resume)


def _command(args: argparse.Namespace) -> Any:
    """The module of a command; importing torch and transformers takes seconds, and a terminal is told."""
    shown: AbstractContextManager[None] = nullcontext()
    if sys.stderr.isatty():
        console = importlib.import_module("rich.console").Console(stderr=True)
        shown = shown_by(importlib.import_module("deltatune.training.console").RunConsole(console).phase)
    with shown, phase("importing the libraries"):
        return importlib.import_module(f"deltatune.commands.{_module(args)}")


def _kept(command: str) -> str:
    from deltatune.runs.command import starting_again

    return f"{_KEPT.get(command, 'nothing was written')}; {starting_again()}"


def _say_once(text: str) -> None:
    """Says how a run ended whose ranks all end so."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{text}\n")


def _take_all_characters() -> None:
    """A locale whose encoding lacks a character of ours, or of a file's name, shows a question mark for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _check(args: argparse.Namespace) -> None:
    """Options that act only beside another one."""
    if args.command in _PREFLIGHT and args.allow_change and args.resume is None:
        raise UserError("--allow-change cannot act without --resume: a new run trains as its recipe says")
    if args.command == "train" and args.nproc is not None:
        launched = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
        if launched:
            raise UserError(
                f"--nproc starts the processes itself, and {launched[0]} is set: another launcher, such as torchrun, "
                "has started this one; leave one of them out"
            )


def _module(args: argparse.Namespace) -> str:
    """The module of a command."""
    if args.command == "train" and args.nproc is not None:
        return "launch"
    return f"{args.command}_" if keyword.iskeyword(args.command) else str(args.command)


class _Parser(argparse.ArgumentParser):
    """Reports its errors as all others are reported."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    from deltatune import __version__

    parser = _Parser(prog="deltatune", description="Packed, compiled fine-tuning of hybrid language models.")
    parser.add_argument("--version", action="version", version=f"deltatune {__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_commands_of_recipes(commands)
    _add_verify(commands)
    _add_doctor(commands)
    _add_merge(commands)
    _add_export(commands)
    _add_import(commands)
    _add_report(commands)
    return parser


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _add(commands: _Commands, name: str, summary: str) -> _Parser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_commands_of_recipes(commands: _Commands) -> None:
    train = _add(commands, "train", "Fine-tune a model as a recipe says.")
    preprocess = _add(commands, "preprocess", "Tokenise and pack a recipe's data, and report on it.")
    plan = _add(commands, "plan", "Say what a run would do, without loading weights.")
    for parser in (train, preprocess, plan):
        parser.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
        what = "change one key, such as training.max_steps=100 or data.train.0.path=mine.jsonl; may be repeated"
        settings = parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
        settings.type, settings.help = _setting, what
    for parser in (train, plan):
        what = (
            "go on from the last whole checkpoint of training.output_dir, or from DIR; auto: or start if there is none"
        )
        parser.add_argument("--resume", nargs="?", const=True, metavar="DIR|auto", help=what)
        what = "with --resume: go on with other data, packs or seeds than the checkpoint was trained with"
        parser.add_argument("--allow-change", action="store_true", help=what)
    what = "train in N processes of this machine, one for each GPU"
    train.add_argument("--nproc", type=_processes, metavar="N", help=what)
    what = "say what a run in N processes would do"
    plan.add_argument("--nproc", type=_processes, metavar="N", help=what)
    what = "print N samples, trained tokens coloured"
    preprocess.add_argument("--show", type=_count, default=0, metavar="N", help=what)
    preprocess.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal")


def _add_verify(commands: _Commands) -> None:
    parser = _add(commands, "verify", "Prove that packed documents stay independent in a checkpoint's model.")
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, or a model name on the Hugging Face Hub")
    parser.add_argument("--lengths", type=_lengths, metavar="A,B,...", help="lengths of the probe's documents")
    parser.add_argument("--tolerance", type=float, help="largest relative difference between packed and alone")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="float32 by default")
    parser.add_argument("--device", default="cpu", help="where to run; cpu by default")
    parser.add_argument("--stock", action="store_true", help="probe the model as it ships, unprepared")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with it")


def _add_doctor(commands: _Commands) -> None:
    parser = _add(commands, "doctor", "Show versions, devices and the kernels that would run here.")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiler's smoke test")
    what = "compile what this recipe's run will compile, before it; may be repeated"
    parser.add_argument("--build", action="append", metavar="RECIPE", help=what)


def _add_merge(commands: _Commands) -> None:
    parser = _add(commands, "merge", "Merge an adapter into its base model and save a plain checkpoint.")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="the folder of a trained adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the merged checkpoint goes; must be new")
    parser.add_argument("--base", metavar="MODEL", help="the base model, where it has moved since training")
    what = "merge into a base with other weights than the adapter was trained on"
    parser.add_argument("--allow-other-base", action="store_true", help=what)
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the merged weights; the base's by default")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the base")


def _add_export(commands: _Commands) -> None:
    parser = _add(commands, "export", "Write an adapter in the form that an inference server reads.")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="the folder of a trained adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the new adapter goes; must be new")
    what = "per-expert: a pair of matrices for each projection of each routed expert; peft: PEFT's own"
    parser.add_argument("--layout", required=True, choices=("peft", "per-expert"), help=what)
    parser.add_argument("--base", metavar="MODEL", help="the base model, where it has moved since training")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the base")


def _add_import(commands: _Commands) -> None:
    parser = _add(
        commands, "import", "Turn another project's recipe into one of ours, and say what became of each key."
    )
    what = "Axolotl's or LLaMA-Factory's YAML, TRL's YAML or shell script with trl sft, Unsloth's .py or .ipynb"
    parser.add_argument("file", metavar="FILE", help=what)
    projects = ("axolotl", "llamafactory", "trl", "unsloth")
    parser.add_argument("--from", dest="kind", choices=projects, help="whose it is, where its keys do not tell")
    what = "a new file for the recipe, which otherwise goes to the output and the table to the error output"
    parser.add_argument("--output", metavar="RECIPE", help=what)


def _add_report(commands: _Commands) -> None:
    parser = _add(commands, "report", "Write what runs did as one HTML page: curves, legs, packs, kernels, memory.")
    what = "the training.output_dir of a run, whether it goes on or not; several are laid over each other"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=what)
    parser.add_argument("--output", metavar="FILE", help="where the page goes; report.html in the first run's folder")


def _setting(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, such as training.max_steps=100; got {text!r}")
    return text


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _processes(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of processes, got {text!r}")
    return int(text)


def _lengths(text: str) -> list[int]:
    parts = text.replace(",", " ").split()
    if len(parts) < 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected at least two lengths, such as 5,1,70,7; got {text!r}")
    return [int(part) for part in parts]
