"""The loss of a sharded head is the fused op on the gathered weight; gradients are reduced in float32."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from deltatune import Sequences, ops, parallelize, prepare
from deltatune.layers import causal_lm
from forked import free_port, run_ranks
from tiny import documents, tiny_model

RANKS, VOCAB, HIDDEN = 2, 97, 32  # an odd vocabulary
LENGTHS = [20, 12, 32]
#: whether the head is tied, adapters
HEADS: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "untied": (False, None),
    "tied": (True, None),
    "frozen": (False, {"target_modules": ["q_proj"]}),
    "trained_beside_adapters": (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "rows": (False, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}}),
}
#: by which FSDP2 scatters gradients, in one torch or another
REDUCTIONS = ("reduce_scatter_single", "reduce_scatter_tensor")
DTYPES = {"wide": None, "narrow": torch.bfloat16}


def observe(head: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What the op is called with in two steps, and what gradients are reduced in."""
    tied, lora = HEADS[head]
    model = tiny_model("qwen3_5", layers=2, vocab_size=VOCAB, tie_word_embeddings=tied)
    model.tie_weights()
    if lora is not None:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **lora))
    model.train()
    parallel = parallelize(prepare(model), shard=RANKS, param_dtype=dtype)
    calls: list[dict[str, Any]] = []
    reduced: set[torch.dtype] = set()
    fused = ops.linear_cross_entropy
    reductions = {name: getattr(dist, name) for name in REDUCTIONS if hasattr(dist, name)}

    def watched(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        part = isinstance(weight, DTensor)
        calls.append({"shape": tuple(weight.shape), "dtypes": (hidden.dtype, weight.dtype), "part": part})
        return fused(hidden, weight, *args, **kwargs)

    def noting(reduce: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            reduced.update(value.dtype for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            return reduce(*args, **kwargs)

        return noted

    ops.linear_cross_entropy = watched
    for name, reduce in reductions.items():
        setattr(dist, name, noting(reduce))
    causal_lm._chunked_loss = None  # the way of heads that are more than a weight
    try:
        for step in range(2):
            tokens = torch.cat(documents(LENGTHS, seed=10 * step + dist.get_rank()))[None]
            loss = parallel.model(input_ids=tokens, labels=tokens, sequences=Sequences.from_lengths(LENGTHS)).loss
            loss.backward()
    finally:
        ops.linear_cross_entropy = fused
        for name, reduce in reductions.items():
            setattr(dist, name, reduce)
    return {"calls": calls, "reduced": reduced, "loss": loss.dtype}


def rank_main(rank: int, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found = {(head, name): observe(head, dtype) for head in HEADS for name, dtype in DTYPES.items()}
    torch.save(found, Path(folder) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("head")
    run_ranks(rank_main, str(folder), free_port(), count=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_the_fused_op_gets_the_whole_weight(head: str, dtype: str, ranks: list[dict[tuple[str, str], Any]]) -> None:
    computed = DTYPES[dtype] or torch.float32
    for found in ranks:
        assert found[head, dtype]["calls"] == 2 * [
            {"shape": (VOCAB, HIDDEN), "dtypes": (computed, computed), "part": False}
        ]
        assert found[head, dtype]["loss"] == torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_reduced_in_float32(head: str, ranks: list[dict[tuple[str, str], Any]]) -> None:
    for found in ranks:
        assert found[head, "narrow"]["reduced"] == {torch.float32}
