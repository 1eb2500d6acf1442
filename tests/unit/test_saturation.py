"""The share of time in which an engine could have run more."""

import pytest

from rollpool.worker.saturation import Saturation


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_only_time_with_backlog_counts(clock: Clock) -> None:
    measured = Saturation(clock)
    measured.observe(in_flight=0, full=4, backlog=False)
    clock.now += 10
    measured.observe(in_flight=2, full=4, backlog=True)
    clock.now += 3
    measured.observe(in_flight=4, full=4, backlog=True)
    clock.now += 5
    measured.observe(in_flight=4, full=4, backlog=False)
    clock.now += 100
    measured.observe(in_flight=0, full=4, backlog=False)
    assert (measured.backlog_seconds, measured.underfull_seconds) == (8.0, 3.0)


def test_nothing_counts_before_the_first_observation(clock: Clock) -> None:
    measured = Saturation(clock)
    clock.now += 50
    measured.observe(in_flight=0, full=4, backlog=True)
    assert (measured.backlog_seconds, measured.underfull_seconds) == (0.0, 0.0)


def test_a_pause_ends_the_count_until_the_next_observation(clock: Clock) -> None:
    measured = Saturation(clock)
    measured.observe(in_flight=0, full=4, backlog=True)
    clock.now += 2
    measured.pause()
    clock.now += 1000
    measured.observe(in_flight=4, full=4, backlog=True)
    assert (measured.backlog_seconds, measured.underfull_seconds) == (2.0, 2.0)


def test_an_engine_over_full_is_full(clock: Clock) -> None:
    measured = Saturation(clock)
    measured.observe(in_flight=5, full=4, backlog=True)
    clock.now += 2
    measured.pause()
    assert (measured.backlog_seconds, measured.underfull_seconds) == (2.0, 0.0)
