"""Training that goes on from an adapter: the same weights, on the same base, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_cases import make_recipe, save_checkpoint

from deltatune.config.load import dump_recipe
from deltatune.config.schema import LoraSection
from deltatune.errors import UserError
from deltatune.training.adapters import adapt
from deltatune.training.continuing import load_adapter
from deltatune.training.run import train
from tiny import VOCAB, tiny_conditional, tiny_model

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return weights


def test_a_run_begins_where_the_adapter_ended(tmp_path: Path, checkpoint: Path) -> None:
    first = {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}, "use_rslora": True}
    training = {"max_steps": 2, "weight_decay": 0.1}
    train(make_recipe(tmp_path, checkpoint, lora=first, training=training), console=QUIET)
    source = tmp_path / "output"
    second = {"output_dir": str(tmp_path / "second"), "max_steps": 2, "learning_rate": 0.0}
    recipe = make_recipe(tmp_path, checkpoint, lora=None, training=second)
    recipe = recipe.model_copy(update={"lora": LoraSection(name_or_path=str(source), lora_dropout=0.1)})
    console = Console(record=True, width=200, file=(tmp_path / "screen.txt").open("w"))
    train(recipe, console=console)
    assert f"adapters begin as those of {source}" in console.export_text()
    before, after = adapter(source), adapter(tmp_path / "second")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    (leg,) = json.loads((tmp_path / "second" / "run.json").read_text())["legs"]
    assert leg["adapter"]["name_or_path"] == str(source)
    assert len(leg["adapter"]["sha256"]) == 64
    saved = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert (saved["r"], saved["rank_pattern"], saved["use_rslora"], saved["lora_dropout"]) == (
        4,
        {"down_proj": 2},
        True,
        0.1,
    )
    assert "name_or_path: " + str(source) in dump_recipe(recipe)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An adapter whose B matrices are not zero."""
    model = peft.get_peft_model(
        tiny_model("qwen3"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.save_pretrained(str(tmp_path / "source"))
    return tmp_path / "source"


def begun(source: Path, model: Any = None, **lora: Any) -> Any:
    section = LoraSection(name_or_path=str(source), **lora)
    adapted = adapt(tiny_model("qwen3") if model is None else model, section)
    load_adapter(adapted, section)
    return adapted


def test_adapters_of_a_tower_stay_as_they_are(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False)
    peft.get_peft_model(tiny_conditional(), config).save_pretrained(str(tmp_path / "source"))
    trained = {
        "visual" in name: parameter.requires_grad
        for name, parameter in begun(tmp_path / "source", tiny_conditional()).named_parameters()
        if "lora_" in name
    }
    assert trained == {False: True, True: False}


def change(source: Path, **config: Any) -> None:
    file = source / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def test_weights_are_loaded_and_train(source: Path) -> None:
    model = begun(source, adapter_dtype="model", r=2, target_modules=("v_proj", "q_proj"))
    saved = {f"{name.removesuffix('.weight')}.default.weight": weight for name, weight in adapter(source).items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 8}, r"lora\.r: 8 cannot act on the adapter of .*source, which has 2; leave it out"),
        ({"target_modules": ("q_proj",)}, r"lora\.target_modules: \['q_proj'\] cannot act .*\['q_proj', 'v_proj'\]"),
        ({"use_dora": True}, r"lora\.use_dora: True cannot act"),
    ],
)
def test_settings_must_agree(source: Path, lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        begun(source, **lora)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_an_adapter_of_changed_base_weights_is_refused(source: Path, init: str) -> None:
    change(source, init_lora_weights=init)
    with pytest.raises(
        UserError, match=rf"path: \S+ is an adapter of other base weights than those on disk \({init}\); merge it"
    ):
        begun(source)


@pytest.mark.parametrize(
    ("config", "trains"),
    [({}, False), ({"trainable_token_indices": {"embed_tokens": [3]}}, False),
     ({"trainable_token_indices": {"embed_tokens": [3, 4]}}, True), ({"modules_to_save": ["embed_tokens"]}, True)],
)  # fmt: skip
def test_added_tokens_need_rows_in_the_adapter(source: Path, config: dict[str, Any], trains: bool) -> None:
    change(source, **config)
    section = LoraSection(name_or_path=str(source))
    if trains:
        assert adapt(tiny_model("qwen3"), section, None, [3, 4]) is not None
        return
    with pytest.raises(UserError, match=r"model\.added_tokens would not train: the adapter of .*source has no rows"):
        adapt(tiny_model("qwen3"), section, None, [3, 4])


def test_rows_of_tokens_need_room_in_the_model(source: Path) -> None:
    change(source, trainable_token_indices={"embed_tokens": [5, VOCAB]})
    with pytest.raises(UserError, match=rf"up to {VOCAB}, and the model has {VOCAB}; give model\.added_tokens as"):
        begun(source)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("config", r"source lacks \d+ of the weights that its configuration says, such as .*o_proj"),
        ("targets", r"source holds \d+ weights that have no place in the model, such as .*v_proj"),
        ("rank", r"source does not fit the model: size mismatch for .*lora_A"),
    ],
)
def test_weights_must_fit(source: Path, broken: str, message: str, device: str) -> None:
    """On the meta device too, where ``plan`` looks."""
    if broken == "rank":
        change(source, r=4)
    else:
        change(source, target_modules=["q_proj", "v_proj", "o_proj"] if broken == "config" else ["q_proj"])
    with torch.device(device):
        model = tiny_model("qwen3")
    with pytest.raises(UserError, match=message):
        begun(source, model)


