import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml

from deltatune.cli import main
from deltatune.commands import planning
from deltatune.config.load import load_recipe
from deltatune.errors import UserError
from deltatune.training import preflight, space
from deltatune.training import run as run_module
from deltatune.training.run import train


def test_plan_says_what_a_run_would_do(capsys, write_recipe, tmp_path) -> None:
    assert main(["plan", str(write_recipe())]) == 0
    page = capsys.readouterr().out
    for expected in (
        "Qwen3_5GatedDeltaNet",
        "gated_delta_rule",
        "trainable 1,088 of ",
        "self_attn.q_proj.lora_A",
        "24 rows -> 24 documents",
        "2 steps of 1 pack (128 tokens)",
        "memory estimate",
        "optimizer",
    ):
        assert expected in page
    assert not (tmp_path / "output").exists()


def test_paths_begin_where_the_command_is_called(capsys, write_recipe, tmp_path, monkeypatch) -> None:
    recipe = yaml.safe_load(write_recipe().read_text())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(recipe["model"]["name_or_path"])
    recipe["model"]["name_or_path"], recipe["data"]["train"][0]["path"] = "./base", "rows.jsonl"
    (elsewhere / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["plan", "elsewhere/recipe.yaml"]) == 0
    monkeypatch.chdir(elsewhere)
    assert main(["plan", "recipe.yaml"]) == 2
    assert "model ./base is no folder" in capsys.readouterr().err


def test_plan_offers_a_smaller_optimizer_where_its_state_weighs(capsys, write_recipe, monkeypatch) -> None:
    recipe = str(write_recipe())
    monkeypatch.setattr(planning, "_WEIGHS", 2048)
    assert main(["plan", recipe]) == 0
    assert "training.optim: adamw_8bit keeps" not in capsys.readouterr().out, "small tensors stay in float32"
    recipe = str(write_recipe(lora=None))
    assert main(["plan", recipe]) == 0
    assert "training.optim: adamw_8bit keeps" in capsys.readouterr().out
    assert main(["plan", recipe, "--set", "training.optim=sgd"]) == 0
    assert "adamw_8bit" not in capsys.readouterr().out


def test_plan_of_a_mixture_counts_experts_and_their_optimizer(capsys, write_recipe, monkeypatch, mixture) -> None:
    model = {"name_or_path": str(mixture)}
    assert main(["plan", str(write_recipe(model=model, lora={"r": 4}))]) == 0
    # 2 layers of 4 experts with [48, 32] and [32, 24]
    assert "4 a layer in 2 layers, 2 a token; 18,432 parameters (" in (page := capsys.readouterr().out)
    assert ", 0 trained for them; no adapter on them" in page
    assert "lora.target_parameters: all-experts" in page
    monkeypatch.setattr(planning, "_WEIGHS", 2**17)
    lora = {"r": 64, "target_modules": None, "target_parameters": "all-experts"}
    assert main(["plan", str(write_recipe(model=model, lora=lora))]) == 0
    page = capsys.readouterr().out
    # a layer: (32 + 48 + 24 + 32) columns of 4 x 64
    assert f", {2 * 136 * 256:,} trained for them\n" in page
    assert 2 * 136 * 256 * 8 == 544 * 2**10, "two moments in float32"
    assert [line.split()[1:] for line in page.splitlines() if line.startswith("optimizer  ")] == [["544.0", "KiB"]]
    assert "training.optim: adamw_8bit keeps" in page


