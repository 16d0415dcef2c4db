"""Saving and merging: whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from training_cases import byte_tokenizer, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltatune import prepare
from deltatune.errors import UserError
from deltatune.training import staging
from deltatune.training.export import export_adapter, merge_adapter, save_trained
from deltatune.training.sealed import seal
from deltatune.training.servers import per_expert
from deltatune.training.staging import staged
from tiny import tiny_model

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter with weights of its own, saved from a prepared model."""
    base = save_checkpoint(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "in_proj_qkv"])
    )
    prepare(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_trained(model, byte_tokenizer(), tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 30)[None], use_cache=False).logits
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def test_a_merged_model_equals_base_and_adapter(tmp_path: Path, adapter: Path) -> None:
    merged = merge_adapter(adapter, tmp_path / "deep" / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter)))
    assert (expected - plain).abs().max() > 0.1
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged)), expected) < 1e-5
    assert AutoTokenizer.from_pretrained(merged).chat_template == byte_tokenizer().chat_template


def test_a_moved_base_is_named_by_hand(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"the adapter's base model: .*pass another with --base"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "elsewhere"), dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_what_is_no_adapter_is_refused(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match=r"base is no adapter: it holds no adapter_config.json"):
        merge_adapter(tmp_path / "base", tmp_path / "merged")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model.safetensors"):
        merge_adapter(adapter, tmp_path / "merged")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, adapter: Path) -> None:
    other = save_checkpoint(tmp_path / "other", tiny_model("qwen3_5", vocab_size=259, hidden_size=48))
    with pytest.raises(UserError, match=r"does not fit its base model"):
        merge_adapter(adapter, tmp_path / "merged", base=str(other))


def test_a_damaged_adapter_is_one_line(tmp_path: Path, adapter: Path) -> None:
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for part in (0, 4, len(whole) // 2):
        weights.write_bytes(whole[:part])
        with pytest.raises(UserError, match=r"its weights cannot be read: .*; copy them again"):
            merge_adapter(adapter, tmp_path / "merged")
        with pytest.raises(UserError, match=r"its weights cannot be read"):
            export_adapter(adapter, tmp_path / "exported", layout="peft")
    weights.write_bytes(whole)
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "TOMORROW"}))
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read by peft [0-9.]+: .*TOMORROW"):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auto_mapping": "Qwen3ForCausalLM"}, r"auto_mapping: expected a mapping, got \"Qwen3ForCausalLM\""),
        ({"base_model_name_or_path": ["base"]}, "base_model_name_or_path: expected text"),
        ({"revision": 3}, "revision: expected text, got 3"),
        ({"peft_type": 1}, "peft_type: expected text, got 1"),
        ({"trainable_token_indices": [1e9]}, r"indices: expected token numbers, .*got \[1000000000.0\]"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices: expected token numbers"),
        ({"trainable_token_indices": 7}, "trainable_token_indices: expected token numbers"),
        ({"trainable_token_indices": [10**9]}, r"trains the row of token 1000000000, its base has 259 rows, and"),
        ({"trainable_token_indices": {"embed_tokens": [259, 261]}}, r"nobody says what row 260 holds; pass .* --base"),
    ],
)
def test_settings_of_another_type_are_one_line(
    tmp_path: Path, adapter: Path, values: dict[str, Any], message: str
) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    with pytest.raises(UserError, match=message):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: b"\xef\xbb\xbf" + text, "begins with a byte order mark, which PEFT cannot read"),
        (lambda text: text.decode().encode("utf-16"), "is no JSON object"),
        (lambda _: b"\xff{}", "is no JSON object"),
        (lambda _: b"[" * 100_000 + b"]" * 100_000, "is no JSON object"),
        (lambda _: b"[]", "is no JSON object, but a JSON list"),
    ],
    ids=["byte order mark", "UTF-16", "no text", "nested", "list"],
)
def test_settings_that_are_no_object_are_one_line(tmp_path: Path, adapter: Path, spoil: Any, message: str) -> None:
    config = adapter / "adapter_config.json"
    config.write_bytes(spoil(config.read_bytes()))
    for merges in (merge_adapter, partial(export_adapter, layout="peft")):
        with pytest.raises(UserError, match=message):
            merges(adapter, tmp_path / "merged")


