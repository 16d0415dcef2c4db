"""Models in two shards: gradients are those of whole weights, in the dtypes that layers are to compute in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from deltatune import CompileOptions, Sequences, parallelize, prepare
from deltatune.errors import UserError
from deltatune.layers.gated_delta_net import GatedDeltaNet
from deltatune.ops._opaque import kernel_of
from deltatune.parallel.sequence import shard_sequence
from deltatune.parallel.state import clip_grad_norm_, gathered_state
from deltatune.training.finishing import check_finite
from forked import free_port, run_ranks
from tiny import documents, tiny_conditional, tiny_model
from tools.processes import as_rank

pytestmark = pytest.mark.slow

RANKS, STEPS, RATE = 2, 3, 0.02
TRACED = CompileOptions(backend="aot_eager")
EVERY = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
EXPERTS = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}

#: family, layers, whether the head is tied, adapters, dtype, the dtype of the policy, compile
CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "adapters": {"lora": EVERY, "tied": True, "impl": "fused"},
    "compiled_adapters": {"layers": 1, "lora": EVERY, "impl": "fused", "compile": TRACED, "checkpointing": "layer"},
    "adapters_and_head": {"lora": {**EVERY, "modules_to_save": ["lm_head"]}},
    "adapters_and_tied_embedding": {"lora": {**EVERY, "modules_to_save": ["embed_tokens"]}, "tied": True},
    "wide_adapters": {"lora": EVERY, "dtype": torch.bfloat16},
    "experts": {"family": "qwen3_moe", "lora": EXPERTS},
    "compiled": {"family": "qwen3", "tied": True, "compile": TRACED},
    "replicas": {"tied": True, "shard": 1},
    "shared_packs": {"shard": 1, "sequence": 2, "lora": EVERY},
    "shared_packs_in_shards": {"layers": 1, "tied": True, "sequence": 2, "compile": TRACED},
    "states_in_shards": {"tied": True, "sequence": 2, "recurrent": "state", "checkpointing": "layer"},
    "packs_shared_before": {"group_first": True, "lora": EVERY},
}
#: how a model with a vision tower is divided, and whether the tower trains
TOWERS: dict[str, tuple[dict[str, int], bool]] = {"replicas": ({}, True), "shards": ({"shard": RANKS}, False)}
IMAGE = 60  # the token in whose places images go


def build(
    family: str = "qwen3_5", layers: int = 2, tied: bool = False, lora: Any = None, dtype: Any = torch.float32, **_: Any
) -> Any:
    model = tiny_model(family, layers=layers, vocab_size=97, tie_word_embeddings=tied, dtype=dtype)
    if tied:
        model.tie_weights()
    if lora is not None:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
    return model.train()


def loss_of(model: nn.Module, seed: int, part: Callable[..., Any] = dict) -> torch.Tensor:
    lengths = [20, 12, 32]
    tokens = torch.cat(documents(lengths, seed=seed))[None]
    batch = {"input_ids": tokens, "labels": tokens, "sequences": Sequences.from_lengths(lengths)}
    loss: torch.Tensor = model(**part(batch), num_items_in_batch=100).loss
    return loss


def build_with_tower(*, trains: bool) -> Any:
    model = tiny_conditional(layers=1).train()
    model.config.image_token_id = IMAGE
    model.model.visual.requires_grad_(trains)
    return model


def loss_with_images(model: Any, step: int, rank: int) -> torch.Tensor:
    """Text alone, but for one image on the first rank in every second step."""
    config = model.config if hasattr(model, "config") else model.module.config
    tokens = torch.cat(documents([20, 12], seed=10 * step + rank))[None].clamp(max=IMAGE - 1)
    batch: dict[str, Any] = {"labels": tokens.clone(), "sequences": Sequences.from_lengths([20, 12])}
    if rank == 0 and step % 2:
        vision = config.vision_config
        tokens[0, 4:8] = IMAGE
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(16, width, generator=torch.Generator().manual_seed(step))
        batch |= {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
        batch["mm_token_type_ids"] = (tokens == IMAGE).long()
    loss: torch.Tensor = model(input_ids=tokens, **batch, num_items_in_batch=60).loss
    return loss


def train(model: nn.Module, step_loss: Callable[[int], torch.Tensor]) -> list[dict[str, Any]]:
    """Loss and gradients of every step of plain descent."""
    steps = []
    for step in range(STEPS):
        model.zero_grad(set_to_none=True)
        found: dict[str, Any] = {"loss": step_loss(step)}
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
                found[name.removeprefix("module.")] = grad.detach().clone()
        found["norm"] = clip_grad_norm_(model, 0.5)
        steps.append(found)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.sub_(RATE * weight.grad)
    return steps


def on_ranks(case: str) -> dict[str, Any]:
    settings = CASES[case]
    asked = {name: settings[name] for name in ("compile", "checkpointing") if name in settings}
    prepared = prepare(build(**settings), lora=settings.get("impl", "auto"), **asked)
    if dist.get_rank() == 1:
        another_draw(prepared.model)
    if settings.get("group_first", False):
        shard_sequence(prepared, dist.group.WORLD)
    axes = {name: settings[name] for name in ("sequence", "recurrent") if name in settings}
    parallel = parallelize(prepared, shard=settings.get("shard", RANKS), **axes)
    model, mesh = parallel.model, parallel.mesh

    def step_loss(step: int) -> torch.Tensor:
        loss = loss_of(model, 10 * step + mesh.data_rank, parallel.part) * mesh.size
        loss.backward()
        dist.all_reduce(loss := loss.detach())
        return loss / RANKS

    with fused_products() as calls:
        steps = train(model, step_loss)
    report = prepared.compile_report
    return {
        "steps": steps,
        "report": None if report is None else report.to_dict(),
        "sharded": all(isinstance(weight, DTensor) for weight in model.parameters() if weight.requires_grad),
        "fused": len(calls) > 0,
        "sends_buffers": getattr(model, "broadcast_buffers", False),
        "searches": getattr(model, "find_unused_parameters", False),
        "packs": mesh.sum_over_data(torch.ones(1)),
        "saved": gathered_state(model) if settings.get("shard") != 1 else {},
    }


@contextlib.contextmanager
def fused_products() -> Iterator[list[None]]:
    """An entry for each product of a base and its adapters, those inside graphs too."""
    calls: list[None] = []

    def accumulate(narrow: torch.Tensor, up: torch.Tensor, inputs: Any, weights: Any) -> torch.Tensor:
        calls.append(None)
        return narrow @ up + sum(x @ weight for x, weight in zip(inputs, weights, strict=True))

    with torch.library._scoped_library("deltatune", "IMPL") as library:
        library.impl("lora_accumulate", accumulate, "CPU")
        library.impl(kernel_of(torch.ops.deltatune.lora_accumulate.default).name(), accumulate, "CPU")
        yield calls


def another_draw(model: nn.Module) -> None:
    """As adapters of a process with another seed."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(1.0)