def test_plan_loads_no_weights(write_recipe, monkeypatch, checkpoint, tmp_path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(torch.nn.Linear, "forward", None)
    assert main(["plan", str(write_recipe(model={"name_or_path": str(bare)}))]) == 0


def test_plan_counts_steps_by_epochs_and_accumulation(capsys, write_recipe) -> None:
    recipe = write_recipe(training={"num_train_epochs": 2, "gradient_accumulation_steps": 4, "use_cpu": True})
    assert main(["plan", str(recipe)]) == 0
    # 24 documents of about 30 tokens: 6 packs of 128, so 2 steps an epoch, the second of 2 packs
    assert "4 steps of 4 packs (512 tokens), 2 steps an epoch, 2.00 epochs" in capsys.readouterr().out


def test_plan_counts_steps_of_several_processes(capsys, write_recipe) -> None:
    recipe = write_recipe(training={"num_train_epochs": 2, "gradient_accumulation_steps": 2, "use_cpu": True})
    assert main(["plan", str(recipe), "--nproc", "2"]) == 0
    # 6 packs: 3 on each, so 2 steps an epoch, the second of 2 packs
    assert "4 steps of 4 packs (512 tokens), 2 steps an epoch, 2.00 epochs" in capsys.readouterr().out


def test_plan_of_full_training_with_automatic_checkpointing(capsys, write_recipe) -> None:
    assert main(["plan", str(write_recipe(lora=None, checkpointing="auto", compile=True))]) == 0
    page = capsys.readouterr().out
    assert "(100.00%)" in page
    assert "checkpointing none: auto takes it" in page


def test_plan_gives_warnings(capsys, write_recipe) -> None:
    assert main(["plan", str(write_recipe()), "--set", "packing.tokens_per_batch=100"]) == 0
    assert "warning: packing.tokens_per_batch: 100 is no multiple of 64" in capsys.readouterr().out


def test_plan_reads_evaluation_data_too(capsys, write_recipe, write_rows) -> None:
    good, bad = write_rows({"text": "held out"}, name="eval.jsonl"), write_rows("{", name="bad.jsonl")
    assert main(["plan", str(write_recipe()), "--set", f"data.eval.0.path={good}"]) == 0
    assert "\neval: 1 row -> 1 document," in capsys.readouterr().out
    assert main(["plan", str(write_recipe()), "--set", f"data.eval.0.path={bad}"]) == 2
    assert "bad.jsonl" in capsys.readouterr().err


def test_plan_counts_pairs(capsys, write_recipe, pairs) -> None:
    assert main(["plan", str(write_recipe(pairs, preference={"loss": "simpo"}))]) == 0
    assert "train: 12 rows -> 12 pairs" in capsys.readouterr().out


def test_plan_says_what_a_run_elsewhere_will_need(capsys, write_recipe, monkeypatch) -> None:
    """On a machine without an accelerator, for a run that wants one, a kernel of a GPU is no error; a package is."""
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    recipe = str(write_recipe(training={"max_steps": 2}, kernels={"gated_delta_rule": "fla"}))
    assert main(["plan", recipe]) == 0
    assert re.search(r"warning: .*fla.*; what follows is for kernels: auto\n", capsys.readouterr().out)
    assert main(["plan", recipe, "--set", "training.optim=adamw_8bit"]) == 2
    remedy = "adamw_8bit needs the package bitsandbytes; pip install 'deltatune[optimizers]'"
    assert f"{remedy}\n" in capsys.readouterr().err


def test_plan_says_what_of_a_step_lies_in_the_hosts_memory(capsys, write_recipe) -> None:
    recipe = str(write_recipe(training={"max_steps": 2}, activation_offloading=True, checkpointing="layer"))
    assert main(["plan", recipe]) == 0
    page = capsys.readouterr().out
    assert "warning: activation_offloading: true needs a GPU where the run will train; here it would be cpu" in page
    assert "activation offloading: about 0.0 GiB of a step lie in pinned host memory" in page
    assert main(["plan", recipe, "--set", "activation_offloading=false"]) == 0
    assert "offloading" not in capsys.readouterr().out
    assert main(["plan", recipe, "--set", "training.use_cpu=true"]) == 2
    assert "activation_offloading: true cannot act with training.use_cpu" in capsys.readouterr().err


def test_plan_says_what_is_saved(capsys, write_recipe, tmp_path, monkeypatch) -> None:
    training = {"output_dir": str(tmp_path / "output"), "save_total_limit": 2, "use_cpu": True}
    recipe = str(write_recipe(training=training))
    assert main(["plan", recipe]) == 0
    assert "a checkpoint is 12.8 KiB, 3 of them at once; " in capsys.readouterr().out
    monkeypatch.setattr(space, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=1000)))
    assert main(["plan", recipe]) == 2
    assert "the first save needs 12.8 KiB, and " in capsys.readouterr().err


