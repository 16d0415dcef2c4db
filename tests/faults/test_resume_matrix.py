"""Every key of a recipe, changed between two legs of a run: it acts, is refused, or needs a word."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import check_same, losses, run, screen
from safetensors.torch import load_file, save_file

from deltatune.config.explain import known_keys
from deltatune.config.load import parse_recipe
from deltatune.config.schema import Source
from deltatune.training.changes import Verdict, find_changes

Check = Callable[[Path, Any], bool]  # the folder of the second leg, and the case


@dataclass(frozen=True)
class Change:
    """Values that a second leg has, and what shows that they act; None where nothing of a small run does."""

    verdict: Verdict
    words: tuple[str, ...]
    shows: Check | None = None


def entries(output: Path) -> list[dict[str, Any]]:
    """The log lines of the second leg."""
    lines = [json.loads(line) for line in (output / "run.jsonl").read_text().splitlines()]
    return [line for line in lines if line["leg"] == 2]


def rates(output: Path) -> list[float]:
    return [line["learning_rate"] for line in entries(output) if "learning_rate" in line]


def steps(output: Path, name: str) -> list[int]:
    return [line["step"] for line in entries(output) if name in line]


def state(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    return found


def other_losses(output: Path, case: Any) -> bool:
    found, expected = (losses(folder / "checkpoint-6") for folder in (output, case.whole))
    return found[:4] == expected[:4] and found[4:] != expected[4:]


def same(output: Path, case: Any) -> bool:
    check_same(output, case.whole)
    return True


def group(name: str, value: Any) -> Check:
    def check(output: Path, _: Any) -> bool:
        saved = torch.load(output / "checkpoint-6" / "optimizer.pt")["param_groups"][0][name]
        return bool((tuple(saved) if isinstance(saved, list) else saved) == value)

    return check


def says(text: str) -> Check:
    return lambda output, _: text in screen(output)


def checkpoints(*numbers: int) -> Check:
    return lambda output, _: {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in numbers}


def acts(*words: str, shows: Check | None = None) -> Change:
    return Change("acts", words, shows)


def asks(*words: str) -> Change:
    return Change("asks", words)


def cannot(*words: str) -> Change:
    return Change("cannot", words)


EVALUATES = ("data.eval.0.path={folder}/eval.jsonl", "training.eval_strategy=steps", "training.eval_steps=1")
BEST = ("training.load_best_model_at_end=true",)

CHANGES: dict[str, Change] = {
    "model.name_or_path": cannot("model.name_or_path={folder}/other"),
    "model.dtype": cannot("model.dtype=bfloat16"),
    "model.revision": cannot("model.revision=main"),
    "model.trust_remote_code": cannot("model.trust_remote_code=true"),
    "model.tokenizer": asks("model.tokenizer={folder}/base"),
    "model.chat_template": asks("model.chat_template=chatml"),
    "data.train.path": asks("data.train.0.path={folder}/eval.jsonl"),
    "data.train.format": asks("data.train.0.format=chat"),
    "data.train.split": asks("data.train.0.split=train[:90%]"),
    "data.train.name": asks("data.train.0.name=other"),
    "data.train.revision": asks("data.train.0.revision=other"),
    "data.train.columns": asks("data.train.0.columns={messages: messages}"),
    "data.train.message_fields": asks("data.train.0.message_fields={content: content}"),
    "data.train.limit": asks("data.train.0.limit=50"),
    "data.train.weight": asks("data.train.0.weight=2.0"),
    "data.train.repeat": asks("data.train.0.repeat=2"),
    "data.eval": acts(*EVALUATES, shows=lambda output, _: steps(output, "eval_loss") == [5, 6]),
    "data.val_size": asks("data.val_size=5"),
    "data.weight_by": asks("data.weight_by=documents", "data.train.0.weight=1.0"),
    "data.train_on": asks("data.train_on=all"),
    "data.roles": asks("data.roles={bot: assistant}"),
    "data.overlong": asks("data.overlong=drop"),
    "data.streaming": asks("data.streaming=true"),
    "data.max_length": asks("data.max_length=100"),
    "data.on_bad_row": asks("data.on_bad_row=drop"),
    "data.cache_dir": acts("data.cache_dir={folder}/other cache", shows=same),
    "data.num_proc": acts("data.num_proc=2", shows=same),
    "data.chat_template_kwargs": asks("data.chat_template_kwargs={x: 1}"),
    "packing.tokens_per_batch": asks("packing.tokens_per_batch=256"),
    "lora.r": cannot("lora.r=4"),
    "lora.lora_alpha": cannot("lora.lora_alpha=8"),
    "lora.lora_dropout": acts("lora.lora_dropout=0.5", shows=other_losses),
    "lora.target_modules": cannot("lora.target_modules=[q_proj]"),
    "lora.target_parameters": cannot("lora.target_parameters=[mlp.up_proj.weight]", "lora.lora_dropout=0.0"),
    "lora.exclude_modules": cannot("lora.exclude_modules=[down_proj]"),
    "lora.modules_to_save": cannot("lora.modules_to_save=[lm_head]"),
    "lora.layers_to_transform": cannot("lora.layers_to_transform=[0]"),
    "lora.rank_pattern": cannot("lora.rank_pattern={q_proj: 3}"),
    "lora.alpha_pattern": cannot("lora.alpha_pattern={q_proj: 3}"),
    "lora.bias": cannot("lora.bias=all"),
    "lora.use_rslora": cannot("lora.use_rslora=true"),
    "lora.use_dora": cannot("lora.use_dora=true"),
    "lora.init_lora_weights": cannot("lora.init_lora_weights=gaussian"),
    "lora.adapter_dtype": cannot("lora.adapter_dtype=model"),
    "lora.impl": acts("lora.impl=stock", shows=same),  # what auto takes on a CPU
    # they compile, which takes long; tests of compile show what they do
    "compile.scope": acts("compile={scope: model}"),
    "compile.strict": acts("compile={strict: false}"),
    "compile.options": acts("compile={options: {shape_padding: true}}"),
    "checkpointing": acts("checkpointing=layer", shows=says("checkpointing layer")),
    "activation_offloading": acts("activation_offloading=true", "training.use_cpu=false"),  # needs a GPU
    "kernels": acts(
        "kernels={linear_cross_entropy: reference}",
        shows=lambda output, _: re.search(r"\nlinear_cross_entropy +reference ", screen(output)) is not None,
    ),
    "training.num_train_epochs": acts(
        "training.num_train_epochs=1", "training.max_steps=-1", shows=lambda output, _: steps(output, "loss")[-1] > 6
    ),
    "training.max_steps": acts("training.max_steps=8", shows=lambda output, _: steps(output, "loss") == [5, 6, 7, 8]),
    "training.gradient_accumulation_steps": asks("training.gradient_accumulation_steps=2"),
    "training.learning_rate": acts(
        "training.learning_rate=0.1", shows=lambda output, _: rates(output) == pytest.approx([0.1 / 3, 0.1 / 6])
    ),
    "training.lr_scheduler_type": acts(
        "training.lr_scheduler_type=constant", shows=lambda output, _: rates(output) == [0.01, 0.01]
    ),
    "training.lr_scheduler_kwargs": acts(
        "training.lr_scheduler_type=cosine_with_min_lr",
        "training.lr_scheduler_kwargs={min_lr: 0.009}",
        shows=lambda output, _: min(rates(output)) > 0.009,
    ),
    "training.warmup_steps": acts(
        "training.warmup_steps=5", shows=lambda output, _: rates(output) == pytest.approx([0.008, 0.01])
    ),
    "training.optim": cannot("training.optim=sgd"),
    "training.weight_decay": acts("training.weight_decay=0.25", shows=group("weight_decay", 0.25)),
    "training.adam_beta1": acts("training.adam_beta1=0.5", shows=group("betas", (0.5, 0.999))),
    "training.adam_beta2": acts("training.adam_beta2=0.5", shows=group("betas", (0.9, 0.5))),
    "training.adam_epsilon": acts("training.adam_epsilon=0.5", shows=group("eps", 0.5)),
    "training.max_grad_norm": acts("training.max_grad_norm=1e-8", shows=other_losses),
    "training.seed": asks("training.seed=7"),
    "training.data_seed": asks("training.data_seed=7"),
    "training.bf16": acts("training.bf16=true", shows=other_losses),
    "training.fp16": acts("training.fp16=true", "training.use_cpu=false"),  # needs a GPU
    "training.use_cpu": acts("training.use_cpu=false", shows=same),  # where there is nothing else
    "training.logging_steps": acts("training.logging_steps=3", shows=lambda output, _: steps(output, "loss") == [6]),
    "training.logging_first_step": acts("training.logging_first_step=true", shows=same),  # that step is done
    "training.report_to": acts("training.report_to=tensorboard", shows=lambda output, _: any(output.rglob("events.*"))),
    "training.run_name": acts("training.run_name=other", "training.report_to=none", shows=same),
    "training.disable_tqdm": acts("training.disable_tqdm=false", shows=says("step 5/6")),
    "training.eval_strategy": acts(*EVALUATES, shows=lambda output, _: steps(output, "eval_loss") == [5, 6]),
    "training.eval_steps": acts(*EVALUATES, shows=lambda output, _: steps(output, "eval_loss") == [5, 6]),
    "training.save_strategy": acts("training.save_strategy=no", "training.save_steps=500", shows=checkpoints(2, 4)),
    "training.save_steps": acts("training.save_steps=1", shows=checkpoints(5, 6)),
    "training.save_total_limit": acts("training.save_total_limit=1", shows=checkpoints(6)),
    "training.save_only_model": acts(
        "training.save_only_model=true",
        shows=lambda output, _: not (output / "checkpoint-6" / "optimizer.pt").exists(),
    ),
    "training.load_best_model_at_end": acts(
        *EVALUATES, "training.load_best_model_at_end=true",
        shows=lambda output, _: state(output)["best_model_checkpoint"] is not None,
    ),
    "training.dataloader_num_workers": acts("training.dataloader_num_workers=1", shows=same),
    "training.dataloader_pin_memory": acts("training.dataloader_pin_memory=false", shows=same),
    "training.on_nonfinite": acts("training.on_nonfinite=skip", shows=same),
    # the tests of each feature show what they do
    "model.added_tokens": cannot("model.added_tokens=[<x>]"),
    "model.special_tokens": cannot("model.special_tokens={unk_token: <|endoftext|>}"),
    "lora.name_or_path": cannot("lora.name_or_path={folder}/adapter"),
    "training.unfrozen_parameters": cannot("training.unfrozen_parameters=[norm]", "lora=null"),
    "training.learning_rates": cannot("training.learning_rates={q_proj: 0.5}"),
    "training.loraplus_lr_ratio": cannot("training.loraplus_lr_ratio=2.0"),
    "training.loraplus_lr_embedding": acts("training.loraplus_lr_ratio=2.0", "training.loraplus_lr_embedding=1e-3"),
    "training.early_stopping_patience": acts(*EVALUATES, *BEST, "training.early_stopping_patience=1"),
    "training.early_stopping_threshold": acts(
        *EVALUATES, *BEST, "training.early_stopping_patience=1", "training.early_stopping_threshold=0.5"
    ),
    "samples.prompts": acts(*EVALUATES, "samples={prompts: [hello]}"),
    "samples.chat": acts(*EVALUATES, "samples={prompts: [hello], chat: false}"),
    "samples.held_out": acts(*EVALUATES, "samples={held_out: 2}"),
    "samples.max_new_tokens": acts(*EVALUATES, "samples={held_out: 2, max_new_tokens: 7}"),
    # of one process; test_sharded_runs.py has other numbers of them
    "parallel.replicate": acts("parallel.replicate=1", shows=same),
    "parallel.shard": acts("parallel.shard=1", shows=same),
    "parallel.sequence": acts("parallel.sequence=1", shows=same),
    "parallel.recurrent": acts("parallel.recurrent=state"),  # in one process nothing
    # test_expert_runs.py has more
    "parallel.expert": acts("parallel.expert=auto", shows=same),
    "parallel.expert_capacity": acts("parallel.expert=2", "parallel.expert_capacity=2.0"),  # in one process nothing
    "parallel.timeout_s": acts("parallel.timeout_s=90", shows=same),
    "verify.enabled": acts("verify.enabled=true", shows=says("OK: every document")),
    "verify.lengths": acts("verify.enabled=true", "verify.lengths=[5, 1, 9]", shows=says("OK: every document")),
    "verify.tolerance": acts("verify.enabled=true", "verify.tolerance=0.5", shows=says("OK: every document")),
}  # fmt: skip
NO_SETTING = {"training.output_dir"}  # where a run is; --resume looks there
NOT_HERE = {"data.train.name", "data.train.revision"}  # of the Hub
REFUSED_ELSEWHERE = {"data.chat_template_kwargs", "data.streaming"}


def all_keys() -> Iterator[str]:
    for section in known_keys(()):
        inner = known_keys((section,))
        if not inner:
            yield section
        for key in inner:
            if (section, key) == ("data", "train"):
                yield from (f"data.train.{name}" for name in Source.model_fields)
            else:
                yield f"{section}.{key}"


def test_every_key_is_tried() -> None:
    pairs = {f"preference.{name}" for name in known_keys(("preference",))}  # of other data; test_changes.py has them
    assert set(CHANGES) | NO_SETTING | pairs == set(all_keys())


def words_of(change: Change, case: Any) -> list[str]:
    return [word.replace("{folder}", str(case.recipe.parent)) for word in change.words]


def loaded(case: Any, words: list[str]) -> Any:
    return parse_recipe(case.recipe.read_text(), "recipe.yaml", words).recipe.model_dump(mode="json")


@pytest.mark.parametrize("key", sorted(set(CHANGES) - NOT_HERE - {"data.streaming"}))
def test_every_key_has_its_verdict(case: Any, key: str) -> None:
    found = find_changes(loaded(case, []), loaded(case, words_of(CHANGES[key], case)))
    place = key.replace("data.train.", "data.train.0.")
    here = [change for change in found if place in change.key or change.key in key]
    assert {change.verdict for change in here} == {CHANGES[key].verdict}, found


@pytest.fixture(scope="module")
def stopped(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run was killed after its second checkpoint."""
    from training_cases import write_conversations

    write_conversations(case.recipe.parent / "eval.jsonl", 12, first=60)
    other = shutil.copytree(case.recipe.parent / "base", case.recipe.parent / "other") / "model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(other).items()}, other, metadata={"format": "pt"})
    shutil.copytree(case.whole / "checkpoint-6", case.recipe.parent / "adapter")
    output = tmp_path_factory.mktemp("stopped") / "output"
    assert run(case.recipe, output, at=case.first("os.rmdir .saving-4"), action="kill") == -signal.SIGKILL
    return output


