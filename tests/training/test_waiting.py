"""Forward times of ranks: what is kept of them, and for how long."""

import torch

from deltatune.training.waiting import ForwardTimes


def steps(times: ForwardTimes, count: int) -> None:
    for _ in range(count):
        with times.forward():
            pass
        times.end_step()


def test_times_are_those_since_the_last_time() -> None:
    times = ForwardTimes(torch.device("cpu"))
    steps(times, 3)
    assert len(times.take()) == 3
    assert times.take() == []
    steps(times, 2)
    times.clear()
    assert times.take() == []


def test_nothing_grows_where_nobody_asks() -> None:
    times = ForwardTimes(torch.device("cpu"))
    steps(times, 2500)
    assert len(times.take()) == 1000
