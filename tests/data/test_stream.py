"""Streams: packs of blocks of rows, the same from any place again."""

import pickle
import re

import datasets
import numpy as np
import pytest
from datasets import IterableDataset

from deltatune.data import stream as module
from deltatune.data.chat import Renderer
from deltatune.data.messages import Layout
from deltatune.data.row_streams import Fetched, Repeated, open_stream
from deltatune.data.sources import load_rows
from deltatune.data.stream import PackStream, Place, StreamSource
from deltatune.errors import DataError
from deltatune.packing import shuffled

TEXT = Layout("text")


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch):
    monkeypatch.setattr(shuffled, "_WINDOW", 20)


@pytest.fixture
def texts(write_jsonl):
    rng = np.random.default_rng(0)
    return [{"text": f"The quick brown fox {i} " * int(rng.integers(1, 6))} for i in range(300)]


@pytest.fixture
def stream(tokenizer, texts, write_jsonl):
    rows = Repeated(load_rows(str(write_jsonl(texts))))

    def build(rows=rows, per_block=64, **settings):
        values = {"tokens_per_batch": 256, "num_packs": 200, "seed": 5, **settings}
        return PackStream([StreamSource(rows, TEXT, per_block)], Renderer(tokenizer), **values)

    return build


def content(pack):
    return [tuple(sample.input_ids.tolist()) for sample in pack]


def content_of(samples):
    return [(sample.input_ids.tolist(), sample.labels.tolist()) for sample in samples]


def test_every_row_comes_as_often_as_every_other(stream, tokenizer, texts):
    packs = [content(pack) for pack in stream(num_packs=120)]
    seen = [ids for pack in packs for ids in pack]
    assert max(sum(map(len, pack)) for pack in packs) <= 256
    fill = sum(map(len, seen)) / (len(packs) * 256)
    assert fill > 0.97
    expected = [tuple(tokenizer(row["text"] + "<|im_end|>")["input_ids"]) for row in texts]
    counts = np.array([seen.count(ids) for ids in expected])
    assert counts.sum() == len(seen)
    # what is left of the blocks that were read, and the end of the last pass
    assert counts.max() - counts.min() <= 1 or np.count_nonzero(counts < counts.max() - 1) == 0


def test_rows_of_a_block_are_shuffled_unless_there_is_no_seed(stream, tokenizer, texts):
    first = [content(stream(seed=seed)[0])[0] for seed in (1, 2, None)]
    assert first[0] != first[1]
    assert first[2] == tuple(tokenizer(texts[0]["text"] + "<|im_end|>")["input_ids"])


