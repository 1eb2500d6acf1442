"""Several runs on one pool: unread results, the staleness rule, weights, and runs that ended."""

from collections.abc import AsyncIterator

import pytest
from delivery import HOUR_MS, RUN, Pool, ended, jobs_of

from rollpool.schemas import LANES
from rollpool.schemas.scripts import Enqueued, Settlement, parked
from rollpool.schemas.staleness import StalenessRule
from rollpool.schemas.wire import pack_model

pytestmark = pytest.mark.both_servers

#: After which a sweep of these tests forgets a run.
AT_ONCE_MS = -1


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    made = Pool(redis_url)
    yield made
    await made.close()


async def settle_all(pool: Pool, *, run: str = RUN, wanted: int = 10) -> int:
    """Settle what there is; returns the bytes of the results."""
    settlements = [ended(entry) for entry in await pool.take(wanted, runs=[run])]
    await pool.settle(*settlements)
    return sum(size_of(settlement) for settlement in settlements)


def size_of(settlement: Settlement) -> int:
    return len(pack_model(settlement.group))


# Unread results


async def test_a_run_whose_results_nobody_reads_gets_no_more_made_and_is_named(pool: Pool) -> None:
    for run in ("mute", "heard"):
        await pool.put(4, run=run)
    size = await settle_all(pool, run="mute", wanted=2)
    pulled = await pool.pull(10, runs=["mute", "heard"], bound=size)
    assert pulled.full == {"mute"}
    assert {entry.run for entry in pulled.entries} == {"heard"}
    assert len(pulled.entries) == 4
    pulled = await pool.pull(10, runs=["mute", "heard"], bound=size + 1)
    assert (pulled.full, jobs_of(pulled.entries)) == (frozenset(), ["b/2", "b/3"])


async def test_without_a_bound_no_run_is_over_it(pool: Pool) -> None:
    await pool.put(2)
    await settle_all(pool, wanted=1)
    pulled = await pool.pull(bound=0)
    assert (pulled.full, len(pulled.entries)) == (frozenset(), 1)


async def test_reading_opens_a_run_again(pool: Pool) -> None:
    await pool.put(3)
    size = await settle_all(pool, wanted=2)
    assert (await pool.pull(bound=size)).full == {RUN}
    await pool.mark_read(1)
    assert (await pool.pull(1, bound=size)).full == frozenset()
    assert (await pool.counters())["unread"] == size - 1
    await pool.check("b")


async def test_a_commit_opens_a_run_again(pool: Pool) -> None:
    await pool.put(1)
    await pool.put(1, batch="next")
    size = await settle_all(pool, wanted=1)
    assert (await pool.pull(bound=size)).entries == []
    await pool.commit()
    assert jobs_of((await pool.pull(bound=size)).entries) == ["next/0"]
    assert (await pool.counters())["unread"] == 0


async def test_results_count_until_they_are_read_or_committed_whatever_is_said_twice(pool: Pool) -> None:
    await pool.put(2)
    size = await settle_all(pool)
    for said in (10, 5, 10):
        await pool.mark_read(said)
        assert (await pool.counters())["unread"] == size - 10
    assert [await pool.commit(), await pool.commit()] == [0, 0]
    await pool.mark_read(size)
    assert (await pool.counters())["unread"] == 0


async def test_no_more_is_read_than_there_is(pool: Pool) -> None:
    await pool.put(1)
    await settle_all(pool)
    await pool.mark_read(10**9)
    assert (await pool.counters())["unread"] == 0
    await pool.check("b")
    assert await pool.commit() == 0
    assert (await pool.counters())["unread"] == 0


async def test_a_batch_that_nobody_knows_cannot_be_read(pool: Pool) -> None:
    await pool.mark_read(5, batch="unknown")
    assert await pool.server.dbsize() == 0


async def test_what_waited_is_held_back_too_while_nobody_reads(pool: Pool) -> None:
    await pool.put(3)
    first, *others = await pool.take()
    for entry in others:
        await pool.give_back(entry)
    await pool.settle(ended(first))
    assert (await pool.pull(bound=1)).entries == []
    await pool.check("b")
    await pool.mark_read(10**9)
    assert jobs_of((await pool.pull(bound=1)).entries) == ["b/1", "b/2"]


async def test_results_without_a_body_do_not_count(pool: Pool) -> None:
    await pool.put(3)
    await pool.finish(0, 1)
    assert (await pool.counters()).get("unread", 0) == 0
    assert len((await pool.pull(bound=1)).entries) == 1


# The staleness rule


async def put_under(pool: Pool, rule: StalenessRule, size: int, batch: str) -> Enqueued:
    return await pool.put(size, batch=batch, rule=rule)


async def test_no_more_is_enqueued_than_will_be_fresh_when_it_is_trained_on(pool: Pool) -> None:
    rule = StalenessRule(max_staleness=1, batch_size=4)
    await pool.publish(3)
    assert await put_under(pool, rule, 6, "one") == Enqueued("new", 6)
    assert await put_under(pool, rule, 3, "two") == Enqueued("stale", 2)
    assert not await pool.server.exists(pool.keys.batch(RUN, "two"))
    assert await put_under(pool, rule, 2, "three") == Enqueued("new", 2)
    await settle_all(pool)  # `ok` counts like running: it is still to be trained on
    assert await put_under(pool, rule, 1, "four") == Enqueued("stale", 0)
    await pool.publish(4)
    assert await put_under(pool, rule, 5, "five") == Enqueued("stale", 4)
    assert await put_under(pool, rule, 4, "six") == Enqueued("new", 4)


async def test_a_rule_that_became_stricter_has_no_room_and_not_less(pool: Pool) -> None:
    await put_under(pool, StalenessRule(max_staleness=1, batch_size=4), 8, "b")
    assert await put_under(pool, StalenessRule(max_staleness=0, batch_size=4), 1, "c") == Enqueued("stale", 0)


