"""Adapters inside the base products of whole models: compiled and packed, against PEFT's layers and against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from deltatune import CompileOptions, Sequences, prepare, verify
from deltatune.lora import linear as lora_linear
from lora_cases import (
    adapted,
    assert_gradients_close,
    assert_same,
    bordered,
    groups,
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


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("checkpointing", ["none", "layer", 0.5])
def test_compiled_layers_train_as_pefts_do(scope: Any, checkpointing: Any) -> None:
    fused = adapted()
    stock = copy.deepcopy(fused)
    prepare(stock, lora="stock")
    options = CompileOptions(scope=scope, backend="aot_eager")
    prepared = prepare(fused, lora="fused", compile=options, checkpointing=checkpointing)
    for ours, theirs in zip(train(fused, 4), train(stock, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    report = prepared.compile_report
    assert report is not None
    assert list(report.graphs.values()) == [1] * (2 if scope == "layer" else 1)
    assert report.breaks == report.recompiles == []
    assert bordered(fused) == 15


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the activation's op inside the down projection on any device."""
    monkeypatch.setattr(lora_linear, "gated_act_runs", lambda *_: True)


def calls_of_the_activation(model: Any) -> int:
    """How often a step runs the op."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, 1)
    return sum(event.name == "deltatune::lora_gated_act" for event in profile.events())


@pytest.mark.usefixtures("gated")
@pytest.mark.parametrize(
    ("scope", "checkpointing", "times"),
    [
        (None, "none", {1}),
        (None, "layer", {2}),
        ("layer", "none", {1}),
        ("layer", "layer", {2}),
        ("layer", 0.5, {1, 2}),  # as the compiler chooses
        ("model", "none", {1}),
    ],
)
def test_the_activation_joins_the_down_projection(scope: Any, checkpointing: Any, times: set[int]) -> None:
    fused = adapted()
    for module in fused.modules():
        if hasattr(module, "down_proj"):
            module.down_proj.base_layer.bias = torch.nn.Parameter(torch.randn(32), requires_grad=False)
    stock = copy.deepcopy(fused)
    prepare(stock, lora="stock")
    options = None if scope is None else CompileOptions(scope=scope, backend="aot_eager")
    prepare(fused, lora="fused", compile=options, checkpointing=checkpointing)
    for ours, theirs in zip(train(fused, 4), train(stock, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    activations = sum(hasattr(module, "act_fn") for module in fused.modules())
    assert calls_of_the_activation(fused) in {activations * number for number in times}


@pytest.mark.usefixtures("gated")
@pytest.mark.parametrize("why", ["a hook", "a hook on it", "another activation", "no adapter behind it", "disabled"])
def test_the_activation_stays_by_itself_where_it_must(why: str) -> None:
    more = {"target_modules": ["gate_proj", "up_proj"]} if why == "no adapter behind it" else {}
    fused, stock = pair(**more)
    for model in (fused, stock):
        for module in model.modules():
            if why == "a hook" and hasattr(module, "down_proj"):
                module.down_proj.register_forward_hook(lambda *_: None)
            if why == "a hook on it" and hasattr(module, "act_fn"):
                module.act_fn.register_forward_hook(lambda *_: None)
            if why == "another activation" and hasattr(module, "act_fn"):
                module.act_fn = torch.nn.GELU()
    if why == "disabled":
        with fused.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(logits(fused), logits(stock))
    else:
        assert_same(fused, stock)
        assert calls_of_the_activation(fused) == 0


def test_one_graph_a_type_of_layer_whatever_the_depth_and_the_values() -> None:
    from peft import LoraConfig, get_peft_model

    from tiny import tiny_model

    model = get_peft_model(
        tiny_model("qwen3_5", layers=6),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, alpha_pattern={"layers.2": 3}),
    ).train()
    prepared = prepare(model, lora="fused", compile=TRACED)
    train(model, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, 3)
    assert prepared.compile_report is not None
    assert list(prepared.compile_report.graphs.values()) == [1, 1]


def test_a_reference_without_the_adapter_between_compiled_forwards() -> None:
    fused, stock = pair()
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


@pytest.mark.parametrize("joined", [False, True])
def test_recomputed_layers_keep_no_more_than_pefts_own(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_linear, "gated_act_runs", lambda *_: joined)

    def kept(lora: Any) -> int:
        model = adapted()
        prepare(model, lora=lora, compile=TRACED, checkpointing="layer")
        model(**packed_call())  # makes the operands
        own = [*model.parameters(), *model.buffers()]
        own += [x for group in groups(model) if group.operands for x in _tensors(vars(group.operands).values())]
        static, found = {x.untyped_storage().data_ptr() for x in own}, {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(**packed_call()).loss
        assert loss.requires_grad
        return sum(size for storage, size in found.items() if storage not in static)

    assert kept("fused") == kept("stock")


def _tensors(values: Any) -> Any:
    for value in values:
        yield from value if isinstance(value, tuple) else (value,)


def test_generated_code_computes_the_same() -> None:
    fused, stock = pair()
    prepare(fused, lora="fused", compile=CompileOptions())
    for model in (fused, stock):
        model(**packed_call()).loss.backward()
    assert_gradients_close(fused, stock)


def test_16_bit_models_are_at_most_twice_as_far_from_float64_as_pefts() -> None:
    stock = adapted(dtype=torch.bfloat16, autocast_adapter_dtype=False)
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
    assert bordered(model) > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_verify_finds_documents_independent(compiled: bool) -> None:
    model = adapted()
    prepare(model, lora="fused", compile=TRACED if compiled else None)
    model(**packed_call()).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = verify(model, lengths=(3, 1, 20, 9), compiled=compiled)
    assert report.ok, str(report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_report_counts_forms_and_reasons() -> None:
    model = adapted(target_modules=["q_proj", "up_proj", "gate_proj", "lm_head"])
    prepared = prepare(model)
    rows = {(row.form, row.reason): row.layers for row in prepared.report.lora_rows}
    assert rows == {
        ("stock", "on a CPU; lora='fused' folds adapters in there too"): 5,
        ("stock", "outside the decoder layers"): 1,
    }
    assert "on a CPU" in str(prepared.report)
    assert prepared.report.to_dict()["lora_layers"][0]["layers"] == 5
    with pytest.raises(ValueError, match=r"lora='fused' cannot run lm_head: outside the decoder layers"):
        prepare(model, lora="fused")


def test_every_layer_of_a_group_shares_one_narrow_product() -> None:
    fused, _ = pair()
    fused(**packed_call())
    sizes = {len(group.layers): group.layout for group in groups(fused)}
    assert set(sizes) >= {1, 2}
    assert sizes[2].forward_border
    assert sizes[2].backward_border


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_auto_fuses_on_a_gpu_within_the_error_budget(adapter_dtype: torch.dtype) -> None:
    wide = adapter_dtype == torch.float32
    stock = adapted(dtype=torch.bfloat16, autocast_adapter_dtype=wide).cuda()
    fused, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    rows = prepare(fused).report.lora_rows
    assert {row.form for row in rows} == {"fused"}
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
    for parameter in fused.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    fused(**call)
    for group in groups(fused):
        for slot, name in zip(group.layout.slots, group.names, strict=True):
            weight = group.fused[slot.target].lora_A[name].weight
            rows_of = group.operands.rows[slot.offset : slot.offset + slot.rank]
            assert torch.equal(rows_of, weight.to(torch.bfloat16))