def images_of_one_rank(rank: int, case: str) -> dict[str, Any]:
    sizes, trains = TOWERS[case]
    parallel = parallelize(prepare(build_with_tower(trains=trains)), **sizes)

    def step_loss(step: int) -> torch.Tensor:
        loss = loss_with_images(parallel.model, step, rank) * RANKS
        loss.backward()
        return parallel.mesh.sum_over_ranks(loss.detach()) / RANKS

    searches = getattr(parallel.model, "find_unused_parameters", False)
    return {"steps": train(parallel.model, step_loss), "searches": searches}


def narrowed(tied: bool) -> dict[str, Any]:
    """What a float32 model that computes in bfloat16 sees inside a layer, and what comes out."""
    model = build(tied=tied)
    seen: dict[str, torch.dtype] = {}
    prepared = prepare(model)

    def look(layer: Any, _: Any, kwargs: dict[str, Any]) -> None:
        seen.update({name: getattr(layer, name).dtype for name in ("A_log", "dt_bias")})
        seen["projection"], seen["hidden"] = layer.out_proj.weight.dtype, kwargs["hidden_states"].dtype

    layer = next(module for module in model.modules() if isinstance(module, GatedDeltaNet))
    layer.register_forward_pre_hook(look, with_kwargs=True)
    parallel = parallelize(prepared, shard=RANKS, param_dtype=torch.bfloat16)
    loss = loss_of(parallel.model, 0)
    loss.backward()
    grads = {weight.grad.dtype for weight in model.parameters() if weight.grad is not None}
    return {"seen": seen, "loss": loss.dtype, "value": float(loss), "grads": grads}


