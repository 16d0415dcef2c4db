"""deltatune doctor: what is installed, which kernels would run, and what is known to go wrong with that."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from deltatune import __version__, ops
from deltatune.errors import first_line
from deltatune.models.registry import FAMILIES
from deltatune.ops._gated_delta_rule import fla
from deltatune.ops._nvidia import version_of
from deltatune.report import table

if TYPE_CHECKING:
    from deltatune.config.schema import Recipe

__all__ = ["known_problems", "run"]

# what a line of the report is called -> the distributions that may provide it
_PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton", "triton-rocm"),
    "transformers": ("transformers",),
    "peft": ("peft",),
    "accelerate": ("accelerate",),
    "datasets": ("datasets",),
    "trl": ("trl",),
    "fla": ("flash-linear-attention", "fla-core"),
    "flash_qla": ("flash-qla", "flash_qla"),
    "tilelang": ("tilelang",),
    "quack": ("quack-kernels",),
    "causal-conv1d": ("causal-conv1d",),
    "bitsandbytes": ("bitsandbytes",),
}
_OLDEST = {"torch": "2.11", "transformers": "5.17"}


def run(args: argparse.Namespace) -> int:
    """Prints the report, builds kernels where that is asked for; 1 when something is known to go wrong."""
    recipes = {}
    if args.build:
        from deltatune.config.load import load_recipe

        recipes = {path: load_recipe(path).recipe for path in args.build}
    versions = {name: version_of(*options) for name, options in _PACKAGES.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"deltatune {__version__}, Python {platform.python_version()} on {platform.platform()}", ""]
    lines += table(("package", "version"), [(name, str(version or "-")) for name, version in versions.items()])
    lines += ["", *table(("device", "", "memory"), _devices())]
    lines += ["", *table(("op", "runs on", "because"), list(_kernels(device)))]
    problems = known_problems(versions, torch.cuda.get_device_capability() if device.type == "cuda" else None)
    sys.stdout.write("\n".join(lines) + "\n")
    lines = []
    for path, recipe in recipes.items():
        problems += _build(path, recipe, device)
    if not args.no_compile:
        failure = compile_failure(device)
        lines += ["", f"torch.compile on {device.type}: {failure or 'works'}"]
        problems += [f"torch.compile on {device.type} fails: {failure}"] if failure else []
    lines += ["", *(f"problem: {problem}" for problem in problems)] if problems else ["", "no known problem"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if problems else 0


def _build(path: str, recipe: Recipe, device: torch.device) -> list[str]:
    """Compiles what a recipe's run will compile, a line for each step of it; what went wrong."""
    what = f"build {path}: {recipe.model.name_or_path}, packs of {recipe.packing.tokens_per_batch} tokens"
    if device.type != "cuda":
        sys.stdout.write(f"\n{what}: would train single steps, which compiles for the GPU; there is none\n")
        return [f"--build {path} did nothing: no CUDA device is visible; run it on the machine that trains"]
    from deltatune.commands.prebuild import build

    sys.stdout.write(f"\n{what}\n")
    for step, seconds in build(recipe, device):
        sys.stdout.write(f"  {step}: {seconds:.1f} s\n")
        sys.stdout.flush()
    return []


def known_problems(versions: Mapping[str, Version | None], capability: tuple[int, int] | None) -> list[str]:
    """What is known to go wrong with these versions on a GPU of this compute capability (None: no GPU).

    Each line says what to install.
    """
    problems = [
        f"{name} {version} is older than {oldest}: pip install '{name}>={oldest}'"
        for name, oldest in _OLDEST.items()
        if (version := versions.get(name)) is not None and version < Version(oldest)
    ]
    if versions.get("fla") is not None and capability is not None and capability >= (8, 0):
        refusal = fla.refusal(capability, torch.bfloat16)
        problems += [refusal] if refusal else []
    return problems


def compile_failure(device: torch.device) -> str | None:
    """Why a small function does not compile here, or None when it compiles and computes what it should."""

    def affine(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * 2.0 + 1.0

    x = torch.linspace(-1.0, 1.0, 128, device=device)
    try:
        result = torch.compile(affine, fullgraph=True)(x)
    except (RuntimeError, OSError) as error:
        return first_line(error)
    return None if torch.allclose(result, affine(x), atol=1e-5) else "the compiled function computes something else"


def _devices() -> list[tuple[str, str, str]]:
    rows = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads", "")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.name}, sm{found.major}{found.minor}"
        rows.append((f"cuda:{index}", capability, f"{found.total_memory / 2**30:.0f} GiB"))
    return rows


def _kernels(device: torch.device) -> Iterator[tuple[str, str, str]]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    specs = {spec.op: spec for spec in ops.Spec.__subclasses__()}
    for op in dict.fromkeys(op for family in FAMILIES for op in family.ops):
        try:
            choice = ops.choose(specs[op](device, dtype))
        except ValueError as error:
            yield op, "cannot run", str(error)
        else:
            yield op, choice.impl, choice.reason
