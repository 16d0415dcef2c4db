"""Every key of a recipe, changed between two legs of a run: it acts, is refused, or needs a word."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import check_same, losses, run, screen
from safetensors.torch import load_file, save_file

from deltatune.config.explain import known_keys
from deltatune.config.load import parse_recipe
from deltatune.config.refused import PASSED_TRAINING_NAMES
from deltatune.config.schema import Recipe, Source
from deltatune.errors import UserError
from deltatune.training.arguments import training_arguments
from deltatune.training.changes import Verdict, find_changes

ACT = ("acts", "local")
Check = Callable[[Path, Any], bool]  # the folder of the second leg, and the case


@dataclass(frozen=True)
class Change:
    """Values that a second leg has, and what shows that they act.

    Attributes:
        shows: of the second leg; None where the words are refused, or only handed on to others.
        refused: what is said of them where a small run on a CPU cannot have them.
        base: settings that both legs have.
        kind: of the run, of ``KINDS``.
    """

    verdict: Verdict
    words: tuple[str, ...]
    shows: Check | None = None
    refused: str | None = None
    base: tuple[str, ...] = ()
    kind: str = "lora"


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


def acts(*words: str, **more: Any) -> Change:
    return Change("acts", words, **more)


def local(*words: str, **more: Any) -> Change:
    return Change("local", words, **more)


def asks(*words: str, **more: Any) -> Change:
    return Change("asks", words, **more)


def cannot(*words: str, **more: Any) -> Change:
    return Change("cannot", words, **more)


def evaluated(*numbers: int) -> Check:
    return lambda output, _: steps(output, "eval_loss") == [*numbers]


def samples(output: Path) -> list[dict[str, Any]]:
    """Of the evaluation after step 5."""
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] == 5]


def completions(output: Path) -> list[str]:
    return [sample["completion"] for sample in samples(output)]


def embedding_rates(output: Path) -> set[float]:
    groups = torch.load(output / "checkpoint-6" / "optimizer.pt")["param_groups"]
    return {group["initial_lr"] for group in groups if group["label"] == "LoRA+ of embeddings"}


EVALUATES = ("data.eval.0.path={folder}/eval.jsonl", "training.eval_strategy=steps", "training.eval_steps=1")
BEST = ("training.load_best_model_at_end=true",)
PATIENT = (*EVALUATES, *BEST, "training.early_stopping_patience=50", "training.early_stopping_threshold=100.0")
IMPATIENT = (*EVALUATES, *BEST, "training.early_stopping_patience=1")
COMPILED = ("compile={scope: layer}",)
SAMPLED = (*EVALUATES, "samples={prompts: [hello], held_out: 1, max_new_tokens: 4}")
LORA_PLUS = ("training.loraplus_lr_ratio=2.0", "lora.target_modules=[q_proj, embed_tokens]")
WORKER = ("training.dataloader_num_workers=1",)
PUSHED: dict[str, Any] = {"refused": "training.push_to_hub: "}  # it takes a token and a network
TRACKED = ("training.report_to=trackio",)

CHANGES: dict[str, Change] = {
    "model.name_or_path": cannot("model.name_or_path={folder}/other"),
    "model.dtype": cannot("model.dtype=bfloat16"),
    "model.quantization.type": cannot("model.quantization.type=nf4"),
    "model.quantization.compute": acts(
        "model.quantization.compute=fp8",
        refused="model.quantization.compute: fp8: no weight can compute in fp8: no more than 64 outputs",
        base=("model.quantization={type: fp8}",),
    ),
    "model.quantization.blocks": cannot("model.quantization={type: fp8, blocks: true}"),
    "model.revision": cannot("model.revision=main"),
    "model.trust_remote_code": cannot("model.trust_remote_code=true"),
    "model.tokenizer": asks("model.tokenizer={folder}/base"),
    "model.chat_template": asks("model.chat_template=chatml"),
    "data.train.path": asks("data.train.0.path={folder}/eval.jsonl"),
    "data.train.format": asks("data.train.0.format=chat"),
    "data.train.split": asks("data.train.0.split=train[:90%]"),
    "data.train.name": asks("data.train.0.name=other", base=("data.train.0.path=owner/data",)),
    "data.train.revision": asks("data.train.0.revision=other", base=("data.train.0.path=owner/data",)),
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
    "data.cache_dir": local("data.cache_dir={folder}/other cache", shows=same),
    "data.num_proc": local("data.num_proc=2", shows=same),
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
    "compile.scope": acts(
        "compile.scope=model", base=COMPILED,
        shows=lambda output, _: json.loads((output / "report.json").read_text())["prepare"]["compile"]["scope"]
        == "model",
    ),
    "compile.strict": acts("compile.strict=false", base=COMPILED, shows=same),  # nothing breaks a graph
    "compile.options": acts("compile.options={shape_padding: true}", base=COMPILED, shows=same),
    "checkpointing": acts("checkpointing=layer", shows=says("checkpointing layer")),
    "activation_offloading": acts("activation_offloading=true", "training.use_cpu=false", refused="a GPU"),
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
    "training.fp16": acts("training.fp16=true", "training.use_cpu=false", refused="training.fp16 needs a GPU"),
    "training.use_cpu": acts("training.use_cpu=false", shows=same),  # where there is nothing else
    "training.logging_steps": acts("training.logging_steps=3", shows=lambda output, _: steps(output, "loss") == [6]),
    "training.logging_first_step": acts("training.logging_first_step=true", shows=same),  # that step is done
    "training.report_to": acts("training.report_to=tensorboard", shows=lambda output, _: any(output.rglob("events.*"))),
    "training.run_name": acts("training.run_name=other", "training.report_to=none", shows=same),
    "training.disable_tqdm": local("training.disable_tqdm=false", shows=says("step 5/6")),
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
    "training.dataloader_num_workers": local("training.dataloader_num_workers=1", shows=same),
    "training.dataloader_pin_memory": local("training.dataloader_pin_memory=false", shows=same),
    "training.on_nonfinite": acts("training.on_nonfinite=skip", shows=same),
    "model.added_tokens": cannot("model.added_tokens=[<x>]"),
    "model.special_tokens": cannot("model.special_tokens={unk_token: <|endoftext|>}"),
    "lora.name_or_path": cannot("lora.name_or_path={folder}/adapter"),
    "training.unfrozen_parameters": cannot("training.unfrozen_parameters=[norm]", "lora=null"),
    "training.learning_rates": cannot("training.learning_rates={q_proj: 0.5}"),
    "training.loraplus_lr_ratio": cannot("training.loraplus_lr_ratio=2.0"),
    "training.loraplus_lr_embedding": acts(
        "training.loraplus_lr_embedding=0.125", base=LORA_PLUS,
        shows=lambda output, _: embedding_rates(output) == {0.125},
    ),
    "training.early_stopping_patience": acts(
        "training.early_stopping_patience=4", base=PATIENT, shows=lambda output, _: steps(output, "loss") == [5]
    ),
    "training.early_stopping_threshold": acts(
        "training.early_stopping_threshold=100.0", base=IMPATIENT, shows=lambda output, _: steps(output, "loss") == [5]
    ),
    "samples.prompts": acts(
        "samples.prompts=[bye]", base=SAMPLED, shows=lambda output, _: samples(output)[0]["prompt"] == "bye"
    ),
    "samples.chat": acts(
        "samples.chat=false", base=SAMPLED,
        shows=lambda output, case: completions(output)[0] != completions(case.whole)[0],
    ),
    "samples.held_out": acts("samples.held_out=2", base=SAMPLED, shows=lambda output, _: len(samples(output)) == 3),
    "samples.max_new_tokens": acts(
        "samples.max_new_tokens=9", base=SAMPLED,
        shows=lambda output, case: len(completions(output)[1]) > len(completions(case.whole)[1]),
    ),
    "preference.loss": acts("preference.loss=ipo", kind="preference", shows=other_losses),
    "preference.beta": acts("preference.beta=0.5", kind="preference", shows=other_losses),
    "preference.gamma": acts(
        "preference.gamma=2.0", kind="preference", base=("preference.loss=simpo",), shows=other_losses
    ),
    "preference.label_smoothing": acts("preference.label_smoothing=0.25", kind="preference", shows=other_losses),
    # of one process; test_sharded_runs.py has other numbers of them
    "parallel.replicate": acts("parallel.replicate=1", shows=same),
    "parallel.shard": acts("parallel.shard=1", shows=same),
    "parallel.sequence": acts("parallel.sequence=1", shows=same),
    "parallel.recurrent": acts("parallel.recurrent=state", refused="parallel.recurrent: state cannot act"),
    # test_expert_runs.py has more
    "parallel.expert": acts("parallel.expert=auto", shows=same),
    "parallel.expert_capacity": acts(
        "parallel.expert=2", "parallel.expert_capacity=2.0", refused="parallel.expert=2: it has no experts"
    ),
    "parallel.timeout_s": local("parallel.timeout_s=90", shows=same),
    "verify.enabled": acts("verify.enabled=true", shows=says("OK: every document")),
    "verify.lengths": acts("verify.enabled=true", "verify.lengths=[5, 1, 9]", shows=says("OK: every document")),
    "verify.tolerance": acts("verify.enabled=true", "verify.tolerance=0.5", shows=says("OK: every document")),
    # names of TrainingArguments beyond the schema's
    "training.accelerator_config": acts(
        "training.accelerator_config={gradient_accumulation_kwargs: {sync_each_batch: true}}", shows=same
    ),
    "training.dataloader_drop_last": asks("training.dataloader_drop_last=true"),
    "training.dataloader_persistent_workers": local(
        "training.dataloader_persistent_workers=true", base=WORKER, shows=same
    ),
    "training.dataloader_prefetch_factor": local("training.dataloader_prefetch_factor=3", base=WORKER, shows=same),
    # of several processes
    "training.ddp_backend": acts("training.ddp_backend=gloo", shows=same),
    "training.ddp_broadcast_buffers": acts("training.ddp_broadcast_buffers=true", shows=same),
    "training.ddp_bucket_cap_mb": acts("training.ddp_bucket_cap_mb=13", shows=same),
    "training.ddp_find_unused_parameters": acts("training.ddp_find_unused_parameters=true", shows=same),
    "training.ddp_static_graph": acts("training.ddp_static_graph=true", shows=same),
    "training.ddp_timeout": local("training.ddp_timeout=99", shows=same),
    "training.eval_delay": acts("training.eval_delay=6", base=EVALUATES, shows=evaluated(6)),
    "training.eval_on_start": acts("training.eval_on_start=true", base=EVALUATES, shows=evaluated(4, 5, 6)),
    "training.full_determinism": acts("training.full_determinism=true", shows=same),  # as a CPU is anyway
    "training.greater_is_better": cannot("training.greater_is_better=true", base=(*EVALUATES, *BEST)),
    "training.hub_always_push": acts("training.push_to_hub=true", "training.hub_always_push=true", **PUSHED),
    "training.hub_model_id": acts("training.push_to_hub=true", "training.hub_model_id=owner/other", **PUSHED),
    "training.hub_private_repo": acts("training.push_to_hub=true", "training.hub_private_repo=true", **PUSHED),
    "training.hub_revision": acts("training.push_to_hub=true", "training.hub_revision=other", **PUSHED),
    "training.hub_strategy": acts("training.push_to_hub=true", "training.hub_strategy=checkpoint", **PUSHED),
    "training.push_to_hub": acts("training.push_to_hub=true", **PUSHED),
    "training.include_num_input_tokens_seen": acts(
        "training.include_num_input_tokens_seen=all",
        shows=lambda output, _: all(line["num_input_tokens_seen"] > 0 for line in entries(output) if "loss" in line),
    ),
    "training.log_level": local("training.log_level=error", shows=same),
    "training.log_level_replica": local("training.log_level_replica=error", shows=same),
    "training.log_on_each_node": local("training.log_on_each_node=false", shows=same),
    "training.logging_strategy": acts(
        "training.logging_strategy=epoch", "training.logging_steps=10",
        shows=lambda output, _: steps(output, "loss") == [6]
    ),
    "training.metric_for_best_model": cannot("training.metric_for_best_model=eval_loss", base=EVALUATES),
    "training.optim_args": cannot("training.optim_args='momentum=0.9'", base=("training.optim=sgd",)),
    "training.optim_target_modules": cannot(
        "training.optim_target_modules=[q_proj]", base=("training.optim=galore_adamw",)
    ),
    "training.project": acts("training.project=other", base=TRACKED),
    "training.trackio_bucket_id": acts("training.trackio_bucket_id=other", base=TRACKED),
    "training.trackio_space_id": acts("training.trackio_space_id=other", base=TRACKED),
    "training.trackio_static_space_id": acts("training.trackio_static_space_id=other", base=TRACKED),
    "training.save_on_each_node": acts("training.save_on_each_node=true", shows=same),
    "training.skip_memory_metrics": acts("training.skip_memory_metrics=false", shows=same),
    "training.tf32": acts("training.tf32=true", refused="training.tf32 needs a GPU"),
    "training.torch_empty_cache_steps": acts("training.torch_empty_cache_steps=1", shows=same),
    "training.train_sampling_strategy": asks("training.train_sampling_strategy=sequential"),
}  # fmt: skip
CHANGES |= {  # of held-out data every key acts; of those that choose rows evaluations show it
    key.replace("train", "eval"): acts(
        *(word.replace("train.0", "eval.0").replace("eval.jsonl", "train.jsonl") for word in change.words),
        base=(*EVALUATES, *(word.replace("train.0", "eval.0") for word in change.base)), shows=evaluated(5, 6),
    )
    for key, change in CHANGES.items()
    if key.startswith("data.train.") and key not in ("data.train.weight", "data.train.repeat")
}  # fmt: skip
NO_SETTING = {"training.output_dir"}  # where a run is; --resume looks there
NEVER = {"data.eval.weight", "data.eval.repeat"}
# of the Hub, or of a package that is no requirement of the tests
NOT_HERE = {f"data.{part}.{name}" for part in ("train", "eval") for name in ("name", "revision")}
NOT_HERE |= {"training.optim_target_modules"}
# by transformers; of one process, or of what a CPU cannot have, not by this run
HANDED_ON = {f"training.{name}" for name in PASSED_TRAINING_NAMES if f"training.{name}" in CHANGES}
HANDED_ON -= {key for key, change in CHANGES.items() if change.refused or change.verdict not in ACT}
HANDED_ON -= {"training.ddp_backend"}  # without a launcher left out
REFUSED_ELSEWHERE = {"data.chat_template_kwargs", "data.streaming"}


def all_keys() -> Iterator[str]:
    for section in known_keys(()):
        inner = known_keys((section,))
        if not inner:
            yield section
        for key in inner:
            if (section, key) in (("data", "train"), ("data", "eval")):
                yield from (f"data.{key}.{name}" for name in Source.model_fields)
            if (section, key) == ("model", "quantization"):
                yield from (f"model.{key}.{name}" for name in known_keys((section, key)))
            elif (section, key) != ("data", "train"):
                yield f"{section}.{key}"
    yield from (f"training.{name}" for name in PASSED_TRAINING_NAMES)


def test_every_key_is_tried() -> None:
    assert set(CHANGES) | NO_SETTING | NEVER == set(all_keys())


@pytest.mark.parametrize("key", sorted(NEVER))
def test_what_no_recipe_may_say_is_no_change(recipes: Any, key: str) -> None:
    word = f"{key.replace('eval', 'eval.0')}=2"
    with pytest.raises(UserError, match="an evaluation sees every document once"):
        loaded(recipes("lora", *EVALUATES), [word if key.endswith("repeat") else f"{word}.0"])


def test_what_shows_a_key_is_said_of_each_that_acts() -> None:
    acting = {key: change for key, change in CHANGES.items() if change.verdict in ACT}
    assert {key for key, change in acting.items() if not (change.shows or change.refused)} <= HANDED_ON


def words_of(change: Change, recipe: Path) -> list[str]:
    return [word.replace("{folder}", str(recipe.parent)) for word in change.words]


def loaded(recipe: Path, words: Sequence[str] = ()) -> Recipe:
    return parse_recipe(recipe.read_text(), "recipe.yaml", words).recipe


@pytest.mark.parametrize("key", sorted(set(CHANGES) - {"data.streaming"}))
def test_every_key_has_its_verdict(recipes: Any, key: str) -> None:
    recipe = recipes(CHANGES[key].kind, *CHANGES[key].base)
    before, now = (loaded(recipe, words).model_dump(mode="json") for words in ((), words_of(CHANGES[key], recipe)))
    found = find_changes(before, now)
    place = re.sub(r"^data\.(train|eval)\.", r"data.\1.0.", key)
    here = [change for change in found if place in change.key or change.key in key]
    assert {change.verdict for change in here} == {CHANGES[key].verdict}, found


@pytest.mark.parametrize("key", sorted(HANDED_ON))
def test_what_transformers_takes_gets_there(recipes: Any, key: str) -> None:
    change, name = CHANGES[key], key.removeprefix("training.")
    recipe = recipes(change.kind, *change.base)
    before, now = (
        getattr(training_arguments(loaded(recipe, words).training), name) for words in ((), words_of(change, recipe))
    )
    assert before != now


@pytest.fixture(scope="module")
def stopped(cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Change], tuple[Any, Path]]:
    """The case of a change's first leg, and a folder whose run was killed after its second checkpoint."""

    @cache
    def killed(kind: str, *base: str) -> tuple[Any, Path]:
        case, output = cases(kind, *base), tmp_path_factory.mktemp("stopped") / "output"
        folder = case.recipe.parent
        other = shutil.copytree(folder / "base", folder / "other") / "model.safetensors"
        save_file({name: weight + 1 for name, weight in load_file(other).items()}, other, metadata={"format": "pt"})
        shutil.copytree(case.whole / "checkpoint-6", folder / "adapter")
        assert run(case.recipe, output, at=case.first("os.rmdir .saving-4"), action="kill") == -signal.SIGKILL
        return case, output

    return lambda change: killed(change.kind, *change.base)


