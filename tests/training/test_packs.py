from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import IterableDataset
from training_cases import byte_tokenizer, make_recipe

from deltatune.data.preview import preview
from deltatune.data.sources import load_rows
from deltatune.data.stream import PackStream
from deltatune.errors import UserError
from deltatune.parallel.mesh import Mesh
from deltatune.training import packs
from deltatune.training.packs import load_data

CALLING = """{%- for m in messages %}{{- m.role + ':' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{- call.function.arguments | tojson }}{%- endfor %}{{- '<|im_end|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""


@pytest.mark.parametrize(("streaming", "opener"), [(False, "load_rows"), (True, "open_stream")])
def test_a_source_is_opened_as_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, opener: str
) -> None:
    settings = {"split": "test[:9%]", "name": "en", "revision": "v1", "limit": 7}
    asked: dict[str, Any] = {}

    def opened(path: str, **kwargs: Any) -> None:
        asked.update(kwargs, path=path)
        raise UserError("opened")

    monkeypatch.setattr(packs, opener, opened)
    source = {"path": "owner/data", "columns": {"tools": "functions"}, **settings}
    recipe = make_recipe(
        tmp_path, tmp_path, data={"train": [source], "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    )
    with pytest.raises(UserError, match="opened"):
        load_data(recipe, byte_tokenizer())
    assert list(asked.pop("needed")) == ["functions"]
    assert asked == {"path": "owner/data", "cache_dir": tmp_path / "cache", **settings}


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_nothing_reads_are_named(tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {index}", "score": 1}) + "\n" for index in range(900)))
    data = {"train": [{"path": str(file)}], "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
    recipe = make_recipe(tmp_path, tmp_path, data=data)
    assert f"{file}: unused columns: score" in load_data(recipe, byte_tokenizer()).train.report.remarks


@pytest.mark.parametrize("num_proc", [1, 2])
def test_compressed_files_and_slices_pack_like_their_rows(tmp_path: Path, num_proc: int) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": f"row {index} " * (index % 5 + 1)} for index in range(600)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    sources = {
        "plain": [{"path": str(tmp_path / "rows.jsonl")}],
        "packed": [{"path": str(tmp_path / "rows.jsonl.gz")}],
        "cut": [{"path": str(tmp_path / "rows.jsonl"), "split": split} for split in ("train[:50%]", "train[50%:]")],
    }
    tokens = []
    for name, train in sources.items():
        data = {"train": train, "cache_dir": str(tmp_path / name), "num_proc": num_proc}
        recipe = make_recipe(tmp_path, tmp_path, data=data)
        packed = load_data(recipe, byte_tokenizer()).train
        shards = (shard for documents in packed.documents for shard in documents.shards)
        tokens.append([token for shard in shards for token in shard.tokens.tolist()])
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(tokens[0]) > 600


def previews(folder, rows, files=1, **data):
    """The samples of Parquet files of these rows, as text."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number in range(files):
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"rows-{number}.parquet")
    source = {"path": str(folder / "rows-*.parquet"), **data.pop("source", {})}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CALLING
    recipe = make_recipe(folder, folder, data={"train": [source], **data})
    packs = load_data(recipe, tokenizer).train
    return [preview(sample, tokenizer, color=False) for pack in range(len(packs)) for sample in packs[pack]]


def test_names_of_speakers_and_keys_come_from_the_recipe(tmp_path):
    rows = [{"messages": [{"speaker": "customer", "text": "q"}, {"speaker": "agent", "text": "a"}]}]
    assert previews(
        tmp_path,
        rows,
        roles={"customer": "user", "agent": "assistant"},
        source={"message_fields": {"role": "speaker", "content": "text"}},
    ) == ["user:q<|im_end|>assistant:«a<|im_end|>»"]


@pytest.mark.parametrize("files", [1, 2])
def test_keys_that_a_parquet_file_fills_are_absent(files, tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"function": {"name": "g", "arguments": {"b": 2}}}]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]}]
    assert previews(tmp_path, rows, files) == ['user:q<|im_end|>assistant:«{"a": 1}{"b": 2}<|im_end|>»'] * files


