"""``checkpointing="auto"``: decided where the tokens are known, by what fits, and again only for larger batches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch

from deltatune import CompileOptions, Sequences, prepare
from deltatune.compile import auto, memory
from tiny import tiny_model

TRACED = CompileOptions(backend="aot_eager")
SETTINGS = ["none", 0.75, 0.5, 0.25, "layer"]


def train(model: Any, tokens: int = 96) -> torch.Tensor:
    ids = torch.arange(tokens)[None] % 90
    loss: torch.Tensor = model(input_ids=ids, labels=ids, sequences=Sequences.from_lengths([tokens - 30, 30])).loss
    loss.backward()
    return loss.detach()


def adapted(family: str = "qwen3", layers: int = 2) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "out_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model(family, layers=layers), config).train()


def test_the_first_training_forward_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "candidate_settings", lambda *, compiled: ("none", "layer"))
    model = adapted(layers=1)
    prepared = prepare(model, compile=TRACED, checkpointing="auto")
    assert prepared.auto_checkpointing is None
    assert "decided at the first training forward" in str(prepared.report)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 96, dtype=torch.long))
    model.eval()(input_ids=torch.ones(1, 96, dtype=torch.long))
    assert prepared.auto_checkpointing is None
    train(model.train())
    choice = prepared.auto_checkpointing
    assert choice is not None
    assert choice.setting == prepared.report.to_dict()["checkpointing"] == "none"
    assert choice.reason in str(prepared.report)


def test_the_least_recomputation_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions: list[dict[str | float, int]] = []
    monkeypatch.setattr(
        auto, "least_recomputation", lambda *args: predictions.append(args[0]) or memory.least_recomputation(*args)
    )
    prepare(adapted(layers=1), compile=TRACED, checkpointing="auto").decide_checkpointing(96)
    (predicted,) = predictions
    assert list(predicted) == SETTINGS
    found, room = [], 2**40
    while True:
        monkeypatch.setattr(memory, "usable_memory", lambda _device, room=room: room)
        choice = memory.least_recomputation(predicted, torch.device("cpu"))
        assert choice.predicted_bytes == predicted[choice.setting]
        found.append(choice.setting)
        if choice.predicted_bytes > 0.9 * room:
            break
        room = int((choice.predicted_bytes - 1) / 0.9)
    assert found[0] == "none"
    assert found[-1] == "layer"
    assert len(set(found)) >= 3
    assert [SETTINGS.index(setting) for setting in found] == sorted(SETTINGS.index(setting) for setting in found)
    assert "even so a predicted" in choice.reason


def test_a_larger_batch_decides_again() -> None:
    model = adapted()
    prepared = prepare(model, compile=None, checkpointing="auto")
    train(model, 64)
    first = prepared.auto_checkpointing
    train(model, 48)
    assert prepared.auto_checkpointing is first
    train(model, 128)
    second = prepared.auto_checkpointing
    assert first is not None
    assert second is not None
    assert second.predicted_bytes > first.predicted_bytes


def test_a_setting_that_changes_has_graphs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_from_graphs", lambda *_: {"none": 2**30, "layer": 2**20})
    model = adapted(layers=1)
    prepared = prepare(model, compile=TRACED, checkpointing="auto")
    expected = train(model)
    reports = [prepared.compile_report]
    for room in (1, 2**40, 1):  # batches of one shape: another setting is all that can ask for another graph
        monkeypatch.setattr(memory, "usable_memory", lambda _device, room=room: room)
        prepared.decide_checkpointing(96)
        assert prepared.report.checkpointing == ("layer" if room == 1 else "none")
        torch.testing.assert_close(train(model), expected, rtol=1e-5, atol=0)
        reports.append(prepared.compile_report)
    none, layer, none_again, layer_again = reports
    assert none is none_again
    assert layer is layer_again
    assert none is not layer
    for report in (none, layer):
        assert report is not None
        assert set(report.graphs.values()) == {1}
        assert report.recompiles == []


def test_layers_in_front_of_all_that_trains_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "candidate_settings", lambda *, compiled: ("none",))
    config = peft.LoraConfig(r=4, target_modules=r".*layers\.3\..*q_proj", init_lora_weights=False)
    late = prepare(
        peft.get_peft_model(tiny_model("qwen3", layers=4), config), compile=TRACED, checkpointing="auto"
    ).decide_checkpointing(96)
    early = prepare(adapted(layers=4), compile=TRACED, checkpointing="auto").decide_checkpointing(96)
    assert late is not None
    assert early is not None
    assert late.predicted_bytes < 0.8 * early.predicted_bytes


@pytest.mark.parametrize("compile", [None, CompileOptions(scope="model", backend="aot_eager")])
def test_without_layer_graphs_the_shapes_decide(
    compile: CompileOptions | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    prepared = prepare(model, compile=compile, checkpointing="auto")
    monkeypatch.setattr(memory, "usable_memory", lambda _device: 1)
    train(model)
    assert prepared.report.checkpointing == "layer"


def test_a_given_setting_is_left_alone() -> None:
    prepared = prepare(adapted(), compile=TRACED, checkpointing="layer")
    assert prepared.decide_checkpointing(96) is None
    assert prepared.report.checkpointing == "layer"


def test_copies_keep_what_was_decided() -> None:
    model = adapted()
    prepare(model, compile=None, checkpointing="auto")
    train(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(train(twin), train(model))


def test_deciding_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module, some of which are in evaluation: what is inside them, and around them, as well."""
    monkeypatch.setattr(auto, "candidate_settings", lambda *, compiled: ("none",))
    model = adapted()
    layers = model.get_base_model().model.layers
    layers[0].eval()
    layers[1].mlp.eval()
    prepared = prepare(model, compile=TRACED, checkpointing="auto")
    states = [(module.training, list(module._forward_pre_hooks)) for module in model.modules()]
    prepared.decide_checkpointing(96)
    assert [(module.training, list(module._forward_pre_hooks)) for module in model.modules()] == states
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_are_summed_count_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "candidate_settings", lambda *, compiled: ("none",))
    model = tiny_model("qwen3", layers=1).train()
    prepared = prepare(model, compile=TRACED, checkpointing="auto")
    alone, summed = (prepared.decide_checkpointing(96, accumulates=accumulates) for accumulates in (False, True))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    seen = prepared.decide_checkpointing(96)
    assert alone is not None
    assert summed is not None
    assert seen is not None
    assert alone.predicted_bytes < summed.predicted_bytes == seen.predicted_bytes


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("setting", ["none", 0.5, "layer"])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(
    setting: str | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "head_dim": 256, "num_attention_heads": 8}
    delta = {"linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 16}
    model = tiny_model("qwen3_5", layers=6, dtype=torch.bfloat16, linear_value_head_dim=128, **sizes, **delta).cuda()
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"])
    model = peft.get_peft_model(model, config).train()
    monkeypatch.setattr(auto, "candidate_settings", lambda *, compiled: (setting,))
    prepared = prepare(model, compile=CompileOptions(), checkpointing="auto")
    choice = prepared.decide_checkpointing(8192)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 90, (1, 8192), device="cuda")
    sequences = Sequences.from_lengths([3000, 5192]).to("cuda")
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids, sequences=sequences).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert choice is not None
    assert choice.predicted_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
