"""The memory estimate against tensors that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deltatune import CompileOptions, prepare
from deltatune.compile import memory
from deltatune.compile.memory import estimate_memory, estimate_traced_memory, offloaded_bytes, optimizer_bytes
from deltatune.compile.trace import LayerMemory
from deltatune.config.schema import LoraSection
from deltatune.ops import Choice
from deltatune.ops._linear_cross_entropy.blocks import workspace_bytes
from deltatune.training.adapters import adapt
from deltatune.training.preflight import missing_optimizer
from tiny import FAMILIES, tiny_model

CPU = torch.device("cpu")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.dtype.itemsize
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch_fused", lambda p: torch.optim.AdamW(p, fused=True)),
        ("adamw_torch", torch.optim.AdamW),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("adagrad", torch.optim.Adagrad),
    ],
)
def test_weights_gradients_and_optimizer_are_exact(name: str, make: Any, dtype: torch.dtype) -> None:
    model = adapt(tiny_model("qwen3_5", dtype=dtype), LoraSection(r=4, adapter_dtype="model"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    estimate = estimate_memory(model, tokens_per_batch=64, optimizer=name)
    tensors = [*model.parameters(), *model.buffers()]
    assert estimate.weights == sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
    assert estimate.gradients == sum(p.grad.numel() * p.grad.dtype.itemsize for p in trained)
    assert estimate.optimizer == state_bytes(optimizer)


def held_bytes(state: Any) -> int:
    """What an optimizer of a library keeps, without the table of codes that bitsandbytes' parameters share."""
    if isinstance(state, dict):
        return sum(held_bytes(value) for name, value in state.items() if not str(name).startswith("qmap"))
    inner = getattr(state, "tensor_attrs", ())  # of torchao's narrow tensors
    if inner:
        return sum(held_bytes(getattr(state, name)) for name in inner)
    return state.numel() * state.dtype.itemsize if isinstance(state, torch.Tensor) else 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*memory._BITSANDBYTES, *memory._TORCHAO])
def test_state_of_other_libraries_is_exact(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    if (missing := missing_optimizer(name)) is not None:
        pytest.skip(missing)
    # above and below the smallest narrow tensor, and no whole number of blocks
    weights = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((64, 96), (96, 43), (20, 96), (96,))]
    arguments = TrainingArguments(str(tmp_path), optim=name, use_cpu=True)
    make, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = make(weights, **settings)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        optimizer.step()
    assert [held_bytes(optimizer.state[weight]) for weight in weights] == [
        optimizer_bytes(weight, name) for weight in weights
    ]


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adafactor"])
def test_compact_optimizers_take_less(name: str) -> None:
    matrix = torch.empty(512, 1024, device="meta")
    assert optimizer_bytes(matrix, name) < optimizer_bytes(matrix, "adamw_torch") / 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapters", [False, True])
def test_activations_are_near_what_backward_keeps(family: str, adapters: bool) -> None:
    model = tiny_model(family, layers=4, hidden_size=64, head_dim=32)
    if adapters:
        model = adapt(model, LoraSection(r=4))
    prepare(model)
    kept = saved_bytes(model.train(), 256)
    assert estimate_memory(model, tokens_per_batch=256).activations == pytest.approx(kept, rel=0.25)


