"""Signals while a run trains."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from deltatune.training.signals import StopAfterStep, caught_signals


def step_ends(stop: StopAfterStep) -> TrainerControl:
    control = TrainerControl()
    stop.on_step_end(SimpleNamespace(), None, control)  # type: ignore[arg-type]
    return control


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_the_run_after_the_step(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    stop, said = StopAfterStep(), []
    with caught_signals(stop, said.append):
        assert not step_ends(stop).should_training_stop
        os.kill(os.getpid(), number)
        assert stop.received == number
        control = step_ends(stop)
        assert control.should_training_stop
        assert control.should_save
        assert {each: signal.getsignal(each) for each in before} == before, "a second one is not caught"
    assert {each: signal.getsignal(each) for each in before} == before
    assert said == [f"{number.name}: the run ends after this step, with a checkpoint; once more ends it at once"]


def test_the_second_ctrl_c_ends_it_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it

    def twice() -> None:
        with caught_signals(StopAfterStep(), lambda _: None):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            twice()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_while_ranks_agree_ends_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopAfterStep()
    stop._ranks = object()  # type: ignore[assignment]

    def meanwhile(*_: object, **__: object) -> None:
        stop.received = signal.SIGTERM

    monkeypatch.setattr("deltatune.training.signals.dist.all_reduce", meanwhile)
    assert not step_ends(stop).should_training_stop, "the other ranks go on"
    assert step_ends(stop).should_training_stop


def test_a_thread_catches_nothing_and_says_nothing() -> None:
    found: list[Any] = []

    def run() -> None:
        with caught_signals(StopAfterStep(), found.append):
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
