import pickle

import pytest

from deltatune.data.table_rows import arrow_rows, hub_rows, parquet_rows, saved_rows
from deltatune.errors import DataError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

ROWS = [{"text": f"row {i}", "meta": {"id": i, "note": None if i else "first"}} for i in range(600)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_parquet(path):
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))


def write_arrow(path, new):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(path), "wb") as target, new(target, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def write_arrow_file(path):
    write_arrow(path, pyarrow.ipc.new_file)


def write_arrow_stream(path):
    write_arrow(path, pyarrow.ipc.new_stream)


def write_saved(path):
    datasets.Dataset.from_list(ROWS).with_format("numpy", columns=["meta"]).save_to_disk(str(path), num_shards=2)


KINDS = {
    "parquet": (write_parquet, parquet_rows),
    "arrow_file": (write_arrow_file, arrow_rows),
    "arrow_stream": (write_arrow_stream, arrow_rows),
    "saved": (write_saved, saved_rows),
}


@pytest.mark.parametrize(("write", "read"), KINDS.values(), ids=KINDS)
def test_tables_are_read_in_any_range(tmp_path, write, read):
    write(tmp_path / "rows")
    rows = read(tmp_path / "rows")
    assert list(rows.read(0, len(rows))) == ROWS
    assert list(rows.read(250, 520)) == ROWS[250:520]
    assert (rows.columns, rows.columnar, rows.where(1)) == (("text", "meta"), True, f"{tmp_path}/rows, row 2")
    assert list(pickle.loads(pickle.dumps(rows)).read(1, 2)) == ROWS[1:2]


@pytest.mark.parametrize(("write", "read"), KINDS.values(), ids=KINDS)
def test_identity_follows_the_content(tmp_path, monkeypatch, write, read):
    for name in ("one", "same"):
        write(tmp_path / name)
    monkeypatch.setattr(f"{__name__}.ROWS", ROWS[:5])
    write(tmp_path / "other")
    one, same, other = (read(tmp_path / name).identity for name in ("one", "same", "other"))
    assert one == same != other


@pytest.mark.parametrize("content", [b"", b"no table at all", b"ARROW1 and nothing", b"PAR1 and nothing"])
@pytest.mark.parametrize("read", [parquet_rows, arrow_rows])
def test_broken_files_are_named(tmp_path, content, read, capfd):
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(DataError, match=r"rows cannot be read as (Parquet|Arrow)") as caught:
        read(tmp_path / "rows")
    assert "\n" not in str(caught.value)
    assert "Arrow" not in capfd.readouterr().err


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [(b"row 599", b"row \xff99"), (bytes([7, 0, 0, 0, 14, 0, 0, 0]), b"\xff" * 8)],
    ids=["text", "offsets"],
)
def test_tables_with_broken_bytes_are_named(tmp_path, saved, old, new):
    file, read = tmp_path / "rows", arrow_rows
    if saved:
        write_saved(tmp_path)
        file, read = max(tmp_path.glob("*.arrow")), lambda file: saved_rows(file.parent)
    else:
        write_arrow_stream(file)
    content = file.read_bytes()
    file.write_bytes(content.replace(old, new) if old in content else pytest.fail("nothing to break"))
    with pytest.raises(DataError, match="cannot be read as") as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_rows_that_need_another_package_are_named(tmp_path, monkeypatch):
    images = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": ""}]})
    images.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path))
    rows = saved_rows(tmp_path)
    monkeypatch.setattr(datasets.config, "PIL_AVAILABLE", False)
    with pytest.raises(DataError, match=r"row 1 cannot be decoded: .*Pillow"):
        list(rows.read(0, 1))


@pytest.mark.parametrize("state", ["{", "{}", "[]", '{"_data_files": [{"filename": "gone.arrow"}]}'])
def test_broken_saved_folders_are_named(tmp_path, state):
    write_saved(tmp_path / "rows")
    (tmp_path / "rows" / "state.json").write_text(state)
    with pytest.raises(DataError, match="rows cannot be read as a data set that was saved to disk") as caught:
        saved_rows(tmp_path / "rows")
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_what_the_recipe_says(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = hub_rows("someone/some-data", "test[:10%]", "small", "v1")
    settings = {"split": "test[:10%]", "revision": "v1"}
    assert asked == [(("someone/some-data", "small"), settings)]
    assert rows.where(0) == "someone/some-data (small, split test[:10%]), row 1"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "is neither a local file nor a data set on the Hub: .*accessed; check the name, or run `hf auth login`",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit\nthe page."),
            "a gated dataset on the Hub. Visit the page; accept its terms on its page, then run `hf auth login`",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            "from the Hub: .*found b.py; give the files that it reads, or a revision that holds Parquet",
        ),
        (
            ValueError("Unknown split \"trian\". Should be one of ['test', 'train']."),
            r"from the Hub: Unknown split .trian.\. .* \(did you mean train\?\)$",
        ),
        (
            ValueError("BuilderConfig 'smal' not found. Available: ['small', 'large']"),
            r"from the Hub: .*'large'\] \(did you mean small\?\)$",
        ),
        (ConnectionError("Couldn't reach it"), "from the Hub: Couldn't reach it; it is no local file or folder"),
        (datasets.exceptions.DatasetGenerationError("x"), "from the Hub: x"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, message):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=rf"^a/b \(split train\) .*{message}") as caught:
        hub_rows("a/b", "train", None, None)
    assert "\n" not in str(caught.value)
