"""Adapters that began inside the base weights are saved as plain ones of the stock base, and runs go on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import adapter_on, conditional, logits, relative, saved, stock, text, tied
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from training_cases import make_recipe

from deltatune.config.rules import adapter_errors
from deltatune.config.schema import LoraSection
from deltatune.errors import UserError
from deltatune.training.adapters import adapt
from deltatune.training.export import export_adapter, merge_adapter
from deltatune.training.run import train
from deltatune.training.starts import begins_in_base, first_factors, load_plain, make_plain

STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "random": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "patterns": {
        "init_lora_weights": "pissa_niter_4",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"q_proj": 5},
    },
    "weight_decomposed": {"init_lora_weights": "pissa", "use_dora": True},
    "head_too": {"init_lora_weights": "pissa_niter_4", "modules_to_save": ["lm_head"], "bias": "all"},
    "rank above the width": {"init_lora_weights": "pissa", "r": 40},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("start") / "base", conditional())


@pytest.mark.parametrize("lora", STARTS.values(), ids=STARTS)
def test_it_reloads_on_the_stock_base(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    trained = adapter_on(base, tmp_path / "adapter", **lora)
    torch.manual_seed(7)
    before = logits(stock(base))
    reloaded = logits(PeftModel.from_pretrained(stock(base), str(tmp_path / "adapter")))
    assert relative(before, trained) > 0.1
    assert relative(reloaded, trained) < 1e-5


def test_it_is_added_to_the_unchanged_weights_as_servers_do(base: Path, tmp_path: Path) -> None:
    """``W + alpha / r B A`` by hand, of one weight, against the merged model's."""
    adapter_on(base, tmp_path / "adapter", init_lora_weights="pissa_niter_4")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.language_model.layers.1.self_attn.q_proj"
    a, b = (state[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
    weight = load_file(base / "model.safetensors")[f"{name}.weight"] + config["lora_alpha"] / config["r"] * b @ a
    merged = load_file(merge_adapter(tmp_path / "adapter", tmp_path / "merged") / "model.safetensors")
    torch.testing.assert_close(merged[f"{name}.weight"], weight, rtol=1e-5, atol=1e-6)
    export_adapter(tmp_path / "adapter", tmp_path / "served", layout="peft")


def test_a_run_goes_on_under_another_seed(base: Path, tmp_path: Path) -> None:
    """The random decomposition is another one then, and the checkpoint's is taken up."""
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    lora = {"r": 4, "init_lora_weights": "pissa_niter_4"}
    recipe = make_recipe(tmp_path, base, lora=lora, training={**training, "learning_rate": 1e-1})
    train(recipe, console=Console(quiet=True))
    checkpoint = tmp_path / "output" / "checkpoint-2"
    expected = logits(PeftModel.from_pretrained(stock(base), str(checkpoint)))
    assert relative(logits(stock(base)), expected) > 0.1

    torch.manual_seed(99)
    model = adapt(stock(base), LoraSection(**lora))
    first = first_factors(model)
    assert first is not None
    load_plain(model, checkpoint, first)
    assert relative(logits(model), expected) < 1e-5
    model.save_pretrained(str(tmp_path / "again"))
    make_plain(tmp_path / "again", first)
    assert relative(logits(PeftModel.from_pretrained(stock(base), str(tmp_path / "again"))), expected) < 1e-5


def test_a_resumed_run_ends_in_the_same_bits(base: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "init_lora_weights": "pissa_niter_4", "target_modules": ["q_proj", "down_proj"]}
    training = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    train(make_recipe(tmp_path, base, lora=lora, training=training), console=Console(quiet=True))
    other = {**training, "output_dir": str(tmp_path / "other")}
    recipe = make_recipe(tmp_path, base, lora=lora, training=other)
    checkpoint = tmp_path / "output" / "checkpoint-2"
    train(recipe, resume=checkpoint, console=Console(quiet=True))
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("output", "other"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.parametrize("start", ["eva", "corda", "loftq", "lora_ga", "pisa"])
def test_what_begins_from_data_is_refused_by_name(start: str) -> None:
    (error,) = adapter_errors(LoraSection(init_lora_weights=start))
    assert error.startswith(f"lora.init_lora_weights: {start} ")
    assert "pissa_niter_4" in error


@pytest.mark.parametrize("start", [True, False, "gaussian", "Gaussian", "olora", "OLoRA", "pissa", "pissa_niter_16"])
def test_others_are_accepted(start: bool | str) -> None:
    assert list(adapter_errors(LoraSection(init_lora_weights=start))) == []
    assert begins_in_base(start) == (str(start).lower() in ("olora", "pissa", "pissa_niter_16"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "mica"])
def test_a_plan_needs_no_weights(start: str) -> None:
    with torch.device("meta"):
        model = text()
    shapes = {name: p.shape for name, p in adapt(model, LoraSection(r=4, init_lora_weights=start)).named_parameters()}
    assert shapes == {name: p.shape for name, p in adapt(text(), LoraSection(r=4)).named_parameters()}


def test_a_weight_that_is_embedding_and_head_is_not_taken_apart() -> None:
    section = LoraSection(target_modules=["lm_head"], init_lora_weights="pissa")
    with pytest.raises(UserError, match=r"embedding and lm_head share .*leave them out of target_modules"):
        adapt(tied(text()), section)
    adapt(text(), section)


@pytest.mark.parametrize("start", ["pissa_niter_4", "loftq"])
def test_an_adapter_whose_base_weights_are_lost_is_refused(base: Path, tmp_path: Path, start: str) -> None:
    """As PEFT itself and other tools save it."""
    adapter_on(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    for use in (merge_adapter, lambda *folders: export_adapter(*folders, layout="peft")):
        with pytest.raises(UserError, match=rf"trained on base weights that {start} changed"):
            use(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
