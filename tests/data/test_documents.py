import json
import os
import re
import signal
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from deltatune.data import documents as module
from deltatune.data import shards
from deltatune.data.chat import Renderer
from deltatune.data.documents import tokenize
from deltatune.data.messages import Layout
from deltatune.data.sources import load_rows
from deltatune.errors import DataError, UserError

TEXT = Layout("text")


@pytest.fixture
def texts(write_jsonl):
    return load_rows(str(write_jsonl([{"text": f"The quick brown fox {i}" * (i % 5 + 1)} for i in range(700)])))


def counting(renderer):
    """A renderer whose rows are counted, and the list of them; the cache does not see the list."""
    rendered = []

    class Counted(Renderer):
        def render(self, row, layout, where, notes=None):
            rendered.append(where)
            return super().render(row, layout, where, notes)

    return Counted(**vars(renderer)), rendered


def arrays(documents):
    return [documents.offsets, documents.rows, documents.targets, documents.contents] + [
        np.concatenate([getattr(shard, name) for shard in documents.shards]) for name in ("tokens", "trained")
    ]


def same(one, other):
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(arrays(one), arrays(other), strict=True))


def test_several_processes_give_the_same_documents(tokenizer, texts, tmp_path):
    one = tokenize(texts, TEXT, Renderer(tokenizer), num_proc=1)
    assert len(one.shards) == 3
    assert same(one, tokenize(texts, TEXT, Renderer(tokenizer), num_proc=2))
    assert same(one, tokenize(texts, TEXT, Renderer(tokenizer), num_proc=2, cache_dir=tmp_path))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_the_first_bad_row_is_named_whoever_reads_it(tokenizer, write_jsonl, num_proc):
    rows = [{"text": "fox"}] * 600
    rows[300] = rows[590] = {"text": ""}
    source = load_rows(str(write_jsonl(rows)))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 301: text is empty"):
        tokenize(source, TEXT, Renderer(tokenizer), num_proc=num_proc)


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([300], r"rows\.jsonl, line 301: text is empty, .*; data\.on_bad_row: drop leaves such rows out"),
        ([3, 5], r"\S*rows\.jsonl: 2 of the first 256 rows cannot be .* on: line 4 \(also line 6\): text is empty, .*"),
        ([300, 590], r"\S*rows\.jsonl, line 301: text is empty, .*"),
        ([590, 591], r"\S*rows\.jsonl: 2 of 600 rows cannot be trained on: line 591 \(also line 592\): .*"),
        (
            range(1, 20, 2),
            r".*: 10 of the .*line 2 \(also line 4, line 6, line 8, line 10\): .*; and 5 more; data\.on_b.*",
        ),
    ],
)
def test_bad_rows_are_named_together(tokenizer, write_jsonl, tmp_path, bad, said, num_proc):
    rows = [{"text": "" if index in bad else f"fox {index}"} for index in range(600)]
    source = load_rows(str(write_jsonl(rows)))
    for _ in range(2):  # what is kept of the first time hides no bad row
        with pytest.raises(DataError) as caught:
            tokenize(source, TEXT, Renderer(tokenizer), num_proc=num_proc, cache_dir=tmp_path / "cache")
        assert re.search(said, str(caught.value))


