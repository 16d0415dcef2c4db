from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from training_cases import byte_tokenizer, make_recipe

from deltatune.errors import UserError
from deltatune.training import packs
from deltatune.training.packs import load_data


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
