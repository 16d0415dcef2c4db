"""Whole runs over a base in few bits: adapters train, resume, are verified, planned and merged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from few_bits_cases import DENSE, SIZES, base, losses, recipe_of
from safetensors.torch import load_file
from training_cases import byte_tokenizer, save_checkpoint

from deltatune import CompileOptions
from deltatune.cli import main
from deltatune.commands.prebuild import build
from deltatune.config.load import dump_recipe
from deltatune.errors import UserError
from deltatune.training import planned
from deltatune.training.quantized_base import QuantizedBase
from deltatune.training.quantized_weights import quantized_lines
from deltatune.training.run import train
from forked import free_port, run_ranks
from released_checkpoints import STYLES, make, model_of
from tiny import tiny_model


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[float], set[str]]]:
    """The losses of a run over a family's base in 16 bits, and the names of what it saves."""

    @cache
    def of(family: str) -> tuple[list[float], set[str]]:
        folder = tmp_path_factory.mktemp(family)
        train(recipe_of(folder / "wide", base(folder, family), None))
        output = folder / "wide" / "output"
        return losses(output), set(load_file(output / "adapter_model.safetensors"))

    return of


def without_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = CompileOptions(backend="aot_eager")
    monkeypatch.setattr(planned, "compile_options", lambda recipe: recipe.compile and traced)


