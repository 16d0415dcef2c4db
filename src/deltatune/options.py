"""What ``prepare`` is asked, checked when it is said; nothing changes it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from deltatune.config.inductor import INDUCTOR_OPTIONS

__all__ = ["CompileOptions", "Options", "validate_checkpointing"]


_ALLOWED: Final[dict[str, tuple[object, ...]]] = {
    "scope": ("layer", "model"),
    "strict": (True, False),
    "dynamic": (None, True, False),
    "backend": ("inductor", "aot_eager"),
}


@dataclass(frozen=True)
class CompileOptions:
    """How ``prepare`` compiles a model.

    Attributes:
        scope: ``"layer"`` compiles each decoder layer (one graph for each type of layer, whatever the depth);
            ``"model"`` the whole text model as one graph (slower to compile, fuses across layers).
        strict: a graph break or too many recompiles stop the run; otherwise they are counted and reported.
        options: Inductor settings for these graphs alone, keys of ``deltatune.config.inductor.INDUCTOR_OPTIONS``; the
            process's own settings are never touched.
        dynamic: as ``torch.compile``: None makes a dimension dynamic once it has changed, False keeps shapes static.
        backend: ``"inductor"``, or ``"aot_eager"``: the same graphs without generated code, for debugging and tests.

    Raises:
        ValueError: an unknown scope or backend, options with ``"aot_eager"``, a key outside the list, a value of the
            wrong type, or a setting that the installed torch does not have.
    """

    scope: Literal["layer", "model"] = "layer"
    strict: bool = True
    options: Mapping[str, bool] = field(default_factory=dict)
    dynamic: bool | None = None
    backend: Literal["inductor", "aot_eager"] = "inductor"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"compile {name} must be {choices}, got {getattr(self, name)!r}")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"compile options must be a mapping of Inductor settings, got {self.options!r}")
        if self.options and self.backend != "inductor":
            raise ValueError(f"compile options are Inductor's and cannot act with backend={self.backend!r}")
        for key, value in self.options.items():
            _check_option(key, value)
        if self.options.get("triton.cudagraphs"):
            warnings.warn(
                "triton.cudagraphs with packing: document boundaries are read on the CPU inside the attention and "
                "delta rule ops, so a graph cannot be replayed for another batch and Inductor skips cudagraphs",
                stacklevel=3,
            )


def _check_option(key: str, value: object) -> None:
    if key not in INDUCTOR_OPTIONS:
        raise ValueError(f"compile option {key!r} is not supported; choose from {', '.join(INDUCTOR_OPTIONS)}")
    if not isinstance(value, bool):
        raise ValueError(f"compile option {key} must be bool, got {value!r}")
    import torch._inductor.config as inductor_config

    if key not in inductor_config._config:  # type: ignore[attr-defined,unused-ignore]
        raise ValueError(f"compile option {key} does not exist in torch {torch.__version__}; remove it")


def validate_checkpointing(checkpointing: str | float, options: CompileOptions | None) -> None:
    """Checks an activation checkpointing setting.

    Raises:
        ValueError: neither ``"none"``, ``"layer"``, ``"auto"`` nor a share in [0, 1], or a share without compile.
    """
    if checkpointing in ("none", "layer", "auto"):
        return
    if isinstance(checkpointing, bool) or not isinstance(checkpointing, float | int) or not 0 <= checkpointing <= 1:
        raise ValueError(
            f"checkpointing must be 'none', 'layer', 'auto' or a number from 0 to 1 (the share of activations that may "
            f"stay), got {checkpointing!r}"
        )
    if options is None:
        raise ValueError(
            f"checkpointing={checkpointing} is the compiler's own choice of what to recompute and needs compile; "
            "pass compile=CompileOptions(), or checkpointing='layer'"
        )


@dataclass(frozen=True)
class Options:
    """What ``prepare`` decided; nothing changes it."""

    kernels: Mapping[str, str]  # op name -> implementation that was asked for
    mask_form: str  # what the stock text model takes in place of a mask it would build: "mapping" or "4d"
    compile: CompileOptions | None = None  # None runs the layers eagerly
    checkpointing: str | float = "none"  # "none", "layer", "auto" or the share of activations that may stay
    lora: str = "auto"  # "auto", "fused" or "stock"
    interface: bool = False  # stock attention modules call ours, through the attention interface
