"""Counts, clocks and FLOPs."""

from __future__ import annotations

import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from deltatune import prepare
from deltatune.config.schema import LoraSection
from deltatune.parallel.mesh import Mesh
from deltatune.training.adapters import adapt
from deltatune.training.batches import PackCounts
from deltatune.training.metrics import Meter, StepFlops, peak_flops
from deltatune.training.progress import format_metrics
from deltatune.training.waiting import waiting_share
from tiny import tiny_model

CPU = torch.device("cpu")


def meter(**options: object) -> Meter:
    return Meter(tiny_model("qwen3", layers=1), device=CPU, dtype=torch.float32, **options)


def test_evaluation_and_checkpoints_are_not_training_time() -> None:
    running = meter()
    running.on_train_begin()
    running.add(PackCounts(trained=10, tokens=50, capacity=100, squares=1, packs=1))
    with running.paused():
        time.sleep(0.3)
    running.on_step_end()
    window = running.window()
    assert window["tokens_per_second"] > 50 / 0.2
    assert window["trained_tokens_per_second"] == pytest.approx(window["tokens_per_second"] / 5, rel=1e-3)
    assert window["fill"] == 0.5


def test_a_window_ends_where_the_next_begins_and_the_summary_holds_both() -> None:
    running = meter(recompiles=lambda: 3)
    running.on_train_begin()
    for tokens in (10, 30):
        running.add(PackCounts(trained=1, tokens=tokens, capacity=40, packs=1))
        running.on_step_end()
        assert running.window()["fill"] == tokens / 40
    summary = running.summary()
    assert (summary["tokens"], summary["steps"], summary["fill"]) == (40, 2, 0.5)
    assert summary["recompiles"] == 3
    assert "steady_tokens_per_second" not in summary, "two steps are all warm-up"


def test_the_steady_rate_leaves_the_warm_up_out() -> None:
    running = meter()
    running.on_train_begin()
    for step in range(4):
        time.sleep(0.2 if step < 2 else 0.01)
        running.add(PackCounts(trained=1, tokens=10, capacity=10, packs=1))
        running.on_step_end()
    summary = running.summary()
    assert summary["steady_tokens_per_second"] > 2 * summary["tokens_per_second"]


def test_counts_of_ranks_are_summed() -> None:
    class TwoAlike(Mesh):
        def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

    running = meter(mesh=TwoAlike(2, 0))
    running.on_train_begin()
    running.add(PackCounts(trained=3, tokens=5, capacity=8, packs=1))
    running.on_step_end()
    assert running.summary()["tokens"] == 10


def test_memory_and_waiting_are_of_all_ranks() -> None:
    class BesideASlowerOne(Mesh):
        """Rank 1 holds 2 GiB more than all this one does, and is 0.1 s slower."""

        def sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
            if value.ndim == 2:
                value[1] = value[0] + torch.tensor([2.0**31, *([0.1] * (value.shape[1] - 1))])
            return value

    running = meter(mesh=BesideASlowerOne(2, 0))
    running.on_train_begin()
    for _ in range(2):
        running.add(PackCounts(trained=3, tokens=5, capacity=8, packs=1))
        with running.forward():
            time.sleep(0.1)
        running.on_step_end()
    window = running.window()
    assert window["peak_memory_sum_gib"] == pytest.approx(2 * window["peak_memory_gib"] - 2, abs=0.002)
    assert window["waiting_share"] == pytest.approx(0.25, abs=0.1), "one of two waits for half of a step"
    assert "waiting_share" not in running.window(), "no step since"


def test_one_process_waits_for_nobody() -> None:
    running = meter()
    running.add(PackCounts(trained=3, tokens=5, capacity=8, packs=1))
    with running.forward():
        pass
    running.on_step_end()
    assert not {"waiting_share", "peak_memory_sum_gib"} & set(running.window())


def test_the_share_of_waiting_is_over_steps() -> None:
    assert waiting_share([[1.0, 3.0], [3.0, 1.0]]) == pytest.approx(1 / 3), "each step waits for its own slowest"
    assert waiting_share([[], []]) is None


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_matrices_are_those_of_the_counter(adapters: bool, tied: bool) -> None:
    model = tiny_model("qwen3", layers=2, tie_word_embeddings=tied)
    if adapters:
        model = adapt(model, LoraSection(r=4))
        # the first layer's inputs need no gradient when the embedding is frozen; ours always do
        model.enable_input_require_grads()
    tokens = 64
    ids = torch.randint(1, 90, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    matrices = sum(
        counts
        for op, counts in counter.get_flop_counts()["Global"].items()
        if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    assert StepFlops.of(prepare(model).model).per_token * tokens == pytest.approx(matrices, rel=0.03)


def test_flops_of_documents_grow_with_their_squared_length() -> None:
    flops = StepFlops.of(prepare(tiny_model("qwen3_5", layers=4)).model)
    short = flops(PackCounts(tokens=100, squares=10 * 10**2))
    long = flops(PackCounts(tokens=100, squares=100**2))
    assert long - short == pytest.approx(6 * 4 * 16 * 2 * (100**2 - 10 * 10**2)), "two full-attention layers, 4 x 16"


def test_routed_experts_count_by_the_share_a_token_visits() -> None:
    few = StepFlops.of(prepare(tiny_model("qwen3_moe", num_experts_per_tok=1)).model).per_token
    more = StepFlops.of(prepare(tiny_model("qwen3_moe", num_experts_per_tok=2)).model).per_token
    # gate, up and down of one more expert in two layers, forward and twice backward
    assert more - few == 6 * 2 * 3 * 24 * 32


def test_no_peak_is_claimed_for_a_cpu() -> None:
    assert peak_flops(CPU, torch.bfloat16) is None
    assert "mfu" not in meter().summary()


def test_a_log_entry_on_one_line() -> None:
    logs = {"loss": 1.5, "tokens_per_second": 12345.6, "fill": 0.987, "epoch": 1.0}
    assert format_metrics(logs) == "loss 1.5000 · tok/s 12,346 · fill 98.7%"


def test_adapters_of_experts_count_with_the_share_that_a_token_visits() -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = tiny_model("qwen3_moe").requires_grad_(False)
    before = StepFlops.of(prepare(model).model).per_token
    adapted = get_peft_model(model, LoraConfig(r=4, target_parameters=names, target_modules=[]))
    factors = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    prepare(adapted)
    # 2 of 4 experts; forward, the input's gradient and their own
    assert StepFlops.of(adapted).per_token - before == 6 * factors * 0.5
