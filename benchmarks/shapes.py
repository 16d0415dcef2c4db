"""Models by name: the shapes of released checkpoints at any depth, with random weights made on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

__all__ = ["BASES", "SHAPES", "Shape", "adapters", "build_model", "shape_named", "with_base", "with_lora"]

#: Per-token decay ``exp(-A softplus(dt))`` with A around this: a state lives through hundreds of tokens, so that a leak
#: between documents changes every figure that the gates compare.
_SLOW_DECAY: Final = 0.05
#: What ``--targets`` names, as PEFT takes it.
_QKVO: Final = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS: Final = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: What has adapters, as PEFT is told.
TARGETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "qkvo": {"target_modules": _QKVO},
    "all": {"target_modules": "all-linear"},
    "experts": {"target_modules": _QKVO, "target_parameters": _EXPERTS},
}
#: Formats of weights in few bits, made of those in 16; in the last, products compute in fp8 too, as a recipe has it.
BASES: Final = ("nf4", "fp8", "fp8-products")
#: Every fourth layer attends, the others run the delta rule.
_PERIOD: Final = 4
#: Matrices whose product is added to the residual stream.
_WRITERS: Final = ("o_proj", "out_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A model's configuration.

    Attributes:
        name: as on the command line.
        model_type: transformers' name of the text model's config.
        values: of that config; ``layer_types`` follow from the depth.
        hybrid: three delta-rule layers to one of attention, or attention alone.
    """

    name: str
    model_type: str
    values: Mapping[str, Any] = field(repr=False)
    hybrid: bool = True

    @property
    def full_layers(self) -> int:
        """The depth of the released checkpoint."""
        return int(self.values["num_hidden_layers"])

    def config(self, layers: int | None = None) -> Any:
        """The transformers config at a depth; the pattern of layer types is kept and cut off.

        Raises:
            ValueError: a depth below one, or one that leaves out a type of layer.
        """
        from transformers import AutoConfig

        depth = self.full_layers if layers is None else layers
        least = _PERIOD if self.hybrid else 1
        if depth < least:
            raise ValueError(f"{self.name} needs at least {least} layers to hold every type of layer, got {depth}")
        values = {**self.values, "num_hidden_layers": depth}
        if self.hybrid:
            values["layer_types"] = [
                "full_attention" if (index + 1) % _PERIOD == 0 else "linear_attention" for index in range(depth)
            ]
        return AutoConfig.for_model(self.model_type, **values)


def _rope(*, mrope: bool) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    return rope | {"mrope_section": [11, 11, 10], "mrope_interleaved": True} if mrope else rope


def _qwen3_5(
    name: str, hidden: int, layers: int, intermediate: int, heads: tuple[int, int], value_heads: int, *, tied: bool
) -> Shape:
    values = _hybrid(hidden, layers, heads, value_heads, tied=tied)
    return Shape(name, "qwen3_5_text", values | {"intermediate_size": intermediate})


def _hybrid(hidden: int, layers: int, heads: tuple[int, int], value_heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": 248320,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262144,
        "rope_parameters": _rope(mrope=True),
        "tie_word_embeddings": tied,
    }


def _experts(number: int, chosen: int) -> dict[str, Any]:
    return {
        "num_experts": number,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    }


_MOE: Final = _hybrid(2048, 40, (16, 2), 32, tied=False) | _experts(256, 8)
_NEXT: Final = {
    **_hybrid(2048, 48, (16, 2), 32, tied=False),
    **_experts(512, 10),
    "vocab_size": 151936,
    "intermediate_size": 5120,
    "rope_parameters": _rope(mrope=False),
}
_QWEN3: Final = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
_GPT_OSS: Final = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
_14B: Final = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 17408}
_TINY: Final = {
    **_hybrid(64, 4, (4, 2), 4, tied=False),
    "vocab_size": 96,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    # where q and k of a document's first token are nearly orthogonal the delta rule's output is small, and the norm
    # after it would make a large gradient of rounding; 1e-6 prevents that for heads of 128, this for heads of 32
    "rms_norm_eps": 1e-3,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}  # fmt: skip

