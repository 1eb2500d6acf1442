"""The admission rule by itself: AReaL's formula, and what it promises; the server is asked in test_admitting.py."""

import math
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.producer.admission import Limits, Load, capacity, staleness_room
from rollpool.schemas import SettingsError, StalenessRule


@given(
    staleness=st.integers(0, 5),
    batch_size=st.integers(1, 64),
    version=st.integers(0, 100),
    accepted=st.integers(0, 1000),
    running=st.integers(0, 1000),
    limit=st.integers(1, 2000),
)
def test_a_run_that_was_held_to_the_rule_from_the_first_policy_on_has_the_capacity_of_the_paper(
    staleness: int, batch_size: int, version: int, accepted: int, running: int, limit: int
) -> None:
    load = Load(running=running, accepted=accepted, version=version, from_version=0, from_jobs=0)
    expected = min(limit - running, (staleness + version + 1) * batch_size - (accepted + running))
    assert capacity(load, backlog_limit=limit, rule=StalenessRule(staleness, batch_size)) == expected


def test_without_limits_there_is_room_for_anything() -> None:
    assert capacity(Load(running=10**6), backlog_limit=0, rule=None) == math.inf
    assert Limits(0).refusal(Load(running=10**6), 10**6) is None


def test_a_run_that_comes_to_the_rule_late_is_counted_from_there_on() -> None:
    rule = StalenessRule(1, 4)
    assert staleness_room(rule, Load(running=100, accepted=900, version=70)) == 8
    later = Load(running=106, accepted=900, version=71, from_version=70, from_jobs=1000)
    assert staleness_room(rule, later) == 12 - 6


def test_before_the_first_policy_nothing_was_trained() -> None:
    rule = StalenessRule(1, 4)
    assert staleness_room(rule, Load(running=3, from_jobs=0)) == 5
    # A trainer may begin at any version: the first one that is published is where counting begins.
    assert staleness_room(rule, Load(running=3, version=100, from_jobs=0)) == 5


def test_counters_of_the_server_are_read_as_they_are() -> None:
    assert Load.of(None, [None] * 4) == Load()
    assert Load.of(b"7", [b"3", b"40", b"5", b"12"]) == Load(
        running=3, accepted=40, version=7, from_version=5, from_jobs=12
    )


@pytest.mark.parametrize(
    ("max_staleness", "batch_size", "named"),
    [(-1, 1, "max_staleness"), (True, 1, "max_staleness"), (1.0, 1, "max_staleness"), (0, 0, "batch_size")],
)
def test_a_rule_that_cannot_be_kept_is_refused(max_staleness: int, batch_size: int, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        StalenessRule(max_staleness, batch_size)


def test_a_refusal_says_the_numbers_and_what_to_do() -> None:
    limits = Limits(10, StalenessRule(1, 4))
    full = limits.reason("r", Load(running=9), 2)
    assert "9 open jobs; 2 more are over its backlog_limit of 10" in full
    stale = limits.reason("r", Load(running=2, accepted=9, version=8, from_version=7, from_jobs=0), 4)
    assert "has room for 1 jobs at policy 8, and the batch has 4" in stale
    assert "publish the next policy" in stale
    assert "never has room for more than 8 jobs" in limits.reason("r", Load(version=8), 9)


@st.composite
def trainings(draw: st.DrawFn) -> tuple[StalenessRule, list[tuple[str, int]]]:
    rule = StalenessRule(draw(st.integers(0, 3)), draw(st.integers(1, 5)))
    events = st.sampled_from(["enqueue", "ok", "drop", "train"])
    return rule, draw(st.lists(st.tuples(events, st.integers(1, 8)), max_size=80))


@given(trainings())
def test_what_is_admitted_is_never_staler_than_the_rule_when_it_is_trained_on_in_order(
    training: tuple[StalenessRule, list[tuple[str, int]]],
) -> None:
    """A step trains on the oldest `batch_size` groups that are there, and publishes the next version."""
    rule, events = training
    limits = Limits(0, rule)
    #: Version at admission: of open jobs, and of `ok` groups that wait for their step, both in order of admission.
    running, waiting = deque[int](), deque[int]()
    version, accepted = 10, 0
    for event, count in events:
        if event == "enqueue":
            load = Load(running=len(running), accepted=accepted, version=version, from_version=10, from_jobs=0)
            if limits.refusal(load, count) is None:
                running.extend([version] * count)
        elif event == "train":
            if len(waiting) >= rule.batch_size:
                trained = [waiting.popleft() for _ in range(rule.batch_size)]
                assert version - min(trained) <= rule.max_staleness
                version += 1
        else:
            for _ in range(min(count, len(running))):
                admitted = running.popleft()
                if event == "ok":
                    waiting.append(admitted)
                    accepted += 1


@given(staleness=st.integers(0, 3), batch_size=st.integers(1, 5), steps=st.integers(1, 20))
def test_a_trainer_that_keeps_the_pool_full_is_never_held_back_for_ever(
    staleness: int, batch_size: int, steps: int
) -> None:
    rule = StalenessRule(staleness, batch_size)
    load = Load(version=0, from_version=0, from_jobs=0)
    for step in range(steps):
        room = staleness_room(rule, load)
        assert room >= batch_size
        load = Load(accepted=load.accepted + batch_size, version=step + 1, from_version=0, from_jobs=0)
