"""A recipe that is wrong says so before anything is imported that the fault can be seen without."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

#: Imports, tells the modules there are, and answers each line by what a fork of it does.
PROGRAM = """\
import json, os, resource, sys
from deltatune.cli import main
exec(sys.argv[1])

def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

before = seconds()
print(json.dumps(list(sys.modules)), flush=True)
for line in sys.stdin:
    arguments, said, told = json.loads(line)
    if (child := os.fork()) == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        try:
            status = main(arguments)
            with open(told, "w") as file:
                json.dump([status, list(sys.modules), before + seconds()], file)
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(child, 0)
    print(flush=True)
"""
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")
#: What a model takes, and rows and tokenizers do not.
OF_MODELS = (
    *("peft", "accelerate", "datasets", "trl", "transformers.modeling_utils"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"),
)
#: Seconds of CPU without those of HEAVY; a third of one, on a machine that does nothing else.
BOUND = 4.0


class Plans:
    """``deltatune plan``, each in a process forked from one that has done nothing but imports."""

    def __init__(self, imports: str) -> None:
        command = [sys.executable, "-c", PROGRAM, imports]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.imported: set[str] = set(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or "null")

    def run(self, recipe: Path, *settings: str) -> tuple[int, set[str], float, str]:
        """The status, the modules that were imported, the seconds of CPU and what it said."""
        given = [part for setting in settings for part in ("--set", setting)]
        said, told = recipe.parent / "said", recipe.parent / "told"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([["plan", str(recipe), *given], str(said), str(told)]) + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()
        assert told.exists(), said.read_text()
        status, modules, seconds = json.loads(told.read_text())
        return status, set(modules), seconds, said.read_text()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait() == 0


@pytest.fixture(scope="module")
def plans() -> Iterator[Plans]:
    """What every plan imports is there: the assertions and the seconds of CPU are those of parent and child."""
    found = Plans("import deltatune.training.preflight")
    yield found
    found.close()


@pytest.fixture(scope="module")
def plans_with_tokenizers() -> Iterator[Plans]:
    """What a tokenizer takes of a model's modules is there: nothing now, much of it in transformers 5.17."""
    found = Plans("import torch, deltatune.training.preflight; from transformers import AutoTokenizer")
    yield found
    found.close()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.optim=adamw_torhc", r"adamw_torhc is unknown (did you mean adamw_torch?); known: "),
        ("training.lr_scheduler_type=cosin", "cosin is unknown (did you mean cosine?); known: "),
        ("training.lr_scheduler_kwargs={num_cycle: 1}", "linear takes no num_cycle; it takes last_epoch"),
        ("training.lr_scheduler_type=warmup_stable_decay", "warmup_stable_decay needs num_decay_steps"),
        ("training.lr_scheduler_type=greedy", "greedy follows evaluations"),
        ("training.report_to=wandbb", "wandbb is unknown (did you mean wandb?); known: "),
        ("training.logging_strategy=step", "step is unknown (did you mean steps?); known: "),
        ("training.loging_strategy=steps", "unknown (did you mean logging_strategy?)"),
        ("training.metric_for_best_model=f1", "metric_for_best_model: f1 is nothing that an evaluation logs"),
        ("training.fp16=true", "fp16 needs a GPU"),
        ("lora.target_modules=[q_porj]", "'q_porj' matches no module; nearest: q_proj"),
        ("lora.target_modules=.*q_porj", "'.*q_porj' matches no module; nearest: q_proj"),
        ("lora.target_modules=.*\\.(q|k)_porj", "(q|k)_porj' matches no module; nearest: "),
        ("lora.rank_pattern={'.*self_attn.(q_porj|(k|v)_porj)': 4}", "matches no layer; nearest: "),
        ("parallel.sequence=3 packing.tokens_per_batch=192", "parallel.sequence=3 does not divide "),
        ("parallel.expert=2", "parallel.expert=2: it has no experts; leave expert out"),
        ("lora.rank_pattern={q_porj: 4}", "'q_porj' matches no layer; nearest: q_proj"),
        ("training.unfrozen_parameters=[q_porj]", "'q_porj' matches no parameter; nearest: q_proj"),
        ("kernels={gated_delta_rule: fast}", "unknown impl='fast'; expected 'auto' or one of 'flash_qla', 'fla'"),
        ("lora.rank=4", "lora.rank"),
        ("model.dtype=bf17", "model.dtype"),
        ("data.train.0.path=no/rows.jsonl", "no/rows.jsonl does not exist"),
        ("training.tf32=true", "tf32 needs a GPU"),
        ("training.optim=adamw_8bit", "needs the package bitsandbytes"),
        ("training.report_to=flyte", "package of flyte is not installed"),
        ("training.optim_args=momentum training.optim=sgd", "optim_args: expected name=value"),
        ("training.adam_beta1=0.8 training.optim=sgd", "has no effect with training.optim: sgd"),
        ("training.accelerator_config={split: true}", "accelerator_config: split is unknown"),
        ("training.push_to_hub=true training.save_strategy=steps", "push_to_hub: HF_HUB_OFFLINE"),
        ("training.lr_scheduler_type=cosine_with_min_lr", "needs one of min_lr, min_lr_rate"),
        (
            "training.lr_scheduler_type=polynomial training.lr_scheduler_kwargs={power: high}",
            "power: expected a number",
        ),
        ("training.lr_scheduler_type=polynomial training.lr_scheduler_kwargs={lr_end: 1.0}", "must be below"),
        ("training.learning_rates={'(': 1e-4}", "is no regular expression"),
        ("training.unfrozen_parameters=['(']", "is no regular expression"),
        ("lora.rank_pattern={'(': 2}", "is no regular expression"),
        ("lora.layers_to_transform=[0, 9]", "lora.layers_to_transform: 9 is no layer; the model has layers 0 to 1"),
        ("lora.impl=fused lora.lora_dropout=0.1", "lora.lora_dropout cannot run in lora.impl: fused"),
        ("model.added_tokens=[a]", "a is in the vocabulary already"),
        ("model.special_tokens={eos_token: <no>}", "<no> is not in the vocabulary"),
        ("model.chat_template=chatmll", "did you mean chatml?"),
        ("model.chat_template=no/such.jinja", "cannot read no/such.jinja"),
    ],
)
def test_names_and_paths_are_checked_without_torch(plans: Plans, write_recipe: Any, setting: str, message: str) -> None:
    settings = re.split(r" (?=\w+\.\w+=)", setting)
    status, modules, seconds, said = plans.run(write_recipe(), *settings)
    assert (status, len(said.splitlines())) == (2, 1)
    assert message in said
    assert modules.isdisjoint(HEAVY)
    assert seconds < BOUND


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parallel.expert=3", "parallel.expert=3 does not divide 4 experts; set expert to one of 1, 2, 4"),
        ("parallel.sequence=3 packing.tokens_per_batch=192", "parallel.sequence=3 does not divide 4 heads"),
    ],
)
def test_ranks_are_held_against_experts_and_heads_without_torch(
    plans: Plans, write_recipe: Any, mixture: Path, setting: str, message: str
) -> None:
    status, modules, seconds, said = plans.run(
        write_recipe(), f"model.name_or_path={mixture}", *re.split(r" (?=\w+\.\w+=)", setting)
    )
    assert (status, len(said.splitlines())) == (2, 1)
    assert message in said
    assert modules.isdisjoint(HEAVY)
    assert seconds < BOUND