SHAPES: Final[Mapping[str, Shape]] = {
    shape.name: shape
    for shape in (
        _qwen3_5("qwen3.5-0.8b", 1024, 24, 3584, (8, 2), 16, tied=True),
        _qwen3_5("qwen3.5-2b", 2048, 24, 6144, (8, 2), 16, tied=True),
        _qwen3_5("qwen3.5-4b", 2560, 32, 9216, (16, 4), 32, tied=True),
        _qwen3_5("qwen3.5-9b", 4096, 32, 12288, (16, 4), 32, tied=False),
        _qwen3_5("qwen3.5-27b", 5120, 64, 17408, (24, 4), 48, tied=False),
        Shape("qwen3.5-35b-a3b", "qwen3_5_moe_text", _MOE),
        Shape("qwen3.5-35b-a3b-layers", "qwen3_5_moe_text", _MOE | {"num_hidden_layers": 4, "vocab_size": 1024}),
        Shape("qwen3-next-80b-a3b", "qwen3_next", _NEXT),
        Shape("qwen3-8b", "qwen3", _QWEN3, hybrid=False),
        Shape("qwen3-14b", "qwen3", {**_QWEN3, **_14B}, hybrid=False),
        Shape("gpt-oss-20b", "gpt_oss", _GPT_OSS, hybrid=False),
        Shape("tiny", "qwen3_5_text", _TINY),
        Shape("tiny-moe", "qwen3_5_moe_text", {**_TINY, **_experts(8, 2), "moe_intermediate_size": 32}),
    )
}
"""Name -> shape; ``tiny`` and ``tiny-moe`` are for a CPU and stand for no checkpoint, ``-layers`` are a period of a
model's layers before a vocabulary so small that they are nearly all of a step."""


def shape_named(name: str) -> Shape:
    """One of ``SHAPES``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(SHAPES)}")
    return SHAPES[name]


def build_model(
    shape: Shape, device: torch.device, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Any:
    """A causal language model with random weights, made where it runs: no copy of it ever exists elsewhere.

    Matrices have a standard deviation of ``fan_in ** -0.5``; those that write to the residual stream are smaller by the
    root of how many do, and embeddings have one of 1, so that every layer changes the stream a little and rounding
    does not grow with depth; logits have one near 1. Norms are near one; decay is slow. In training mode, all of it
    trainable, no attention chosen yet.
    """
    from transformers import AutoModelForCausalLM

    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape.config(layers), dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    _randomise(model)
    return model.train()


def with_base(model: Any, base: str, *, values: bool) -> None:
    """Puts the weights that a recipe's ``model.quantization`` would in few bits, one of ``BASES``.

    With ``values`` each becomes the values of what it would be.
    """
    from deltatune import ops
    from deltatune.hf.quantizable import quantizable
    from deltatune.quantization.blank import Encoding
    from deltatune.quantization.products import compute_in_fp8
    from deltatune.quantization.tensor import QuantizedTensor

    format, _, products = base.partition("-")
    for name, like in quantizable(model, Encoding(format)).items():
        path, _, key = name.rpartition(".")
        weight = model.get_parameter(name).detach()
        upright = weight.mT if like.transposed else weight
        found = QuantizedTensor(ops.quantize(upright, format), weight.dtype, transposed=like.transposed)
        made = found.decoded().contiguous() if values else found
        model.get_submodule(path)._parameters[key] = nn.Parameter(made, requires_grad=False)
    if products and not values:
        compute_in_fp8(model, model.device, model.dtype)


def with_lora(model: Any, targets: str, *, rank: int, alpha: int, seed: int = 0) -> Any:
    """The model with LoRA by PEFT, in float32; adapters hold the same random values in every model of one shape.

    B is random as well: at zero the gradient of A would be zero and prove nothing.
    """
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=0.0, **TARGETS[targets])
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapters(adapted):
            values = torch.randn(parameter.shape, generator=generator)
            # B small, as after some steps of training
            size = 0.1 * rank**-0.5 if ".lora_B." in name else parameter.shape[-1] ** -0.5
            # through bfloat16, so that adapters of any dtype hold the same numbers
            parameter.copy_((values * size).bfloat16())
    return adapted


def adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and values of what trains, without the name PEFT gives the adapter."""
    return [(name.replace(".default", ""), p) for name, p in model.named_parameters() if p.requires_grad]


@torch.no_grad()
def _randomise(model: Any) -> None:
    config = model.config.get_text_config()
    writers = 2 * config.num_hidden_layers
    for name, parameter in model.named_parameters():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind == "A_log":
            parameter.normal_(math.log(_SLOW_DECAY), 0.3)
        elif kind == "dt_bias":
            parameter.normal_(0.0, 0.5)
        elif kind == "embed_tokens":
            parameter.normal_()
        elif parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            scale = writers**-0.5 if kind in _WRITERS else 1.0
            parameter.normal_(0.0, scale * parameter.shape[-1] ** -0.5)
    if config.tie_word_embeddings:
        # the head is the embedding, so the norm before it is small instead; these norms multiply by 1 + weight
        model.get_decoder().norm.weight.fill_(config.hidden_size**-0.5 - 1)
