"""Gates that open for what is right and close for what is not."""

import dataclasses

import pytest
import torch

from deltatune.bench.gates import (
    Observation,
    against_stock,
    against_truth,
    bounds_from,
    leak_gate,
    observe,
    sample_documents,
    stock_gates,
    truth,
)
from deltatune.bench.shapes import SHAPES, build_model
from deltatune.bench.systems import Adapters, Setting, System, build_system
from deltatune.bench.workload import Batch, Workload

CPU = torch.device("cpu")
LENGTHS = (33, 20, 41, 26)


@pytest.fixture(scope="module")
def base():
    return build_model(SHAPES["tiny"], CPU, dtype=torch.bfloat16, seed=3)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Workload(LENGTHS, SHAPES["tiny"].config().vocab_size, seed=3).batch(0)


def system(base, name: str, **setting) -> System:
    return build_system(Setting(name, **setting), base, Adapters(rank=4, alpha=8))


@pytest.fixture(scope="module")
def known(base, batch) -> tuple[list[int], Observation, Observation]:
    documents = sample_documents(LENGTHS)
    true = truth(system(base, "reference"), batch, documents)
    return documents, true, observe(system(base, "stock"), batch, documents)


def test_the_leak_free_baseline_passes_verify(base) -> None:
    assert leak_gate(system(base, "stock")).ok


def test_stock_as_shipped_fails_verify(base) -> None:
    gate = leak_gate(system(base, "stock as shipped"))
    assert not gate.ok
    assert gate.figure is not None
    assert gate.figure > 0
    assert "linear_attention" in gate.detail


def test_ours_passes_every_gate(base, batch, known) -> None:
    documents, true, stock = known
    assert all(gate.ok for gate in stock_gates("stock", stock, true))
    ours = observe(system(base, "deltatune"), batch, documents)
    gates = against_truth("ours", ours, stock, true) + against_stock("ours", ours, stock, bounds_from(stock, true))
    assert [gate.name for gate in gates if not gate.ok] == []


def test_a_corrupted_gradient_trips_the_gates(base, batch, known) -> None:
    documents, true, stock = known
    corrupted = system(base, "deltatune")
    name, parameter = next((n, p) for n, p in corrupted.model.named_parameters() if "v_proj.lora_B" in n)
    parameter.register_hook(lambda grad: -grad)
    ours = observe(corrupted, batch, documents)
    gates = {gate.name: gate for gate in against_truth("ours", ours, stock, true)}
    assert not gates["adapter gradients against float32"].ok, name
    assert gates["token losses against float32"].ok
    whole = {gate.name: gate for gate in against_stock("ours", ours, stock, bounds_from(stock, true))}
    assert not whole["adapter gradients against the stock path"].ok


def test_a_loss_that_is_off_trips_its_gate(base, batch, known) -> None:
    _, true, stock = known
    off = dataclasses.replace(stock, losses={document: loss + 0.5 for document, loss in stock.losses.items()})
    gates = {gate.name: gate for gate in against_truth("off", off, stock, true)}
    assert not gates["document loss against float32"].ok


def test_a_document_that_sees_another_trips_the_gates(base, batch, known) -> None:
    documents, true, stock = known
    leaking = observe(system(base, "stock as shipped"), batch, documents)
    assert not all(gate.ok for gate in against_truth("leaking", leaking, stock, true))


def test_a_gradient_that_is_not_a_number_trips_the_gates(known) -> None:
    _, true, stock = known
    gradients = {
        d: {n: torch.full_like(g, torch.nan) for n, g in grads.items()} for d, grads in stock.gradients.items()
    }
    gates = against_truth("nan", dataclasses.replace(stock, gradients=gradients), stock, true)
    found = {gate.name: gate for gate in gates}["adapter gradients against float32"]
    assert not found.ok
    assert found.to_dict()["figure"] is None


def test_a_missing_gradient_trips_the_gates(known) -> None:
    _, true, stock = known
    gradients = {d: dict(list(grads.items())[1:]) for d, grads in stock.gradients.items()}
    gates = against_truth("missing", dataclasses.replace(stock, gradients=gradients), stock, true)
    assert not {gate.name: gate for gate in gates}["adapter gradients against float32"].ok


def test_a_stock_path_far_from_the_truth_is_not_trusted(known) -> None:
    _, true, stock = known
    wrong = {d: {n: 2 * g for n, g in grads.items()} for d, grads in stock.gradients.items()}
    assert not all(gate.ok for gate in stock_gates("stock", dataclasses.replace(stock, gradients=wrong), true))


@pytest.mark.parametrize("lengths", [(5,), (9, 4), (100, 64, 2000, 70, 300, 1500, 64), (4000, 4000)])
def test_sampled_documents_fit_the_budget_and_hold_the_last(lengths: tuple[int, ...]) -> None:
    chosen = sample_documents(lengths, budget=3072, at_most=4)
    assert chosen
    assert len(chosen) == len(set(chosen)) <= 4
    assert len(chosen) == 1 or sum(lengths[i] for i in chosen) <= 3072
    assert len(lengths) - 1 in chosen
