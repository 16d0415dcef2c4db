"""Learning rates by pattern, LoRA+, Muon and 8-bit state: which parameters move how, and go on from a checkpoint."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from rich.console import Console
from safetensors.torch import load_file
from test_run import stopping_after
from torch import nn
from training_cases import make_recipe, save_checkpoint

from deltatune.config.training_section import TrainingSection
from deltatune.errors import UserError
from deltatune.training import run as run_module
from deltatune.training.arguments import training_arguments
from deltatune.training.muon import MATRICES, MuonWithAdamW
from deltatune.training.optimizers import OptimizerSettings, optimizer_lines, parameter_groups
from deltatune.training.run import train
from tiny import tiny_model

QUIET = Console(quiet=True)


def adapted(**lora: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **lora)
    return peft.get_peft_model(tiny_model("qwen3_5"), config)


def rates(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def grouped(model: nn.Module, **training: Any) -> dict[str, tuple[float, float]]:
    settings = OptimizerSettings.of(TrainingSection(**training))
    return rates(model, parameter_groups(model, settings, learning_rate=1e-3, weight_decay=0.1))


@pytest.mark.parametrize(
    "lora", [{}, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "input_layernorm"]}]
)
def test_lora_plus_is_pefts(lora: dict[str, Any]) -> None:
    model = peft.get_peft_model(
        tiny_model("qwen3_5"), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "o_proj"], **lora})
    )
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, fused=True
    )
    ours, expected = grouped(model, loraplus_lr_ratio=16.0), rates(model, theirs.param_groups)
    assert {name: lr for name, (lr, _) in ours.items()} == {name: lr for name, (lr, _) in expected.items()}
    adapters = [name for name in ours if "lora_" in name]
    assert [ours[name] for name in adapters] == [expected[name] for name in adapters], "weight decay as well"


def test_patterns_set_rates_and_leave_weight_decay_as_it_is() -> None:
    model = tiny_model("qwen3_5")
    found = grouped(model, learning_rates={r"layers\.0\..*proj": 5e-4, "embed_tokens": 0.0})
    assert found["model.embed_tokens.weight"] == (0.0, 0.1)
    norm = "model.layers.0.input_layernorm.weight"
    assert found[norm] == (1e-3, 0.0), "no decay of a norm"
    assert {found[name] for name in found if name.startswith("model.layers.0.mlp")} == {(5e-4, 0.1)}
    assert found["model.layers.1.mlp.down_proj.weight"] == (1e-3, 0.1)
    assert found.keys() == {name for name, _ in model.named_parameters()}, "none is left out"


@pytest.mark.parametrize(
    ("learning_rates", "message"),
    [
        ({"q_prj": 1.0}, r"learning_rates: 'q_prj' matches no parameter; those that train .*lora_A"),
        ({"layernorm": 1.0}, r"'layernorm' matches frozen parameters alone"),
        ({"q_proj": 1.0, "lora_B": 2.0}, r"q_proj.lora_B.default.weight is matched by 'q_proj' and by 'lora_B'"),
        ({"(": 1.0}, r"'\(' is no regular expression"),
    ],
)
def test_every_pattern_decides_for_something(learning_rates: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grouped(adapted(), learning_rates=learning_rates)


def test_a_run_says_what_is_stepped_how() -> None:
    section = TrainingSection(learning_rate=1e-3, optim="muon", learning_rates={"lora_B": 1e-2})
    lines = optimizer_lines(adapted(), section)
    assert [line.split(":")[0] for line in lines] == [
        "learning rate 0.001 (the recipe's), weight decay 0, by Muon",
        "learning rate 0.01 (lora_B), weight decay 0, by Muon",
    ]
    assert optimizer_lines(adapted(), TrainingSection()) == []


# Muon


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    settings = OptimizerSettings(muon=True)
    return parameter_groups(model, settings, learning_rate=1e-3, weight_decay=0.1)


def test_muon_steps_hidden_matrices_and_adamw_the_rest() -> None:
    model = tiny_model("qwen3_5")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group[MATRICES] for group in muon_groups(model) for p in group["params"]}
    others = {name.rpartition("layers.")[2][2:] for name, matrix in found.items() if not matrix}
    assert {name for name in found if "proj" in name and not found[name]} == set()
    assert {"linear_attn.conv1d.weight", "linear_attn.A_log", "input_layernorm.weight"} <= others
    assert not found["model.embed_tokens.weight"]
    assert not found.get("lm_head.weight", False)


def test_muon_is_torchs_own_beside_its_adamw() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))]
    ours, theirs = weights, [nn.Parameter(weight.detach().clone()) for weight in weights]
    groups = [
        {"params": ours[:1], MATRICES: True, "lr": 1e-2, "weight_decay": 0.1},
        {"params": ours[1:], MATRICES: False, "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = MuonWithAdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    muon = torch.optim.Muon(theirs[:1], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[1:], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step in range(4):
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            other.grad = weight.grad.clone()
        if step == 2:  # a schedule writes into the groups; a checkpoint replaces groups and state
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = MuonWithAdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
            optimizer.load_state_dict(saved)
            for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
                group["lr"] *= 0.5
        for each in (optimizer, muon, adamw):
            each.step()
    for weight, other in zip(ours, theirs, strict=True):
        assert torch.equal(weight, other)


def test_muon_without_a_matrix_is_refused() -> None:
    model = tiny_model("qwen3_5")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(UserError, match="muon steps weights of hidden linear layers, and none of them trains"):
        optimizer_lines(model, TrainingSection(optim="muon"))


# Runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base")


def needs(package: str) -> Any:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"needs {package}, as make test-optimizers has it"
    )


def narrow(state: Any) -> bool:
    """Whether anything in it is kept in bytes, or halves of them."""
    if isinstance(state, dict):
        return any(map(narrow, state.values()))
    return "bit" in type(state).__name__ or getattr(state, "dtype", None) is torch.uint8


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles its step, for each shape of a parameter."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "training",
    [
        {"optim": "muon", "loraplus_lr_ratio": 4.0},
        {"learning_rates": {"q_proj": 1e-3}},
        pytest.param({"optim": "adamw_8bit", "learning_rates": {"q_proj": 1e-3}}, marks=needs("bitsandbytes")),
        pytest.param({"optim": "paged_adamw_8bit"}, marks=needs("bitsandbytes")),
        pytest.param({"optim": "adamw_torch_8bit"}, marks=needs("torchao")),
        pytest.param({"optim": "adamw_torch_4bit"}, marks=needs("torchao")),
    ],
    ids=lambda training: "-".join(map(str, training.values())),
)
def test_a_run_goes_on_bit_for_bit(
    tmp_path: Path, checkpoint: Path, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "weight_decay": 0.1, **training}
    values = {
        "lora": {"r": 256, "target_modules": ["q_proj", "down_proj"]},
        "verify": {"enabled": False, "lengths": None},
    }
    whole = train(make_recipe(tmp_path, checkpoint, training=common, **values), console=QUIET)
    parts = make_recipe(tmp_path, checkpoint, training={**common, "output_dir": str(tmp_path / "parts")}, **values)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_trainer", stopping_after(2, run_module._trainer))
        train(parts, console=QUIET)
    saved = torch.load(tmp_path / "parts" / "checkpoint-2" / "optimizer.pt", weights_only=False)
    assert narrow(saved["state"]) == ("bit" in training.get("optim", ""))
    resumed = train(parts, resume=True, console=QUIET)
    losses = [[entry["loss"] for entry in result.log_history if "loss" in entry] for result in (whole, resumed)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("output", "parts"))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_the_name_of_muon_is_ours() -> None:
    assert training_arguments(TrainingSection(optim="muon", use_cpu=True)).optim == "adamw_torch"
