"""The benchmark of ops, on tiny shapes and the CPU: gates that can fail, rows that survive the failure of others."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from deltatune import ops
from deltatune.bench.ops.case import Setting, Variant
from deltatune.bench.ops.catalog import OPS, shape_of
from deltatune.bench.ops.gate import Gate
from deltatune.bench.ops.measure import measure_case
from deltatune.cli import main
from deltatune.ops import causal_conv

CPU = torch.device("cpu")
TOKENS = 96
TINY = shape_of("tiny").values


def make_case(op, *, documents=3, variants=None, tokens=TOKENS):
    case = OPS[op].build(shape_of("tiny"), tokens, Setting(CPU, documents=documents))
    kept = [variant for variant in case.variants if variant.by != "compile"] if variants is None else variants
    return replace(case, variants=kept)


def conv_variant(function, *, name="candidate", by="library", packed=True):
    return Variant(name, by, lambda: function, packed=packed)


def measured(case, gate_case=None):
    return measure_case(case, gate_case or case, CPU, rounds=1, seconds=0.01)


def by_name(config, what="forward+backward"):
    return {result["impl"]: result for result in config["results"] if result["what"] == what}


# adapters are no op with implementations: a layer takes the form that they allow
@pytest.mark.parametrize("op", [op for op in OPS if not op.startswith("lora_")])
def test_the_implementations_are_those_the_op_knows(op) -> None:
    called = {"causal_conv_l2norm": "causal_conv", "final_norm": "rms_norm_rope"}.get(op, op)
    with pytest.raises(ValueError, match="unknown impl") as caught:
        getattr(ops, f"choose_{called}")(CPU, torch.bfloat16, impl="?")
    known = set(re.findall(r"'(\w+)'", str(caught.value).partition("expected")[2])) - {"auto"}
    assert set(OPS[op].implementations) == known


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_gated_and_timed(op) -> None:
    config = measured(make_case(op))
    reference = by_name(config)["reference"]
    assert reference["status"] == "ok"
    assert reference["median_ms"] > 0
    assert reference["of_floor"] == pytest.approx(reference["floor_ms"] / reference["median_ms"])
    assert set(config["errors"]["reference"]) == set(config["error_budget"])
    missing = [result for result in config["results"] if result["status"] == "unavailable"]
    assert all(result["reason"] for result in missing), "a variant that is not there says why"


def test_bytes_are_those_of_each_input_read_and_each_output_written_once() -> None:
    conv, norm, rope = (make_case(op) for op in ("causal_conv", "gated_rms_norm", "rms_norm_rope"))
    H, G, K, V = (
        TINY[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    )
    heads = (TINY["num_attention_heads"] + TINY["num_key_value_heads"]) * TINY["head_dim"]
    channels, gated = 2 * H * K + G * V, G * V
    for case, width, forward, backward in ((conv, channels, 2, 3), (norm, gated, 3, 5), (rope, heads, 2, 3)):
        stream = TOKENS * width * 2
        assert (case.work.forward_bytes, case.work.backward_bytes) == (forward * stream, backward * stream)
    results = measured(conv)["results"]
    assert {
        result["floor_bytes"] for result in results if result["what"] == "forward+backward" and "floor_bytes" in result
    } == {5 * TOKENS * channels * 2}


def test_operations_are_those_of_the_registered_formulas() -> None:
    config = measured(make_case("linear_cross_entropy", variants=[]))
    assert config["results"] == []
    product = 2 * TOKENS * TINY["hidden_size"] * TINY["vocab_size"]
    floors = {
        result["what"]: result["floor_flops"]
        for result in measured(make_case("linear_cross_entropy"))["results"]
        if "floor_flops" in result
    }
    assert floors == {"forward": product, "forward+backward": 2 * product}


def wrong_output(t):
    return 1.02 * causal_conv(t["x"], t["weight"])


def leaking(t):
    return causal_conv(t["x"], t["weight"], sequences=None)


def not_a_number(t):
    y = causal_conv(t["x"], t["weight"])
    return torch.where(torch.arange(y.shape[1])[:, None] == 5, math.nan, y)


@pytest.mark.parametrize("function", [wrong_output, leaking, not_a_number])
def test_a_wrong_function_does_not_pass_the_gate(function) -> None:
    case = make_case("causal_conv")
    inputs = case.draw(1)
    gate = Gate.of(case, inputs)
    assert gate.check(case, case.reference, inputs)[1] is None
    assert "allowed" in (gate.check(case, function, inputs)[1] or "")


def test_the_gate_sees_the_gradients_of_weights_that_are_not_timed() -> None:
    case = make_case("causal_conv")
    inputs = case.draw(1)

    def half_the_weight_gradient(t):
        return case.reference({"x": t["x"], "weight": (t["weight"] + t["weight"].detach()) / 2})

    errors, wrong = Gate.of(case, inputs).check(case, half_the_weight_gradient, inputs)
    assert wrong is not None
    assert "dweight" in wrong
    assert errors["y"] < 1e-2


def test_a_function_without_documents_is_held_to_a_single_one() -> None:
    case = make_case("causal_conv", variants=[conv_variant(leaking), conv_variant(leaking, name="alone", packed=False)])
    rows = by_name(measured(case))
    assert rows["candidate"]["status"] == "red gate"
    assert rows["alone"]["status"] == "ok"


@pytest.mark.parametrize(
    ("by", "timed"), [("deltatune", False), ("compile", False), ("library", True), ("stock", True)]
)
def test_no_time_is_reported_of_a_wrong_answer_of_ours(by, timed) -> None:
    row = by_name(measured(make_case("causal_conv", variants=[conv_variant(wrong_output, by=by)])))["candidate"]
    assert row["status"] == "red gate"
    assert ("median_ms" in row) == timed


def missing_package():
    raise ImportError("no such package")


def fails(t):
    raise RuntimeError("a kernel\nthat fails")


def fails_without_autograd(t):
    if not torch.is_grad_enabled():
        raise torch.OutOfMemoryError("too large")
    return causal_conv(t["x"], t["weight"])


def test_one_failure_does_not_cost_the_others() -> None:
    case = make_case("causal_conv", documents=1)
    variants = [
        Variant("missing", "library", missing_package),
        conv_variant(fails, name="failing"),
        conv_variant(fails_without_autograd, name="large"),
        *case.variants,
    ]
    rows = by_name(measured(replace(case, variants=variants)))
    assert (rows["missing"]["status"], rows["missing"]["reason"]) == ("unavailable", "no such package")
    assert (rows["failing"]["status"], rows["failing"]["reason"]) == ("failed", "a kernel that fails")
    assert rows["large"]["status"] == "out_of_memory"
    assert rows["reference"]["median_ms"] > 0


def test_correctness_may_be_checked_at_another_size() -> None:
    config = measured(make_case("gated_rms_norm"), make_case("gated_rms_norm", tokens=33))
    assert (config["config"]["T"], config["config"]["gate_tokens"]) == (TOKENS, 33)
    assert by_name(config)["reference"]["status"] == "ok"


def test_the_budget_of_a_loss_is_that_of_logits_in_the_dtype_of_the_model() -> None:
    case = make_case("linear_cross_entropy", tokens=256)
    inputs = case.draw(1)
    gate = Gate.of(case, inputs)
    hidden, weight, labels = inputs["hidden"].double(), inputs["weight"].double(), inputs["labels"]
    rounded = torch.nn.functional.cross_entropy((hidden @ weight.T).bfloat16().double(), labels, reduction="sum")
    error = ((rounded - gate.exact["loss"]) / gate.exact["loss"]).abs().item()
    assert error < 3 * gate.budget["loss"], "within three standard errors"
    assert gate.budget["loss"] < 1e-2


def test_documents_of_equal_length() -> None:
    assert Setting(CPU, documents=3).lengths(64) == [21, 21, 22]
    assert sum(Setting(CPU).lengths(500)) == 500


def test_the_command_measures_prints_and_writes(tmp_path, capsys) -> None:
    argv = ["bench", "ops", "--op", "gated_rms_norm", "--shape", "tiny", "--shape", "qwen3-8b", "--tokens", "64"]
    assert main([*argv, "--device", "cpu", "--rounds", "1", "--seconds", "0.01", "--records", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "gated_rms_norm: qwen3-8b has none" in page
    (path,) = tmp_path.glob("gated_rms_norm-cpu-*.json")
    assert str(path) in page
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["kind"], record["subject"], record["ok"]) == ("ops/gated_rms_norm", "gated_rms_norm", True)
    assert record["argv"][:5] == ["deltatune", "bench", "ops", "--op", "gated_rms_norm"]
    (config,) = record["configs"]
    rows = by_name(config)
    compiled = rows["torch.compile(reference)"]
    assert compiled["status"] == "ok"
    assert len(compiled["samples_ms"]) == 4
    assert {"reference", "stock eager", "FLA"} <= rows.keys()
    assert config["auto"] == "reference"


@pytest.mark.parametrize(("wrong", "status"), [("reference", 1), ("lossy", 0)])
def test_only_what_a_run_would_take_decides_the_exit_status(monkeypatch, capsys, wrong, status) -> None:
    def build(shape, tokens, setting):
        case = OPS["causal_conv"].build(shape, tokens, setting)
        return replace(case, variants=[conv_variant(wrong_output, name=wrong, by="deltatune")], auto="reference")

    monkeypatch.setattr("deltatune.bench.ops.command.OPS", {"causal_conv": replace(OPS["causal_conv"], build=build)})
    argv = ["bench", "ops", "--shape", "tiny", "--tokens", "64", "--device", "cpu", "--rounds", "1", "--no-record"]
    assert main(argv) == status
    assert "red gate: relative error of y" in capsys.readouterr().out


def test_reasons_stand_whole_below_the_table(capsys) -> None:
    argv = ["bench", "ops", "--op", "causal_conv", "--shape", "tiny", "--tokens", "64", "--device", "cpu"]
    assert main([*argv, "--rounds", "1", "--seconds", "0.01", "--no-record"]) == 0
    table, _, reasons = capsys.readouterr().out.partition("\ntriton: unavailable: ")
    assert max(map(len, reasons.splitlines())) <= 120
    said = " ".join(reasons.split())
    assert "cannot run here: triton needs an NVIDIA GPU, the inputs are on cpu; use impl='reference'" in said
    assert table.rpartition("triton")[2].split("\n")[0].endswith(" unavailable")
    assert reasons.count("No module named 'causal_conv1d'") == 1, "once for both directions"


def test_an_unknown_model_is_one_line(capsys) -> None:
    assert main(["bench", "ops", "--shape", "qwen9", "--device", "cpu"]) == 2
    assert "unknown model 'qwen9'" in capsys.readouterr().err


def test_an_unusable_device_is_one_line(capsys) -> None:
    assert main(["bench", "ops", "--shape", "tiny", "--device", "banana"]) == 2
    assert capsys.readouterr().err.startswith("error: --device banana cannot be used here: ")
