import re

import numpy as np
import pytest

from deltatune.data.chat import Renderer
from deltatune.data.messages import Layout
from deltatune.data.preview import preview
from deltatune.packing.sample import Sample


@pytest.fixture
def sample(tokenizer, conversation):
    return Renderer(tokenizer).render({"messages": conversation}, Layout("chat"), "row")[0]


def test_markers_stand_around_what_trains(sample, tokenizer):
    text = preview(sample, tokenizer, color=False)
    assert "assistant\n«Four, of course!\n<|im_end|>»\n<|im_start|>user" in text
    assert text.endswith("assistant\n«Paris<|im_end|>»\n")
    assert text.count("«") == 2


def test_colours_stand_for_markers(sample, tokenizer):
    text = preview(sample, tokenizer)
    assert "\x1b[1;32mParis<|im_end|>\x1b[0m" in text
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == tokenizer.decode(sample.input_ids)


def test_the_first_token_never_trains(tokenizer):
    ids = np.array(tokenizer("fox jumps")["input_ids"])
    first = tokenizer.decode(ids[:1])
    assert preview(Sample(ids, ids), tokenizer, color=False).startswith(f"{first}«")


def test_characters_of_several_tokens_stay_whole(tokenizer):
    ids = np.array(tokenizer("a🙂")["input_ids"])
    assert preview(Sample(ids, ids), tokenizer, color=False) == "a«🙂»"


def test_control_characters_of_a_row_reach_no_terminal(tokenizer):
    ids = np.array(tokenizer("a\x1b[31mb\tc\r\nd")["input_ids"])
    text = preview(Sample(ids, ids), tokenizer)
    assert re.sub(r"\x1b\[(?:1;32|2|0)m", "", text) == "a\\x1b[31mb\tc\\r\nd"
