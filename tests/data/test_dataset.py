import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from deltatune.data.chat import Renderer
from deltatune.data.dataset import pack_documents
from deltatune.data.documents import Documents, tokenize
from deltatune.data.messages import Layout
from deltatune.data.mixture import Shares
from deltatune.data.overlong import Limit, cut_sample
from deltatune.data.report import PackingReport, one_source, variance_between
from deltatune.data.shards import Shard
from deltatune.data.sources import load_rows
from deltatune.errors import DataError
from deltatune.packing.collate import PackedCollator
from deltatune.packing.sample import IGNORE_INDEX, Sample
from deltatune.packing.shuffled import Packs

TEXT = Layout("text")


class Numbered:
    """Rows without content, for documents made by hand."""

    name, columns, identity = "rows.jsonl", ("text",), "0"

    def __init__(self, num):
        self._num = num

    def __len__(self):
        return self._num

    def where(self, index):
        return f"{self.name}, line {index + 1}"


def make_documents(lengths, trained=None, layout=TEXT):
    """Documents of consecutive numbers; ``trained`` is a mask over all tokens."""
    total = sum(lengths)
    mask = np.ones(total, dtype=bool) if trained is None else np.asarray(trained, dtype=bool)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shard = Shard(
        tokens=np.arange(total, dtype=np.int32),
        trained=mask,
        lengths=np.array(lengths, dtype=np.int32),
        targets=np.array([mask[at + 1 : to].sum() for at, to in pairwise(starts)], dtype=np.int32),
        rows=np.arange(len(lengths)),
        contents=np.arange(len(lengths), dtype=np.uint64),
    )
    return Documents([shard], Numbered(len(lengths)), layout)


def make_pairs(lengths, trained=None):
    """Pairs of documents, of which each row of ``lengths`` gives two."""
    documents = make_documents([length for pair in lengths for length in pair], trained, Layout("preference"))
    rows = np.repeat(np.arange(len(lengths)), 2)
    shard = dataclasses.replace(documents.shards[0], rows=rows, contents=rows.astype(np.uint64))
    return dataclasses.replace(documents, shards=[shard], source=Numbered(len(lengths)))


def all_pieces(dataset):
    return sorted(tuple(sample.input_ids.tolist()) for pack in dataset for sample in pack)


@pytest.fixture
def texts(write_jsonl):
    return load_rows(str(write_jsonl([{"text": f"The quick brown fox {i}" * (i % 5 + 1)} for i in range(700)])))


def test_every_document_is_in_one_pack(tokenizer, texts):
    documents = tokenize(texts, TEXT, Renderer(tokenizer))
    dataset = pack_documents([documents], tokens_per_batch=256)
    expected = sorted(tuple(tokenizer(row["text"] + "<|im_end|>")["input_ids"]) for row in texts.read(0, 700))
    assert all_pieces(dataset) == expected
    assert max(sum(map(len, pack)) for pack in dataset) <= 256


@pytest.mark.parametrize("held", [False, True])
def test_a_weight_of_a_source_with_nothing_left_is_an_error(held):
    documents = [make_documents([3, 4]), make_documents([4 if held else 30])]
    keep = [np.ones(2, dtype=bool), np.array([not held])]
    settings = {"tokens_per_batch": 10, "overlong": "drop", "keep": keep}
    assert pack_documents(documents, **settings).report.documents == 2
    with pytest.raises(DataError, match=r"^rows\.jsonl has a weight, and none of its documents is left to train on"):
        pack_documents(documents, shares=Shares(weights=[1, 1]), **settings)


def test_parts_stay_in_the_order_of_their_source():
    dataset = pack_documents([make_documents([4, 25, 5])], tokens_per_batch=10, overlong="split", seed=None)
    assert dataset.starts.tolist() == [0, 4, 14, 24, 29]


def test_parts_of_a_streamed_document_that_train_nothing_are_left_out():
    ids = np.arange(9)
    sample = Sample(ids, np.where(ids < 6, IGNORE_INDEX, ids))
    parts = cut_sample(sample, Limit(3, None), "split", "row 1", Counter())
    assert [part.input_ids.tolist() for part in parts] == [[6, 7, 8]]


