"""Runs share a lane by their weights.

The bound that is tested: a run is served a share of jobs at a time, at most its part of what a host wants and one more:
`Q = (wanted * weight / all weights + 1) * n` samples. The run with the least virtual time (samples / weight) goes
first, so while all are backlogged no run's virtual time is ahead of another's by more than its last share, Q / weight;
what each was served then differs from its weighted share by at most `weight * max(Q / weight)` over all runs.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from delivery import RUN, Pool, ended, jobs_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from rollpool.schemas import LANES
from rollpool.schemas.scripts import Entry, enqueue

pytestmark = pytest.mark.both_servers


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    made = Pool(redis_url)
    yield made
    await made.close()


@dataclass(frozen=True)
class Run:
    """One of several that compete; `n` samples a job."""

    weight: float
    n: int

    def most_at_once(self, wanted: int, weights: float) -> float:
        return (wanted * self.weight / weights + 1) * self.n


runs_that_compete = st.lists(
    st.builds(Run, weight=st.sampled_from([0.1, 0.5, 1, 1, 2, 7.5]), n=st.integers(1, 8)), min_size=2, max_size=5
)


async def fill(pool: Pool, run: str, n: int, size: int, *, batch: str = "b", weight: float | None = None) -> None:
    """Jobs of which only the delivery matters."""
    await enqueue(
        pool.client,
        pool.keys,
        run=run,
        batch=batch,
        lane="default",
        content="c",
        policy=5,
        n=n,
        previews_and_bodies=["p", b"body"] * size,
        weight=weight,
    )


def samples_by_run(entries: list[Entry]) -> Counter[str]:
    made = Counter[str]()
    for entry in entries:
        made[entry.run] += int(entry.fields[b"n"])
    return made


class Loop:
    """Examples of hypothesis, each on an emptied server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.runner = asyncio.Runner()

    def run(self, test: Any, *args: Any) -> None:
        with Redis.from_url(self.url) as client:
            client.flushall()
        self.runner.run(self._with_pool(test, *args))

    async def _with_pool(self, test: Any, *args: Any) -> None:
        pool = Pool(self.url)
        try:
            await test(pool, *args)
        finally:
            await pool.close()


