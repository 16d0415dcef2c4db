"""What the config.json of a checkpoint says of weights in few bits, in the words of the programs that made it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["BY_TRANSFORMERS", "Released", "disagreement", "is_component", "released", "settings_of"]

#: What transformers loads itself, into layers that take adapters.
BY_TRANSFORMERS: Final = "bitsandbytes"
_COMPONENT: Final = re.compile(
    r"(weight|_proj|experts\.\w+)_(scale_inv|blocks|scales|packed|scale|scale_2|global_scale|shape|zero_point)$"
)
_PACKED: Final = {
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "float-quantized": "fp8",
    "naive-quantized": "fp8",
}
_ALGORITHMS: Final = {"NVFP4": ("nvfp4",), "FP8": ("fp8",), "MIXED_PRECISION": ("nvfp4", "fp8")}


@dataclass(frozen=True)
class Released:
    """A checkpoint in few bits.

    Attributes:
        method: ``quant_method``: ``"fp8"``, ``"mxfp4"``, ``"compressed-tensors"``, ``"modelopt"`` or
            ``"bitsandbytes"``.
        formats: of its weights, the one that it goes by first; none of bitsandbytes'.
    """

    method: str
    formats: tuple[str, ...]

    @property
    def is_read_here(self) -> bool:
        """Whether its weights are read by our own code, and are ours in the model."""
        return self.method != BY_TRANSFORMERS


def is_component(name: str) -> bool:
    """Whether a tensor's name is one of a part of a weight in few bits."""
    return _COMPONENT.search(name) is not None


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of a config.json, or of the text model in it; None without one."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        found = part.get("quantization_config")
        if isinstance(found, Mapping):
            return found
    return None


def released(settings: Mapping[str, Any] | None) -> Released | None:
    """What the weights of a checkpoint with this ``quantization_config`` are in; None without one.

    Raises:
        ValueError: a method, a format or a setting that is not read here, with what to use in its place.
    """
    if settings is None:
        return None
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
    if method == BY_TRANSFORMERS:
        return Released(method, ())
    if method == "mxfp4":
        return Released(method, ("mxfp4",))
    if method == "fp8":
        blocks = settings.get("weight_block_size", [128, 128])
        if not isinstance(blocks, list | tuple) or [*blocks] != [128, 128]:
            raise ValueError(f"its FP8 weights have scales for blocks of {blocks}, and those of 128x128 are read here")
        return Released(method, ("fp8",))
    if method == "compressed-tensors":
        return Released(method, tuple(dict.fromkeys(_of_compressed_tensors(settings))))
    if method == "modelopt":
        inner = settings.get("quantization")
        algorithm = (inner if isinstance(inner, Mapping) else settings).get("quant_algo")
        if algorithm not in _ALGORITHMS:
            raise ValueError(
                f"its ModelOpt weights are in {algorithm}, and {', '.join(_ALGORITHMS)} are read here; take a "
                "checkpoint in one of them, or one in 16 bits with model.quantization: {type: nf4}"
            )
        return Released(method, _ALGORITHMS[algorithm])
    raise ValueError(
        f"its weights are quantised by {method}, which is not read here; take its checkpoint in 16 bits with "
        "model.quantization: {type: nf4} or {type: fp8}, or one in FP8, MXFP4, NVFP4 or by bitsandbytes"
    )


def disagreement(kind: str, found: Released | None, *, blocks: bool = False, compute: str = "bf16") -> str | None:
    """Why a recipe cannot have its base in a format, one line; None where it can.

    Args:
        kind: ``model.quantization.type``.
        found: what the checkpoint is in.
        blocks: ``model.quantization.blocks``.
        compute: ``model.quantization.compute``.
    """
    key = f"model.quantization.type: {kind}"
    if found is None:
        if kind == "auto":
            return f"{key}: the checkpoint is in 16 or 32 bits; set nf4 or fp8, or leave model.quantization out"
        if kind in ("mxfp4", "nvfp4"):
            return f"{key}: the checkpoint is in 16 or 32 bits, of which nf4 and fp8 can be made; set one of these"
        return None
    formats = " and ".join(found.formats) or "bits of its own"
    if kind != "auto" and kind != (found.formats or ("",))[0]:
        return (
            f"{key}: the checkpoint is in {formats} already, by {found.method}; set auto, or take its checkpoint in 16 "
            "bits"
        )
    if compute == "fp8" and found.formats != ("fp8",):
        return (
            f"model.quantization.compute: fp8 multiplies the codes of weights in fp8, and the checkpoint is in "
            f"{formats}, by {found.method}; leave compute out, or take its checkpoint in 16 bits with "
            "model.quantization: {type: fp8, compute: fp8}"
        )
    if blocks:
        return "model.quantization.blocks cannot act: the checkpoint is in fp8 already; leave it out"
    return None


def _of_compressed_tensors(settings: Mapping[str, Any]) -> Iterator[str]:
    groups = settings.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    named = [group.get("format") for group in groups if isinstance(group, Mapping)]
    for name in [str(name) for name in named if name] or [str(settings.get("format"))]:
        if name not in _PACKED:
            raise ValueError(
                f"its weights are in compressed-tensors' format {name}, and {', '.join(_PACKED)} are read here; take a "
                "checkpoint in one of them, or one in 16 bits with model.quantization: {type: nf4}"
            )
        yield _PACKED[name]
