"""A merged model is base and adapter on real tokens, with everything else of its base; or it is not there."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import VOCABULARY, adapter_on, add_to_file, conditional, logits, relative, saved, stock, text, tied
from huggingface_hub import ModelCard, constants
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training_cases import byte_tokenizer, make_recipe
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from deltatune.cli import main
from deltatune.config.schema import ModelSection
from deltatune.errors import UserError
from deltatune.runs.command import command_line
from deltatune.training import export, merging, saving
from deltatune.training.export import Origin, merge_adapter, save_trained
from deltatune.training.merge_record import merge_record
from deltatune.training.run import train
from deltatune.training.sealed import seal

#: dtype: how far 16-bit logits are from those of the unmerged adapter, whose sums round elsewhere
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BASES: dict[str, Any] = {
    "text": lambda: text("qwen3_5"),
    "text, tied": lambda: tied(text()),
    "images": conditional,
    "images, tied": lambda: tied(conditional()),
    "images, mixture": lambda: conditional("qwen3_5_moe"),
    "mixture": lambda: text("qwen3_moe"),
    "bfloat16": lambda: text().to(torch.bfloat16),
    "float16": lambda: text().to(torch.float16),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "weight_decomposed": {"use_dora": True},
    "rslora with biases": {"use_rslora": True, "bias": "all"},
    "embedding trained": {"modules_to_save": ["embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
}


#: Every adapter on a text model and on one of images whose embeddings are its head; on the others what they decide.
MERGED = [
    *((name, kind) for name in ("text", "images, tied") for kind in ADAPTERS),
    ("images", "linear"),
    ("text, tied", "embedding trained"),
    ("text, tied", "head adapted"),
    ("images, mixture", "linear"),
    ("images, mixture", "rslora with biases"),
    ("mixture", "linear"),
    ("mixture", "weight_decomposed"),
    ("bfloat16", "weight_decomposed"),
    ("float16", "rslora with biases"),
]


@pytest.mark.parametrize(("name", "kind"), MERGED)
def test_stock_libraries_compute_what_was_trained(name: str, kind: str, tmp_path: Path) -> None:
    base, lora = saved(tmp_path / "base", BASES[name]()), ADAPTERS[kind]
    if "mixture" in name and not lora:
        lora = {"target_parameters": "all-experts"}
    trained = adapter_on(base, tmp_path / "adapter", **lora)
    before = stock(base)
    assert relative(logits(before), trained) > 0.05
    assert relative(logits(PeftModel.from_pretrained(before, str(tmp_path / "adapter"))), trained) < 1e-6
    found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype="auto")
    assert relative(logits(found), trained) < 1e-6
    merged = stock(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    assert relative(logits(merged), trained) < BOUNDS[before.dtype]
    assert type(merged) is type(before)
    apart = "tied" in name and ("modules_to_save" in lora or "target_modules" in lora)
    assert merged.config.tie_word_embeddings == ("tied" in name and not apart)
    if apart:  # in the file: transformers unties two weights that differ whatever it says, other loaders do not
        written = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert not any(section.get("tie_word_embeddings") for section in (written, written.get("text_config", {})))


def test_shards_are_merged_and_keep_what_the_class_does_not_load(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", conditional(), max_shard_size="40KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    heads = {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.ones(32), "other.x": torch.ones(3)}
    save_file(heads, base / "more.safetensors", {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(heads, "more.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    trained = adapter_on(base, tmp_path / "adapter")
    said: list[str] = []
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", say=said.append)
    assert relative(logits(stock(merged)), trained) < 1e-5
    found = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert all_tensors(merged).keys() == found
    assert all(torch.equal(all_tensors(merged)[name], heads[name]) for name in heads)
    assert said[0].startswith("3 tensors that Qwen3_5ForConditionalGeneration does not load, such as mtp.fc.weight")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_only_what_the_adapter_changes_differs_from_the_base(tmp_path: Path) -> None:
    """Decay in float32 inside a bfloat16 checkpoint, as Qwen3.5 ships it, and heads that no class loads."""
    base = saved(tmp_path / "base", text("qwen3_5").to(torch.bfloat16))
    decay = {name: t.float() for name, t in load_file(base / "model.safetensors").items() if name.endswith("A_log")}
    add_to_file(base, {**decay, "mtp.fc.weight": torch.randn(8, 8)})
    adapter_on(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = load_file(merge_adapter(tmp_path / "adapter", tmp_path / "merged") / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert decay
    assert merged.keys() == before.keys()
    differing = {
        name for name, t in before.items() if t.dtype != merged[name].dtype or not torch.equal(t, merged[name])
    }
    assert differing == {"model.layers.1.self_attn.q_proj.weight"}


def test_an_adapter_of_the_text_model_alone_is_merged_into_the_whole(tmp_path: Path) -> None:
    """As TRL and PEFT make one with AutoModelForCausalLM, from a checkpoint of a model with images."""
    base = saved(tmp_path / "base", conditional())
    add_to_file(base, {"mtp.fc.weight": torch.ones(2, 2)})
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    save_trained(model, None, tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert all_tensors(merged).keys() == all_tensors(base).keys()
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert relative(logits(loader.from_pretrained(merged)), logits(model)) < 1e-5


def test_an_adapter_that_fits_in_part_is_refused(tmp_path: Path) -> None:
    """PEFT only warns, and merges what it found."""
    base = saved(tmp_path / "base", text())
    adapter_on(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    gone = sorted(state)[0]
    save_file({name: tensor for name, tensor in state.items() if name != gone}, file)
    with pytest.raises(UserError, match=r"does not fit its base model: it lacks 1 tensors, such as .*q_proj"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    stray = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    save_file({**state, stray: state[gone].clone()}, file)
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM of .* has no place for 1 tensors, such as .*layers\.9"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_a_merge_that_is_not_base_and_adapter_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tmp_path / "base", text())
    adapter_on(base, tmp_path / "adapter")

    def spoiled(adapted: Any) -> Any:
        merged = merging.merge(adapted)
        merged.model.layers[0].mlp.up_proj.weight.data[0] += 0.05
        return merged

    monkeypatch.setattr(export, "merge", spoiled)
    before = sorted(tmp_path.iterdir())
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert "not base and adapter: on 256 tokens" in error
    assert "(token " in error
    assert "nothing was written" in error
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base", text())
    adapter_on(base, tmp_path / "adapter")
    seen = threading.Event()

    def stop(*_: Any) -> Any:
        assert not (tmp_path / "merged").exists()
        seen.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "compare", stop)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert seen.is_set()
    assert sorted(tmp_path.iterdir()) == before


def test_virtual_tokens_are_no_weights(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", text())
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), tuning).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"holds virtual tokens \(PROMPT_TUNING\)"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_rounding_that_hides_an_adapter_is_said(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", text().to(torch.bfloat16))
    adapter_on(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: t * 1e-3 for name, t in load_file(file).items()}, file)
    said: list[str] = []
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", say=said.append)
    assert said[-1] == "that is within the limit: on this text the adapter does no more than rounding may"
    merge_adapter(tmp_path / "adapter", tmp_path / "wide", dtype="float32", say=said.append)
    assert stock(tmp_path / "wide").dtype == torch.float32


def test_what_was_checked_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter_on(saved(tmp_path / "base", text()), tmp_path / "adapter")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("checked on 256 tokens: its logits are those of base and adapter within ")
    assert last == f"merged model in {tmp_path / 'merged'}"
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (record["command"], record["adapter"]["run"]) == (command_line(), None)
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("transformers", None, "mit")
    assert f"A LoRA adapter merged into `{tmp_path / 'base'}` with deltatune" in card.text
    assert f"| adapter | {tmp_path / 'adapter'}, SHA-256 {record['adapter']['sha256']} |" in card.text
    assert f'Qwen3ForCausalLM.from_pretrained("{tmp_path / "merged"}")' in card.text


def test_the_record_names_the_run_around_a_checkpoint_and_no_other(tmp_path: Path) -> None:
    run = {"status": "finished", "legs": [{"started": "2026-01-01T00:00:00+00:00"}]}
    (tmp_path / "run.json").write_text(json.dumps(run))

    def run_of(adapter: Path) -> Any:
        return merge_record(adapter, {}, started="", dtype="auto", check=None)["adapter"]["run"]

    for name in ("checkpoint-2", "checkpoint-best", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"weights")
        assert run_of(tmp_path / name) is None, "no manifest: a run did not write it"
        seal(tmp_path / name, {})
    found = {"folder": str(tmp_path), "started": "2026-01-01T00:00:00+00:00", "status": "finished"}
    assert run_of(tmp_path / "checkpoint-2") == found
    assert run_of(tmp_path / "checkpoint-best") is run_of(tmp_path / "mine") is None
    (tmp_path / "mine" / "run.json").write_text(json.dumps(run))
    assert run_of(tmp_path / "mine") == {**found, "folder": str(tmp_path / "mine")}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of one model on the Hub, both downloaded, the second later than what a branch was."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--acme--tiny"
    for seed, commit in enumerate(("a" * 40, "b" * 40)):
        snapshot = saved(folder / "snapshots" / commit, text(seed=seed))
        (snapshot / "preprocessor_config.json").write_text(json.dumps({"patch_size": seed}))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40)
    (folder / "refs" / "v1").write_text("a" * 40)
    return folder


@pytest.mark.parametrize(("revision", "commit"), [("v1", "a" * 40), (None, "b" * 40)])
def test_the_commit_that_was_trained_on_is_merged(hub: Path, tmp_path: Path, revision: str | None, commit: str) -> None:
    recipe = make_recipe(tmp_path, hub, model={"name_or_path": "acme/tiny", "revision": revision})
    train(recipe, console=Console(quiet=True))
    config = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", commit)
    assert config["auto_mapping"]["base_model_class"] == "Qwen3ForCausalLM"
    # the branches move on
    for name in ("main", "v1"):
        (hub / "refs" / name).write_text("b" * 40 if commit[0] == "a" else "a" * 40)
    adapted = logits(PeftModel.from_pretrained(stock(hub / "snapshots" / commit), str(tmp_path / "output")))
    merged = merge_adapter(tmp_path / "output", tmp_path / "merged")
    assert relative(logits(stock(merged)), adapted) < 1e-5
    assert json.loads((merged / "preprocessor_config.json").read_text()) == {"patch_size": int(commit[0] == "b")}


def test_added_tokens_have_room(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", text())
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 5)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    save_trained(model, None, tmp_path / "adapter")
    merged = stock(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    assert merged.config.vocab_size == VOCABULARY + 5
    assert relative(logits(merged), logits(model)) < 1e-5


def test_the_base_may_be_lost_while_it_trains(tmp_path: Path) -> None:
    """What was trained is saved all the same, and what is missing is said."""
    base = saved(tmp_path / "base", text())
    model = stock(base)
    shutil.rmtree(base)
    (said,) = save_trained(model, byte_tokenizer(), tmp_path / "out", Origin(ModelSection(name_or_path=str(base))))
    assert "belong beside the model are missing" in said
    assert relative(logits(stock(tmp_path / "out")), logits(model)) < 1e-6
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("writes", "error"),
    [
        ("copy_generation_config", OSError(errno.ENOSPC, "No space left on device", "{folder}/generation_config.json")),
        ("_keep", SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_is_not_taken_for_a_lost_base(
    tmp_path: Path, writes: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ended well would never write what is missing."""
    base = saved(tmp_path / "base", text())

    def full(_: Path, folder: Path, *__: Any) -> None:
        if isinstance(error, OSError):
            error.filename = str(error.filename).format(folder=folder)
        raise error

    monkeypatch.setattr(saving, writes, full)
    with pytest.raises(UserError, match=r"cannot be written to: .*No space left on device.*; make room"):
        save_trained(stock(base), byte_tokenizer(), tmp_path / "out", Origin(ModelSection(name_or_path=str(base))))


def test_another_disk_that_is_full_costs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base", text())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/else/tokenizer.json")

    monkeypatch.setattr(saving, "copy_generation_config", full)
    (said,) = save_trained(stock(base), None, tmp_path / "out", Origin(ModelSection(name_or_path=str(base))))
    assert "belong beside the model are missing" in said
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_link_and_the_folder_itself_may_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base", text("qwen3"))
    adapter_on(base, tmp_path / "adapter")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    merge_adapter(tmp_path / "adapter", tmp_path / "link")
    assert (tmp_path / "real" / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge_adapter(tmp_path / "adapter", ".")
    assert (tmp_path / "here" / "model.safetensors").is_file()