def test_a_run_that_did_not_end_is_told_its_last_whole_checkpoint(tmp_path: Path, adapter: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 10, 12):
        shutil.copytree(adapter, run / f"checkpoint-{step}")
        seal(run / f"checkpoint-{step}", {})
    (run / "checkpoint-12" / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"no adapter_config\.json; the run in it .* is .*checkpoint-10$"):
        merge_adapter(run, tmp_path / "merged")
    for step in (2, 10):
        (run / f"checkpoint-{step}" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json$"):
        merge_adapter(run, tmp_path / "merged")


def test_an_output_folder_in_use_is_refused(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is not empty"):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize("error", [OSError("disk full"), Exception("No space left on device (os error 28)")])
def test_an_interrupted_save_leaves_the_older_model_whole(tmp_path: Path, error: Exception) -> None:
    model = tiny_model("qwen3", layers=1)
    save_trained(model, None, tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())

    class Failing:
        def save_pretrained(self, folder: str, **_: Any) -> None:
            (Path(folder) / "config.json").write_text(json.dumps({}))
            raise error

    with pytest.raises(UserError, match=f"out cannot be written to: {re.escape(str(error))}; make room"):
        save_trained(Failing(), None, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3"


def test_a_card_may_name_files_of_any_bytes(tmp_path: Path) -> None:
    save_trained(tiny_model("qwen3", layers=1), None, tmp_path, card="trained on caf\udce9.jsonl")
    assert (tmp_path / "README.md").read_text() == r"trained on caf\udce9.jsonl"


def write_half(path: Path) -> None:
    with staged(path) as folder:
        (folder / "half").write_text("")
        raise RuntimeError("disk full")


def test_what_readers_look_for_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before, a save leaves nothing that loads as a model."""
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: (moved.append(path.name), replace(path, target))[1])
    save_trained(tiny_model("qwen3", layers=1), None, tmp_path)
    assert "model.safetensors" in moved
    assert moved[-1] == "config.json"


def test_a_staged_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(
        staging, "sync_tree", lambda folder: synced.append(((folder / "file").exists(), (tmp_path / "out").exists()))
    )
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("")
    assert synced == [(True, False)]


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk full"):
        write_half(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "x") as folder:
        (folder / "whole").write_text("")
        assert not (tmp_path / "x").exists()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["whole"]


_KILLED = """\
import os, sys
from pathlib import Path
from deltatune.training.staging import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("")
    print(flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path / "x")], stdin=-1, stdout=-1)
    assert writer.stdout is not None
    writer.stdout.readline()
    with pytest.raises(UserError, match=f"in use by process {writer.pid} .* choose another output folder"):
        write_half(tmp_path / "x")
    writer.kill()
    writer.wait()
    assert len(list(tmp_path.iterdir())) == 1, "what it left"
    with staged(tmp_path / "x") as folder:
        assert not list(folder.iterdir())
        (folder / "whole").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "whole"]


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_pattern": {"experts.down_proj": 12}},
        {"rank_pattern": {"experts.down_proj": 4}},
        {"alpha_pattern": {"mlp.experts.gate_up_proj": 12}, "rank_pattern": {"layers.0.mlp.experts.gate_up_proj": 4}},
        {"rank_pattern": {"down_proj": 3}, "use_rslora": True},
        # of linear layers that share a projection's name
        {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"gate_proj": 12}},
    ],
)
def test_every_expert_keeps_its_rank_and_alpha(changes: dict[str, Any], tmp_path: Path) -> None:
    """``alpha / r`` by PEFT's reading of the written config, against PEFT's own merge."""
    base = tiny_model("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, lora_alpha=6, target_parameters=names, init_lora_weights=False, **changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    save_trained(model, None, tmp_path / "adapter")
    exported = export_adapter(tmp_path / "adapter", tmp_path / "served", layout="per-expert")
    state = load_file(exported / "adapter_model.safetensors")
    written = LoraConfig.from_pretrained(str(exported))
    merged = model.merge_and_unload().state_dict()
    for layer in range(2):
        change = {name: merged[f"model.layers.{layer}.{name}"] - base.state_dict()[f"model.layers.{layer}.{name}"]
                  for name in names}  # fmt: skip
        gate, up = change[names[0]].chunk(2, dim=1)
        for projection, expected in {"gate_proj": gate, "up_proj": up, "down_proj": change[names[1]]}.items():
            for e in range(4):
                path = f"model.layers.{layer}.mlp.experts.{e}.{projection}"
                a, b = (state[f"base_model.model.{path}.lora_{one}.weight"] for one in "AB")
                rank = written.rank_pattern.get(get_pattern_key(written.rank_pattern, path), written.r)
                alpha = written.alpha_pattern.get(get_pattern_key(written.alpha_pattern, path), written.lora_alpha)
                assert rank == a.shape[0]
                scale = alpha / (rank**0.5 if written.use_rslora else rank)
                torch.testing.assert_close(scale * b @ a, expected[e], rtol=1e-4, atol=1e-6)


def test_layers_may_adapt_different_weights(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    names = ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(target_parameters=names, init_lora_weights=False),
    )
    save_trained(model, None, tmp_path / "adapter")
    state = load_file(
        export_adapter(tmp_path / "adapter", tmp_path / "served", layout="per-expert") / "adapter_model.safetensors"
    )
    adds = {name.removesuffix(".lora_B.weight") for name, tensor in state.items() if "lora_B" in name and tensor.any()}
    found = {name.split("layers.")[1].replace("mlp.experts.", "") for name in adds}
    assert found == {*(f"0.{e}.{p}" for e in range(4) for p in ("gate_proj", "up_proj")),
                     *(f"1.{e}.down_proj" for e in range(4))}  # fmt: skip
    names = {name.split(".mlp.experts.")[1] for name in state}
    assert {f"{e}.{p}.lora_{one}.weight" for e in range(4) for p in PROJECTIONS for one in "AB"} == names
    assert len(state) == 2 * len(names)


def test_stock_peft_reads_the_adapters_of_each_expert(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    expected = logits(model)
    save_trained(model, None, tmp_path / "adapter")
    exported = export_adapter(tmp_path / "adapter", tmp_path / "served", layout="per-expert")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(exported))
    assert relative(logits(loaded), expected) < 1e-5
    same = export_adapter(tmp_path / "adapter", tmp_path / "same", layout="peft")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(same))
    assert relative(logits(loaded), expected) < 1e-6


def expert_adapter(family: str, **values: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(
        tiny_model(family), LoraConfig(r=2, target_parameters=names, init_lora_weights=False, **values)
    )
    state = get_peft_model_state_dict(model)
    return state, model.peft_config["default"].to_dict(), tiny_model(family)


def test_adapters_of_other_shapes_are_not_split() -> None:
    state, config, model = expert_adapter("qwen3_moe")
    swapped = {name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A"): tensor.mT
               for name, tensor in state.items()}  # fmt: skip
    with pytest.raises(UserError, match=r"A \[8, 48\] and B \[32, 8\] are not those of 4 experts.*another model"):
        per_expert(swapped, config, model)


def test_one_expression_cannot_name_projections_of_experts() -> None:
    with pytest.raises(UserError, match="target_modules of the adapter are one expression"):
        per_expert(*expert_adapter("gpt_oss", target_modules=r".*q_proj"))


def test_an_adapter_without_experts_is_not_split(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match="none on routed experts"):
        export_adapter(adapter, tmp_path / "served", layout="per-expert")
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_merged_experts_reload_in_the_stock_model(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    expected = logits(model)
    prepare(model)
    save_trained(model, byte_tokenizer(), tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(merged)), expected) < 1e-5
