import bz2
import gzip
import lzma
import re

import pytest

from deltatune.data import unpacked as module
from deltatune.data.unpacked import made_once, unpacked
from deltatune.errors import DataError

CONTENT = b'{"text": "a"}\n\n{"text": "b"}\n{"text": "c"}\n'


def zstd(content):
    pyarrow = pytest.importorskip("pyarrow")
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return target.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.fixture(params=PACK)
def suffix(request):
    return request.param


@pytest.mark.parametrize(("limit", "expected"), [(None, CONTENT), (2, CONTENT[:29]), (9, CONTENT)])
def test_compressed_files_are_unpacked_as_far_as_asked(tmp_path, suffix, limit, expected):
    file = tmp_path / f"rows.jsonl{suffix}"
    file.write_bytes(PACK[suffix](CONTENT))
    result = unpacked(file, tmp_path / "cache", limit)
    assert result.read_bytes() == expected
    before = result.stat().st_mtime_ns
    assert unpacked(file, tmp_path / "cache", limit).stat().st_mtime_ns == before


def test_files_of_several_frames_are_whole(tmp_path, suffix):
    file = tmp_path / f"rows.jsonl{suffix}"
    file.write_bytes(PACK[suffix](CONTENT) * 2)
    assert unpacked(file, tmp_path, None).read_bytes() == CONTENT * 2


def test_the_content_names_what_is_kept(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    for content in (b"one\n", b"two\n"):
        file.write_bytes(gzip.compress(content, mtime=0))
        assert unpacked(file, tmp_path, None).read_bytes() == content


def test_other_files_stay_where_they_are(tmp_path):
    assert unpacked(tmp_path / "rows.jsonl", tmp_path, None) == tmp_path / "rows.jsonl"


@pytest.mark.parametrize("broken", ["cut", "other"])
def test_broken_files_are_named_and_leave_nothing(tmp_path, suffix, broken):
    file = tmp_path / f"rows.jsonl{suffix}"
    whole = PACK[suffix](bytes(range(256)) * 100)
    file.write_bytes(whole[: len(whole) // 2] if broken == "cut" else b"this is not compressed at all")
    with pytest.raises(DataError, match=rf"{re.escape(file.name)} is no whole \w+ file: .*; fetch or pack it again"):
        unpacked(file, tmp_path / "cache", None)
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl\.gz cannot be read: No such file"):
        unpacked(tmp_path / "none.jsonl.gz", tmp_path, None)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write the cache of unpacked data in .*cache.*; set data.cache_dir"):
        made_once(tmp_path / "cache", "x", lambda target: None)


def test_what_another_process_made_meanwhile_stays(tmp_path):
    def write(target):
        made_once(tmp_path, "x", lambda other: other.write(b"theirs"))
        target.write(b"ours")

    assert made_once(tmp_path, "x", write).read_bytes() == b"theirs"


def test_zstd_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"pip install 'deltatune\[train\]'"):
        unpacked(tmp_path / "a.jsonl.zst", tmp_path, None)


def test_the_cache_lies_with_that_of_datasets(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", "/somewhere")
    assert str(module.default_cache()) == "/somewhere/deltatune"