def second_leg(stopped: Any, output: Path, change: Change, *more: str) -> int:
    case, folder = stopped(change)
    shutil.copytree(folder, output, dirs_exist_ok=True)
    words = [part for word in words_of(change, case.recipe) for part in ("--set", word)]
    return run(case.recipe, output, "--resume", *words, *more)


@pytest.mark.faults
@pytest.mark.parametrize(
    "key", sorted(key for key, change in CHANGES.items() if change.shows is not None and key not in NOT_HERE)
)
def test_what_acts_is_recorded_and_acts(stopped: Any, tmp_path: Path, key: str) -> None:
    change, output = CHANGES[key], tmp_path / "output"
    assert second_leg(stopped, output, change) == 0, screen(output)
    recorded = json.loads((output / "run.json").read_text())["legs"][-1]["changes"]
    place = re.sub(r"^data\.eval\.", "data.eval.0.", key)
    assert any(line.startswith((f"{place}:", f"{place}.")) for line in recorded), recorded
    assert f"changed since checkpoint-4: {place}" in screen(output).replace("\n", "")
    assert change.shows is not None
    assert change.shows(output, stopped(change)[0]), entries(output)


@pytest.mark.faults
@pytest.mark.parametrize("key", sorted(key for key, change in CHANGES.items() if change.refused is not None))
def test_what_no_small_run_has_is_refused_in_words(stopped: Any, tmp_path: Path, key: str) -> None:
    if torch.accelerator.is_available():
        pytest.skip("needs a machine without an accelerator")
    change, output = CHANGES[key], tmp_path / "output"
    assert second_leg(stopped, output, change) == 2
    said = " ".join(screen(output).split())
    assert change.refused is not None
    assert change.refused in said
    assert "cannot act on a run that goes on" not in said


@pytest.mark.faults
@pytest.mark.parametrize(
    "key", sorted(key for key, change in CHANGES.items() if change.verdict == "cannot" and key not in NOT_HERE)
)
def test_what_cannot_act_is_refused(stopped: Any, tmp_path: Path, key: str) -> None:
    output = tmp_path / "output"
    assert second_leg(stopped, output, CHANGES[key], "--allow-change") == 2
    assert "cannot act on a run that goes on" in screen(output), screen(output)


ASKS = sorted(key for key, change in CHANGES.items() if change.verdict == "asks" and key not in NOT_HERE)


@pytest.mark.faults
@pytest.mark.parametrize("key", ASKS)
def test_what_needs_a_word_goes_on_with_it(stopped: Any, tmp_path: Path, key: str) -> None:
    output = tmp_path / "output"
    assert second_leg(stopped, output, CHANGES[key]) == 2
    assert "say --allow-change" in screen(output), screen(output)
    status = second_leg(stopped, output, CHANGES[key], "--allow-change")
    assert status == (2 if key in REFUSED_ELSEWHERE else 0), screen(output)
