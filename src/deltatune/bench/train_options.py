"""The options of ``deltatune bench train``: each says its unit, its default and what it costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import torch

from deltatune.bench.child import COMPILED
from deltatune.bench.models import TARGETS
from deltatune.bench.protocol import RECORDS
from deltatune.bench.shapes import SHAPES
from deltatune.bench.systems import BASELINES
from deltatune.bench.workload import LONGEST, SHORTEST

__all__ = ["FRONTIER", "add_arguments"]

FRONTIER: Final = ("none", 0.8, 0.6, 0.4, 0.2, "layer", "auto")
"""What ``--frontier`` sweeps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``deltatune bench train``."""
    _add_workload(parser)
    _add_systems(parser)
    _add_timing(parser)


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default="qwen3.5-2b",
        choices=list(SHAPES),
        help="shapes of this model, its weights random; %(default)s by default",
    )
    add(
        "--layers",
        type=int,
        metavar="N",
        help=(
            "decoder layers, the pattern of their types kept; the model's own number by default; time and memory "
            "grow with it"
        ),
    )
    add(
        "--tokens",
        type=int,
        default=16384,
        metavar="T",
        help="tokens of a pack; %(default)s by default; time and activations grow with it",
    )
    add(
        "--one-document",
        action="store_true",
        help=(
            "one document as long as the pack, in place of documents of --shortest to --longest tokens; off by "
            "default; attention grows with its square"
        ),
    )
    add(
        "--shortest",
        type=int,
        default=SHORTEST,
        metavar="T",
        help="tokens of the shortest document; %(default)s by default",
    )
    add(
        "--longest",
        type=int,
        default=LONGEST,
        metavar="T",
        help=(
            "tokens of the longest document; %(default)s by default; where all are longer than 4096, a shorter pack "
            "is held to float32 in place of the timed one"
        ),
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of weights, adapters, lengths and tokens; %(default)s by default",
    )
    add(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="of weights and activations; %(default)s by default",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda by default where there is one, else cpu, which is for trying things out",
    )


def _add_systems(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpointing",
        nargs="+",
        default=["none", "layer"],
        metavar="C",
        help=(
            "of ours: none, layer, auto, or the share of activations that stays, from 0 to 1; none layer by default; "
            "each is one system more to compile, check and time"
        ),
    )
    add(
        "--frontier",
        action="store_true",
        help=(
            f"checkpointing {' '.join(map(str, FRONTIER))} for the first of --targets: {len(FRONTIER)} systems, a "
            "record of its own kind; off by default"
        ),
    )
    add(
        "--targets",
        nargs="+",
        default=["qkvo"],
        choices=list(TARGETS),
        help=(
            "projections that have adapters: qkvo by default; baselines and the floor have the first; each has ours "
            "once for every --checkpointing, and a float32 reference of its own"
        ),
    )
    add(
        "--lora",
        nargs="+",
        default=["auto"],
        choices=["auto", "stock", "fused"],
        help=(
            "how ours runs adapters, as prepare takes it; auto by default; each is ours once more; auto and fused on "
            "all projections hold their own copy of the frozen weights"
        ),
    )
    add(
        "--baselines",
        nargs="*",
        default=["stock", "stock as shipped"],
        choices=[*BASELINES, COMPILED],
        help=(
            "stock and 'stock as shipped' by default; no word after it: none; 'stock compiled' compiles in a process "
            "of its own, for --compile-limit at most"
        ),
    )
    add(
        "--baseline-checkpointing",
        nargs="+",
        default=["layer", "none"],
        choices=["none", "layer"],
        help="of the baselines but 'stock compiled'; layer none by default; each is every baseline once more",
    )
    add("--rank", type=int, default=16, metavar="R", help="of the adapters; %(default)s by default")
    add(
        "--alpha",
        type=int,
        default=32,
        metavar="A",
        help="of the adapters, which are scaled by A / R; %(default)s by default",
    )
    add(
        "--adapter-dtype",
        default="float32",
        choices=["float32", "model"],
        help="of the adapters and their optimizer state: %(default)s by default, or that of the weights",
    )
    add(
        "--backend",
        default="inductor",
        choices=["inductor", "aot_eager", "none"],
        help=(
            "how ours is compiled: %(default)s by default; aot_eager: graphs without generated kernels; none: "
            "eagerly, nothing to wait for"
        ),
    )


def _add_timing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--warmup",
        type=int,
        default=3,
        metavar="N",
        help="steps of each system before its first turn, not timed; %(default)s by default",
    )
    add(
        "--steps",
        type=int,
        default=12,
        metavar="N",
        help="timed steps of each system over all turns; %(default)s by default",
    )
    add(
        "--rounds",
        type=int,
        default=4,
        metavar="N",
        help=(
            "turns that the steps are spread over; %(default)s by default; each costs one step more, which is not timed"
        ),
    )
    add(
        "--no-floor",
        action="store_true",
        help=(
            "leave the arithmetic floor out, which times every product, attention and delta rule of a step on its "
            "own; measured by default"
        ),
    )
    add(
        "--kernels",
        nargs="?",
        const="fastest",
        choices=("fastest", "all"),
        help=(
            "profile ours kernel by kernel, where it is fastest for each of --targets (fastest, as without a word) or "
            "at every setting (all): two steps more each; off by default"
        ),
    )
    add(
        "--compile-limit",
        type=float,
        default=300.0,
        metavar="S",
        help=(
            "seconds from the start of a process of its own ('stock compiled', --cold-start) to the end of its first "
            "step; %(default)s by default"
        ),
    )
    add(
        "--cold-start",
        type=int,
        nargs="?",
        const=0,
        metavar="N",
        help=(
            "start the first of ours in two new processes, without compiled graphs on disk and with them; N decoder "
            "layers, as many as --layers without N; off by default; each takes --compile-limit at most to its first "
            "step"
        ),
    )
    add("--commit", metavar="HASH", help="of the source, where it lies without its history; git says it by default")
    add("--records", type=Path, default=RECORDS, metavar="DIR", help="where the record goes; %(default)s by default")