def test_packs_collate(tokenizer, texts):
    dataset = pack_documents([tokenize(texts, TEXT, Renderer(tokenizer))], tokens_per_batch=256)
    batch = PackedCollator(tokens_per_batch=256, pad_token_id=0)([dataset[0]])
    assert batch["sequences"].lengths[: len(dataset[0])] == [len(sample) for sample in dataset[0]]


def test_report_counts_what_is_in_the_packs(tokenizer, texts):
    dataset = pack_documents([tokenize(texts, TEXT, Renderer(tokenizer))], tokens_per_batch=256)
    report = dataset.report
    samples = [sample for pack in dataset for sample in pack]
    assert (report.rows, report.documents, report.packs) == (700, 700, len(dataset))
    assert report.tokens == sum(map(len, samples))
    assert report.trained_tokens == sum(sample.num_trained for sample in samples)
    assert report.longest == max(map(len, samples))
    assert report.fill == report.tokens / (report.packs * 256) > 0.97
    assert "700 rows -> 700 documents" in str(report)
    assert "over-long" not in str(report)


def test_sources_are_packed_together():
    dataset = pack_documents([make_documents([3, 4]), make_documents([5])], tokens_per_batch=16)
    assert len(dataset) == 1
    assert dataset.report.rows == 3
    assert sorted(map(len, dataset[0])) == [3, 4, 5]


def test_seed_decides_which_equal_lengths_meet():
    documents = make_documents([4] * 40)

    def packs(seed):
        return [[s.input_ids.tolist() for s in p] for p in pack_documents([documents], tokens_per_batch=8, seed=seed)]

    assert packs(1) == packs(1)
    assert packs(1) != packs(2)


def test_too_long_is_an_error_that_names_the_row():
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 2 has 9 tokens, more than packing\.tokens_per_batch=8 \(1 "
    ):
        pack_documents([make_documents([3, 9, 8])], tokens_per_batch=8)


@pytest.mark.parametrize(
    ("overlong", "expected", "counts"),
    [
        ("split", [range(3), range(3, 11), range(11, 19), range(19, 22), range(22, 30)], {"split": 1}),
        ("truncate", [range(3), range(3, 11), range(22, 30)], {"truncated": 1}),
        ("drop", [range(3), range(22, 30)], {"dropped": 1}),
    ],
)
def test_too_long_documents_are_cut_and_counted(overlong, expected, counts):
    dataset = pack_documents([make_documents([3, 19, 8])], tokens_per_batch=8, overlong=overlong)
    assert all_pieces(dataset) == sorted(map(tuple, expected))
    assert dataset.report.longest == 19
    given = {name: getattr(dataset.report, name) for name in ("split", "truncated", "dropped", "unlabelled")}
    assert {name: count for name, count in given.items() if count} == counts
    assert "over-long documents: 1 " in str(dataset.report)


@pytest.mark.parametrize("overlong", ["split", "truncate"])
def test_parts_that_train_nothing_are_left_out_and_counted(overlong):
    # of the second part only the first token would train, and nothing stands before it
    mask = [False] * 8 + [True] + [False] * 7 + [True] * 4 + [True] * 5
    dataset = pack_documents([make_documents([20, 5], mask)], tokens_per_batch=8, overlong=overlong)
    kept = [tuple(range(20, 25))] + ([tuple(range(16, 20))] if overlong == "split" else [])
    assert all_pieces(dataset) == sorted(kept)
    assert dataset.report.unlabelled == (2 if overlong == "split" else 1)
    assert dataset.report.trained_tokens == sum(len(piece) - 1 for piece in kept)


def test_nothing_left_is_an_error():
    with pytest.raises(DataError, match="no document is left to train on"):
        pack_documents([make_documents([9, 10])], tokens_per_batch=8, overlong="drop")


def test_a_weighted_source_of_which_nothing_is_left_is_named():
    sources = [make_documents([5, 6]), make_documents([50, 60])]
    sources[1].source.name = "long.jsonl"
    with pytest.raises(DataError, match=r"long\.jsonl has a weight, and none of its documents is left"):
        pack_documents(sources, tokens_per_batch=20, overlong="drop", shares=Shares([1.0, 1.0]))


def test_report_counts_one_as_one():
    text = str(PackingReport(1, 1, 1, 0, 1, 8, 1 / 8, 1, 0.0))
    assert text.startswith("1 row -> 1 document, 1 token, 0 of them trained; longest document 1 token\n1 pack of")


