"""Models that are not on this machine, where the Hub answers and where it does not; nothing leaves this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.file_download
import pytest
from huggingface_hub import constants

from deltatune.config.schema import ModelSection
from deltatune.errors import UserError
from deltatune.training import checkpoint, hub
from deltatune.training.checkpoint import load_config, load_model, load_tokenizer
from tiny import tiny_model

ABSENT = ModelSection(name_or_path="nobody/nothing")


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch) -> Iterator[None]:
    """Online as far as settings go, without a proxy, and with no answer remembered."""
    for name in ("all_proxy", "http_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._no_answer.cache_clear()
    yield
    hub._no_answer.cache_clear()


@pytest.fixture
def silent_hub(monkeypatch, tmp_path) -> str:
    """A Hub at a port where nobody listens, nothing downloaded from it, and libraries that may not ask it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"

    def asks(*_: Any, **__: Any) -> None:
        pytest.fail("a library asks the Hub that does not answer")

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.file_download, "get_hf_file_metadata", asks)
    return endpoint


@pytest.fixture
def answers(monkeypatch) -> Iterator[list[int]]:
    """A Hub that answers with these statuses in turn."""
    statuses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(statuses.pop(0))
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield statuses
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("status", [200, 307, 401, 404, 503])
def test_any_status_is_an_answer(answers, status) -> None:
    answers.append(status)
    assert hub.silence() is None
    assert hub.silence() is None, "asked once"
    assert answers == []


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_where_the_hub_is_silent_a_model_that_is_not_here_is_an_error_at_once(silent_hub, tmp_path, load) -> None:
    with pytest.raises(UserError) as caught:
        load(ABSENT)
    message = str(caught.value)
    assert f"nobody/nothing: it is not in {tmp_path / 'hub'}, and {silent_hub} does not answer (" in message
    assert "check the name and the connection, or give a checkpoint folder" in message


def test_where_the_hub_is_silent_what_was_downloaded_is_read(silent_hub, tmp_path) -> None:
    commit, repository = "0" * 40, tmp_path / "hub" / "models--nobody--nothing"
    weights = repository / "snapshots" / commit / "model.safetensors"
    saved = tiny_model("qwen3")
    saved.save_pretrained(weights.parent)
    weights.rename(tmp_path / "weights")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = load_config(ABSENT)
    assert config.model_type == "qwen3"
    with pytest.raises(UserError, match=r"does not appear to have a file .* does not answer"):
        load_model(ABSENT, config)
    (tmp_path / "weights").rename(weights)
    assert type(load_model(ABSENT, config)) is type(saved)


def test_a_forbidden_hub_is_not_asked(silent_hub, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="and HF_HUB_OFFLINE forbids asking http"):
        load_config(ABSENT)


def test_a_proxy_of_a_kind_only_libraries_know_is_left_to_them(silent_hub, monkeypatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    assert hub.silence() is None


def test_a_folder_asks_nobody(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "silence", lambda: pytest.fail("a folder is here"))
    tiny_model("qwen3").save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path))
    assert load_model(section, load_config(section)).config.model_type == "qwen3"