def test_blocks_are_shuffled_in_orders_of_their_own(stream, write_jsonl):
    """The same rows in each block come in another order."""
    rows = Repeated(load_rows(str(write_jsonl([{"text": f"fox {i}"} for i in range(64)], "block.jsonl"))))
    orders = [content(stream(rows)._block(Place(block=number)).documents) for number in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_every_sample_knows_its_row(stream, tokenizer, texts, tmp_path):
    packs = stream()
    packs._block(Place()).next(Place()).save(tmp_path / "place.npz")
    left = Place.load(tmp_path / "place.npz").left
    assert left
    for sample in [*packs[0], *packs[3], *left]:
        line = int(packs.where(sample.origin).rpartition(", line ")[2])
        assert tuple(sample.input_ids) == tuple(tokenizer(texts[line - 1]["text"] + "<|im_end|>")["input_ids"])


@pytest.mark.parametrize("stop", [1, 30, 61])
def test_from_the_latest_place_the_packs_are_the_same(stream, tmp_path, stop):
    whole = stream()
    packs, place = [], None
    for number in range(80):
        pack = whole[number]
        packs.append(content(pack))
        if number < stop:
            place = pack.news.place or place
    place.save(tmp_path / "place.npz")
    later = stream(start=Place.load(tmp_path / "place.npz"))
    assert [content(later[number]) for number in range(stop, 80)] == packs[stop:]
    assert later.start.pack <= stop


def test_a_place_is_told_again_after_going_on(stream):
    """A run that goes on in the middle of a block and stops in it again still knows where the block began."""
    whole = stream()
    place = None
    for number in range(36):
        place = whole[number].news.place or place
    assert place.pack == 34
    later = stream(start=place)
    assert later[36].news.place.pack == 34
    assert later[37].news.place is None


def test_going_back_begins_again(stream):
    packs = stream()
    forward = [content(packs[number]) for number in range(40)]
    assert content(packs[3]) == forward[3]
    assert content(packs[39]) == forward[39]


def test_packs_before_the_start_are_made_from_the_beginning(stream):
    whole = stream()
    place = next(news.place for news in (whole[number].news for number in range(60)) if news.place and news.place.pack)
    assert content(stream(start=place)[0]) == content(stream()[0])


def test_a_copy_in_another_process_begins_where_the_stream_does(stream):
    packs = stream()
    first = content(packs[0])
    packs[10]
    copy = pickle.loads(pickle.dumps(packs))
    assert content(copy[0]) == first


def test_ranks_read_different_blocks(stream):
    ranks = [stream(rank=rank, num_ranks=2) for rank in (0, 1)]
    seen = [
        {ids for number in range(rank, 20, 2) for ids in content(packs[number])} for rank, packs in enumerate(ranks)
    ]
    # the 300 rows are 4.7 blocks, and 10 packs of a rank are of two: 0 and 2, 1 and 3
    assert not seen[0] & seen[1]


def test_sources_are_mixed_by_documents(tokenizer, write_jsonl):
    sources = [
        StreamSource(
            Repeated(load_rows(str(write_jsonl([{"text": f"{name} {i}"} for i in range(90)], name)))), TEXT, count
        )
        for name, count in (("a.jsonl", 60), ("b.jsonl", 20))
    ]
    packs = PackStream(sources, Renderer(tokenizer), 256, 60)
    texts = [tokenizer.decode(sample.input_ids) for pack in packs for sample in pack]
    assert np.mean([text.startswith("a") for text in texts]) == pytest.approx(0.75, abs=0.02)


def test_bad_rows_are_dropped_and_told_once(stream, texts, write_jsonl):
    texts[3] = {"text": ""}
    rows = Repeated(load_rows(str(write_jsonl(texts, "bad.jsonl"))))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 4: text is empty"):
        stream(rows)[0]
    packs = stream(rows, on_bad_row="drop")
    told = [packs[number].news.remarks for number in range(10)]
    assert told[0][0] == "1 row dropped, among them:"
    assert "bad.jsonl, line 4" in told[0][1]
    assert set(told[1:]) == {()}
    assert stream(rows, on_bad_row="drop")[6].news.remarks == told[0], "a pack that is asked for first tells it"


def test_bad_rows_of_a_block_are_named_together(stream, texts, write_jsonl):
    texts[3] = texts[5] = {"text": ""}
    rows = Repeated(load_rows(str(write_jsonl(texts, "bad.jsonl"))))
    expected = (
        r"bad\.jsonl: 2 of a block of 64 rows cannot be trained on: line 4 \(also line 6\): text is empty.*on_bad_row"
    )
    with pytest.raises(DataError, match=expected):
        stream(rows)[0]


def test_lines_that_are_no_rows_are_bad_rows(stream, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{oops\n{"text": "two"}\n')
    rows = Repeated(load_rows(str(tmp_path / "broken.jsonl")))
    with pytest.raises(DataError, match=r"broken\.jsonl, line 2 is not valid JSON"):
        stream(rows)[0]
    pack = stream(rows, on_bad_row="drop")[0]
    assert "21 rows dropped" in pack.news.remarks[0]
    assert len(set(content(pack))) == 2


def test_long_documents_are_dealt_with_as_they_come(stream):
    with pytest.raises(DataError, match=r"rows\.jsonl, line \d+ has \d+ tokens, more than data\.max_length=20"):
        stream(max_length=20)[0]
    for overlong in ("split", "truncate", "drop"):
        packs = stream(max_length=20, overlong=overlong)
        assert max(len(sample) for number in range(10) for sample in packs[number]) <= 20


@pytest.mark.parametrize(
    ("overlong", "said"),
    [("truncate", r"over-long documents: \d+ truncated"), ("drop", r"over-long documents: \d+ dropped for length")],
)
def test_long_documents_are_counted(stream, overlong, said):
    packs = stream(max_length=20, overlong=overlong)
    assert re.fullmatch(said, packs[0].news.remarks[0])
    assert re.fullmatch(said, str(packs.report).splitlines()[2])


def test_a_long_document_is_no_bad_row(stream):
    with pytest.raises(DataError, match=r"more than data\.max_length=20"):
        stream(max_length=20, on_bad_row="drop")[0]


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"text": ""}, {"on_bad_row": "drop"}, "64 rows one after another were dropped; the first error: .* is empty"),
        ({"text": "fox " * 9}, {"overlong": "drop", "max_length": 3}, "leave no document of at most data.max_length=3"),
    ],
)
def test_rows_that_all_give_nothing_end_the_stream(stream, write_jsonl, row, settings, said):
    rows = Repeated(load_rows(str(write_jsonl([row], "none.jsonl"))))
    with pytest.raises(DataError, match=rf"none\.jsonl: .*{said}"):
        stream(rows, **settings)[0]


