"""One graph a layer type, no breaks, nothing new after the second batch; scoped Inductor options."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
import transformers

from deltatune import CompileOptions, Sequences, prepare
from deltatune.compile.graphs import FROZEN, GraphBreakError, Graphs, graphs_of
from deltatune.config.inductor import INDUCTOR_OPTIONS
from tiny import HYBRIDS, documents, tiny_model

TOTAL = 96
TYPES = {"qwen3": 1, "qwen3_moe": 1, "qwen3_next": 2, "qwen3_5": 2, "qwen3_5_moe": 2, "gpt_oss": 2}
TARGETS = ["q_proj", "v_proj", "out_proj", "in_proj_qkv", "in_proj_qkvz"]
# the same graphs as Inductor's, without the C++ compiler
TRACED = CompileOptions(backend="aot_eager")


def batches(count: int) -> list[dict[str, Any]]:
    """Packs of one shape with ever other documents."""
    packs = []
    for i in range(count):
        lengths = [max(1, 40 - 9 * (i % 5)), *([3 + i % 4] * (1 + i)), 1]
        docs = torch.cat(documents(lengths, seed=i))[:TOTAL]
        tokens = torch.nn.functional.pad(docs, (0, TOTAL - len(docs)))[None]
        labels = tokens.masked_fill(torch.arange(TOTAL) >= len(docs), -100)
        packs.append({"input_ids": tokens, "labels": labels, "sequences": Sequences.from_lengths(lengths, total=TOTAL)})
    return packs


def train(model: Any, count: int) -> list[torch.Tensor]:
    losses = []
    for batch in batches(count):
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
    return losses


def assert_same_training(model: Any, reference: Any, count: int) -> None:
    for ours, theirs in zip(train(model, count), train(reference, count), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm().clamp_min(1e-6), name


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        ("qwen3", "none"),
        ("qwen3_moe", "layer"),
        ("qwen3_next", "none"),
        ("qwen3_5", 0.5),
        ("qwen3_5_moe", "none"),
        ("gpt_oss", "none"),
    ],
)
def test_one_graph_a_layer_type(family: str, checkpointing: str | float) -> None:
    model = tiny_model(family, layers=2 * TYPES[family]).train()
    reference = copy.deepcopy(model)
    prepare(reference)
    prepared = prepare(model, compile=TRACED, checkpointing=checkpointing)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same_training(model, reference, 2)
    report = prepared.compile_report
    assert report is not None
    assert list(report.graphs.values()) == [1] * TYPES[family]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == TYPES[family], "and nothing else"
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, 6)
    assert list(report.graphs.values()) == [1] * TYPES[family]
    assert report.breaks == []
    assert report.recompiles == []


@pytest.mark.parametrize(
    ("family", "when", "checkpointing"), [("qwen3", "before", "none"), ("qwen3_5_moe", "after", "layer")]
)
def test_one_graph_a_layer_type_with_adapters(family: str, when: str, checkpointing: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    layers = 2 * TYPES[family]
    reference = peft.get_peft_model(tiny_model(family, layers=layers), config).train()
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    prepare(reference)
    model = tiny_model(family, layers=layers)
    if when == "before":
        model = peft.get_peft_model(model, config)
    prepared = prepare(model, compile=TRACED, checkpointing=checkpointing)
    if when == "after":
        model = peft.get_peft_model(model, config)
    model.load_state_dict(state)
    model.train()
    assert_same_training(model, reference, 3)
    report = prepared.compile_report
    assert report is not None
    assert list(report.graphs.values()) == [1] * TYPES[family]
    assert report.breaks == []


#: Two types of a dense layer.
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("layers", "checkpointing", "windows", "kinds"),
    [(3, "none", WINDOWS, ("full", "sliding")), (2, "layer", {}, ("full",))],
)
def test_layers_before_anything_that_trains_have_no_backward(
    layers: int, checkpointing: str, windows: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    targets = rf".*layers\.{layers - 1}\..*q_proj"
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("qwen3", layers=layers, **windows), config).train()
    reference = copy.deepcopy(model)
    prepare(reference)
    prepared = prepare(model, compile=TRACED, checkpointing=checkpointing)
    needs = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda _module, _args, output: needs.append(output.requires_grad))
    assert_same_training(model, reference, 3)
    assert needs == [*[False] * (layers - 1), True] * 3
    report = prepared.compile_report
    assert report is not None
    mlp = type(model.get_base_model().model.layers[0].mlp).__name__
    frozen = sorted(name for name in report.graphs if name.endswith(FROZEN))
    assert frozen == [f"{kind}_attention_{mlp}{FROZEN}" for kind in kinds]
    assert report.recompiles == []


@pytest.mark.parametrize(("family", "checkpointing"), [("qwen3", "none"), ("qwen3_5", "layer"), ("gpt_oss", "none")])
def test_the_whole_text_model_is_one_graph(family: str, checkpointing: str) -> None:
    model = tiny_model(family, layers=1 + (family in HYBRIDS)).train()
    reference = copy.deepcopy(model)
    prepare(reference)
    options = CompileOptions(scope="model", backend="aot_eager")
    prepared = prepare(model, compile=options, checkpointing=checkpointing)
    assert_same_training(model, reference, 3)
    assert prepared.compile_report is not None
    assert prepared.compile_report.graphs == {"text_model": 1}


@pytest.mark.slow
def test_inductor_with_scoped_options() -> None:
    from torch._inductor import config as inductor_config

    model = tiny_model("qwen3", layers=1).train()
    reference = copy.deepcopy(model)
    prepare(reference)
    before = {key: copy.deepcopy(getattr(inductor_config, key)) for key in INDUCTOR_OPTIONS if "." not in key}
    options = CompileOptions(options={"shape_padding": False, "epilogue_fusion": False, "fx_graph_cache": False})
    prepared = prepare(model, compile=options, checkpointing="layer")
    assert_same_training(model, reference, 3)
    assert prepared.compile_report is not None
    assert list(prepared.compile_report.graphs.values()) == [1]
    assert {key: getattr(inductor_config, key) for key in before} == before


def test_hidden_states_with_compiled_layers() -> None:
    model = tiny_model("qwen3")
    reference = copy.deepcopy(model)
    prepare(reference)
    prepared = prepare(model, compile=TRACED)
    batch = batches(1)[0]
    train(model, 1)
    ours = model(**batch, output_hidden_states=True).hidden_states
    theirs = reference(**batch, output_hidden_states=True).hidden_states
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    train(model, 1)
    assert prepared.compile_report is not None
    assert prepared.compile_report.breaks == []


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("qwen3_moe", "none"), ("gpt_oss", "layer"), pytest.param("qwen3_5_moe", 0.5, marks=pytest.mark.slow)],
)
def test_router_logits_leave_the_compiled_layers(family: str, checkpointing: str | float) -> None:
    # layers of one type: windows are another test's
    kinds = {"layer_types": ["full_attention"]} if family == "gpt_oss" else {}
    model = tiny_model(family, **kinds).train()
    model.router_aux_loss_coef = 0.5
    reference = copy.deepcopy(model)
    prepare(reference)
    prepared = prepare(model, compile=TRACED, checkpointing=checkpointing)
    train(model, 1)
    first, *rest = batches(3)
    for number, batch in enumerate((first, *rest)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            outputs = [one(**batch, output_router_logits=True) for one in (model, reference)]
        ours, theirs = outputs
        assert len(ours.router_logits) == len(theirs.router_logits) == 2
        torch.testing.assert_close(ours.router_logits, theirs.router_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-5, atol=0)
        for one, output in zip((model, reference), outputs, strict=True):
            one.zero_grad(set_to_none=True)
            output.loss.backward()
        for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm().clamp_min(1e-6), name
    as_tuple = model(**first, output_router_logits=True, return_dict=False)
    assert any(isinstance(part, tuple) and len(part) == 2 for part in as_tuple)
    train(model, 1)
    assert prepared.compile_report is not None
    assert prepared.compile_report.breaks == []
    assert not any("router" in key for module in model.modules() for key in module.__dict__ if key.startswith("_delta"))


def test_a_router_that_was_replaced_loses_no_logits_in_silence() -> None:
    model = tiny_model("qwen3_moe")
    prepare(model, compile=TRACED)
    mlp = model.model.layers[1].mlp
    mlp.gate = type(tiny_model("qwen3_moe").model.layers[1].mlp.gate)(model.config)
    with pytest.raises(ValueError, match=r"a router was replaced after prepare.*call prepare\(model\) again"):
        model(**batches(1)[0], output_router_logits=True)


def test_router_logits_are_refused_inside_one_graph() -> None:
    model = tiny_model("qwen3_moe")
    prepare(model, compile=CompileOptions(scope="model", backend="aot_eager"))
    with pytest.raises(ValueError, match="output_router_logits is recorded inside"):
        model(**batches(1)[0], output_router_logits=True)


def break_the_layer(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    forward = mlp.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(x)

    mlp.forward = broken


def test_a_break_stops_a_strict_run_with_its_reason() -> None:
    model = tiny_model("qwen3")
    break_the_layer(model)
    prepare(model, compile=TRACED)
    with pytest.raises(GraphBreakError, match="graph_break"):
        train(model, 1)


def test_a_break_is_counted_otherwise() -> None:
    model = tiny_model("qwen3", layers=1)
    break_the_layer(model)
    prepared = prepare(model, compile=CompileOptions(backend="aot_eager", strict=False))
    train(model, 1)
    assert prepared.compile_report is not None
    assert prepared.compile_report.breaks


def test_evaluation_has_a_graph_of_its_own() -> None:
    model = tiny_model("qwen3")
    prepared = prepare(model, compile=TRACED)
    train(model, 1)
    with torch.no_grad():
        model.eval()(**batches(1)[0])
    model.train()
    train(model, 1)
    report = prepared.compile_report
    assert report is not None
    assert report.graphs == {"full_attention_Qwen3MLP": 1, "full_attention_Qwen3MLP (no grad)": 1}
    assert report.recompiles == []


def test_windows_and_full_attention_are_types_of_their_own() -> None:
    model = tiny_model("qwen3", layers=3, **WINDOWS)
    prepared = prepare(model, compile=TRACED)
    train(model, 3)
    report = prepared.compile_report
    assert report is not None
    assert sorted(report.graphs.values()) == [1, 1]
    assert report.recompiles == []


def test_a_deep_decoder_without_own_layers_is_one_graph() -> None:
    values = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 10}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values))
    prepared = prepare(model, compile=TRACED)
    train(model, 2)
    report = prepared.compile_report
    assert report is not None
    assert sum(count for name, count in report.graphs.items() if "grad" not in name) == 1
    assert report.recompiles == []


def test_the_recompile_limit_names_reason_and_remedy() -> None:
    model = tiny_model("qwen3", layers=1)
    prepare(model, compile=CompileOptions(backend="aot_eager", dynamic=False))
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for length in (10, 20):
            model(documents([length])[0][None])
        with pytest.raises(GraphBreakError, match=r"one shape \[B, T\]"):
            model(documents([30])[0][None])


def test_a_recompile_is_reported_with_its_reason() -> None:
    model = tiny_model("qwen3")
    prepared = prepare(model, compile=TRACED)
    with torch.no_grad():
        for length in (96, 50):
            model(documents([length])[0][None])
    report = prepared.compile_report
    assert report is not None
    assert report.graphs == {"full_attention_Qwen3MLP (no grad)": 2}
    assert len(report.recompiles) == 1
    assert "size mismatch" in report.recompiles[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "everything"}, "'layer' or 'model'"),
        ({"options": {"max_autotune": True}}, "not supported; choose from coordinate_descent_tuning"),
        ({"options": {"shape_padding": "yes"}}, "must be bool"),
        ({"options": {"shape_padding": True}, "backend": "aot_eager"}, "cannot act"),
        ({"backend": "eager"}, "'inductor' or 'aot_eager'"),
        ({"strict": "yes"}, "compile strict"),
        ({"dynamic": "x"}, "compile dynamic"),
        ({"options": None}, "must be a mapping"),
    ],
)
def test_bad_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompileOptions(**arguments)


def test_every_allowed_option_exists_in_torch() -> None:
    CompileOptions(options=dict.fromkeys(INDUCTOR_OPTIONS, False))


def test_an_option_torch_no_longer_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor_config

    monkeypatch.delitem(inductor_config._config, "decompose_mem_bound_mm")
    with pytest.raises(ValueError, match="does not exist in torch"):
        CompileOptions(options={"decompose_mem_bound_mm": True})


def test_cudagraphs_warn_with_the_reason() -> None:
    with pytest.warns(UserWarning, match="boundaries are read on the CPU"):
        CompileOptions(options={"triton.cudagraphs": True})


@pytest.mark.parametrize("hooked", [False, True])
def test_a_compiled_model_is_freed_with_its_last_reference(hooked: bool) -> None:
    def one_that_ran() -> weakref.ref[Any]:
        model = tiny_model("qwen3").train()
        if hooked:
            model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, y: y * 2 if model.training else y)
        prepare(model, compile=TRACED)
        train(model, 1)
        return weakref.ref(model)

    freed = one_that_ran()
    gc.collect()
    assert freed() is None


def run_with_a_hook(model: Any, hook: Any) -> Any:
    handle = model.model.layers[0].mlp.gate_proj.register_forward_hook(hook)
    logits = model(documents([20])[0][None]).logits
    handle.remove()
    return logits


def scaled_by(factor: float) -> Any:
    return lambda _module, _args, y: y * factor


@pytest.mark.parametrize("strict", [True, False])
def test_hooks_made_anew_count_under_the_recompile_limit(strict: bool) -> None:
    model, eager = tiny_model("qwen3", layers=1).train(), tiny_model("qwen3", layers=1).train()
    report = prepare(model, compile=CompileOptions(backend="aot_eager", strict=strict)).compile_report
    prepare(eager)
    assert report is not None
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for factor in (1.0, 2.0):
            run_with_a_hook(model, scaled_by(factor))
        for factor in (3.0, 4.0):
            if strict:
                with pytest.raises(GraphBreakError, match=r"hooks inside.*3 sets.*register a hook once"):
                    run_with_a_hook(model, scaled_by(factor))
                return
            torch.testing.assert_close(
                run_with_a_hook(model, scaled_by(factor)), run_with_a_hook(eager, scaled_by(factor))
            )
    assert sum(count for name, count in report.graphs.items() if "hooks" in name) == 2
    assert [len(report.recompiles), len(report.breaks)] == [1, 1]
    assert "register a hook once" in report.recompiles[0]


class Scale:
    __slots__ = ("factor",)  # and so no weak references

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, _module: Any, _args: Any, y: torch.Tensor) -> torch.Tensor:
        return y * self.factor

    hook = __call__


@pytest.mark.parametrize("hook", [scaled_by(3.0), Scale(3.0), Scale(3.0).hook], ids=["function", "object", "method"])
def test_one_hook_put_on_again_keeps_its_graph(hook: Any) -> None:
    model, eager = tiny_model("qwen3", layers=1).train(), tiny_model("qwen3", layers=1).train()
    prepared = prepare(model, compile=TRACED)
    prepare(eager)
    for _ in range(3):
        put = hook.__self__.hook if hasattr(hook, "__self__") else hook
        torch.testing.assert_close(run_with_a_hook(model, put), run_with_a_hook(eager, hook))
    assert prepared.compile_report is not None
    assert prepared.compile_report.graphs == {"full_attention_Qwen3MLP (hooks 1)": 1}


def test_a_hook_of_its_own_in_each_layer_is_no_recompile() -> None:
    model = tiny_model("qwen3", layers=3).train()
    prepared = prepare(model, compile=TRACED)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(scaled_by(number))
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for batch in batches(2):
            model(**batch)
    assert prepared.compile_report is not None
    assert len(prepared.compile_report.graphs) == 3
    assert prepared.compile_report.recompiles == []


def test_a_hook_that_was_taken_off_is_freed_with_its_graph() -> None:
    model = tiny_model("qwen3", layers=1).train()
    prepare(model, compile=TRACED)

    def one_that_ran(factor: torch.Tensor) -> weakref.ref[Any]:
        hook = scaled_by(factor)
        run_with_a_hook(model, hook).sum().backward()
        return weakref.ref(hook)

    gone = [one_that_ran(torch.tensor(2.0)), one_that_ran(torch.tensor(3.0))]
    gc.collect()
    assert [hook() for hook in gone] == [None, None]
    (graphs,) = model._deltatune.graphs.values()
    assert list(graphs._compiled) == [()]


def test_the_graphs_of_an_overtaken_first_call_are_those_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    prepare(model, compile=TRACED)
    others: list[Graphs] = []

    class Overtaken(Graphs):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            monkeypatch.setattr("deltatune.compile.graphs.Graphs", Graphs)
            with ThreadPoolExecutor(1) as pool:
                others.append(pool.submit(graphs_of, model._deltatune).result())

    monkeypatch.setattr("deltatune.compile.graphs.Graphs", Overtaken)
    assert graphs_of(model._deltatune) is others[0]
    assert graphs_of(model._deltatune) is others[0]
