"""How much memory a run needs, from shapes alone: the model may be on the meta device."""

# T tokens of a batch, E width of the residual stream, L layers, b bytes of an activation

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from deltatune.compile.trace import LayerMemory
from deltatune.cost import WHOLE, Cost, ExpertSplit
from deltatune.hf import model as hf_model
from deltatune.hf.experts import experts_per_token, routed_parameters
from deltatune.hf.units import gathered_units
from deltatune.ops import LinearCrossEntropySpec, choose
from deltatune.ops._linear_cross_entropy.blocks import workspace_bytes
from deltatune.ops._linear_cross_entropy.reference import chunk_tokens
from deltatune.packing.group import Recurrent
from deltatune.quantization.tensor import QuantizedTensor, computes_in_fp8, stored_bytes
from deltatune.state import CheckpointingChoice
from deltatune.subclass import Swapped

__all__ = [
    "MemoryEstimate",
    "candidate_settings",
    "device_memory",
    "estimate_memory",
    "estimate_traced_memory",
    "layer_cost",
    "least_recomputation",
    "offloaded_bytes",
    "optimizer_bytes",
    "usable_memory",
]

# Optimizer state per trained element, in copies of the parameter's own dtype, where it is not AdamW's two; every tensor
# also has a step count.
_STATE_COPIES: Final = {"adagrad": 1, "rmsprop": 1, "sgd": 0}
_STEP_BYTES: Final = 4
# bitsandbytes keeps so many states: in float32, or (8bit) a byte an element and a float32 scale a block. Small tensors
# stay in float32.
_BITSANDBYTES: Final = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), 2),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), 1),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), 1),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"), 3),
}
# Bits an element of both states of torchao's AdamW, which have a float32 scale a block and a table of their codes.
# Tensors that are small, or not whole blocks, stay in the parameter's dtype.
_TORCHAO: Final = {"adamw_torch_8bit": 8, "adamw_torch_4bit": 4}
_NARROW_SMALLEST: Final = 4096
_BLOCK: Final = 256
# A value that is rounded to fp8: in float32, over its row's scale, and its code.
_ROUNDED_BYTES: Final = 4 + 4 + 1

# What allocator and kernels' workspaces take beyond the tensors counted here.
_HEADROOM: Final = 0.9
_SHARES: Final = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step.

    Attributes:
        weights: parameters and buffers; exact.
        gradients: of trained parameters, in their own dtype; exact.
        optimizer: its state; exact for AdamW, SGD, the others torch itself has, and those of bitsandbytes and torchao.
        activations: what backward keeps and computes: eager and without fusion, an upper bound under ``compile``; or
            read off the compiled layers' graphs.
        logits: what the loss holds at once, and the gradients it has computed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def to_dict(self) -> dict[str, int]:
        """Bytes by purpose, and their total."""
        return asdict(self) | {"total": self.total}

    def __str__(self) -> str:
        return "\n".join(f"{name:<12}{_size(value):>12}" for name, value in self.to_dict().items())


def estimate_memory(
    model: nn.Module,
    *,
    tokens_per_batch: int,
    optimizer: str = "adamw_torch_fused",
    checkpointing: str | float = "none",
    compute_dtype: torch.dtype | None = None,
    in_flight_bytes: int | None = None,
    shard: int = 1,
    sequence: int = 1,
    recurrent: Recurrent = "heads",
    experts: ExpertSplit = WHOLE,
) -> MemoryEstimate:
    """Memory of a training step, from a model with its adapters, on any device, ``meta`` included.

    Weights, gradients and optimizer state are counted tensor by tensor. Activations are ``T * sum(a_l)`` with ``a_l``
    the bytes a decoder layer keeps for each token:

    - its inputs of the two norms (``2 E b``), what the norms hand on (``2 E b``), and what they scale where their
      weights train (``2 E b``)
    - the output of every projection that does not write to the residual stream, and the input of those that do; the
      activated gate of the MLP
    - what attention, the gated delta rule and routed experts keep in addition, as their layers' ``cost`` says
    - an adapter: its ``r`` columns, and its input once more where it is kept in a wider dtype than activations

    To that comes the largest weight in few bits, which is decoded for the products that read it.

    ``checkpointing="layer"`` keeps ``E b`` a layer and token, and one layer in full while it is recomputed; a share
    ``s`` keeps that share of the difference in every layer. Where activations are offloaded, what the largest layer
    keeps is on the device, and what is on its way.

    With ``shard`` a rank keeps its part of weights, gradients and optimizer state, and besides, whole, what is gathered
    at once: two layers (one computes while the next comes in), what belongs to the model itself, and their gradients.

    With ``sequence`` T is a rank's part of the pack, and what layers exchange is kept at every setting.

    With ``experts`` a rank keeps its part of the experts, of their gradients and state, in no shards; tokens that it
    gets are kept at every setting, and its experts are given as many visits as they have room for.

    Args:
        model: the prepared model that will train.
        tokens_per_batch: T, of one rank.
        optimizer: transformers' name for it; one that is not known is counted as AdamW.
        checkpointing: ``"none"``, ``"layer"`` or a share from 0 to 1.
        compute_dtype: of activations; the weights' own by default (autocast makes it narrower).
        in_flight_bytes: the most that offloading has on its way; None without offloading.
        shard: ranks among which the weights will be divided, or are.
        sequence: ranks that will hold a pack together, or do.
        recurrent: how they divide recurrent layers; see ``shard_sequence``.
        experts: how experts, whole in this model, will be divided.
    """
    width_bytes = (compute_dtype or hf_model.compute_dtype(model)).itemsize
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    routed = set() if experts.ranks == 1 else routed_parameters(model)
    weights, gradients = (0, 0) if shard == 1 else _gathered_bytes(model, width_bytes, routed)

    def ranks(tensor: torch.Tensor) -> int:
        return experts.ranks if tensor in routed else shard

    return MemoryEstimate(
        weights=weights + sum(_share(tensor, ranks(tensor)) for tensor in (*model.parameters(), *model.buffers())),
        gradients=gradients + sum(_share(parameter, ranks(parameter)) for parameter in trained),
        optimizer=_state_bytes(trained - routed, optimizer) // shard
        + _state_bytes(trained & routed, optimizer) // experts.ranks,
        activations=_activation_bytes(
            model, tokens_per_batch, width_bytes, checkpointing, in_flight_bytes, sequence, recurrent, experts
        ),
        logits=_loss_bytes(model, tokens_per_batch, width_bytes),
    )


