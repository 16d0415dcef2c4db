import pytest

from deltatune.data.formats import Layout
from deltatune.data.tokens import read_tokens
from deltatune.errors import DataError

TOKENS = Layout("tokens")


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7], [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, [5, 6, 7], [-100, -100, 7]),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, [5, 6, 7], [-100, 6, 7]),
        ({"input_ids": [5, 6, 7], "assistant_masks": [1, 1, 0]}, [5, 6, 7], [5, 6, -100]),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}, [5, 6, 7],
         [-100, 6, -100]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "completion_mask": [0, 0, 1]}, [5, 6, 7], [-100, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": None, "attention_mask": [1, 1, 1]}, [5, 6, 7], [5, 6, 7]),
        ({"input_ids": [5, 6, 0, 0], "labels": [5, 6, -100, -100], "attention_mask": [1, 1, 0, 0]}, [5, 6], [5, 6]),
        ({"input_ids": [0, 0, 5, 6], "labels": [-100, -100, -100, 6], "attention_mask": [0, 0, 1, 1],
          "position_ids": [1, 1, 0, 1]}, [5, 6], [-100, 6]),
        ({"input_ids": [5, 6, 0], "attention_mask": [True, True, False]}, [5, 6], [5, 6]),
        ({"input_ids": [5, 6], "position_ids": [0, 1], "seq_lengths": [2]}, [5, 6], [5, 6]),
        ({"input_ids": [0, 9]}, [0, 9], [0, 9]),
    ],
)  # fmt: skip
def test_rows_say_which_of_their_tokens_train(row, ids, labels):
    sample = read_tokens(row, TOKENS, 10, "x")
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == (ids, labels)
    assert (sample.input_ids.dtype, sample.labels.dtype) == ("int64", "int64")


def test_columns_may_go_by_other_names():
    row = {"tokens": [5, 6], "loss_mask": [0, 1]}
    layout = Layout("tokens", {"input_ids": "tokens", "assistant_masks": "loss_mask"})
    assert read_tokens(row, layout, 10, "x").labels.tolist() == [-100, 6]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "has no input_ids"),
        ({"input_ids": []}, "has no input_ids"),
        ({"input_ids": [5, 10]}, "input_ids holds 10; the tokenizer's ids are 0 to 9"),
        ({"input_ids": [5, -1]}, "input_ids holds -1"),
        ({"input_ids": [5, 2**40]}, "input_ids holds a number beyond 32 bits"),
        ({"input_ids": [5, 10**30]}, "input_ids holds a number beyond 32 bits"),
        ({"input_ids": [5, 6.0]}, "input_ids must be a list of whole numbers, got float 6.0"),
        ({"input_ids": [5, True]}, "input_ids must be a list of whole numbers, got bool True"),
        ({"input_ids": [5, None]}, "input_ids must be a list of whole numbers, got NoneType None"),
        ({"input_ids": [[5, 6]]}, r"input_ids must be a list of whole numbers, got list \[5, 6\]"),
        ({"input_ids": "56"}, "input_ids must be a list of whole numbers, got str '56'"),
        ({"input_ids": [5, 6], "labels": [6]}, "labels has 1 entries for 2 input_ids"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, r"labels\[0\] is 6 and input_ids\[0\] is 5.*not shifted"),
        ({"input_ids": [5, 6], "labels": 1}, "labels must be a list of whole numbers, got int 1"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "completion_mask must hold 0 or 1, got 2"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "attention_mask must be 1 on one stretch"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "attention_mask must be 1 on one stretch"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 2]}, "attention_mask must hold 0 or 1, got 2"),
        ({"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, r"is a pack of several documents \(position_ids"),
        ({"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}, r"is a pack of several documents \(seq_lengths"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(DataError, match=f"^x.jsonl, line 7.*{message}"):
        read_tokens(row, TOKENS, 10, "x.jsonl, line 7")
