"""The pinned baselines on the CPU, where the same stock functions run document by document."""

import importlib.util

import pytest
import torch

from deltatune.bench.baselines import _unchanged_file, leak_free, liger_patched, reference, shipped
from deltatune.bench.shapes import SHAPES, build_model
from deltatune.bench.workload import Batch, Workload

CPU = torch.device("cpu")
LENGTHS = (9, 3, 21, 1, 14)


@pytest.fixture(scope="module")
def base():
    return build_model(SHAPES["tiny"], CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Workload(LENGTHS, SHAPES["tiny"].config().vocab_size).batch(0)


def hidden(model, batch: Batch):
    names = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return model.model(**{name: batch.tensors[name] for name in names}, use_cache=False).last_hidden_state[0]


def test_leak_free_is_every_document_alone_through_the_stock_model(base, batch) -> None:
    packed, stock, start = hidden(leak_free(base), batch), reference(base), 0
    for document, length in enumerate(LENGTHS):
        ids = batch.alone(document).tensors["input_ids"]
        alone = stock.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(packed[start : start + length], alone, rtol=1e-4, atol=1e-5)
        start += length


def test_shipped_sees_the_document_before(base, batch) -> None:
    ours, theirs = hidden(leak_free(base), batch), hidden(shipped(base), batch)
    torch.testing.assert_close(theirs[:9], ours[:9])
    assert float((theirs[9:12] - ours[9:12]).abs().max()) > 0.01


def test_the_stock_model_and_its_file_are_untouched(base, batch) -> None:
    before = {module: type(module) for module in base.modules()}
    hidden(leak_free(base), batch)
    hidden(shipped(base), batch)
    assert {module: type(module) for module in base.modules()} == before
    assert base.config._attn_implementation != "deltatune_bench_varlen"


def test_checkpointing_changes_no_gradient(base, batch) -> None:
    grads = []
    for checkpointed in (False, True):
        model = leak_free(base).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = hidden(model, batch).square().sum()
        grads.append(torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0])
    torch.testing.assert_close(*grads)


def test_a_patch_of_the_models_file_does_not_outlive_its_model(base) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as file

    stock = file.Qwen3_5MLP
    with _unchanged_file(type(base)):
        file.Qwen3_5MLP = object  # type: ignore[misc,assignment]
    assert file.Qwen3_5MLP is stock


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="needs Liger to be missing")
def test_without_liger_its_baseline_says_so(base) -> None:
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        liger_patched(base)
