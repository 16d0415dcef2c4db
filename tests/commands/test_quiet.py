"""What libraries tell each other stays out of a command's output."""

import logging

import pytest
from transformers.utils.logging import warning_once

from deltatune.cli import main
from deltatune.commands.quiet import quiet_libraries

KERNELS = "transformers.integrations.hub_kernels"
ADVICE = "`causal_conv1d_fn` is falling back to its reference PyTorch implementation"


@pytest.fixture(autouse=True)
def _seen_by_caplog(monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)


def test_advice_on_kernels_is_silent_inside_alone(caplog) -> None:
    with quiet_libraries():
        logging.getLogger(KERNELS).warning(ADVICE)
        logging.getLogger(KERNELS).warning("something else")
    assert caplog.messages == ["something else"]
    logging.getLogger(KERNELS).warning(ADVICE)
    assert caplog.messages[-1] == ADVICE


def test_the_comparison_with_the_stock_class_gives_no_advice(caplog, checkpoint) -> None:
    warning_once.cache_clear()
    assert main(["verify", str(checkpoint), "--lengths", "5,1,9"]) == 0
    assert not any("falling back" in message for message in caplog.messages)