def saved_bytes(model: Any, tokens: int) -> int:
    """Bytes of the storages that backward holds on to, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(1, 90, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_the_meta_device_gives_the_same_estimate() -> None:
    model = tiny_model("qwen3_5_moe", layers=4)
    prepare(model)
    real = estimate_memory(model, tokens_per_batch=512)
    assert estimate_memory(model.to("meta"), tokens_per_batch=512) == real


def test_checkpointing_orders_as_it_recomputes() -> None:
    model = tiny_model("qwen3_5", layers=8)
    prepare(model)
    settings: list[str | float] = ["none", 0.75, 0.5, 0.25, "layer"]
    sizes = [estimate_memory(model, tokens_per_batch=512, checkpointing=s).activations for s in settings]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 2


def test_offloaded_activations_leave_one_layer_and_what_is_on_its_way() -> None:
    model = tiny_model("qwen3", layers=8)
    prepare(model)
    tokens, boundary = 512, 32 * 4
    for setting in ("none", "layer"):
        whole = estimate_memory(model, tokens_per_batch=tokens, checkpointing=setting)
        host = offloaded_bytes(model, tokens_per_batch=tokens, checkpointing=setting)
        layer = (host - tokens * boundary) // 8
        left = estimate_memory(model, tokens_per_batch=tokens, checkpointing=setting, in_flight_bytes=1000)
        assert whole.activations - left.activations == 7 * layer - 1000
        assert (left.logits, left.weights) == (whole.logits, whole.weights)
        assert estimate_memory(model, tokens_per_batch=tokens, checkpointing=setting, in_flight_bytes=2**30) == whole
    assert layer == tokens * boundary


@pytest.mark.parametrize(
    ("room", "compiled", "expected"),
    [("none", True, "none"), (0.5, True, 0.5), (0.5, False, "layer"), ("layer", True, "layer"), (None, True, "layer")],
)
def test_auto_takes_the_least_recomputation_that_fits(
    monkeypatch: pytest.MonkeyPatch, room: str | float | None, compiled: bool, expected: str | float
) -> None:
    model = tiny_model("qwen3_5", layers=8)
    prepared = prepare(model, compile=CompileOptions() if compiled else None, checkpointing="auto")
    fits = 0 if room is None else estimate_memory(model, tokens_per_batch=512, checkpointing=room).total
    monkeypatch.setattr(memory, "device_memory", lambda device: int(fits / 0.9) + 2)
    choice = prepared.decide_checkpointing(512, device=CPU)
    assert choice is not None
    assert choice.setting == expected
    assert "usable" in choice.reason


def gradients_of(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("kept", "peak", "stage"), [(10**8, 10**8, "loss"), (10**8, 3 * 10**8, "last"), (0, 0, "step")]
)
def test_the_peak_is_that_of_the_largest_stage(kept: int, peak: int, stage: str) -> None:
    model = tiny_model("qwen3", layers=3)
    layers = [LayerMemory(kept, 1000, peak)] * 3
    found = estimate_traced_memory(model, layers, tokens_per_batch=1, optimizer="sgd")
    activations = {"loss": 3 * kept + 1000 + 2 * 32 * 4, "last": 2 * kept + 1000 + peak, "step": 0}
    assert found.activations == activations[stage]
    assert found.gradients == (gradients_of(model) if stage == "step" else 0)
    assert (found.logits > 0) is (stage == "loss")
    whole = estimate_traced_memory(model, layers, tokens_per_batch=1, optimizer="sgd", accumulates=True)
    assert whole.gradients == gradients_of(model)


def test_gradients_come_while_activations_go() -> None:
    """With a large first layer the peak is its backward, when the other layers' gradients are there."""
    model = tiny_model("qwen3", layers=3)
    layers = [LayerMemory(10**8, 0, 4 * 10**8), *[LayerMemory(0, 0, 0)] * 2]
    found = estimate_traced_memory(model, layers, tokens_per_batch=1)
    assert found.gradients == sum(gradients_of(layer) for layer in model.model.layers[1:])


@pytest.mark.parametrize("trains", [True, False])
def test_the_loss_in_blocks_takes_what_its_blocks_do(monkeypatch: pytest.MonkeyPatch, trains: bool) -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    model.lm_head.requires_grad_(trains)
    chunked = estimate_memory(model, tokens_per_batch=4096).logits
    monkeypatch.setattr(memory, "choose", lambda *_, **__: Choice("triton", ""))
    found = estimate_memory(model, tokens_per_batch=4096).logits
    vocabulary, width = model.lm_head.weight.shape
    gradients = 2 * width * (4096 + trains * vocabulary)
    assert found == workspace_bytes(4096, width, vocabulary, 2, weight_grad=trains) + gradients
    assert found != chunked
