"""What is said of one card of 80 GB: the estimate of a plan, by layers, and on the safe side of what was measured."""

from __future__ import annotations

import pytest

from benchmarks import card
from benchmarks.figures import GIB, steps_of
from benchmarks.records import load_records
from deltatune.training import layout


@pytest.mark.parametrize("state", list(card.STATES)[:2])
def test_layers_add_up_as_an_estimate_of_more_of_them_has_it(state: str) -> None:
    assert card.step(state, 12) == card.built(state, 12)


def test_the_estimate_of_all_layers_is_just_above_the_recorded_peak() -> None:
    peaks = [
        result["peak_bytes"]
        for steps in steps_of(load_records())
        if steps.config["model"] == card.MODEL and steps.config["tokens"] == card.TOKENS and steps.full
        for result in steps.find("deltatune", "layer", targets="experts")
    ]
    assert peaks
    estimate = card.step("float32", 40).total
    for peak in peaks:
        # activations are counted unfused
        assert peak <= estimate <= 1.05 * peak


@pytest.mark.parametrize("state", card.STATES)
def test_a_period_more_does_not_fit(state: str) -> None:
    room = layout._ROOM * card.DEVICE_GIB * GIB
    fit = card.layers_that_fit(state)
    assert card.step(state, fit).total <= room < card.step(state, fit + card.PERIOD).total


def test_states_are_of_the_width_that_they_are_named_for() -> None:
    wide, small, narrow = (card.step(state, 40) for state in card.STATES)
    assert wide.optimizer == pytest.approx(2 * wide.gradients, rel=1e-3)
    # two states of a byte, and a float32 scale for each block of 256
    assert small.optimizer == pytest.approx(wide.optimizer * (1 + 4 / 256) / 4, rel=0.01)
    assert narrow.optimizer == pytest.approx(wide.optimizer / 2, rel=1e-3)
    assert narrow.gradients == pytest.approx(wide.gradients / 2, rel=1e-3)