def _no_tokenizer(_: Path, folder: Path) -> list[str]:
    return [f"model.tokenizer={folder}"]


def _unknown_type(checkpoint: Path, folder: Path) -> list[str]:
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_6"}))
    return [f"model.name_or_path={folder}"]


def rows(*given: Any) -> Callable[[Path, Path], list[str]]:
    def write(_: Path, folder: Path) -> list[str]:
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in given))
        return [f"data.train.0.path={folder / 'rows.jsonl'}"]

    return write


def _few_embeddings(checkpoint: Path, folder: Path) -> None:
    """A checkpoint whose configuration has 200 embeddings, with a tokenizer of 259 tokens."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["vocab_size"] = 200
    (folder / "config.json").write_text(json.dumps(config))


def _padding_beyond(checkpoint: Path, folder: Path) -> list[str]:
    _few_embeddings(checkpoint, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "\u0120"}))
    return [f"model.name_or_path={folder}"]


def _ids_beyond(checkpoint: Path, folder: Path) -> list[str]:
    _few_embeddings(checkpoint, folder)
    return [f"model.name_or_path={folder}", *rows({"input_ids": [1, 210]})(checkpoint, folder)]


def _text_beyond(checkpoint: Path, folder: Path) -> list[str]:
    _few_embeddings(checkpoint, folder)
    return [f"model.name_or_path={folder}"]


def _no_adapter(_: Path, folder: Path) -> list[str]:
    return [f"lora.name_or_path={folder}"]


def _other_adapter(_: Path, folder: Path) -> list[str]:
    (folder / "adapter_model.safetensors").touch()
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    return [f"lora.name_or_path={folder}"]


def _earlier_run(_: Path, folder: Path) -> list[str]:
    (folder / "checkpoint-1").mkdir()
    return [f"training.output_dir={folder}"]


def said(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


GOOD = said("user", "assistant")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_tokenizer, "cannot load a tokenizer"),
        (_unknown_type, "does not know (did you mean qwen3_5?)"),
        (rows({"messages": 3}), "line 1: messages must be a list of messages"),
        (rows(GOOD, [1]), "line 2 begins a JSON list; expected one JSON object per line"),
        (rows(*[GOOD] * 900, said("user", "asistant")), "line 901: messages[1] has the"),
        (rows(GOOD, said("user")), "line 2 has no assistant turn in its conversation"),
        (rows({"question": "x", "answer": "y"}), "rows.jsonl fits no format"),
        (rows({"prompt": "x", "chosen": "y", "rejected": "z"}), "add preference: {}"),
        (rows({"input_ids": [1, -5]}), "line 1: input_ids holds -5"),
        (rows({"input_ids": [1, 10**6]}), "the rows are another tokenizer's"),
        (_ids_beyond, "line 1 holds token 210, and the model has 200 embeddings"),
        (_padding_beyond, "packs are filled with token 223 ('\u0120'), and the model has 200 embeddings"),
        (_no_adapter, "is no adapter: it holds no adapter_config.json"),
        (_other_adapter, "is an adapter of type IA3"),
        (_earlier_run, "holds checkpoints of an earlier run"),
    ],
)
def test_types_of_models_and_first_rows_are_checked_without_torch(
    plans: Plans,
    write_recipe: Any,
    checkpoint: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path], list[str]],
    message: str,
) -> None:
    (tmp_path / "spoiled").mkdir()
    status, modules, seconds, said = plans.run(write_recipe(), *spoil(checkpoint, tmp_path / "spoiled"))
    assert (status, len(said.splitlines())) == (2, 1)
    assert message in said
    assert modules.isdisjoint(HEAVY)
    assert seconds < BOUND


def _broken_tokenizer(_: Path, folder: Path) -> list[str]:
    (folder / "tokenizer.json").write_text("{}")
    return [f"model.tokenizer={folder}"]


def _refused_prompt(checkpoint: Path, folder: Path) -> list[str]:
    refusing = "model.chat_template=\"{{ raise_exception('no') }}\""
    asked = ["samples={prompts: ['why?']}", "data.val_size=2", "training.eval_strategy=epoch", refusing]
    return [*asked, *rows(*[GOOD] * 1000, {"messages": 3})(checkpoint, folder)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_refused_prompt, "the chat template cannot ask 'why?': no; "),
        (_broken_tokenizer, "cannot load a tokenizer"),
        (rows(*[GOOD] * 1000, {"messages": 3}), "line 1001: messages must be a list"),
        (_text_beyond, "the data holds token 223 ('\u0120'), and the model has 200 embeddings"),
        (lambda *_: ["data.chat_template_kwargs={enable_thinkin: false}"], "enable_thinkin"),
    ],
)
def test_all_rows_and_tokenizers_are_checked_before_models_are_imported(
    plans_with_tokenizers: Plans,
    write_recipe: Any,
    checkpoint: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path], list[str]],
    message: str,
) -> None:
    (tmp_path / "spoiled").mkdir()
    status, modules, _, said = plans_with_tokenizers.run(write_recipe(), *spoil(checkpoint, tmp_path / "spoiled"))
    assert (status, len(said.splitlines())) == (2, 1)
    assert message in said
    assert modules.intersection(OF_MODELS) <= plans_with_tokenizers.imported


def test_a_plan_imports_neither_trainer_nor_tables(plans_with_tokenizers: Plans, write_recipe: Any) -> None:
    status, modules, _, _ = plans_with_tokenizers.run(write_recipe())
    assert status == 0
    assert modules.isdisjoint({"datasets", "pandas", "trl", "transformers.trainer", "torch._inductor.compile_fx"})