@pytest.fixture
def loop(redis_url: str) -> Iterator[Loop]:
    made = Loop(redis_url)
    yield made
    made.runner.close()


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples(25)
@given(runs=runs_that_compete, pulls=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_while_all_are_backlogged_each_gets_its_weighted_share(loop: Loop, runs: list[Run], pulls: list[int]) -> None:
    loop.run(shares_are_kept, runs, pulls)


async def shares_are_kept(pool: Pool, runs: list[Run], pulls: list[int]) -> None:
    names = {f"run-{at}": run for at, run in enumerate(runs)}
    for name, run in names.items():
        await fill(pool, name, run.n, sum(pulls) + 1, weight=run.weight)
    weights = sum(run.weight for run in runs)
    served = Counter[str]()
    most = 0.0
    for wanted in pulls:
        entries = await pool.take(wanted, runs=list(names))
        assert len(entries) == wanted
        served += samples_by_run(entries)
        most = max(most, *(run.most_at_once(wanted, weights) / run.weight for run in runs))
        for name, run in names.items():
            share = served.total() * run.weight / weights
            assert abs(served[name] - share) <= run.weight * most + 1e-6


@examples(15)
@given(runs=runs_that_compete, wanted=st.integers(1, 20))
def test_no_run_starves_however_small_its_weight(loop: Loop, runs: list[Run], wanted: int) -> None:
    loop.run(nobody_starves, [*runs, Run(0.1, 1)], wanted)


async def nobody_starves(pool: Pool, runs: list[Run], wanted: int) -> None:
    """After so many samples that its share is over the bound, each was served."""
    names = {f"run-{at}": run for at, run in enumerate(runs)}
    weights = sum(run.weight for run in runs)
    most = max(run.most_at_once(wanted, weights) / run.weight for run in runs)
    enough = most * weights + 1
    for name, run in names.items():
        await fill(pool, name, run.n, int(enough) + wanted, weight=run.weight)
    served = Counter[str]()
    while served.total() <= enough:
        served += samples_by_run(await pool.take(wanted, runs=list(names)))
    assert served.keys() == names.keys()


@examples(15)
@given(idle=st.integers(1, 30), wanted=st.integers(1, 16), how=st.sampled_from(["new", "finished", "held", "full"]))
def test_a_run_that_was_idle_gets_no_credit_for_it(loop: Loop, idle: int, wanted: int, how: str) -> None:
    loop.run(idleness_earns_nothing, idle, wanted, how)


async def idleness_earns_nothing(pool: Pool, idle: int, wanted: int, how: str) -> None:
    """A run that had nothing to be served for many pulls shares from then on as if it had just begun."""
    runs = ["busy", "idle"]
    await fill(pool, "busy", 1, (idle + 10) * wanted)
    if how != "new":
        await pool.put(2 if how == "full" else 1, run="idle", n=1)
        [entry] = await pool.take(1, runs=["idle"])
        if how != "held":
            await pool.settle(ended(entry))
    bound = 1 if how == "full" else 0
    for _ in range(idle):
        entries = (await pool.pull(wanted, runs=runs, bound=bound)).entries
        assert samples_by_run(entries) == {"busy": wanted}
    await fill(pool, "idle", 1, 10 * wanted, batch="after")
    served = Counter[str]()
    for _ in range(8):
        served += samples_by_run(await pool.take(wanted, runs=runs))
    # Each at most a share ahead of the other: (wanted / 2 + 1) samples, and the one by which it joined.
    assert abs(served["busy"] - served["idle"]) <= 2 * (wanted / 2 + 1)


async def test_a_run_that_joins_waits_for_nobody(pool: Pool) -> None:
    await fill(pool, "old", 4, 100)
    for _ in range(10):
        await pool.take(5, runs=["old", "new"])
    await fill(pool, "new", 4, 100)
    assert samples_by_run(await pool.take(10, runs=["old", "new"]))["new"] >= 16


async def test_a_weight_is_what_was_said_last(pool: Pool) -> None:
    await fill(pool, "one", 1, 100, weight=1)
    await fill(pool, "other", 1, 100, weight=3)
    assert samples_by_run(await pool.take(40, runs=["one", "other"])) == {"one": 10, "other": 30}
    await fill(pool, "one", 1, 1, batch="more", weight=3)
    await fill(pool, "other", 1, 1, batch="more")
    assert samples_by_run(await pool.take(40, runs=["one", "other"])) == {"one": 20, "other": 20}


async def test_what_a_run_has_none_of_the_others_get(pool: Pool) -> None:
    await fill(pool, "small", 1, 3, weight=5)
    await fill(pool, "large", 1, 100)
    assert samples_by_run(await pool.take(20, runs=["small", "large"])) == {"small": 3, "large": 17}


async def test_lanes_come_before_weights(pool: Pool) -> None:
    await pool.put(5, run="light", lane="high", weight=0.1)
    await pool.put(5, run="heavy", lane="default", weight=10)
    await pool.put(5, run="light", batch="low", lane="low")
    entries = await pool.take(12, runs=["heavy", "light"])
    assert [entry.run for entry in entries] == ["light"] * 5 + ["heavy"] * 5 + ["light"] * 2
    assert LANES.index("high") == 0


async def test_what_waited_counts_for_its_run_too(pool: Pool) -> None:
    await pool.put(20, run="one", n=1)
    await pool.put(20, run="other", n=1)
    for entry in await pool.take(20, runs=["one"]):
        await pool.give_back(entry)
    await pool.server.delete(pool.keys.fair)
    for run in ("one", "other"):
        await pool.server.hset(pool.keys.run(run), "pass", 0)
    assert samples_by_run(await pool.take(20, runs=["one", "other"])) == {"one": 10, "other": 10}


@pytest.mark.parametrize("made_up", ["", "0", "-1", "nan", "inf", "-inf", "1e400", "x", "0x", "1e-300", "1e300"])
@pytest.mark.parametrize("field", ["weight", "pass", "unread", "open"])
async def test_numbers_that_somebody_made_up_stop_nobody(pool: Pool, field: str, made_up: str) -> None:
    await pool.put(5, run="one")
    await pool.put(5, run="other")
    await pool.server.hset(pool.keys.run("one"), field, made_up)
    taken: list[Entry] = []
    for wanted in (2, 2, 2, 10):
        taken += (await pool.pull(wanted, runs=["one", "other"], bound=10**6)).entries
    assert jobs_of(entry for entry in taken if entry.run == "other") == [f"b/{index}" for index in range(5)]


async def test_who_wants_nothing_changes_nothing(pool: Pool) -> None:
    await pool.put(5, run="one")
    await pool.put(5, run="other")
    await pool.take(3, runs=["one"])
    await pool.server.set(pool.keys.fair, 100)
    before = [await pool.server.hgetall(pool.keys.run(run)) for run in ("one", "other")]
    assert await pool.take(0, runs=["one", "other"]) == []
    assert [await pool.server.hgetall(pool.keys.run(run)) for run in ("one", "other")] == before


@pytest.mark.parametrize("made_up", ["", "nan", "-5", "x", "1e300", "inf"])
async def test_a_virtual_time_that_somebody_made_up_stops_nobody(pool: Pool, made_up: str) -> None:
    await pool.server.set(pool.keys.fair, made_up)
    await pool.put(4, run="one")
    await pool.put(4, run="other")
    assert len(await pool.take(3, runs=["one", "other"])) == 3
    assert len(await pool.take(10, runs=["one", "other"])) == 5


@pytest.mark.parametrize("made_up", ["", "0", "-3", "nan", "inf", "1e300", "x"])
async def test_a_number_of_samples_that_somebody_made_up_stops_nobody(pool: Pool, made_up: str) -> None:
    await pool.put(2, run="one")
    await pool.put(4, run="other")
    await pool.server.xadd(pool.lane(run="one"), {"job": "b/0", "run": "one", "n": made_up})
    await pool.server.xadd(pool.lane(run="one"), {"n": made_up})
    assert len(await pool.take(3, runs=["one", "other"])) == 3
    assert len(await pool.take(10, runs=["one", "other"])) == 5


async def test_without_runs_there_is_nothing(pool: Pool) -> None:
    await pool.put(1)
    assert await pool.take(runs=[]) == []
    assert jobs_of(await pool.take(runs=[RUN])) == ["b/0"]
