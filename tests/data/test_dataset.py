import numpy as np
import pytest

from deltatune.data.chat import Renderer
from deltatune.data.dataset import PackingReport, pack_documents
from deltatune.data.documents import Documents, tokenize
from deltatune.data.messages import Layout
from deltatune.data.sources import load_rows
from deltatune.errors import DataError
from deltatune.packing.collate import PackedCollator

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


def make_documents(lengths, trained=None):
    """Documents of consecutive numbers; ``trained`` is a mask over all tokens."""
    total = sum(lengths)
    mask = np.ones(total, dtype=bool) if trained is None else np.asarray(trained, dtype=bool)
    return Documents(
        tokens=np.arange(total, dtype=np.int32),
        trained=mask,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rows=np.arange(len(lengths)),
        source=Numbered(len(lengths)),
    )


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


def test_several_processes_give_the_same_documents(tokenizer, texts):
    one = tokenize(texts, TEXT, Renderer(tokenizer))
    two = tokenize(texts, TEXT, Renderer(tokenizer), num_proc=2)
    for name in ("tokens", "trained", "offsets", "rows"):
        assert np.array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_first_bad_row_is_named_whoever_reads_it(tokenizer, write_jsonl, num_proc):
    rows = [{"text": "fox"}] * 600
    rows[300] = rows[590] = {"text": ""}
    source = load_rows(str(write_jsonl(rows)))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 301: text is empty"):
        tokenize(source, TEXT, Renderer(tokenizer), num_proc=num_proc)


class TestCache:
    def tokenize_counting(self, rows, renderer, cache, layout=TEXT):
        """Documents, and whether they were made anew."""
        rendered = []

        class Counting(Renderer):
            def render(self, row, layout, where, notes=None):
                rendered.append(where)
                return super().render(row, layout, where, notes)

        documents = tokenize(rows, layout, Counting(**vars(renderer)), cache_dir=cache)
        return documents, bool(rendered)

    def test_a_second_run_reads_the_same_documents(self, tokenizer, texts, tmp_path):
        cache = tmp_path / "cache"
        first, made = self.tokenize_counting(texts, Renderer(tokenizer), cache)
        second, made_again = self.tokenize_counting(texts, Renderer(tokenizer), cache)
        plain = tokenize(texts, TEXT, Renderer(tokenizer))
        assert (made, made_again) == (True, False)
        for name in ("tokens", "trained", "offsets", "rows"):
            assert np.array_equal(getattr(first, name), getattr(plain, name))
            assert np.array_equal(getattr(second, name), getattr(plain, name))
        assert len(list(cache.iterdir())) == 1

    def test_what_changes_the_tokens_changes_the_entry(self, tokenizer, marked_tokenizer, texts, write_jsonl, tmp_path):
        cache = tmp_path / "cache"
        other_rows = load_rows(str(write_jsonl([{"text": f"fox {i}"} for i in range(300)], "other.jsonl")))
        runs = [
            (texts, Renderer(tokenizer), TEXT),
            (other_rows, Renderer(tokenizer), TEXT),
            (texts, Renderer(marked_tokenizer), TEXT),
            (texts, Renderer(tokenizer, chat_template="x"), TEXT),
            (texts, Renderer(tokenizer, train_on="all"), TEXT),
            (texts, Renderer(tokenizer, chat_template="{{ x }}", template_kwargs={"x": 1}), TEXT),
            (texts, Renderer(tokenizer), Layout("text", {"text": "text"})),
        ]
        assert all(self.tokenize_counting(rows, renderer, cache, layout)[1] for rows, renderer, layout in runs)
        assert len(list(cache.iterdir())) == len(runs)

    def test_a_failure_leaves_nothing(self, tokenizer, write_jsonl, tmp_path):
        cache = tmp_path / "cache"
        rows = load_rows(str(write_jsonl([{"text": "a"}, {"text": ""}])))
        with pytest.raises(DataError):
            tokenize(rows, TEXT, Renderer(tokenizer), cache_dir=cache)
        assert not cache.exists()

    def test_a_write_that_fails_leaves_nothing(self, tokenizer, texts, tmp_path, monkeypatch):
        cache = tmp_path / "cache"

        def disk_full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "save", disk_full)
        with pytest.raises(DataError, match=r"No space left on device; set data\.cache_dir"):
            tokenize(texts, TEXT, Renderer(tokenizer), cache_dir=cache)
        assert list(cache.iterdir()) == []

    def test_a_place_that_cannot_be_written_is_named(self, tokenizer, texts, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"set data\.cache_dir"):
            tokenize(texts, TEXT, Renderer(tokenizer), cache_dir=tmp_path / "file" / "cache")

    def test_losing_a_race_takes_the_winners_entry(self, tokenizer, texts, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        original = np.save
        raced = []

        def save_after_the_other(path, array):
            if not raced:
                raced.append(True)
                tokenize(texts, TEXT, Renderer(tokenizer), cache_dir=cache)
            original(path, array)

        monkeypatch.setattr(np, "save", save_after_the_other)
        documents = tokenize(texts, TEXT, Renderer(tokenizer), cache_dir=cache)
        assert len(documents) == 700
        assert len(list(cache.iterdir())) == 1


def test_report_counts_one_as_one():
    text = str(PackingReport(1, 1, 1, 0, 1, 8, 1 / 8, 1))
    assert text.startswith("1 row -> 1 document, 1 token, 0 of them trained; longest document 1 token\n1 pack of")


def test_report_prints_what_was_cut():
    report = PackingReport(1, 2, 3, 2, 1, 8, 3 / 8, 9, split=1, unlabelled=4)
    assert str(report).endswith("over-long documents: 1 split, 4 left out because the cut left no trained token")
