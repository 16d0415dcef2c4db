"""Adapters as part of the base products of whole models: compiled and packed, against PEFT's and against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune import CompileOptions, Sequences, prepare, verify
from lora_cases import (
    FEW,
    adapted,
    assert_gradients_close,
    assert_same,
    fused_layers,
    logits,
    packed_call,
    pair,
    relative,
)
from tiny import documents

TRACED = CompileOptions(backend="aot_eager")


def train(model: Any, steps: int) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**packed_call(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize(("checkpointing", "scope"), [("none", "layer"), ("layer", "model"), (0.5, "layer")])
def test_compiled_layers_train_as_pefts_do(scope: Any, checkpointing: Any) -> None:
    """In one graph for each type of layer, whatever the depth and the values."""
    fused = adapted(layers=4) if checkpointing == "none" else adapted("qwen3", target_modules=FEW)
    stock = copy.deepcopy(fused)
    prepare(stock, lora="stock")
    options = CompileOptions(scope=scope, backend="aot_eager")
    prepared = prepare(fused, lora="fused", compile=options, checkpointing=checkpointing)
    for ours, theirs in zip(train(fused, 4), train(stock, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    report = prepared.compile_report
    assert report is not None
    assert list(report.graphs.values()) == [1] * (2 if checkpointing == "none" else 1)
    assert report.breaks == report.recompiles == []
    assert fused_layers(fused) == sum(hasattr(module, "lora_A") for module in fused.modules())


def test_scales_of_every_kind_share_two_graphs() -> None:
    """A scale is a number of the graph until a layer or a call has another one."""
    alpha = {rf".*layers\.{i}\..*": 3 + i for i in range(3)}
    fused, stock = pair("qwen3", layers=3, target_modules=["q_proj", "down_proj"], alpha_pattern=alpha)
    prepared = prepare(fused, lora="fused", compile=TRACED)
    assert_same(fused, stock)
    before = dict(prepared.compile_report.graphs)  # type: ignore[union-attr]
    for factor in (0.5, 3.0):
        for model in (fused, stock):
            for module in model.modules():
                if hasattr(module, "scale_layer"):
                    module.scale_layer(factor)
        assert_same(fused, stock)
    assert prepared.compile_report is not None
    assert prepared.compile_report.graphs == before
    assert max(before.values()) <= 2


def test_a_reference_without_the_adapter_between_compiled_forwards() -> None:
    fused, stock = pair("qwen3", target_modules=FEW)
    prepared = prepare(fused, lora="fused", compile=TRACED)
    for model in (fused, stock):
        for step in range(2):
            chosen = model(**packed_call(step)).loss
            with torch.no_grad(), model.disable_adapter():
                reference = model(**packed_call(step)).loss
            rejected = model(**packed_call(step + 5)).loss
            (chosen * 2 - rejected - reference).backward()
    assert_gradients_close(fused, stock)
    assert prepared.compile_report is not None
    assert prepared.compile_report.breaks == []


def test_recomputed_layers_keep_no_more_than_pefts_own() -> None:
    def kept(lora: Any) -> int:
        model = adapted("qwen3", target_modules=FEW)
        prepare(model, lora=lora, compile=TRACED, checkpointing="layer")
        own = [*model.parameters(), *model.buffers()]
        static, found = {x.untyped_storage().data_ptr() for x in own}, {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(**packed_call()).loss
        assert loss.requires_grad
        return sum(size for storage, size in found.items() if storage not in static)

    assert kept("fused") == kept("stock")


def test_16_bit_models_are_at_most_twice_as_far_from_float64_as_pefts() -> None:
    stock = adapted("qwen3", dtype=torch.bfloat16, autocast_adapter_dtype=False)
    models = {"fused": copy.deepcopy(stock), "compiled": copy.deepcopy(stock), "exact": copy.deepcopy(stock).double()}
    prepare(models["fused"], lora="fused")
    prepare(models["compiled"], lora="fused", compile=TRACED)
    prepare(models["exact"], lora="stock")
    prepare(stock, lora="stock")
    for model in (stock, *models.values()):
        model(**packed_call()).loss.backward()

    # single tensors of so small a model scatter by chance; all of them together do not
    def error(model: Any) -> float:
        pairs = zip(model.parameters(), models["exact"].parameters(), strict=True)
        found = [(a.grad.double() - b.grad, b.grad) for a, b in pairs if b.grad is not None]
        return sum(float(d.norm() / e.norm()) for d, e in found) / len(found)

    assert error(models["fused"]) <= 2 * error(stock)
    assert error(models["compiled"]) <= 2 * error(stock)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_no_gradient_and_no_bit_between_documents(family: str) -> None:
    model = adapted(family)
    prepare(model, lora="fused")
    lengths = [5, 1, 70, 7, 33]
    docs = documents(lengths)
    changed = [*docs[:2], (docs[2] + 1) % 96, *docs[3:]]

    def outputs(pieces: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = model.get_input_embeddings()(torch.cat(pieces))[None].detach().requires_grad_()
        found = model(inputs_embeds=embeddings, sequences=Sequences.from_lengths(lengths)).logits[0]
        for i, part in enumerate(found.split(lengths)):
            (gradient,) = torch.autograd.grad(part.square().sum(), embeddings, retain_graph=True)
            for j, other in enumerate(gradient[0].split(lengths)):
                assert bool(other.abs().sum() > 0) == (i == j)
        (gradient,) = torch.autograd.grad(found.square().sum(), embeddings)
        return found, gradient[0]

    for before, after in zip(outputs(docs), outputs(changed), strict=True):
        for i, (a, b) in enumerate(zip(before.split(lengths), after.split(lengths), strict=True)):
            assert torch.equal(a, b) == (i != 2)
    assert fused_layers(model) > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_verify_finds_documents_independent(compiled: bool) -> None:
    model = adapted("qwen3", target_modules=FEW) if compiled else adapted("qwen3_5")
    prepare(model, lora="fused", compile=TRACED if compiled else None)
    model(**packed_call()).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = verify(model, lengths=(3, 1, 20, 9), compiled=compiled)
    assert report.ok, str(report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_report_counts_modes_and_reasons() -> None:
    model = adapted(target_modules=["q_proj", "up_proj", "gate_proj", "lm_head"])
    prepared = prepare(model)
    rows = {(row.mode, row.reason): row.layers for row in prepared.report.lora_rows}
    assert rows == {
        ("stock", "on a CPU; lora fused (lora.impl in a recipe) makes adapters part of the products there too"): 5,
        ("stock", "outside the decoder layers"): 1,
    }
    assert "on a CPU" in str(prepared.report)
    assert prepared.report.to_dict()["lora_layers"][0]["layers"] == 5
    with pytest.raises(ValueError, match=r"lora='fused' cannot run lm_head: outside the decoder layers"):
        prepare(model, lora="fused")


def narrow_products(model: Any) -> int:
    """How many narrow products a forward runs."""

    class Counter(TorchDispatchMode):
        narrow = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # frozen weights are turned, so not contiguous
            self.narrow += func is torch.ops.aten.mm.default and args[1].is_contiguous()
            return func(*args, **(kwargs or {}))

    with Counter() as counter, torch.no_grad():
        logits(model)
    return counter.narrow


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_layers_of_one_input_share_a_narrow_product(family: str) -> None:
    """Of a mixer: its projections in, and out; of an MLP: gate with up, and down."""
    fused, _ = pair(family)
    assert narrow_products(fused) == 2 * 4
    for layer in fused.get_base_model().get_decoder().layers:
        layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    assert narrow_products(fused) == 2 * 5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_auto_fuses_on_a_gpu_within_the_error_budget(adapter_dtype: torch.dtype) -> None:
    wide = adapter_dtype == torch.float32
    stock = adapted(dtype=torch.bfloat16, autocast_adapter_dtype=wide).cuda()
    fused, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    rows = prepare(fused).report.lora_rows
    assert {row.mode for row in rows} == {"fused"}
    for model in (stock, exact):
        prepare(model, lora="stock")
    call = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in packed_call().items()}
    for model in (fused, stock, exact):
        model.zero_grad()
        model(**call).loss.backward()
    pairs = list(zip(fused.parameters(), stock.parameters(), exact.parameters(), strict=True))
    trained = [(a.grad, b.grad, c.grad) for a, b, c in pairs if c.grad is not None]
    ours = sum(relative(a, c) for a, _, c in trained)
    theirs = sum(relative(b, c) for _, b, c in trained)
    assert ours <= 2 * theirs