def test_plan_of_a_run_that_goes_on(capsys, write_recipe, tmp_path) -> None:
    recipe, output = str(write_recipe()), tmp_path / "output"
    assert main(["train", recipe, "--set", "training.save_strategy=steps", "--set", "training.save_steps=1"]) == 0
    (output / ".saving-3").mkdir()
    last, capsys_out = output / "checkpoint-2", capsys.readouterr
    capsys_out()
    going_on = ["plan", recipe, "--resume", "--set", "training.max_steps=3"]
    assert main(going_on) == 0
    page = capsys_out().out
    assert f"goes on from {last}\n" in page
    assert "changed since checkpoint-2: training.max_steps: 2 -> 3\n" in page
    assert (output / ".saving-3").exists(), "a plan writes nothing"
    for settings, message in {
        "lora.r=2": "lora.r: 4 -> 2 cannot act on a run that goes on",
        "training.gradient_accumulation_steps=2": "packs of an optimizer step: 1 -> 2 makes the run go on with other",
        "packing.tokens_per_batch=64": "packing.tokens_per_batch: 128 -> 64 makes the run go on with other packs",
    }.items():
        assert main([*going_on, "--set", settings]) == 2
        assert message in capsys_out().err
    assert main([*going_on, "--set", "packing.tokens_per_batch=64", "--allow-change"]) == 0


def test_plan_is_for_the_processes_that_the_recipe_asks_for(capsys, write_recipe) -> None:
    assert main(["plan", str(write_recipe()), "--set", "parallel.shard=2", "--set", "parallel.replicate=3"]) == 0
    out = capsys.readouterr().out
    assert "parallel: replicate 3, shard 2 (as the recipe says)" in out
    assert "of 6 packs" in out


def test_plan_names_what_rank_0_must_load_whole(capsys, write_recipe) -> None:
    sharded = ["plan", str(write_recipe()), "--set", "parallel.shard=2"]
    said = "rank 0 loads the whole model into host memory, 0.0 GiB: lora.use_dora takes the norms of its weights"
    assert main([*sharded, "--set", "lora.use_dora=true"]) == 0
    assert said in capsys.readouterr().out
    assert main(sharded) == 0
    assert "rank 0 loads" not in capsys.readouterr().out


def test_plan_counts_packs_and_memory_by_the_ranks_that_hold_a_pack(capsys, write_recipe) -> None:
    recipe = str(write_recipe())

    def plan(*settings: str) -> str:
        assert main(["plan", recipe, *(word for setting in settings for word in ("--set", setting))]) == 0
        return capsys.readouterr().out

    def estimated(page: str, what: str) -> float:
        (line,) = (line for line in page.splitlines() if line.startswith(what))
        return float(line.split()[1])

    alone, cut = plan(), plan("parallel.shard=4", "parallel.sequence=2")
    assert "parallel: replicate 1, shard 4 (as the recipe says)\nparallel: sequence 2: 2 data ranks\n" in cut
    assert "of 2 packs" in cut
    assert estimated(cut, "activations") == pytest.approx(estimated(alone, "activations") / 2, rel=0.01)
    assert "of 1 pack (" in plan("parallel.sequence=2"), "two ranks with whole weights"
    idle = "parallel: sequence 1, so recurrent: state does nothing\n"
    assert idle in plan("parallel.recurrent=state")
    assert idle in plan("parallel.recurrent=state", "parallel.replicate=2")
    assert idle not in plan("parallel.recurrent=state", "parallel.sequence=2")
    assert idle not in alone