def estimate_traced_memory(
    model: nn.Module,
    layers: Sequence[LayerMemory],
    *,
    tokens_per_batch: int,
    optimizer: str = "adamw_torch_fused",
    compute_dtype: torch.dtype | None = None,
    accumulates: bool = False,
) -> MemoryEstimate:
    """Memory of a training step of compiled layers, from what their graphs keep: the largest of its stages.

    - the loss: all layers' activations, the final norm's input and output, its own blocks and gradients
    - the backward of each layer, last to first: the activations of those before it and its own peak, with the gradients
      computed so far
    - the optimizer: weights, all gradients, state

    Args:
        model: the model that will train; the other arguments as ``estimate_memory`` takes them.
        layers: one for each decoder layer, in order, at the setting in question; see ``trace_layer``.
        accumulates: gradients of earlier batches are there from the start.
    """
    whole = estimate_memory(model, tokens_per_batch=tokens_per_batch, optimizer=optimizer, compute_dtype=compute_dtype)
    width_bytes = (compute_dtype or hf_model.compute_dtype(model)).itemsize
    boundary = tokens_per_batch * hf_model.text_config(model).hidden_size * width_bytes
    kept = max((layer.shared for layer in layers), default=0) + sum(layer.kept for layer in layers)
    # the head and the final norm come first, the embedding last
    done = whole.gradients if accumulates else 0
    stages = [replace(whole, gradients=done, activations=kept + 2 * boundary), replace(whole, activations=0, logits=0)]
    for layer, module in zip(reversed(layers), reversed(hf_model.text_model(model).layers), strict=True):
        kept -= layer.kept
        stages.append(replace(whole, gradients=done, activations=kept + layer.backward_peak, logits=0))
        if not accumulates:
            done += sum(_bytes(parameter) for parameter in module.parameters() if parameter.requires_grad)
    return max(stages, key=lambda stage: stage.total)


def _state_bytes(parameters: Iterable[nn.Parameter], optimizer: str) -> int:
    return sum(optimizer_bytes(parameter, optimizer) for parameter in parameters)


