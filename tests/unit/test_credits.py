"""How much a host takes on."""

import math

from hypothesis import given
from hypothesis import strategies as st

from rollpool.worker.credits import MeanN, concurrency_target, jobs_wanted


@given(st.integers(1, 10_000), st.floats(1.0, 16.0))
def test_the_target_is_over_what_the_engine_runs_at_once(running: int, oversubscription: float) -> None:
    assert running <= concurrency_target(running, oversubscription) <= running * oversubscription + 1


@given(st.integers(1, 10_000), st.one_of(st.floats(1.0, 1e6), st.just(math.inf)), st.integers(0, 99))
def test_a_host_with_room_asks_for_at_least_one_job(room: int, mean_n: float, unsettled: int) -> None:
    assert 1 <= jobs_wanted(room, mean_n, unsettled, 100) <= 100 - unsettled


@given(st.integers(-10_000, 0), st.floats(1.0, 1e6))
def test_a_host_without_room_asks_for_none(room: int, mean_n: float) -> None:
    assert jobs_wanted(room, mean_n, 0, 100) == 0


@given(st.integers(100, 10_000))
def test_a_host_whose_outcomes_are_not_confirmed_asks_for_none(unsettled: int) -> None:
    assert jobs_wanted(1000, 1.0, unsettled, 100) == 0


def test_the_first_pull_asks_for_one_job_since_nothing_is_known_of_its_size() -> None:
    assert jobs_wanted(320, MeanN().value, 0, 1024) == 1


@given(st.lists(st.integers(1, 1000), min_size=1))
def test_the_mean_lies_within_what_was_seen(sizes: list[int]) -> None:
    mean = MeanN()
    for n in sizes:
        mean.add(n)
    assert min(sizes) - 1e-6 <= mean.value <= max(sizes) + 1e-6


def test_the_mean_follows_a_change_within_about_ten_jobs() -> None:
    mean = MeanN()
    for n in [1] * 50 + [16] * 12:
        mean.add(n)
    assert mean.value > 14