async def test_what_did_not_end_ok_makes_room(pool: Pool) -> None:
    rule = StalenessRule(max_staleness=0, batch_size=3)
    await put_under(pool, rule, 3, "b")
    first, second, _ = await pool.take()
    await pool.settle(ended(first, "failed"), ended(second, "stale"))
    assert await put_under(pool, rule, 3, "c") == Enqueued("stale", 2)
    assert await put_under(pool, rule, 2, "c") == Enqueued("new", 2)


async def test_a_run_that_comes_late_to_the_rule_starts_from_what_it_has(pool: Pool) -> None:
    rule = StalenessRule(max_staleness=0, batch_size=2)
    await pool.publish(100)
    await pool.put(50, batch="before")
    await settle_all(pool)
    assert await put_under(pool, rule, 3, "b") == Enqueued("stale", 2)
    assert await put_under(pool, rule, 2, "b") == Enqueued("new", 2)
    assert await put_under(pool, rule, 1, "c") == Enqueued("stale", 0)


async def test_the_first_policy_gives_no_room_for_versions_that_never_were(pool: Pool) -> None:
    rule = StalenessRule(max_staleness=0, batch_size=2)
    assert await put_under(pool, rule, 2, "b") == Enqueued("new", 2)
    await pool.publish(100)
    assert await put_under(pool, rule, 1, "c") == Enqueued("stale", 0)
    await pool.finish(0, 0)
    assert await put_under(pool, rule, 1, "c") == Enqueued("new", 1)
    await pool.publish(101)
    assert await put_under(pool, rule, 2, "d") == Enqueued("new", 2)


async def test_the_same_batch_again_needs_no_room(pool: Pool) -> None:
    rule = StalenessRule(max_staleness=0, batch_size=2)
    await put_under(pool, rule, 2, "b")
    assert await put_under(pool, rule, 2, "b") == Enqueued("same", 2)


# Runs that end


async def end_run(pool: Pool, run: str = RUN) -> None:
    await settle_all(pool, run=run)
    assert await pool.commit(run=run) == 0


async def test_a_run_that_ended_is_forgotten_with_its_streams(pool: Pool) -> None:
    for lane in LANES:
        await pool.put(1, batch=lane, lane=lane)
    for entry in await pool.take():
        await pool.give_back(entry)
    await settle_all(pool)
    for lane in LANES:
        await pool.commit(lane)
    assert pool.sweep(idle_ms=HOUR_MS).forgotten == 0
    assert pool.sweep(idle_ms=AT_ONCE_MS).forgotten == 1
    assert pool.sweep(idle_ms=AT_ONCE_MS).forgotten == 0
    left = {name.decode() for name in await pool.server.keys("*")}
    kept = {pool.keys.batch(RUN, lane) for lane in LANES} | {pool.keys.run(RUN)}
    assert left == kept | {pool.keys.retries, pool.keys.fair}
    assert min([await pool.server.ttl(name) for name in kept]) > 0


async def test_a_run_with_something_open_uncommitted_or_on_its_lanes_is_not_forgotten(pool: Pool) -> None:
    for run in ("open", "uncommitted", "foreign", "ended"):
        await pool.put(1, run=run)
    for run in ("uncommitted", "foreign", "ended"):
        await settle_all(pool, run=run)
    for run in ("foreign", "ended"):
        assert await pool.commit(run=run) == 0
    await pool.server.xadd(pool.lane(run="foreign"), {"hello": "world"})
    assert pool.sweep(idle_ms=AT_ONCE_MS).forgotten == 1
    assert await pool.server.smembers(pool.keys.runs) == {b"open", b"uncommitted", b"foreign"}


async def test_a_run_that_waits_to_run_its_last_job_is_not_forgotten(pool: Pool) -> None:
    await pool.put(1)
    await pool.give_back((await pool.take())[0], parked(9))
    assert pool.sweep(idle_ms=AT_ONCE_MS).forgotten == 0
    await pool.check("b")


async def test_a_forgotten_run_that_goes_on_has_its_counters_again(pool: Pool) -> None:
    await pool.put(2, weight=2.5)
    await end_run(pool)
    before = await pool.counters()
    assert pool.sweep(idle_ms=AT_ONCE_MS).forgotten == 1
    assert await pool.put(3, batch="after") == Enqueued("new", 3)
    assert await pool.counters() == {**before, "enqueued": 5, "open": 3}
    assert await pool.server.hget(pool.keys.run(RUN), "weight") == b"2.5"
    assert await pool.server.ttl(pool.keys.run(RUN)) == -1
    assert await pool.server.smembers(pool.keys.runs) == {RUN.encode()}
    assert jobs_of(await pool.take()) == ["after/0", "after/1", "after/2"]
    assert await pool.put(2) == Enqueued("same", 2)


async def test_what_is_left_of_a_cancelled_batch_is_cleared_away_so_that_its_run_can_be_forgotten(pool: Pool) -> None:
    await pool.put(3)
    await pool.give_back((await pool.take(1))[0])
    await pool.finish(0, 2)
    await pool.commit()
    assert pool.sweep(idle_ms=AT_ONCE_MS).forgotten == 0
    assert await pool.take() == []
    assert pool.sweep(idle_ms=AT_ONCE_MS).forgotten == 1


async def test_what_somebody_added_to_a_run_without_jobs_reaches_a_host(pool: Pool) -> None:
    await pool.put(1)
    await end_run(pool)
    await pool.server.xadd(pool.lane("low"), {"hello": "world"})
    [foreign] = await pool.take()
    assert foreign.fields == {b"hello": b"world"}