def optimizer_bytes(parameter: torch.Tensor, optimizer: str) -> int:
    """State an optimizer keeps for one parameter.

    ``copies * bytes + 4`` for torch's own (plain SGD: 0); an element ``states * (1 + 4 / 256)`` for bitsandbytes' in 8
    bits, without the table of codes that all share, and ``4 * states`` for its others; ``2 * (bits / 8 + 4 / 256)`` for
    torchao's; Adafactor keeps float32 row and column sums of a matrix.
    """
    elements = parameter.numel()
    if states := _BITSANDBYTES.get(optimizer):
        narrow = optimizer.endswith("8bit") and elements >= _NARROW_SMALLEST
        return states * (elements + 4 * -(-elements // _BLOCK) if narrow else 4 * elements)
    if optimizer in _TORCHAO:
        bits = _TORCHAO[optimizer]
        narrow = elements >= _NARROW_SMALLEST and elements % _BLOCK == 0
        codes = elements * bits // 8 + 4 * elements // _BLOCK + 4 * 2**bits
        return 2 * (codes if narrow else _bytes(parameter)) + _STEP_BYTES
    if optimizer == "adafactor":
        sums = elements if parameter.ndim < 2 else elements // parameter.shape[-1] + elements // parameter.shape[-2]
        return 4 * sums
    copies = _STATE_COPIES.get(optimizer, 2)
    return copies * _bytes(parameter) + (_STEP_BYTES if copies else 0)


def candidate_settings(*, compiled: bool) -> tuple[str | float, ...]:
    """What ``"auto"`` tries, the least recomputation first; shares are the compiler's."""
    return ("none", *(_SHARES if compiled else ()), "layer")


def least_recomputation(predicted: Mapping[str | float, int], device: torch.device) -> CheckpointingChoice:
    """The first setting whose predicted peak fits nine tenths of what the device has; the last where none does."""
    available = int(usable_memory(device) * _HEADROOM)
    for setting, peak in predicted.items():
        if peak <= available:
            return CheckpointingChoice(setting, peak, f"a predicted {_size(peak)} of {_size(available)} usable")
    return CheckpointingChoice(setting, peak, f"even so a predicted {_size(peak)}, more than {_size(available)} usable")


def usable_memory(device: torch.device) -> int:
    """Bytes this process may have of a device: what is free, and what its allocator holds already."""
    if device.type != "cuda":
        return device_memory(device)
    free, total = torch.cuda.mem_get_info(device)
    return min(total, free + torch.cuda.memory_reserved(device))


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def offloaded_bytes(
    model: nn.Module,
    *,
    tokens_per_batch: int,
    checkpointing: str | float,
    compute_dtype: torch.dtype | None = None,
    sequence: int = 1,
    recurrent: Recurrent = "heads",
) -> int:
    """Bytes of a step that lie in the host's memory where activations are offloaded; arguments of ``estimate_memory``.

    What all layers keep, and the input of the final norm.
    """
    width_bytes = (compute_dtype or hf_model.compute_dtype(model)).itemsize
    kept, _ = _kept_and_recomputed(model, width_bytes, checkpointing, sequence, recurrent)
    return int(tokens_per_batch * (sum(kept) + hf_model.text_config(model).hidden_size * width_bytes))


def _activation_bytes(
    model: nn.Module,
    tokens: int,
    width_bytes: int,
    checkpointing: str | float,
    in_flight: int | None,
    sequence: int,
    recurrent: Recurrent,
    experts: ExpertSplit,
) -> int:
    kept, recomputed = _kept_and_recomputed(model, width_bytes, checkpointing, sequence, recurrent, experts)
    held = tokens * sum(kept)
    if in_flight is not None:
        held = min(held, tokens * max(kept, default=0) + in_flight)
    # embedding output, and the final norm's input and output
    ends = 3 * hf_model.text_config(model).hidden_size * width_bytes
    return int(held + tokens * (max(recomputed, default=0) + ends) + _of_products(model, tokens))


def _of_products(model: nn.Module, tokens: int) -> int:
    """What one product with a weight in few bits holds for its length: its values, or rows as they become codes."""
    config, sizes = hf_model.text_config(model), [0]
    for weight in model.parameters():
        if computes_in_fp8(weight):
            visits = experts_per_token(config, weight.shape[0]) if weight.ndim > 2 else 1
            sizes.append(tokens * visits * max(weight.shape[-2:]) * _ROUNDED_BYTES)
        elif isinstance(weight, QuantizedTensor):
            sizes.append(weight.numel() * weight.dtype.itemsize)
    return max(sizes)


def _kept_and_recomputed(
    model: nn.Module,
    width_bytes: int,
    checkpointing: str | float,
    sequence: int,
    recurrent: Recurrent,
    experts: ExpertSplit = WHOLE,
) -> tuple[list[float], list[float]]:
    """For each layer the bytes of a token that it keeps, and that it computes again."""
    text = hf_model.text_config(model)
    boundary = text.hidden_size * width_bytes
    share = {"none": 1.0, "layer": 0.0}.get(checkpointing) if isinstance(checkpointing, str) else float(checkpointing)
    assert share is not None, f"resolve checkpointing={checkpointing!r} first"
    layers = hf_model.text_model(model).layers
    sent = [_dispatched(layer, experts) for layer in layers]
    always = [
        boundary + (_exchanged(layer, sequence, recurrent) + got) * width_bytes
        for layer, (got, _) in zip(layers, sent, strict=True)
    ]
    whole = [
        _layer_bytes(layer, text, width_bytes, recurrent if sequence > 1 else "heads") + (got + more) * width_bytes
        for layer, (got, more) in zip(layers, sent, strict=True)
    ]
    beyond = [max(size - kept, 0.0) for size, kept in zip(whole, always, strict=True)]
    kept = [size + share * more for size, more in zip(always, beyond, strict=True)]
    return kept, [(1 - share) * more for more in beyond]


def _exchanged(layer: nn.Module, sequence: int, recurrent: Recurrent) -> float:
    """Elements for each token that are kept for what ranks of a pack exchange."""
    if sequence == 1:
        return 0.0
    parts = (module for module in layer.modules() if isinstance(module, Swapped))
    return sum(part.exchanged(sequence, recurrent=recurrent) for part in parts)


def _dispatched(layer: nn.Module, experts: ExpertSplit) -> tuple[float, float]:
    """Elements for each token that come from other ranks for their experts here, and that more visits keep."""
    found = [(0.0, 0.0)]
    if experts.ranks > 1:
        found += [module.dispatched(experts) for module in layer.modules() if isinstance(module, Swapped)]
    received, more = (sum(values) for values in zip(*found, strict=True))
    return received, more


def _layer_bytes(layer: nn.Module, config: Any, width_bytes: int, recurrent: Recurrent) -> float:
    """Bytes a decoder layer keeps for each token: around its projections, and what each of its parts says."""
    width = config.hidden_size
    norms_train = any("layernorm" in name and weight.requires_grad for name, weight in layer.named_parameters())
    elements = (6.0 if norms_train else 4.0) * width
    extra = 0.0
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if ".lora_A" in name:
            itemsize = module.weight.dtype.itemsize
            extra += itemsize * (module.out_features + (module.in_features if itemsize > width_bytes else 0))
        elif ".lora_" not in name:
            elements += module.in_features if module.out_features == width else module.out_features
            # silu(gate), and the gate itself
            elements += module.out_features if "gate_proj" in name else 0
    own = layer_cost(layer, tokens=1, recurrent=recurrent)
    return float((elements + own.kept) * width_bytes + extra + own.kept_bytes)


def layer_cost(layer: nn.Module, *, tokens: int = 0, squares: int = 0, recurrent: Recurrent = "heads") -> Cost:
    """The sum of ``Swapped.cost`` over a prepared module and all under it."""
    parts = (module for module in layer.modules() if isinstance(module, Swapped))
    costs = [part.cost(tokens, squares, recurrent=recurrent) for part in parts]
    return Cost(*map(sum, zip(Cost(), *costs, strict=True)))


def _loss_bytes(model: nn.Module, tokens: int, width_bytes: int) -> int:
    """What the loss holds at once, the gradient of the hidden states, and that of a head that trains."""
    head = hf_model.head_of(model)
    if head is None:
        return 0
    vocabulary, width = head.weight.shape
    trains = head.weight.requires_grad
    gradient = tokens * width * width_bytes
    dtype = torch.bfloat16 if width_bytes == 2 else torch.float32
    if choose(LinearCrossEntropySpec(hf_model.device_of(model), dtype, width=width)).impl == "triton":
        workspace = workspace_bytes(tokens, width, vocabulary, width_bytes, weight_grad=trains)
        return int(workspace + gradient + trains * width_bytes * vocabulary * width)
    # the gradient of float32 logits takes their place; that of the head is summed in float32 and rounded at the end
    entry = 4 + (width_bytes if width_bytes < 4 else 0)
    rows = chunk_tokens(tokens, vocabulary, trains) + trains * width
    return int(entry * rows * vocabulary + gradient)


def _gathered_bytes(
    model: nn.Module, width_bytes: int, beside: AbstractSet[nn.Parameter] = frozenset()
) -> tuple[int, int]:
    """Whole weights and whole gradients that are there at once, in the dtype that sharded layers compute in."""

    def size(weights: Iterable[nn.Parameter], *, trained: bool) -> int:
        return sum(w.numel() * min(w.dtype.itemsize, width_bytes) for w in weights if w.requires_grad or not trained)

    units = [set(unit.parameters()) - beside for unit in gathered_units(model)]
    rest = set(model.parameters()).difference(beside, *units)
    weights = size(rest, trained=False) + 2 * max((size(unit, trained=False) for unit in units), default=0)
    return weights, size(rest, trained=True) + max((size(unit, trained=True) for unit in units), default=0)


def _share(tensor: torch.Tensor, shard: int) -> int:
    """Bytes of one rank's part of a tensor that is sharded, or will be."""
    return _bytes(tensor) if shard == 1 else -(-tensor.numel() // shard) * tensor.dtype.itemsize


def _bytes(tensor: torch.Tensor) -> int:
    """What lies on this device: a sharded tensor's own share; of a weight in few bits, its codes and scales."""
    if isinstance(tensor, QuantizedTensor):
        return stored_bytes(tensor)
    local = getattr(tensor, "_local_tensor", tensor)
    return int(local.numel() * tensor.dtype.itemsize)


def _size(value: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 2**10:.1f} KiB"