def refusals() -> dict[str, str]:
    mixed = build(dtype=torch.bfloat16)
    mixed.model.layers[0].input_layernorm.float()
    whole = CompileOptions(scope="model")
    twice = prepare(build())
    parallelize(twice, shard=RANKS)
    attempts: dict[str, Callable[[], object]] = {
        "mixed": lambda: parallelize(prepare(mixed), shard=RANKS),
        "whole": lambda: parallelize(prepare(build(), compile=whole), shard=RANKS),
        "twice": lambda: parallelize(twice, shard=RANKS),
        "sizes": lambda: parallelize(prepare(build()), replicate=2, shard=2),
        "sequence": lambda: parallelize(prepare(build()), sequence=3),
        "tower": lambda: parallelize(prepare(build_with_tower(trains=True)), shard=RANKS),
        "heads": lambda: parallelize(prepare(tiny_model("qwen3", num_attention_heads=3)), sequence=2),
    }
    return {name: refusal(attempt) for name, attempt in attempts.items()}


def refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "done"


def nan_of_one_rank(rank: int) -> str:
    """What a run says that finds it before it saves."""
    parallel = parallelize(prepare(build()), shard=RANKS)
    if rank == 1:
        with torch.no_grad():
            parallel.prepared.model.get_parameter("model.norm.weight").to_local().fill_(torch.nan)
    try:
        check_finite(parallel.prepared.model, parallel.mesh)
    except UserError as error:
        return str(error)
    return "done"


