"""Adapters that begin inside the base weights (PiSSA, OLoRA), as plain ones that any loader adds to the stock base.

They take a weight apart, ``W = W0 + s B0 A0``, train A and B, and leave W0 as the base. What is trained is, on W::

    W0 + s B A  =  W + s (B A - B0 A0)  =  W + s [B, -B0] [A; A0]

a plain adapter of rank 2r. PEFT would make W0 anew when it loads, from another random decomposition (``pissa_niter_4``)
or on another machine, and servers never do.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.hf import model as hf_model
from deltatune.parallel.state import SHARDS, Parts, part_of, reshard
from deltatune.training.adapter_parts import set_adapter

__all__ = ["begins_in_base", "first_factors", "is_variant", "load_plain", "make_plain", "reads_base", "refuse_tied"]

_ADAPTER: Final = "default"
_WEIGHTS: Final = "adapter_model.safetensors"
_CONFIG: Final = "adapter_config.json"


def begins_in_base(init: object) -> bool:
    """Whether an initialisation takes a part of the base weights into the adapter."""
    return isinstance(init, str) and (init.lower() == "olora" or init.startswith("pissa"))


def reads_base(init: object) -> bool:
    """Whether an initialisation is computed of the base weights' numbers, which must be there when it is."""
    return begins_in_base(init) or (isinstance(init, str) and init.lower() == "mica")


def is_variant(init: object) -> bool:
    """Whether an initialisation also says how an adapter trains: which of its factors stay as they begin, say."""
    (start,) = (field for field in dataclasses.fields(LoraConfig) if field.name == "init_lora_weights")
    return init in start.metadata.get("lora_variants", ())


def first_factors(model: nn.Module) -> dict[str, Tensor] | None:
    """A0 and B0 of an adapted model that has not trained yet, by the names in PEFT's files; None where W0 is W.

    Where a weight has fewer than r singular vectors, rows of zeros make A0 ``[r, in]``, and columns B0 ``[out, r]``.
    """
    configs: Any = getattr(model, "peft_config", {})
    if not any(begins_in_base(getattr(config, "init_lora_weights", None)) for config in configs.values()):
        return None
    ranks = {name: layer.r[_ADAPTER] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    factors = {name: tensor for name, tensor in state.items() if _factor(name)}
    return {name: _padded(tensor, name, ranks[_layer(name)]).clone() for name, tensor in factors.items()}


def refuse_tied(model: nn.Module) -> None:
    """Refuses a decomposition of a weight that is the embedding and the head at once: W0 would change both.

    Raises:
        UserError: an adapter around one of them.
    """
    base = hf_model.base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    around = [module for module in (embedding, head) if isinstance(module, LoraLayer)]
    weights = [getattr(m.get_base_layer() if m in around else m, "weight", None) for m in (embedding, head)]
    if around and weights[0] is weights[1]:
        raise UserError(
            "lora.init_lora_weights: pissa and olora change the base weight, which the embedding and lm_head share "
            "(tie_word_embeddings); leave them out of target_modules, or start at true"
        )


def make_plain(folder: Path, first: Mapping[str, Tensor]) -> None:
    """Rewrites an adapter's files as those of the plain adapter of twice the rank."""
    state = load_peft_weights(str(folder), device="cpu")
    found = {}
    for name, tensor in state.items():
        factor = _factor(name)
        if factor:
            start = first[name].to(tensor)
            rank = start.shape[_rank_dim(name)]
            tensor = torch.cat([_padded(tensor, name, rank), start if factor == "A" else -start], dim=_rank_dim(name))
        found[name] = tensor.contiguous()
    save_file(found, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    # alpha / r, or alpha / sqrt(r), stays what it is
    factor_of_alpha = math.sqrt(2) if config["use_rslora"] else 2
    config |= {
        "init_lora_weights": True,
        "r": 2 * config["r"],
        "lora_alpha": factor_of_alpha * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()},
        "alpha_pattern": {name: factor_of_alpha * alpha for name, alpha in config["alpha_pattern"].items()},
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_plain(model: nn.Module, folder: Path, first: dict[str, Tensor], parts: Parts = SHARDS) -> None:
    """Takes up what ``make_plain`` wrote: A and B into the model, A0 and B0 into ``first`` and the base weights.

    W0 is another one where this model began with another decomposition, by another seed or on another machine.
    """
    reshard(model)
    state = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    trained, saved = dict(state), {}
    for name in first:
        dim, rank = _rank_dim(name), first[name].shape[_rank_dim(name)]
        if name not in state or state[name].shape[dim] != 2 * rank:
            raise UserError(f"{folder} holds no adapter of this run: expected rank {2 * rank} in {name}")
        trained[name] = state[name].narrow(dim, 0, own[name].shape[dim])
        start = state[name].narrow(dim, rank, rank)
        saved[name] = (start if _factor(name) == "A" else -start).to(first[name])
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, down, up in _pairs(first):
        if not (torch.equal(saved[down], first[down]) and torch.equal(saved[up], first[up])):
            layer: Any = layers[name]
            weight = layer.get_base_layer().weight
            change = first[up].float() @ first[down].float() - saved[up].float() @ saved[down].float()
            wide = weight.detach().float()
            with torch.no_grad():
                weight.copy_(wide + part_of(layer.scaling[_ADAPTER] * change, wide))
    set_adapter(model, trained, parts)
    first.update(saved)


def _pairs(factors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """The layer, and the names of its A and B, of linear layers: an embedding starts at zero."""
    for name in factors:
        if _factor(name) == "A" and "embedding" not in name:
            yield _layer(name), name, name.replace("lora_A", "lora_B")


def _factor(name: str) -> str:
    """A or B of a factor in a file; nothing for other tensors."""
    return next((one for one in "AB" if f".lora_{one}." in name or f".lora_embedding_{one}" in name), "")


def _layer(name: str) -> str:
    return name.rpartition(".lora_")[0]


def _rank_dim(name: str) -> int:
    return 0 if _factor(name) == "A" else 1


def _padded(tensor: Tensor, name: str, rank: int) -> Tensor:
    missing = rank - tensor.shape[_rank_dim(name)]
    return nn.functional.pad(tensor, (0, 0, 0, missing) if _factor(name) == "A" else (0, missing))