def test_training_leaves_out_what_is_held_and_follows_the_data_seed(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {index}"}) + "\n" for index in range(100)))
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "cache_dir": str(tmp_path / "cache"), "val_size": 10}
    orders = []
    for seed in (1, 2):
        found = load_data(make_recipe(tmp_path, tmp_path, data=data, training={"data_seed": seed}), byte_tokenizer())
        assert found.eval is not None
        assert (found.train.report.documents, found.eval.report.documents) == (90, 10)
        orders.append([sample.input_ids.tolist() for sample in found.train[0]])
    assert orders[0] != orders[1]


def test_a_stream_shares_its_block_and_has_packs_for_every_rank(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}\n')
    sources = [{"path": str(tmp_path / "rows.jsonl"), "weight": weight} for weight in (3.0, 1.0)]
    data = {"train": sources, "cache_dir": str(tmp_path / "cache"), "streaming": True, "weight_by": "documents"}
    recipe = make_recipe(tmp_path, tmp_path, data=data, training={"max_steps": 5})
    stream = load_data(recipe, byte_tokenizer(), Mesh(data_size=2, data_rank=1)).train
    assert isinstance(stream, PackStream)
    assert [source.rows_per_block for source in stream.sources] == [6144, 2048]
    assert (len(stream), stream.rank, stream.num_ranks) == (10, 1, 2)


def test_a_tokenizer_without_a_token_to_pad_with_is_said_before_rows_are_read(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        load_data(make_recipe(tmp_path, tmp_path, data={"train": [{"path": "nowhere.jsonl"}]}), tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_have_the_same_digest_however_they_are_read(tmp_path: Path, streaming: bool) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')

    def digest(*limits: int | None) -> str:
        sources = [{"path": str(rows), **({} if limit is None else {"limit": limit})} for limit in limits]
        data = {"train": sources, "cache_dir": str(tmp_path / "cache"), "streaming": streaming}
        recipe = make_recipe(tmp_path, tmp_path, data=data, training={"max_steps": 2})
        return load_data(recipe, byte_tokenizer()).identities()[str(rows)]

    assert digest(None) == load_rows(str(rows)).identity
    assert digest(2, None) == f"{digest(2)}, {digest(None)}", "of both that go by one name"
    rows.write_text(rows.read_text().replace("three", "four"))
    assert digest(None) == load_rows(str(rows)).identity


def test_the_digest_of_a_stream_of_the_hub_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset_builder(path: str, name: str | None, **asked: Any) -> Any:
        return SimpleNamespace(hash=f"commit of {asked['revision']}", as_streaming_dataset=lambda split: rows)

    rows = IterableDataset.from_generator(lambda: ({"text": f"row {i}"} for i in range(9)))
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    data = {"train": [{"path": "owner/data", "revision": "v1"}], "streaming": True}
    found = load_data(make_recipe(tmp_path, tmp_path, data=data, training={"max_steps": 2}), byte_tokenizer())
    assert found.identities() == {"owner/data (split train)": "commit of v1"}


def test_a_stream_is_named_and_its_bad_rows_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    data = {"train": [{"path": str(rows)}], "streaming": True, "on_bad_row": "drop"}
    loaded = load_data(make_recipe(tmp_path, tmp_path, data=data, training={"max_steps": 2}), byte_tokenizer())
    assert loaded.identities() == {str(rows): load_rows(str(rows)).identity}
    remarks = loaded.train.report.remarks
    assert len([line for line in remarks if "line 2: text is empty" in line]) == 1


def test_held_out_rows_are_counted_apart(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(30)] + [{"text": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "val_size": 3, "on_bad_row": "drop"}
    data["cache_dir"] = str(tmp_path / "cache")
    lines = load_data(make_recipe(tmp_path, tmp_path, data=data), byte_tokenizer()).lines()
    assert lines[0].startswith("train: 27 of 31 rows -> 27 documents, ")
    assert "1 row dropped:" in lines[0]
    assert lines[1].startswith("eval: 3 of 31 rows -> 3 documents, ")