def test_the_report_shows_the_first_block(stream):
    report = stream().report
    assert report.rows == 64
    assert report.packs > 3
    assert report.remarks[0].startswith("rows are streamed")
    # a block that fills no pack is passed over
    assert stream(per_block=5).report.packs > 0


class TestFetched:
    def rows(self, count=7):
        def generate():
            yield from ({"text": f"row {i}"} for i in range(count))

        return Fetched("hub/name", IterableDataset.from_generator(generate), "commit")

    def texts(self, rows, start, end):
        return [row["text"] for _, row in rows.read(start, end)]

    def test_the_first_row_follows_the_last(self):
        rows = self.rows()
        assert rows.columns == ("text",)
        expected = [f"row {i % 7}" for i in range(30)]
        assert self.texts(rows, 0, 10) == expected[:10]
        assert self.texts(rows, 10, 30) == expected[10:30]

    @pytest.mark.parametrize("start", [3, 6, 7, 20])
    def test_any_place_can_be_read_first(self, start):
        expected = [f"row {i % 7}" for i in range(start, start + 9)]
        rows = self.rows()
        assert self.texts(rows, start, start + 9) == expected
        assert self.texts(rows, start, start + 2) == expected[:2]

    def test_rows_are_named(self):
        assert next(iter(self.rows().read(2, 3)))[0] == "hub/name, row 3"

    def test_rows_that_are_gone_at_the_second_pass_are_an_error(self):
        class Vanishing:
            column_names = ("text",)

            def __init__(self):
                self.passes = [["a", "b"], []]

            def skip(self, number):
                return [{"text": text} for text in self.passes.pop(0)[number:]]

        with pytest.raises(DataError, match="hub/name ended after fewer than 2 rows"):
            self.texts(Fetched("hub/name", Vanishing(), "commit"), 0, 5)

    def test_no_rows_at_all_is_an_error(self):
        with pytest.raises(DataError, match="hub/name holds no rows"):
            self.texts(self.rows(0), 0, 3)


def test_rows_of_the_hub_are_fetched_as_they_are_read(monkeypatch):
    asked = []

    class Builder:
        hash = "0123abcd"

        def __init__(self, *args, **kwargs):
            asked.append((args, kwargs))

        def as_streaming_dataset(self, split):
            asked.append(split)
            return IterableDataset.from_generator(lambda: ({"text": f"row {i}"} for i in range(9)))

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    rows = open_stream("owner/data", split="test", revision="v1", limit=4)
    assert asked == [(("owner/data", None), {"revision": "v1"}), "test"]
    assert rows.identity == "0123abcd", "the commit, since the rows are not read for a digest"
    assert [row["text"][-1] for _, row in rows.read(0, 6)] == ["0", "1", "2", "3", "0", "1"]


@pytest.mark.parametrize("kind", ["cut", "flipped", "overwritten"])
def test_a_broken_place_is_an_error(stream, tmp_path, kind):
    packs, file = stream(), tmp_path / "place.npz"
    place = packs._block(Place()).next(Place())
    place.save(file)
    content, rng, broken = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        at = int(rng.integers(len(content)))
        after = {"cut": b"", "flipped": bytes([content[at] ^ 1 << int(rng.integers(8))]), "overwritten": rng.bytes(40)}
        rest = b"" if kind == "cut" else content[at + len(after[kind]) :]
        file.write_bytes(content[:at] + after[kind] + rest)
        try:
            found = Place.load(file)
        except DataError:
            broken += 1
        else:  # a byte that says nothing, such as a date
            assert (found.block, found.pack, content_of(found.left)) == (1, place.pack, content_of(place.left))
    assert broken > 100


def test_a_place_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.npz does not tell where the stream of data was: .*No such file"):
        Place.load(tmp_path / "none.npz")


def test_blocks_are_as_large_as_the_recipe_says():
    assert module.BLOCK_ROWS == 8192