def test_report_prints_what_was_cut():
    report = PackingReport(1, 2, 3, 2, 1, 8, 3 / 8, 9, 0.0, split=1, unlabelled=4)
    assert str(report).endswith("over-long documents: 1 split, 4 left out because the cut left no trained token")


def test_a_document_may_be_shorter_than_a_pack():
    with pytest.raises(DataError, match=r"line 2 has 9 tokens, more than data\.max_length=5 \(2 such documents"):
        pack_documents([make_documents([3, 9, 8])], tokens_per_batch=16, max_length=5)
    dataset = pack_documents([make_documents([3, 9, 8])], tokens_per_batch=16, max_length=5, overlong="truncate")
    assert all_pieces(dataset) == [tuple(range(3)), tuple(range(3, 8)), tuple(range(12, 17))]


def test_documents_that_are_not_kept_are_in_no_pack():
    keep = [np.array([True, False, True]), np.array([False])]
    dataset = pack_documents([make_documents([3, 4, 5]), make_documents([6])], tokens_per_batch=16, keep=keep)
    assert all_pieces(dataset) == [tuple(range(3)), tuple(range(7, 12))]
    assert (dataset.report.documents, dataset.report.one_source_packs) == (2, None)


def test_without_a_seed_packs_follow_the_order_of_the_rows():
    dataset = pack_documents([make_documents([4] * 9)], tokens_per_batch=12, seed=None)
    firsts = [[sample.input_ids[0] // 4 for sample in pack] for pack in dataset]
    # the end of a pack is chosen by length alone, so equal lengths come as they stand
    assert firsts == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_an_array_takes_the_pieces_of_another_epoch():
    dataset = pack_documents([make_documents([4] * 40)], tokens_per_batch=16)
    for epoch in (1, 2):
        packs = dataset.epochs(epoch)
        assert sorted(tuple(s.input_ids) for pack in packs for s in dataset[pack]) == all_pieces(dataset)
        assert [[tuple(s.input_ids) for s in dataset[pack]] for pack in packs] != [
            [tuple(s.input_ids) for s in pack] for pack in dataset
        ]


def test_weighted_and_repeated_sources_are_counted_as_an_epoch_takes_them():
    sources = [make_documents([10] * 30), make_documents([10] * 10)]
    shares = Shares(weights=[1.0, 1.0], repeats=[1, 2])
    report = pack_documents(sources, tokens_per_batch=100, shares=shares).report
    assert (report.rows, report.documents, report.tokens, report.trained_tokens) == (40, 40, 400, 360)
    assert report.sources == (
        "rows.jsonl: 50.0% of the tokens, 20 of 30 documents an epoch",
        "rows.jsonl: 50.0% of the tokens, 20 of 10 documents an epoch",
    )


@pytest.mark.parametrize(
    ("packs", "between", "of_one_source"),
    [
        ([[0, 1], [2, 3]], 1.0, 1.0),
        ([[0, 2], [1, 3]], 0.0, 0.0),
        ([[0], [1, 2, 3]], 1 / 3, 0.5),  # means 2 and 14 / 3 around 4: (4 + 3 * 4 / 9) / 16
    ],
)
def test_measures_of_how_documents_are_mixed(packs, between, of_one_source):
    """Lengths 2, 2 of one source and 6, 6 of another."""
    made = Packs(np.concatenate(packs), np.cumsum([0, *map(len, packs)]))
    assert variance_between(made, np.array([2, 2, 6, 6])) == pytest.approx(between)
    assert one_source(made, np.array([0, 0, 1, 1])) == of_one_source


def test_the_report_measures_how_documents_are_mixed():
    rng = np.random.default_rng(0)
    short, long = rng.integers(80, 200, 4000), rng.integers(300, 1200, 1000)
    report = pack_documents([make_documents(short), make_documents(long)], tokens_per_batch=4096).report
    assert report.variance_between_packs < 0.1
    assert report.one_source_packs < 0.02
    assert "% of the variance of length lies between packs, " in str(report)


def test_remarks_are_the_last_lines_of_the_report():
    report = pack_documents([make_documents([3])], tokens_per_batch=8, remarks=["rows.jsonl: 1 row dropped:"]).report
    assert str(report).endswith("\nrows.jsonl: 1 row dropped:")


def of_rows(dataset, documents, pack):
    """The row of each sample of a pack: its tokens are their places in the stream."""
    return [int(np.searchsorted(documents.offsets, sample.input_ids[0], side="right") - 1) // 2 for sample in pack]


def test_a_pair_lies_in_one_pack_its_documents_side_by_side():
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 40, (300, 2)).tolist()
    documents = make_pairs(lengths)
    dataset = pack_documents([documents], tokens_per_batch=128)
    for epoch in range(3):
        packs = [of_rows(dataset, documents, dataset[members]) for members in dataset.epochs(epoch)]
        assert all(rows[::2] == rows[1::2] for rows in packs)
        assert sorted(row for rows in packs for row in rows[::2]) == list(range(300))
        first, second = dataset[dataset.epochs(epoch)[0]][:2]
        row = packs[0][0]
        assert [len(first), len(second)] == lengths[row]
    assert all(sum(map(len, pack)) <= 128 for pack in dataset)
    assert (dataset.report.pairs, dataset.report.documents) == (300, 600)
    assert str(dataset.report).startswith("300 rows -> 300 pairs")


def test_pairs_that_are_too_long_are_named():
    """Both together must fit a pack, and each may have its own limit."""
    documents = make_pairs([(5, 5), (9, 8), (3, 12)])
    with pytest.raises(DataError, match=r"line 2 is a pair of 9 and 8 tokens, and .*=16 \(1 such pair in rows.jsonl\)"):
        pack_documents([documents], tokens_per_batch=16)
    with pytest.raises(DataError, match=r"line 3 is a pair of 3 and 12 tokens, .*data.max_length=10 \(1 such pair"):
        pack_documents([documents], tokens_per_batch=32, max_length=10)


def test_pairs_that_are_too_long_are_dropped_whole():
    dataset = pack_documents([make_pairs([(5, 5), (9, 8), (3, 12)])], tokens_per_batch=16, overlong="drop")
    assert sorted(len(sample) for pack in dataset for sample in pack) == [3, 5, 5, 12]
    assert dataset.report.dropped == 1
    assert "over-long pairs: 1 dropped for length" in str(dataset.report)


def test_both_documents_of_a_pair_are_truncated_and_one_without_a_target_takes_the_other_along():
    """Half a pack of each: the first pair keeps 8 and 8 tokens, of the second one answer begins after that."""
    trained = [True] * 17 + [False] * 9 + [True] + [True] * 9
    dataset = pack_documents([make_pairs([(9, 8), (10, 9)], trained)], tokens_per_batch=16, overlong="truncate")
    assert [sample.input_ids.tolist() for pack in dataset for sample in pack] == [[*range(8)], [*range(9, 17)]]
    assert (dataset.report.truncated, dataset.report.unlabelled, dataset.report.pairs) == (2, 1, 1)
    assert dataset.report.trained_tokens == 14


def test_pairs_and_other_rows_do_not_mix():
    with pytest.raises(DataError, match=r"holds preferences and rows\.jsonl other rows"):
        pack_documents([make_documents([4]), make_pairs([(2, 2)])], tokens_per_batch=16)


def test_pairs_held_out_stay_whole():
    documents = make_pairs([(5, 5), (6, 6), (7, 7)])
    dataset = pack_documents([documents], tokens_per_batch=32, keep=[documents.contents == 1])
    assert [len(sample) for pack in dataset for sample in pack] == [6, 6]


def test_every_sample_knows_its_row():
    """Pieces of a document that was cut as well, in every epoch."""
    sources = [make_documents([30, 70, 5]), make_documents([12, 40])]
    dataset = pack_documents(sources, tokens_per_batch=32, overlong="split", seed=1)
    starts = [source.offsets for source in sources]
    for epoch in (0, 1):
        samples = [sample for members in dataset.epochs(epoch) for sample in dataset[members]]
        assert len(samples) == 8
        # tokens are numbers in their source's stream
        for sample in samples:
            source = dataset.sources[sample.origin]
            line = np.searchsorted(starts[source], sample.input_ids[0], side="right")
            assert dataset.where(sample.origin) == f"rows.jsonl, line {line}"
            assert dataset.lengths[sample.origin] == len(sample)
