"""deltatune verify: the independence probe on a checkpoint's own model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pydantic
import torch

from deltatune.commands.quiet import quiet_libraries
from deltatune.config.explain import explain
from deltatune.config.schema import ModelSection
from deltatune.errors import UserError, first_line
from deltatune.phases import phase
from deltatune.preparation import prepare
from deltatune.training.checkpoint import load_model
from deltatune.verification import verify

__all__ = ["run"]


@quiet_libraries()
def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 when a document saw another, 0 when none did."""
    device = _usable_device(args.device)
    model = load_model(_section(args)).to(device)
    if not args.stock:
        prepare(model)
    given: dict[str, Any] = {"lengths": args.lengths, "tolerance": args.tolerance}
    with phase("probing the model"):
        report = verify(model, **{name: value for name, value in given.items() if value is not None})
    sys.stdout.write(f"{report}\n")
    return 0 if report.ok else 1


def _section(args: argparse.Namespace) -> ModelSection:
    given = {"name_or_path": args.model, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    try:
        return ModelSection.model_validate(given)
    except pydantic.ValidationError as error:
        raise UserError(explain(error, given, {(): "MODEL"})) from error


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from error
    return device
