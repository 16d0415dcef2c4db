"""What a checkpoint's config.json says of few bits, held against a recipe, before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from deltatune.config.schema import ModelSection, Recipe
from deltatune.errors import UserError
from deltatune.quantization.released import released, settings_of
from deltatune.training.preflight import preflight
from deltatune.training.quantized_base import quantized_base
from released_checkpoints import FP8, MIXED, MODELOPT, MXFP4, NVFP4

BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}

KNOWN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "fp8": (FP8, ("fp8",)),
    "gpt-oss": ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, ("mxfp4",)),
    "compressed nvfp4": (NVFP4, ("nvfp4",)),
    "compressed mxfp4": (MXFP4, ("mxfp4",)),
    "modelopt": (MODELOPT, ("nvfp4",)),
    "modelopt, in a section of its own": (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}},
        ("nvfp4",),
    ),
    "modelopt, mixed": (MIXED, ("nvfp4", "fp8")),
    "bitsandbytes": (BITSANDBYTES, ()),
}

UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, which is not read here; take its checkpoint in"),
    "awq": ({"quant_method": "awq", "bits": 4}, "quantised by awq, which is not read here; take its checkpoint in"),
    "other blocks": ({"quant_method": "fp8", "weight_block_size": [1, 32]}, "blocks of [1, 32], and those of 128x128"),
    "blocks of a number": ({"quant_method": "fp8", "weight_block_size": 128}, "blocks of 128, and those of 128x128"),
    "no blocks": ({"quant_method": "fp8", "weight_block_size": None}, "blocks of None, and those of 128x128"),
    "int8": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "format int-quantized"),
    "int4": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format pack-quantized"),
    "modelopt int4": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "ModelOpt weights are in W4A16_AWQ"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_programs_write_is_known(name: str) -> None:
    settings, formats = KNOWN[name]
    found = released(settings)
    assert found is not None
    assert found.formats == formats
    assert found.is_read_here == (name != "bitsandbytes")
    assert settings_of({"quantization_config": settings}) == settings_of(
        {"text_config": {"quantization_config": settings}}
    )


def check(folder: Path, settings: dict[str, Any] | None, **sections: Any) -> None:
    """What ``plan`` and ``train`` look up first, of a checkpoint without weights."""
    model = folder / "model"
    model.mkdir()
    config = {"model_type": "qwen3"} | ({} if settings is None else {"quantization_config": settings})
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    (folder / "rows.jsonl").write_text('{"text": "one"}\n')
    given: dict[str, Any] = {
        "data": {"train": [{"path": str(folder / "rows.jsonl")}]},
        "lora": {},
        "training": {"output_dir": str(folder / "output"), "use_cpu": True},
        **sections,
    }
    given["model"] = {"name_or_path": str(model), **given.get("model", {})}
    preflight(Recipe.model_validate({name: value for name, value in given.items() if value is not None}))


def test_checkpoints_of_bitsandbytes_stay_with_transformers() -> None:
    for quantization in (None, {}):
        section = ModelSection.model_validate({"name_or_path": "m", "quantization": quantization})
        assert quantized_base(section, Qwen3Config(quantization_config=BITSANDBYTES)) is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_read_is_refused_with_what_is(name: str, tmp_path: Path) -> None:
    settings, said = UNKNOWN[name]
    with pytest.raises(UserError) as error:
        check(tmp_path, settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


#: settings of the checkpoint, of the recipe, and what is said; None where it may be
PAIRS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, str | None]] = {
    "nothing of nothing": (None, None, None),
    "nf4 of 16 bits": (None, {"type": "nf4"}, None),
    "blocks of 16 bits": (None, {"type": "fp8", "blocks": True}, None),
    "auto of 16 bits": (None, {}, "type: auto: the checkpoint is in 16 or 32 bits; set nf4 or fp8"),
    "mxfp4 of 16 bits": (None, {"type": "mxfp4"}, "mxfp4: the checkpoint is in 16 or 32 bits, of which nf4 and fp8"),
    "auto of fp8": (FP8, {}, None),
    "fp8 of fp8": (FP8, {"type": "fp8"}, None),
    "nothing of fp8": (FP8, None, None),
    "blocks of fp8": (FP8, {"type": "fp8", "blocks": True}, "quantization.blocks cannot act"),
    "nf4 of fp8": (FP8, {"type": "nf4"}, "type: nf4: the checkpoint is in fp8 already, by fp8; set auto"),
    "mxfp4 of nvfp4": (NVFP4, {"type": "mxfp4"}, "the checkpoint is in nvfp4 already, by compressed-tensors"),
    "nvfp4 of mixed": (MIXED, {"type": "nvfp4"}, None),
    "fp8 products of fp8": (FP8, {"type": "fp8", "compute": "fp8"}, None),
    "fp8 products of auto": (FP8, {"compute": "fp8"}, None),
    "fp8 products of nvfp4": (NVFP4, {"compute": "fp8"}, "and the checkpoint is in nvfp4, by compressed-tensors"),
    "fp8 products of mixed": (MIXED, {"compute": "fp8"}, "and the checkpoint is in nvfp4 and fp8, by modelopt; leave"),
    "fp8 products of bitsandbytes": (BITSANDBYTES, {"compute": "fp8"}, "the checkpoint is in bits of its own, by"),
    "fp8 products of 16 bits": (None, {"type": "fp8", "compute": "fp8"}, None),
    "auto of bitsandbytes": (BITSANDBYTES, {}, None),
    "nothing of bitsandbytes": (BITSANDBYTES, None, None),
    "nf4 of bitsandbytes": (BITSANDBYTES, {"type": "nf4"}, "already, by bitsandbytes; set auto"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_type_is_what_the_checkpoint_holds_or_can_be_made_of_it(name: str, tmp_path: Path) -> None:
    settings, given, said = PAIRS[name]
    model = {} if given is None else {"model": {"quantization": given}}
    if said is None:
        check(tmp_path, settings, **model)
        return
    with pytest.raises(UserError) as error:
        check(tmp_path, settings, **model)
    assert said in str(error.value)


#: sections of a recipe that has no word of quantisation
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "all weights": ({"lora": None}, "is in fp8: model.quantization: weights in few bits are frozen"),
    "dora": ({"lora": {"use_dora": True}}, "is in fp8: lora.use_dora"),
    "pissa": ({"lora": {"init_lora_weights": "pissa"}}, "is in fp8: lora.init_lora_weights: pissa"),
    "shards": ({"parallel": {"shard": 2}}, "is in fp8: parallel.shard: 2: model.quantization"),
    "experts": ({"parallel": {"expert": 2}}, "is in fp8: parallel.expert: 2: model.quantization"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_act_on_few_bits_is_refused_where_the_checkpoint_has_them(name: str, tmp_path: Path) -> None:
    sections, said = REFUSED[name]
    with pytest.raises(UserError) as error:
        check(tmp_path, FP8, **sections)
    assert said in str(error.value)
