"""Small checkpoints in the formats and under the names of released ones, and beside each the same in 16 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantized_cases import e2m1, e4m3
from tiny import tiny_model

__all__ = ["STYLES", "Style", "config_of", "edit", "make", "model_of", "tensors_of"]

E2M1 = torch.tensor([e2m1(code) for code in range(16)])
E4M3 = torch.tensor([e4m3(code) for code in range(256)])

#: One matrix ``[N, K]``, or several ``[G, N, K]``: its tensors by what follows its name, and its values in fp32.
Encoded = tuple[dict[str, Tensor], Tensor]


def numbers(*shape: int, draw: torch.Generator) -> Tensor:
    """e4m3 as bytes, none of them NaN, 0 or beyond 16."""
    return torch.randint(8, 0x5A, shape, generator=draw, dtype=torch.uint8) | (
        torch.randint(0, 2, shape, generator=draw, dtype=torch.uint8) << 7
    )


def nibbles(shape: torch.Size, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Packed codes, and their values: the low four bits are the even column."""
    codes = torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, E2M1[codes.long()]


def fp8_blocks(shape: torch.Size, draw: torch.Generator, scales: torch.dtype = torch.bfloat16) -> Encoded:
    *lead, rows, columns = shape
    codes = numbers(*shape, draw=draw)
    grid = (0.01 * torch.rand(*lead, -(-rows // 128), -(-columns // 128), generator=draw) + 0.002).to(scales)
    wide = grid.float().repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
    return {"": codes.view(torch.float8_e4m3fn), "_scale_inv": grid}, E4M3[codes.long()] * wide


def fp8_blocks_in_fp32(shape: torch.Size, draw: torch.Generator) -> Encoded:
    return fp8_blocks(shape, draw, torch.float32)


def fp8_channels(shape: torch.Size, draw: torch.Generator) -> Encoded:
    codes = numbers(*shape, draw=draw)
    scales = 0.01 * torch.rand(*shape[:-1], 1, generator=draw) + 0.002
    return {"": codes.view(torch.float8_e4m3fn), "_scale": scales}, E4M3[codes.long()] * scales


def fp8_tensor(shape: torch.Size, draw: torch.Generator) -> Encoded:
    """As ModelOpt has it, with the scale of activations that nobody reads here."""
    codes, scale = numbers(*shape, draw=draw), 0.01 * torch.rand((), generator=draw) + 0.002
    parts = {"": codes.view(torch.float8_e4m3fn), "_scale": scale, "<input_scale": torch.ones(())}
    return parts, E4M3[codes.long()] * scale


def mxfp4(shape: torch.Size, draw: torch.Generator, codes: str = "_packed", scales: str = "_scale") -> Encoded:
    packed, values = nibbles(shape, draw)
    *lead, columns = shape
    powers = torch.randint(119, 124, (*lead, columns // 32), generator=draw, dtype=torch.uint8)
    values = values * torch.exp2(powers.float() - 127).repeat_interleave(32, -1)
    packed = packed.unflatten(-1, (-1, 16)) if codes == "_blocks" else packed
    return {codes: packed, scales: powers}, values


def gpt_oss(shape: torch.Size, draw: torch.Generator) -> Encoded:
    return mxfp4(shape, draw, "_blocks", "_scales")


def nvfp4(shape: torch.Size, draw: torch.Generator, *, modelopt: bool) -> Encoded:
    packed, values = nibbles(shape, draw)
    *lead, rows, columns = shape
    scales = numbers(*lead, rows, columns // 16, draw=draw) & 0x7F
    factor = 0.02 * torch.rand(lead, generator=draw) + 0.01
    factor = factor if modelopt else 1 / factor
    each = factor.view(*lead, 1, 1)
    values = values * E4M3[scales.long()].repeat_interleave(16, -1)
    values = values * each if modelopt else values / each
    scales = scales.view(torch.float8_e4m3fn)
    if modelopt:
        return {"": packed, "_scale": scales, "_scale_2": factor, "<input_scale": torch.ones(())}, values
    parts = {"_packed": packed, "_scale": scales, "_global_scale": factor.view(*lead, 1)}
    return parts | {"<input_global_scale": torch.ones(1)}, values


def nvfp4_divided(shape: torch.Size, draw: torch.Generator) -> Encoded:
    return nvfp4(shape, draw, modelopt=False)


def nvfp4_modelopt(shape: torch.Size, draw: torch.Generator) -> Encoded:
    return nvfp4(shape, draw, modelopt=True)


Encoder = Callable[[torch.Size, torch.Generator], Encoded]


class Style(NamedTuple):
    """A kind of released checkpoints.

    Attributes:
        family: of models.
        fused: whether experts have the names and shapes of the model, or one of each for every expert.
        experts: how their weights are held.
        linears: how those of linear layers are.
        settings: ``quantization_config``.
        formats: what is found in the model.
    """

    family: str
    fused: bool
    experts: Encoder | None
    linears: Encoder | None
    settings: dict[str, Any]
    formats: set[str]


def compressed(*formats: str) -> dict[str, Any]:
    groups = {f"group_{i}": {"format": format} for i, format in enumerate(formats)}
    whole = formats[0] if len(formats) == 1 else "mixed-precision"
    return {"quant_method": "compressed-tensors", "format": whole, "config_groups": groups}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
NVFP4, MXFP4 = compressed("nvfp4-pack-quantized"), compressed("mxfp4-pack-quantized")
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}

STYLES: dict[str, Style] = {
    "fp8": Style("qwen3_5_moe", False, fp8_blocks, fp8_blocks, FP8, {"fp8"}),
    "fp8, fused": Style("qwen3_5_moe", True, fp8_blocks, fp8_blocks, FP8, {"fp8"}),
    "fp8, scales in fp32": Style("qwen3_moe", False, fp8_blocks_in_fp32, fp8_blocks_in_fp32, FP8, {"fp8"}),
    "fp8, dense": Style("qwen3_5", False, None, fp8_blocks, FP8, {"fp8"}),
    "fp8, channels": Style("qwen3", False, None, fp8_channels, compressed("float-quantized"), {"fp8"}),
    "gpt-oss": Style("gpt_oss", True, gpt_oss, None, {"quant_method": "mxfp4"}, {"mxfp4"}),
    "mxfp4": Style("qwen3_moe", False, mxfp4, mxfp4, MXFP4, {"mxfp4"}),
    "mxfp4, fused": Style("qwen3_5_moe", True, mxfp4, mxfp4, MXFP4, {"mxfp4"}),
    "mxfp4, fused and transposed": Style("gpt_oss", True, mxfp4, None, MXFP4, {"mxfp4"}),
    "nvfp4": Style("qwen3_5_moe", False, nvfp4_divided, nvfp4_divided, NVFP4, {"nvfp4"}),
    "nvfp4, fused": Style("qwen3_5_moe", True, nvfp4_divided, None, NVFP4, {"nvfp4"}),
    "nvfp4, dense": Style("qwen3", False, None, nvfp4_divided, NVFP4, {"nvfp4"}),
    "nvfp4 and fp8": Style(
        "qwen3_5_moe", False, nvfp4_divided, fp8_channels, compressed("nvfp4-pack-quantized", "float-quantized"),
        {"nvfp4", "fp8"},
    ),
    "modelopt": Style("qwen3_5_moe", False, nvfp4_modelopt, nvfp4_modelopt, MODELOPT, {"nvfp4"}),
    "modelopt, fused": Style("qwen3_moe", True, nvfp4_modelopt, None, MODELOPT, {"nvfp4"}),
    "modelopt, mixed": Style("qwen3_moe", False, nvfp4_modelopt, fp8_tensor, MIXED, {"nvfp4", "fp8"}),
}  # fmt: skip

_KEPT = ("gate", "router", "shared_expert_gate", "in_proj_a", "in_proj_b", "conv1d")


def model_of(style: Style, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 160}
    sizes["intermediate_size"] = 128 if style.family == "gpt_oss" else 160  # no multiple of 128 otherwise
    return tiny_model(style.family, dtype=dtype, **{**sizes, **changes})


def make(folder: Path, style: Style, model: Any = None) -> tuple[Path, Path]:
    """Folders of a checkpoint in few bits, and of the values of its weights in 16."""
    model = model_of(style) if model is None else model
    few, values = folder / "few", folder / "values"
    model.save_pretrained(values)
    plain = {n: t.clone() for n, t in model.state_dict().items()} if style.fused else tensors_of(values)
    draw, coded = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for name, tensor in list(plain.items()):
        encoder = _encoder(style, name, tensor)
        if encoder is None:
            coded[name] = tensor
            continue
        transposed = style.family == "gpt_oss" and tensor.ndim == 3
        parts, value = encoder(tensor.mT.shape if transposed else tensor.shape, draw)
        plain[name] = (value.mT if transposed else value).to(tensor.dtype).contiguous()
        for end, part in parts.items():
            # of "<", in place of the last part of the name
            key = f"{name.rpartition('.')[0]}.{end[1:]}" if end.startswith("<") else f"{name}{end}"
            coded[key] = part.contiguous()
    save_file(plain, values / "model.safetensors", metadata={"format": "pt"})
    few.mkdir()
    config = config_of(values)
    (few / "config.json").write_text(json.dumps({**config, "quantization_config": style.settings}))
    save_file(coded, few / "model.safetensors", metadata={"format": "pt"})
    return few, values


def _encoder(style: Style, name: str, tensor: Tensor) -> Encoder | None:
    parts = name.split(".")
    if "layers" not in parts or tensor.ndim < 2 or name.endswith("bias"):
        return None
    if "experts" in parts:
        return style.experts
    fits = style.linears is fp8_blocks or tensor.shape[-1] % 32 == 0
    return None if parts[-2] in _KEPT or not fits else style.linears


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a checkpoint."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
