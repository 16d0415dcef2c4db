import numpy as np
import pytest

from deltatune.data.chat import Renderer
from deltatune.data.documents import tokenize
from deltatune.data.held_out import held_out
from deltatune.data.messages import Layout
from deltatune.data.sources import load_rows
from deltatune.errors import DataError


@pytest.fixture
def documents(tokenizer, write_jsonl):
    def build(texts, name="rows.jsonl"):
        source = load_rows(str(write_jsonl([{"text": text} for text in texts], name)))
        return tokenize(source, Layout("text"), Renderer(tokenizer))

    return build


def chosen(documents, size):
    """The texts that are held out, by row."""
    (mask,) = held_out([documents], size)
    return {int(row) for row in documents.rows[mask]}


def test_a_share_of_the_rows_is_held_out(documents):
    found = len(chosen(documents([f"fox {i}" for i in range(2000)]), 0.1))
    assert 150 < found < 250  # 200, and a standard deviation of 13


def test_rows_stay_on_their_side_when_others_come_and_move(documents):
    texts = [f"fox {i}" for i in range(400)]
    before = {texts[row] for row in chosen(documents(texts), 0.2)}
    more = [f"dog {i}" for i in range(300)] + texts[::-1]
    after = {more[row] for row in chosen(documents(more, "more.jsonl"), 0.2)}
    assert {text for text in after if text.startswith("fox")} == before


def test_equal_rows_are_on_one_side(documents):
    texts = [f"fox {i % 50}" for i in range(200)]
    sides = chosen(documents(texts), 0.3)
    assert all((row in sides) == (row % 50 in sides) for row in range(200))


def test_a_number_of_rows_is_held_out(documents):
    assert len(chosen(documents([f"fox {i}" for i in range(100)]), 7)) == 7
    assert len(chosen(documents([f"fox {i % 50}" for i in range(100)], "twice.jsonl"), 7)) == 14


def test_sources_share_one_measure(documents):
    first, second = documents(["same", *(f"a {i}" for i in range(40))]), documents(["same"], "second.jsonl")
    for size in (0.2, 0.5, 0.8):
        one, other = held_out([first, second], size)
        assert one[0] == other[0]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1e-6, r"data\.val_size=1e-06 of 9 different rows holds out none; raise it"),
        (9, r"data\.val_size=9 of 9 different rows leaves none to train on; lower it"),
        (0.999999, r"leaves none to train on"),
    ],
)
def test_a_size_that_leaves_one_side_empty_is_an_error(documents, size, message):
    with pytest.raises(DataError, match=message):
        held_out([documents([f"fox {i}" for i in range(9)])], size)


def test_digests_are_spread_evenly(documents):
    contents = documents([f"fox {i}" for i in range(1000)]).contents / 2**64
    assert abs(np.mean(contents) - 0.5) < 0.05
