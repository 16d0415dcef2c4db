"""The arithmetic floor: which products and stages a step needs, counted by hand."""

import pytest
import torch

from deltatune.bench.floor import arithmetic_floor, first_trained_layer, products
from deltatune.bench.models import copy_of, with_lora
from deltatune.bench.shapes import SHAPES, build_model
from deltatune.bench.stages import elementwise_stages
from deltatune.packing.sequences import Sequences
from deltatune.training.flops import StepFlops

CPU = torch.device("cpu")
TOKENS = 64


def adapted(targets: str, layers: int = 8):
    base = build_model(SHAPES["tiny"], CPU, layers=layers, dtype=torch.float32)
    return with_lora(copy_of(base), targets, rank=4, alpha=8)


def counts(model) -> dict[str, int]:
    found: dict[str, int] = {}
    for product in products(model, TOKENS):
        found[product.name] = found.get(product.name, 0) + product.count
    return found


def test_products_of_adapters_on_attention() -> None:
    # 8 layers, attention in 3 and 7: projections 5 + 3 (delta rule) or 4 + 3 (attention) a layer
    found = counts(adapted("qkvo"))
    assert found["base forward"] == 6 * 8 + 2 * 7
    # of layer 3 o and the MLP, and all of 4 to 7
    assert found["base input gradient"] == 4 + 3 * 8 + 7
    assert found["adapter forward"] == 2 * 2 * 4
    assert found["adapter gradients"] == 3 * 2 * 4
    assert found["adapter input gradient"] == 1 + 4


def test_adapters_everywhere_need_every_gradient_but_the_first_one() -> None:
    model = adapted("all")
    assert first_trained_layer(model) == 0
    found = counts(model)
    assert found["base forward"] - found["base input gradient"] == 4


def test_products_are_the_model_flops_of_the_same_step() -> None:
    model = adapted("all")
    flops = sum(product.count * product.flops for product in products(model, TOKENS))
    # 6 layers of the delta rule with 4 value heads of 32 x 32
    matrices = StepFlops.of(model).per_token - 18.0 * 6 * 4 * 32 * 32
    saved = sum(
        2 * module.weight.numel()
        for name, module in model.get_base_model().model.layers[0].linear_attn.named_modules()
        if name.startswith("in_proj") and name.endswith(("base_layer", "lora_A.default"))
    )
    assert flops == pytest.approx((matrices - saved) * TOKENS)


def test_the_head_is_counted_in_chunks_of_whole_size() -> None:
    head = [product for product in products(adapted("qkvo"), 8192) if product.name.startswith("head")]
    assert [(p.m, p.count) for p in head] == [(4096, 2), (4096, 2)]


def test_stages_before_the_first_trained_layer_have_no_backward() -> None:
    config = SHAPES["tiny"].config(8)
    stages = {stage.name: stage for stage in elementwise_stages(config, first_trained=3)}
    assert (stages["gated norm"].forward_count, stages["gated norm"].backward_count) == (6, 3)
    assert (stages["output gate"].forward_count, stages["output gate"].backward_count) == (2, 2)
    # 15 norms before mixers and MLPs beside the first; 4 of layers 4 to 7 before mixers, 5 before MLPs
    assert (stages["residual + norm"].forward_count, stages["residual + norm"].backward_count) == (15, 9)


def test_bytes_of_a_stage() -> None:
    config = SHAPES["qwen3.5-2b"].config()
    stages = {stage.name: stage for stage in elementwise_stages(config, first_trained=3)}
    conv = stages["convolution + SiLU + l2norm"]
    assert (conv.forward, conv.backward) == (2 * 6144 * 2, 3 * 6144 * 2)
    assert stages["SwiGLU"].forward == 3 * 6144 * 2
    assert stages["norm + RoPE of q and k"].forward == 2 * (8 + 2) * 256 * 2


def test_a_dense_model_has_neither_delta_rule_nor_output_gate() -> None:
    names = {stage.name for stage in elementwise_stages(SHAPES["qwen3-8b"].config(2), first_trained=0)}
    assert "norm + RoPE of q and k" in names
    assert not names & {"output gate", "gated norm", "convolution + SiLU + l2norm"}


def test_the_floor_is_the_sum_of_its_parts() -> None:
    floor = arithmetic_floor(adapted("qkvo", layers=4), Sequences.from_lengths([40, 24]), dtype=torch.float32)
    assert floor is not None
    assert floor.first_trained_layer == 3
    assert floor.total_ms == pytest.approx(sum(floor.groups.values()))
    assert {"GEMM", "delta rule", "attention", "convolution", "optimizer"} <= set(floor.groups)
    assert all(part.ms > 0 for part in floor.parts if part.count)
    plain = floor.to_dict()
    assert plain["total_ms"] == floor.total_ms
    assert plain["products_in_turn_ms"] > 0
    assert len(plain["parts"]) == len(floor.parts)