@pytest.mark.parametrize(
    ("format", "family", "backend"),
    [
        ("nf4", "qwen3_5_moe", None),
        ("fp8", "qwen3_5_moe", None),
        pytest.param("fp8", "qwen3_5_moe", "aot_eager", marks=pytest.mark.slow),
        pytest.param("nf4", "qwen3_moe", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_base_made_of_16_bits_trains_an_adapter(
    format: str, family: str, backend: Any, wide: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "aot_eager":
        without_generated_code(monkeypatch)
    compile = backend and {"scope": "layer"}
    train(recipe_of(tmp_path / "few", base(tmp_path, family), {"type": format}, compile=compile))
    few, (expected, saved) = losses(tmp_path / "few" / "output"), wide(family)
    assert few[-1] < 0.8 * few[0]
    assert few != expected
    assert few == pytest.approx(expected, rel=0.1)
    assert set(load_file(tmp_path / "few" / "output" / "adapter_model.safetensors")) == saved
    assert not list((tmp_path / "few" / "output").glob("model*.safetensors"))


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    checkpoint = base(tmp_path)
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole_run = recipe_of(tmp_path / "whole", checkpoint, {"type": "nf4"}, training=saves)
    train(whole_run)
    half = recipe_of(tmp_path / "half", checkpoint, {"type": "nf4"}, training=saves)
    shutil.copytree(tmp_path / "whole" / "output" / "checkpoint-2", tmp_path / "half" / "output" / "checkpoint-2")
    data = half.data.model_copy(update={"train": whole_run.data.train})
    train(half.model_copy(update={"data": data}), resume=True)
    whole, half = (load_file(tmp_path / n / "output" / "adapter_model.safetensors") for n in ("whole", "half"))
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())


def test_plan_says_what_is_in_few_bits_and_what_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(tmp_path / "run", base(tmp_path), {"type": "nf4"})
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert main(["plan", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (few,) = [line for line in lines if line.startswith("base weights in nf4: ")]
    # five of the delta rule and four of attention, less two narrow ones; two of experts and three beside in each layer
    assert few.startswith("base weights in nf4: 17 tensors, ")
    kept = [line for line in lines if line.startswith("  as they are: ")]
    for name in (
        "embed_tokens",
        "conv1d",
        "in_proj_a",
        "in_proj_b",
        "mlp.gate.",
        "shared_expert_gate",
        "lm_head",
        "norms",
    ):
        assert any(name in line for line in kept), name
    (weights,) = [line for line in lines if line.startswith("weights ")]
    assert "KiB" in weights


def test_a_plan_counts_the_bytes_that_weights_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, found = base(tmp_path), []
    for quantization in (None, {"type": "fp8"}, {"type": "nf4"}):
        file = tmp_path / "recipe.yaml"
        file.write_text(dump_recipe(recipe_of(tmp_path / "run", checkpoint, quantization)))
        assert main(["plan", str(file)]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights ")]
        found.append(float(line.split()[1]))
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("style", ["fp8", "gpt-oss", "modelopt, mixed"])
def test_a_plan_of_a_released_checkpoint_reads_headers(
    style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, _ = make(tmp_path, STYLES[style], model_of(STYLES[style], vocab_size=len(byte_tokenizer())))
    byte_tokenizer().save_pretrained(few)
    settings = {"compile": {"scope": "layer"}, "checkpointing": "auto"}
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe_of(tmp_path / "run", few, {}, **settings)))
    assert main(["plan", str(file)]) == 0
    said = capsys.readouterr().out
    assert all(f"base weights in {format}: " in said for format in STYLES[style].formats)


def test_what_only_files_say_that_are_not_here_is_said_to_be_unknown() -> None:
    model = tiny_model("qwen3")
    (line,) = quantized_lines(model, QuantizedBase(method="fp8"))
    assert line.startswith("the checkpoint is in few bits; which weights, and how many bytes, is known once")
    assert quantized_lines(model) == []


@pytest.mark.parametrize("style", ["fp8", "gpt-oss", "nvfp4", "modelopt, mixed"])
def test_a_released_checkpoint_trains_without_a_word_of_it(
    style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, _ = make(tmp_path, STYLES[style], model_of(STYLES[style], vocab_size=len(byte_tokenizer())))
    byte_tokenizer().save_pretrained(few)
    train(recipe_of(tmp_path / "run", few, None))
    found = losses(tmp_path / "run" / "output")
    assert found[-1] < found[0]
    said = capsys.readouterr().out
    assert all(f"base weights in {format}: " in said for format in STYLES[style].formats)
    assert "PASSED" in said or "independent" in said


def test_verify_probes_a_released_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, _ = make(tmp_path, STYLES["fp8"])
    assert main(["verify", str(few), "--lengths", "5,1,9"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("quantization", [{"type": "nf4"}, None], ids=["made of 16 bits", "released"])
def test_an_adapter_is_merged_into_16_bits(quantization: Any, tmp_path: Path) -> None:
    checkpoint = base(tmp_path)
    if quantization is None:
        style = STYLES["fp8"]
        checkpoint, _ = make(tmp_path, style, model_of(style, vocab_size=len(byte_tokenizer())))
        byte_tokenizer().save_pretrained(checkpoint)
    train(recipe_of(tmp_path / "run", checkpoint, quantization))
    assert main(["merge", str(tmp_path / "run" / "output"), "--output", str(tmp_path / "merged")]) == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_replicas_train_what_one_process_does(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "base", tiny_model("qwen3", vocab_size=len(byte_tokenizer()), **SIZES))
    run_ranks(rank_main, str(tmp_path), str(checkpoint), free_port(), count=2)
    accumulated = {"gradient_accumulation_steps": 2, "max_steps": 3}
    alone = recipe_of(tmp_path / "alone", checkpoint, {"type": "nf4"}, training=accumulated, **DENSE)
    train(alone)
    found, expected = (losses(tmp_path / name / "output") for name in ("ranks", "alone"))
    assert found == pytest.approx(expected, rel=1e-5)


def rank_main(rank: int, folder: str, checkpoint: str, port: int) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    parent = Path(folder) / "ranks"
    parent.mkdir(exist_ok=True)
    training = {"max_steps": 3}
    train(recipe_of(parent, Path(checkpoint), {"type": "nf4"}, training=training, parallel={"replicate": 2}, **DENSE))


#: what would train, and how that is said
TRAINED: dict[str, tuple[dict[str, Any], str]] = {
    "a pattern": ({"training": {"unfrozen_parameters": ["q_proj"]}}, "self_attn.q_proj"),
    "a module": ({"lora": {"target_modules": ["k_proj"], "modules_to_save": ["o_proj"]}}, "self_attn.o_proj"),
}


@pytest.mark.parametrize("what", TRAINED)
def test_weights_in_few_bits_do_not_train(what: str, tmp_path: Path) -> None:
    sections, said = TRAINED[what]
    lora = {"target_modules": ["k_proj"], "target_parameters": None, **sections.get("lora", {})}
    recipe = recipe_of(tmp_path / "run", base(tmp_path, "qwen3"), {"type": "nf4"}, **{**sections, "lora": lora})
    with pytest.raises(UserError, match=rf"{said}.*weight is in nf4 and cannot train"):
        train(recipe)


def test_prebuild_compiles_layers_over_weights_in_few_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_generated_code(monkeypatch)
    checkpoint = base(tmp_path, "qwen3_moe")
    recipe = recipe_of(tmp_path / "run", checkpoint, {"type": "nf4"}, compile={"scope": "layer"})
    assert [name for name, _ in build(recipe, torch.device("cpu"))] == ["a step, 1 document"]
    style = STYLES["modelopt, mixed"]
    few, _ = make(tmp_path, style, model_of(style, vocab_size=len(byte_tokenizer())))
    recipe = recipe_of(tmp_path / "other", few, None, compile=None)
    assert [name for name, _ in build(recipe, torch.device("cpu"))] == ["a step, 1 document"]
