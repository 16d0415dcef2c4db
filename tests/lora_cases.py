"""Tiny models with adapters, once as PEFT's own and once fused with their base layers."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch

from deltatune import Sequences, prepare
from deltatune.layers.lora import lora_modes
from tiny import documents, tiny_model

LENGTHS = [5, 1, 30, 7]
#: Two layers that share their input, in each type of layer, and one that does not: what a compiled model needs.
FEW = ["q_proj", "v_proj", "in_proj_qkv", "in_proj_z", "down_proj"]


def adapted(family: str = "qwen3_5", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A PEFT model with adapters on every linear layer, B not zero."""
    values = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    wide, layers = values.pop("autocast_adapter_dtype", True), values.pop("layers", 2)
    torch.manual_seed(seed)
    config = peft.LoraConfig(**values)
    return peft.get_peft_model(
        tiny_model(family, dtype=dtype, layers=layers), config, autocast_adapter_dtype=wide
    ).train()


def pair(family: str = "qwen3_5", *, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """``(fused, PEFT's own)``: the same weights, both prepared."""
    stock = adapted(family, dtype=dtype, **changes)
    fused = copy.deepcopy(stock)
    prepare(fused, lora="fused")
    prepare(stock, lora="stock")
    return fused, stock


def packed_call(seed: int = 0, **extra: Any) -> dict[str, Any]:
    tokens = torch.cat(documents(LENGTHS, seed))[None]
    return {"input_ids": tokens, "labels": tokens, "sequences": Sequences.from_lengths(LENGTHS), **extra}


def fused_layers(model: Any) -> int:
    """How many layers of a model run fused, as its report would say it."""
    text_model = (model.get_base_model() if isinstance(model, peft.PeftModel) else model).get_decoder()
    modes = lora_modes(model, text_model, "fused", torch.device("cpu"))
    return sum(mode.name == "fused" for _, mode in modes)


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    call = packed_call(seed)
    del call["labels"]
    return model(**call).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_same(fused: Any, stock: Any, tolerance: float = 1e-5) -> None:
    """Logits, and the gradients of everything that trains."""
    assert relative(logits(fused), logits(stock)) < tolerance
    assert_same_gradients(fused, stock, tolerance)


def assert_same_gradients(fused: Any, stock: Any, tolerance: float = 1e-5) -> None:
    for model in (fused, stock):
        model.zero_grad(set_to_none=True)
        model(**packed_call()).loss.backward()
    assert_gradients_close(fused, stock, tolerance)


def assert_gradients_close(fused: Any, stock: Any, tolerance: float = 1e-5) -> None:
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert ours.grad.dtype == theirs.grad.dtype, name
            assert relative(ours.grad, theirs.grad) < tolerance, name