def test_different_faults_of_rows_are_named_with_their_places(tokenizer, write_jsonl):
    source = load_rows(str(write_jsonl([{"text": "fox"}, {"text": ""}, {"text": 3}, {"text": ""}])))
    expected = r"3 of 4 rows .* line 2 \(also line 4\): text is empty.*; line 3: text must be a string, got int 3; data"
    with pytest.raises(DataError, match=expected):
        tokenize(source, TEXT, Renderer(tokenizer))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_rows_can_be_dropped_and_are_named_and_counted(tokenizer, write_jsonl, tmp_path, num_proc):
    rows = [{"text": f"fox {i}"} for i in range(600)]
    bad = list(range(10, 600, 20))
    for index in bad:
        rows[index] = {"text": ""}
    source = load_rows(str(write_jsonl(rows)))
    for cache_dir in (None, tmp_path / "cache", tmp_path / "cache"):
        documents = tokenize(
            source, TEXT, Renderer(tokenizer), num_proc=num_proc, cache_dir=cache_dir, on_bad_row="drop"
        )
        assert documents.rows.tolist() == [index for index in range(600) if index not in bad]
        count, errors = documents.dropped
        assert count == len(bad) == 30
        assert [error.split(":")[0].rsplit(" ", 1)[1] for error in errors] == [str(index + 1) for index in bad[:20]]


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("broken", ["{oops", "3", '{"text": "cut'])
def test_lines_that_are_no_rows_are_bad_rows(tokenizer, tmp_path, num_proc, broken):
    lines = [json.dumps({"text": f"row {i}"}) for i in range(600)]
    for place in (0, 299, 599):
        lines[place] = broken
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    source = load_rows(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1 is"):
        tokenize(source, TEXT, Renderer(tokenizer), num_proc=num_proc)
    documents = tokenize(source, TEXT, Renderer(tokenizer), num_proc=num_proc, on_bad_row="drop")
    assert sorted(set(range(600)) - set(documents.rows.tolist())) == [0, 299, 599]
    count, errors = documents.dropped
    assert count == 3
    assert [re.search(r"line \d+", error).group() for error in errors] == ["line 1", "line 300", "line 600"]


def test_dropping_every_row_is_an_error_with_the_first_reason(tokenizer, write_jsonl):
    source = load_rows(str(write_jsonl([{"text": ""}] * 3)))
    with pytest.raises(DataError, match=r"all 3 rows were dropped; the first error: .*line 1: text is empty"):
        tokenize(source, TEXT, Renderer(tokenizer), on_bad_row="drop")


def test_a_process_that_is_killed_is_an_error_and_not_a_wait(tokenizer, texts):
    class Killing(Renderer):
        def render(self, row, layout, where, notes=None):
            if where.endswith("line 400"):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().render(row, layout, where, notes)

    with pytest.raises(UserError, match=r"was killed, most likely for lack of memory; set data\.num_proc"):
        tokenize(texts, TEXT, Killing(tokenizer), num_proc=2)


def test_as_many_processes_tokenise_as_there_are_cores(tokenizer, texts, monkeypatch):
    asked = []
    made = module._made
    monkeypatch.setattr(module, "num_cores", lambda: 7)
    monkeypatch.setattr(module, "_made", lambda task, missing, num: asked.append(num) or made(task, missing, 1))
    for num_proc in (None, 3):
        tokenize(texts, TEXT, Renderer(tokenizer), num_proc=num_proc)
    assert asked == [7, 3]


def test_rows_that_say_the_same_have_one_digest_whatever_the_order_of_keys(tokenizer, write_jsonl):
    turns = [{"role": role, "content": "fox"} for role in ("user", "assistant")]
    rows = [{"messages": turns}, {"messages": [dict(reversed(turn.items())) for turn in turns]}]
    source = load_rows(str(write_jsonl(rows)))
    contents = tokenize(source, Layout("chat"), Renderer(tokenizer)).contents
    assert contents[0] == contents[1]


class TestCache:
    def test_a_shard_that_cannot_be_read_back_loses_no_rows(self, tokenizer, texts, tmp_path, monkeypatch):
        plain = tokenize(texts, TEXT, Renderer(tokenizer))
        monkeypatch.setattr(module, "read_shard", lambda file: None)
        for num_proc in (1, 2):
            assert same(plain, tokenize(texts, TEXT, Renderer(tokenizer), num_proc=num_proc, cache_dir=tmp_path))

    def test_after_an_error_no_more_shards_are_begun(self, tokenizer, write_jsonl, tmp_path):
        source = load_rows(str(write_jsonl([{"text": ""}] + [{"text": "fox " * 20}] * (256 * 12))))
        with pytest.raises(DataError, match="line 1: text is empty"):
            tokenize(source, TEXT, Renderer(tokenizer), num_proc=2, cache_dir=tmp_path / "cache")
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) < 10

    @pytest.mark.parametrize("num_proc", [1, 2])
    def test_what_is_on_disk_is_mapped_and_not_held(self, tokenizer, texts, tmp_path, num_proc):
        documents = tokenize(texts, TEXT, Renderer(tokenizer), num_proc=num_proc, cache_dir=tmp_path)
        assert not any(shard.tokens.flags.writeable for shard in documents.shards)

    def test_rows_that_another_run_dropped_are_errors_here(self, tokenizer, write_jsonl, tmp_path):
        source = load_rows(str(write_jsonl([{"text": "fox"}, {"text": ""}])))
        tokenize(source, TEXT, Renderer(tokenizer), cache_dir=tmp_path / "cache", on_bad_row="drop")
        with pytest.raises(DataError, match="line 2: text is empty"):
            tokenize(source, TEXT, Renderer(tokenizer), cache_dir=tmp_path / "cache")

    def test_a_second_run_reads_the_same_documents(self, tokenizer, texts, tmp_path):
        plain = tokenize(texts, TEXT, Renderer(tokenizer))
        for made in (700, 0):
            renderer, rendered = counting(Renderer(tokenizer))
            assert same(plain, tokenize(texts, TEXT, renderer, num_proc=1, cache_dir=tmp_path / "cache"))
            assert len(rendered) == made

    def test_a_run_that_stopped_goes_on_where_it_was(self, tokenizer, write_jsonl, tmp_path):
        rows = [{"text": f"fox {i}"} for i in range(700)]
        source = load_rows(str(write_jsonl(rows)))

        class Stopping(Renderer):
            def render(self, row, layout, where, notes=None):
                if where.endswith("line 600"):
                    raise KeyboardInterrupt
                return super().render(row, layout, where, notes)

        with pytest.raises(KeyboardInterrupt):
            tokenize(source, TEXT, Stopping(tokenizer), num_proc=1, cache_dir=tmp_path / "cache")
        renderer, rendered = counting(Renderer(tokenizer))
        documents = tokenize(source, TEXT, renderer, num_proc=1, cache_dir=tmp_path / "cache")
        assert rendered == [source.where(index) for index in range(512, 700)]
        assert same(documents, tokenize(source, TEXT, Renderer(tokenizer)))

    @pytest.mark.parametrize("damage", ["removed", "cut", "empty", "a byte of the tokens", "a byte of the header"])
    def test_a_shard_that_is_broken_is_made_again(self, tokenizer, texts, tmp_path, damage):
        cache = tmp_path / "cache"
        plain = tokenize(texts, TEXT, Renderer(tokenizer), num_proc=1, cache_dir=cache)
        plain = [array.copy() for array in arrays(plain)]
        shard = sorted(next(cache.iterdir()).iterdir())[1]
        content = bytearray(shard.read_bytes())
        if damage == "removed":
            shard.unlink()
        elif damage == "cut":
            shard.write_bytes(content[: len(content) // 2])
        elif damage == "empty":
            shard.write_bytes(b"")
        else:
            content[-40 if "tokens" in damage else 20] ^= 1
            shard.write_bytes(content)
        renderer, rendered = counting(Renderer(tokenizer))
        documents = tokenize(texts, TEXT, renderer, num_proc=1, cache_dir=cache)
        assert rendered == [texts.where(index) for index in range(256, 512)]
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(arrays(documents), plain, strict=True))

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
        for count, (rows, renderer, layout) in enumerate(runs, start=1):
            tokenize(rows, layout, renderer, cache_dir=cache)
            assert len(list(cache.iterdir())) == count

    @pytest.mark.parametrize("what", ["code", "library"])
    def test_other_code_and_other_libraries_change_the_entry(self, tokenizer, texts, tmp_path, monkeypatch, what):
        cache = tmp_path / "cache"
        tokenize(texts, TEXT, Renderer(tokenizer), cache_dir=cache)
        if what == "code":
            monkeypatch.setattr(module, "_code", lambda: "other")
        else:
            monkeypatch.setattr(module, "version", lambda package: f"{package} 99")
        tokenize(texts, TEXT, Renderer(tokenizer), cache_dir=cache)
        assert len(list(cache.iterdir())) == 2

    def test_an_edit_of_the_code_is_seen(self, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "files", lambda _: tmp_path)
        (tmp_path / "chat.py").write_text("a = 1")
        before = module._code()
        (tmp_path / "chat.py").write_text("a = 2")
        assert module._code() != before

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

        monkeypatch.setattr(shards, "struct", SimpleNamespace(pack=disk_full, unpack=struct.unpack, error=struct.error))
        with pytest.raises(DataError, match=r"No space left on device; set data\.cache_dir"):
            tokenize(texts, TEXT, Renderer(tokenizer), num_proc=1, cache_dir=cache)
        assert list(next(cache.iterdir()).iterdir()) == []

    def test_a_place_that_cannot_be_written_is_named(self, tokenizer, texts, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"set data\.cache_dir"):
            tokenize(texts, TEXT, Renderer(tokenizer), cache_dir=tmp_path / "file" / "cache")

    def test_two_at_a_time_make_one_entry(self, tokenizer, texts, tmp_path):
        cache, found = tmp_path / "cache", []
        threads = [
            threading.Thread(
                target=lambda: found.append(tokenize(texts, TEXT, Renderer(tokenizer), num_proc=1, cache_dir=cache))
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        assert same(found[0], found[1])
        assert same(found[0], found[2])
        (entry,) = cache.iterdir()
        assert sorted(file.name for file in entry.iterdir()) == [f"{i:05}-of-00003.safetensors" for i in range(3)]