def test_plan_names_the_ranks_among_which_the_heads_divide(capsys, write_recipe) -> None:
    assert main(["plan", str(write_recipe()), "--set", "parallel.sequence=16"]) == 2
    error = capsys.readouterr().err
    assert "parallel.sequence=16 does not divide" in error
    assert "set sequence to one of 1, 2" in error


def test_plan_counts_the_memory_of_the_experts_of_one_process(capsys, write_recipe, mixture) -> None:
    recipe = str(write_recipe(model={"name_or_path": str(mixture)}, lora=None))

    def plan(*settings: str) -> str:
        assert main(["plan", recipe, *(word for setting in settings for word in ("--set", setting))]) == 0
        return capsys.readouterr().out

    def estimated(page: str, what: str) -> float:
        (line,) = (line for line in page.splitlines() if line.startswith(what))
        _, size, unit = line.split()
        return float(size) * {"KiB": 1, "MiB": 2**10}[unit]

    alone, half = plan(), plan("parallel.expert=2")
    assert "parallel: replicate 2, shard 1 (" in half
    room = "with room for 1.5 times an even share of visits"
    assert f"parallel: expert 2: a process holds 1/2 of the experts, {room}\n" in half
    assert "of 2 packs" in half
    for what, copies in {"weights": 1, "gradients": 1, "optimizer": 2}.items():
        saved = copies * 18_432 / 2 * 4 / 2**10
        assert estimated(alone, what) - estimated(half, what) == pytest.approx(saved, abs=0.2)
    # rows received, and half as many visits again
    assert estimated(half, "activations") > estimated(alone, "activations")
    assert estimated(plan("parallel.expert=2", "parallel.expert_capacity=2"), "activations") > estimated(
        half, "activations"
    )
    assert "parallel: replicate 2, shard 2 (as the recipe says)" in plan(
        "parallel.expert=4", "parallel.shard=2", "parallel.replicate=2"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["expert=3"], "parallel.expert=3 does not divide 4 experts; set expert to one of 1, 2, 4"),
        (["expert=2", "replicate=3", "shard=1"], "parallel.replicate: 3 times shard: 1 is 3, and 6 processes run"),
    ],
)
def test_plan_names_the_processes_among_which_experts_divide(capsys, write_recipe, mixture, settings, message) -> None:
    recipe = str(write_recipe(model={"name_or_path": str(mixture)}, lora=None))
    assert main(["plan", recipe, *(word for setting in settings for word in ("--set", f"parallel.{setting}"))]) == 2
    assert message in capsys.readouterr().err


def test_experts_are_checked_before_processes_meet(write_recipe, mixture, checkpoint, monkeypatch) -> None:
    def met() -> None:
        raise AssertionError("a process group was made")

    monkeypatch.setattr(run_module, "own_process_group", met)
    for model, ranks, message in (
        (mixture, 3, "parallel.expert=2 does not divide 3 processes; set expert to one of 1"),
        (mixture, 1, "does not divide 1 processes; set expert to one of 1; start several with deltatune train"),
        (checkpoint, 2, "parallel.expert=2: it has no experts; leave expert out"),
    ):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        with pytest.raises(UserError, match=re.escape(message)):
            train(
                load_recipe(write_recipe(model={"name_or_path": str(model)}, lora=None, parallel={"expert": 2})).recipe
            )


def test_plan_refuses_what_a_launcher_says(capsys, write_recipe, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["plan", str(write_recipe())]) == 2
    assert "ACCELERATE_USE_FSDP=true asks accelerate to divide the model" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(capsys, write_recipe, monkeypatch, width) -> None:
    monkeypatch.setattr(planning, "_terminal_width", lambda: width)
    assert main(["plan", str(write_recipe(lora={"r": 4}))]) == 0
    lines = capsys.readouterr().out.splitlines()
    rules = [number for number, line in enumerate(lines) if line and set(line) <= {"-", " "}]
    assert len(rules) >= 4
    for number in rules:
        end = lines.index("", number) if "" in lines[number:] else len(lines)
        assert max(map(len, lines[number - 1 : end])) <= width