def rank_main(rank: int, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found = {case: on_ranks(case) for case in CASES}
    found["narrowed"] = {tied: narrowed(tied) for tied in (True, False)}
    found["images"] = {case: images_of_one_rank(rank, case) for case in TOWERS}
    found["refusals"] = refusals()
    found["nan"] = nan_of_one_rank(rank)
    torch.save(found, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(rank_main, str(folder), free_port(), count=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_shards_train_as_whole_weights_do(case: str, ranks: list[dict[str, Any]]) -> None:
    model = build(**CASES[case])
    prepare(model)

    data_ranks = 1 if "group_first" in CASES[case] else RANKS // CASES[case].get("sequence", 1)

    def step_loss(step: int) -> torch.Tensor:
        loss = sum((loss_of(model, 10 * step + rank) for rank in range(data_ranks)), torch.zeros(()))
        loss.backward()
        return loss.detach()

    for found in ranks:
        assert found[case]["sharded"] == (CASES[case].get("shard") != 1)
        assert not found[case]["sends_buffers"]
        assert not found[case]["searches"], "each weight is used in every call"
        assert found[case]["packs"] == data_ranks
    assert_same(ranks[0][case]["steps"], train(model, step_loss))
    assert [step["norm"] for step in ranks[0][case]["steps"]] == [step["norm"] for step in ranks[1][case]["steps"]]


@pytest.mark.parametrize("case", TOWERS)
def test_images_of_one_rank_train_as_in_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    trains = TOWERS[case][1]
    model = build_with_tower(trains=trains)
    prepare(model)

    def step_loss(step: int) -> torch.Tensor:
        loss = sum((loss_with_images(model, step, rank) for rank in range(RANKS)), torch.zeros(()))
        loss.backward()
        return loss.detach()

    expected = train(model, step_loss)
    assert [any("visual" in name for name in step) for step in expected] == [False, trains, False]
    for found in ranks:
        assert_same(found["images"][case]["steps"], expected)
        assert found["images"][case]["searches"] == trains


def assert_same(steps: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (ours[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("shard") != 1])
def test_rank_0_gathers_every_name_and_tied_ones_once(case: str, ranks: list[dict[str, Any]]) -> None:
    model = build(**CASES[case])
    first, second = (found[case]["saved"] for found in ranks)
    assert second == {}
    assert {name: value.shape for name, value in first.items()} == {n: v.shape for n, v in model.state_dict().items()}
    if case == "tied":
        assert first["lm_head.weight"] is first["model.embed_tokens.weight"]


@pytest.mark.parametrize("case", [case for case in CASES if "lora" in CASES[case]])
def test_adapters_in_shards_are_part_of_the_products(case: str, ranks: list[dict[str, Any]]) -> None:
    # auto keeps them apart on a CPU
    assert {found[case]["fused"] for found in ranks} == {CASES[case].get("impl") == "fused"}


@pytest.mark.parametrize("case", [case for case in CASES if "compile" in CASES[case]])
def test_one_graph_a_layer_type(case: str, ranks: list[dict[str, Any]]) -> None:
    report = ranks[0][case]["report"]
    assert set(report["graphs"].values()) == {1}
    assert report["breaks"] == report["recompiles"] == []


@pytest.mark.parametrize("tied", [True, False])
def test_decay_stays_float32_where_layers_compute_in_bfloat16(tied: bool, ranks: list[dict[str, Any]]) -> None:
    found = ranks[0]["narrowed"][tied]
    assert found["seen"] == {
        "A_log": torch.float32, "dt_bias": torch.float32, "projection": torch.bfloat16, "hidden": torch.bfloat16,
    }  # fmt: skip
    assert found["loss"] == torch.float32
    assert found["grads"] == {torch.float32}
    assert found["value"] == pytest.approx(float(loss_of(prepare(build(tied=tied)).model, 0)), rel=1e-2)
    assert torch.tensor(found["value"]).bfloat16().item() != found["value"], "the loss is no bfloat16 number"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mixed", "weights that train together have one dtype when they are sharded, got "),
        ("whole", "compile scope 'model' puts all layers into one graph"),
        ("twice", "the model is sharded already"),
        ("sizes", "replicate: 2 times shard: 2 is 4, and 2 processes run"),
        ("sequence", "sequence: 3 does not divide 2 processes; choose one of 1, 2"),
        ("tower", "model.visual.patch_embed.proj.weight trains outside of the text model and the head, where a rank"),
        ("heads", "sequence=2 does not divide 3 heads that read"),
    ],
)
def test_what_cannot_be_sharded_is_refused(what: str, message: str, ranks: list[dict[str, Any]]) -> None:
    assert message in ranks[0]["refusals"][what]


def test_a_group_of_ranks_that_are_no_neighbours_is_refused() -> None:
    with as_rank(0, 4):
        prepared = prepare(build(layers=1))
        shard_sequence(prepared, dist.new_group([0, 2]))
        with pytest.raises(ValueError, match=r"group of ranks \[0, 2\], and .* neighbours; give sequence=2 in place"):
            parallelize(prepared, shard=4)


def test_every_rank_refuses_to_save_what_one_finds(ranks: list[dict[str, Any]]) -> None:
    assert all("some trained weights are not finite" in found["nan"] for found in ranks)


def test_several_processes_must_have_met() -> None:
    with pytest.raises(ValueError, match=r"init_process_group"):
        parallelize(prepare(build()), shard=2)