def test_another_base_is_refused(source: Path, tmp_path: Path) -> None:
    wider = tiny_model("qwen3", hidden_size=64)
    with pytest.raises(UserError, match="does not fit the model: size mismatch"):
        begun(source, wider)
    change(source, base_model_name_or_path="Qwen/Qwen3-0.6B-Base")
    model = tiny_model("qwen3")
    model.config._name_or_path = "Qwen/Qwen3-0.6B"
    with pytest.raises(UserError, match=r"was trained on Qwen/Qwen3-0.6B-Base, and model.name_or_path is Qwen/Qwen3"):
        begun(source, model)
    model.config._name_or_path = str(tmp_path)  # a copy on this machine may be anything
    assert begun(source, model) is not None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("no folder", r"lora\.name_or_path: .*source2 is no folder; expected an adapter's; did you mean source\?"),
        ("no config", r"is no adapter: it holds no adapter_config\.json"),
        ("no weights", r"is no adapter: it holds no adapter_model\.safetensors"),
        ("kind", r"is an adapter of type IA3; LoRA is the one"),
        ("json", r"adapter_config\.json is no JSON object"),
        ("cut off", r"source: its weights cannot be read: .*; copy them again"),
    ],
)
def test_what_is_no_adapter(source: Path, broken: str, message: str) -> None:
    if broken == "no config":
        (source / "adapter_config.json").unlink()
    elif broken == "no weights":
        (source / "adapter_model.safetensors").unlink()
    elif broken == "kind":
        change(source, peft_type="IA3")
    elif broken == "json":
        (source / "adapter_config.json").write_text("{")
    elif broken == "cut off":
        weights = (source / "adapter_model.safetensors").read_bytes()
        (source / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=message):
        begun(source.with_name("source2") if broken == "no folder" else source)


def test_the_adapters_folder_is_not_overwritten(tmp_path: Path, checkpoint: Path) -> None:
    lora = {"name_or_path": str(tmp_path / "output"), "r": 16}
    with pytest.raises(UserError, match=r"lora\.name_or_path: .* is training\.output_dir as well; save this run"):
        train(make_recipe(tmp_path, checkpoint, lora=lora), console=QUIET)
