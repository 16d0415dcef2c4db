"""Which sizes of a sequence group a config allows."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from deltatune.errors import UserError
from deltatune.parallel.heads import check_sequence_size, sequence_sizes
from tiny import TEXT_CONFIGS, tiny_conditional

HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}


def config(model_type: str = "qwen3_5_text", **values: Any) -> Any:
    return AutoConfig.for_model(model_type, **values)


def hybrid(heads: int, kv_heads: int, value_heads: int, key_heads: int) -> Any:
    return config(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        linear_num_value_heads=value_heads,
        linear_num_key_heads=key_heads,
        **HYBRID,
    )


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        ((8, 2, 16, 16), (1, 2, 4, 8)),  # 0.8B, 2B
        ((16, 4, 32, 16), (1, 2, 4, 8, 16)),  # 4B, 9B
        ((24, 4, 48, 16), (1, 2, 4, 8)),  # 27B: 3, 6 and 12 divide its query heads, and not 4 or 16
        ((6, 2, 6, 3), (1, 6)),
        ((5, 5, 7, 7), (1,)),
    ],
)
def test_sizes_divide_what_reads_and_share_what_is_read(heads: tuple[int, int, int, int], sizes: Any) -> None:
    found = hybrid(*heads)
    assert sequence_sizes(found) == sizes
    for size in range(1, 50):
        if size in sizes:
            check_sequence_size(found, size)
        else:
            choices = ", ".join(map(str, sizes))
            with pytest.raises(UserError, match=rf"sequence={size} .*set sequence to one of {choices}$"):
                check_sequence_size(found, size)


def test_heads_of_the_delta_rule_need_not_divide_where_states_are_passed_on() -> None:
    found = hybrid(24, 4, 48, 16)
    assert sequence_sizes(found, "state") == (1, 2, 4, 8, 12, 24)
    check_sequence_size(found, 12, "state")
    with pytest.raises(UserError, match=r"sequence=16 .* 24 heads that read 4 evenly .* 1, 2, 4, 8, 12, 24$"):
        check_sequence_size(found, 16, "state")


def test_states_need_a_layer_that_has_one() -> None:
    dense = config("qwen3", num_attention_heads=12, num_key_value_heads=4, num_hidden_layers=2)
    assert sequence_sizes(dense, "state") == (1,)
    with pytest.raises(UserError, match="qwen3 has no recurrent layer whose state could be passed on; leave recurrent"):
        check_sequence_size(dense, 2, "state")


def test_attention_alone_counts_where_there_is_no_delta_rule() -> None:
    dense = config("qwen3", num_attention_heads=12, num_key_value_heads=4, num_hidden_layers=2)
    assert sequence_sizes(dense) == (1, 2, 4, 12)


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_every_family_can(family: str) -> None:
    values = {**TEXT_CONFIGS[family], "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    assert sequence_sizes(config(values.pop("model_type"), **values)) == (1, 2, 4)


def test_the_text_model_of_a_larger_one_counts() -> None:
    assert sequence_sizes(tiny_conditional().config) == (1, 2, 4)


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (config("llama"), "llama runs on attention of its own"),
        (config("qwen3", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
    ],
)
def test_what_cannot_is_named(refused: Any, reason: str) -> None:
    assert sequence_sizes(refused) == (1,)
    check_sequence_size(refused, 1)
    with pytest.raises(UserError, match=reason):
        check_sequence_size(refused, 2)
