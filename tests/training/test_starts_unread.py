"""Adapters of a model whose weights are still to be read begin as those of one that is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import peft
import pytest
import torch
from training_cases import byte_tokenizer, make_recipe, save_checkpoint
from transformers import set_seed

from deltatune.config.rules import start_errors
from deltatune.config.schema import LoraSection
from deltatune.parallel.filling import tensors_of
from deltatune.training import loading
from deltatune.training.adapters import adapt
from deltatune.training.checkpoint import load_config
from tiny import tiny_model


def offered() -> list[Any]:
    """All starts that the installed PEFT names and recipes take."""
    literal = next(t for t in get_args(get_type_hints(peft.LoraConfig)["init_lora_weights"]) if get_args(t))
    named = [re.sub(r"\[.*\]", "4", name) for name in get_args(literal)]
    return [start for start in (True, False, *named) if not [*start_errors(LoraSection(init_lora_weights=start))]]


@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
@pytest.mark.parametrize("start", offered())
def test_a_start_that_reads_weights_has_them(
    start: Any, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that nobody has named: ``new``."""
    if not known:
        monkeypatch.setattr(loading, "reads_base", lambda _: False)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", tiny_model("qwen3_5", vocab_size=len(byte_tokenizer())))
    lora = {"r": 4, "target_modules": ["q_proj", "out_proj"], "init_lora_weights": start}
    recipe = make_recipe(tmp_path, checkpoint, lora=lora)
    found = []
    for load in (loading._whole, loading._source):
        set_seed(5)
        found.append(load(recipe, load_config(recipe.model)))
    expected = tensors_of(found[0].model)
    given = {name: tensor for names, tensor in found[1].pieces for name in names}
    assert given.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(given[name], tensor)] == []
    reads = start not in (True, False, "gaussian", "orthogonal")
    assert bool(found[1].said) == reads
    if known:
        (*lines,) = loading.host_lines(recipe, found[0].model)
        assert lines == [*found[1].said]


@pytest.mark.parametrize("start", offered())
def test_what_trains_is_known_without_weights(start: Any) -> None:
    """MiCA, say, trains one factor of two."""
    section = LoraSection(r=4, target_modules=("q_proj",), init_lora_weights=start)
    there = adapt(tiny_model("qwen3"), section)
    with torch.device("meta"):
        empty = tiny_model("qwen3")
    described = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        for model in (there, adapt(empty, section))
    ]
    assert described[0] == described[1]