def second_leg(case: Any, stopped: Path, output: Path, change: Change, *more: str) -> int:
    shutil.copytree(stopped, output, dirs_exist_ok=True)
    words = [part for word in words_of(change, case) for part in ("--set", word)]
    return run(case.recipe, output, "--resume", *words, *more)


@pytest.mark.faults
@pytest.mark.parametrize("key", sorted(key for key, change in CHANGES.items() if change.shows is not None))
def test_what_acts_is_recorded_and_acts(case: Any, stopped: Path, tmp_path: Path, key: str) -> None:
    change, output = CHANGES[key], tmp_path / "output"
    assert second_leg(case, stopped, output, change) == 0, screen(output)
    recorded = json.loads((output / "run.json").read_text())["legs"][-1]["changes"]
    assert any(line.startswith((f"{key}:", f"{key}.")) for line in recorded), recorded
    assert f"changed since checkpoint-4: {key}" in screen(output).replace("\n", "")
    assert change.shows is not None
    assert change.shows(output, case), entries(output)


@pytest.mark.faults
@pytest.mark.parametrize("key", sorted(key for key, change in CHANGES.items() if change.verdict == "cannot"))
def test_what_cannot_act_is_refused(case: Any, stopped: Path, tmp_path: Path, key: str) -> None:
    output = tmp_path / "output"
    assert second_leg(case, stopped, output, CHANGES[key], "--allow-change") == 2
    assert "cannot act on a run that goes on" in screen(output), screen(output)


ASKS = sorted(key for key, change in CHANGES.items() if change.verdict == "asks" and key not in NOT_HERE)


@pytest.mark.faults
@pytest.mark.parametrize("key", ASKS)
def test_what_needs_a_word_goes_on_with_it(case: Any, stopped: Path, tmp_path: Path, key: str) -> None:
    output = tmp_path / "output"
    assert second_leg(case, stopped, output, CHANGES[key]) == 2
    assert "say --allow-change" in screen(output), screen(output)
    status = second_leg(case, stopped, output, CHANGES[key], "--allow-change")
    assert status == (2 if key in REFUSED_ELSEWHERE else 0), screen(output)
