"""Whole runs whose products are in fp8: they train, resume, are planned, verified and merged, or are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from few_bits_cases import DENSE, base, losses, recipe_of
from safetensors.torch import load_file
from training_cases import byte_tokenizer

from deltatune import ops
from deltatune.cli import main
from deltatune.commands.prebuild import build
from deltatune.config.load import dump_recipe
from deltatune.config.schema import Recipe
from deltatune.errors import UserError
from deltatune.ops import _nvidia
from deltatune.ops._fp8_mm import providers
from deltatune.quantization.products import quantized_weights
from deltatune.quantization.tensor import computes_in_fp8
from deltatune.training import building
from deltatune.training.products import check_products, compute_by_recipe, product_lines
from deltatune.training.run import train
from lora_cases import relative
from quantized_models import quantize_layers
from released_checkpoints import STYLES, make, model_of
from tiny import tiny_model

FP8 = {"type": "fp8", "compute": "fp8"}
WIDE = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 128}


def planned(recipe: Recipe, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    capsys.readouterr()
    code = main(["plan", str(file)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def of_products(said: str) -> list[str]:
    """The lines from that of the products on."""
    lines = said.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("products in fp8"))
    return [lines[first], *itertools.takewhile(lambda line: line.startswith("  "), lines[first + 1 :])]


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3"])
def test_a_run_trains_and_says_what_it_computes_in_fp8(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = base(tmp_path, family, **WIDE)
    fused = {"lora": {**DENSE["lora"], "impl": "fused"}, "checkpointing": "layer"}
    sections: dict[str, Any] = {} if family == "qwen3_5_moe" else fused
    recipe = recipe_of(tmp_path / "eight", checkpoint, FP8, **sections)
    plan = of_products(planned(recipe, tmp_path, capsys))
    models: list[Any] = []
    monkeypatch.setattr(building, "product_lines", lambda r, m, d: models.append(m) or product_lines(r, m, d))
    assert of_products_of_run(recipe, capsys) == plan
    computing = sum(computes_in_fp8(weight) for _, _, weight in quantized_weights(models[0]))
    assert plan[0].startswith(f"products in fp8, forward and backward: {computing} weights (")
    experts = "experts.gate_up_proj 2, experts.down_proj 2"
    assert (experts in plan[0]) == (family == "qwen3_5_moe")
    assert any("no more than 64 outputs" in line and "k_proj" in line for line in plan)
    assert plan[-1] == "  in bfloat16: adapters, routers, embeddings, the head, and all that is in no few bits"
    train(recipe_of(tmp_path / "wide", checkpoint, {"type": "fp8"}, **sections))
    found, expected = losses(tmp_path / "eight" / "output"), losses(tmp_path / "wide" / "output")
    assert found[-1] < 0.8 * found[0]
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05)


def of_products_of_run(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    train(recipe)
    said = capsys.readouterr().out
    assert "independent" in said
    return of_products(said)


def test_bf16_says_nothing_of_products(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path / "run", base(tmp_path, "qwen3"), {"type": "fp8", "compute": "bf16"}, **DENSE)
    assert "products in fp8" not in planned(recipe, tmp_path, capsys)


@pytest.mark.parametrize("before", ["fp8", "bf16"])
def test_a_run_goes_on_as_if_it_had_never_stopped_or_in_the_other_precision(before: str, tmp_path: Path) -> None:
    checkpoint = base(tmp_path, "qwen3", **WIDE)
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole_run = recipe_of(tmp_path / "whole", checkpoint, {**FP8, "compute": before}, training=saves, **DENSE)
    train(whole_run)
    half = recipe_of(tmp_path / "half", checkpoint, FP8, training=saves, **DENSE)
    shutil.copytree(tmp_path / "whole" / "output" / "checkpoint-2", tmp_path / "half" / "output" / "checkpoint-2")
    data = half.data.model_copy(update={"train": whole_run.data.train})
    train(half.model_copy(update={"data": data}), resume=True)
    whole, half = (load_file(tmp_path / n / "output" / "adapter_model.safetensors") for n in ("whole", "half"))
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items()) == (before == "fp8")


def test_an_adapter_is_merged_into_the_checkpoint_s_own_values(tmp_path: Path) -> None:
    checkpoint = base(tmp_path, "qwen3", **WIDE)
    train(recipe_of(tmp_path / "run", checkpoint, FP8, **DENSE))
    assert main(["merge", str(tmp_path / "run" / "output"), "--output", str(tmp_path / "merged")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    before, merged = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "merged"))
    adapter = load_file(tmp_path / "run" / "output" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    scale = json.loads((tmp_path / "run" / "output" / "adapter_config.json").read_text())
    expected = before[f"{name}.weight"].float() + scale["lora_alpha"] / scale["r"] * b @ a
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert relative(merged[f"{name}.weight"], expected) < 2**-8 < relative(before[f"{name}.weight"], expected)


@pytest.mark.parametrize("style", ["fp8", "fp8, channels"])
def test_a_released_checkpoint_computes_in_fp8(style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, _ = make(tmp_path, STYLES[style], model_of(STYLES[style], vocab_size=len(byte_tokenizer())))
    byte_tokenizer().save_pretrained(few)
    sections = DENSE if style == "fp8, channels" else {}
    recipe = recipe_of(tmp_path / "run", few, {"compute": "fp8"}, **sections)
    plan = of_products(planned(recipe, tmp_path, capsys))
    # only a matrix of more than 128 columns has more than one block in a row
    again = [line for line in plan if line.startswith("  rounded once more, from 128x128 blocks")]
    assert len(again) == (style == "fp8")
    assert all(line.endswith(": 2 weights (shared_expert.down_proj 2)") for line in again)
    assert of_products_of_run(recipe, capsys) == plan
    found = losses(tmp_path / "run" / "output")
    assert found[-1] < found[0]


def test_prebuild_compiles_products_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    real = ops.fp8_mm
    monkeypatch.setattr(ops, "fp8_mm", lambda *args, **given: called.append(args) or real(*args, **given))
    recipe = recipe_of(tmp_path / "run", base(tmp_path, "qwen3", **WIDE), FP8, **DENSE)
    assert [name for name, _ in build(recipe, torch.device("cpu"))] == ["a step, 1 document"]
    assert called


def test_a_model_without_a_weight_that_can_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = {"hidden_size": 40, "intermediate_size": 40}
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe_of(tmp_path / "run", base(tmp_path, "qwen3", **narrow), FP8, **DENSE)))
    assert main(["plan", str(file)]) == 2
    assert "model.quantization.compute: fp8: no weight can compute in fp8: widths that" in capsys.readouterr().err


#: compute capability, settings of the recipe, and what is said
CARDS: dict[str, tuple[tuple[int, int], dict[str, Any], str | None]] = {
    "Ampere": ((8, 0), {"training": {"bf16": True}}, r"fp8: torch._scaled_mm needs.*8\.9 .* has 8\.0; set it to bf16"),
    "Ada": ((8, 9), {"training": {"bf16": True}}, None),
    "float32": ((9, 0), {}, r"in bfloat16, and these are in float32; set training\.bf16: true, or compute: bf16"),
    "the reference, by name": ((8, 0), {"kernels": {"fp8_mm": "reference"}}, None),
    "the library, by name": ((8, 0), {"kernels": {"fp8_mm": "torch"}}, r"^fp8_mm: impl='torch' cannot run.* recipe\)$"),
}  # fmt: skip


@pytest.mark.parametrize("card", CARDS)
def test_a_device_without_products_in_fp8_is_refused(
    card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability, sections, said = CARDS[card]
    monkeypatch.setattr(_nvidia, "capability_of", lambda _: capability)
    monkeypatch.setattr(providers, "capability_of", lambda _: capability)
    recipe = recipe_of(tmp_path / "run", tmp_path, FP8, **sections)
    model = tiny_model("qwen3", hidden_size=128)
    assert quantize_layers(model, "fp8")
    for call in (check_products, compute_by_recipe):
        if said is None:
            call(recipe, model, torch.device("cuda"))
            continue
        with pytest.raises(UserError, match=said) as error:
            call(recipe, model, torch.device("cuda"))
        assert "\n" not in str(error.value)
    assert any(computes_in_fp8(weight) for _, _, weight in quantized_weights(model)) == (said is None)
