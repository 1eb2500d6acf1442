"""Where jobs wait, and what ends them without a host's doing: cancellations, deadlines, policies nobody serves."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from delivery import HOUR_MS, RUN, Pool, ended, heard, jobs_of, next_of

from rollpool.schemas.scripts import (
    READY,
    GiveBack,
    Place,
    Record,
    RunOffer,
    Settled,
    delayed,
    exact,
    expire_async,
    give_back,
    parked,
    passed,
    pull,
)
from rollpool.schemas.scripts.finish import AT_ONCE, EXPIRE_CALLS

pytestmark = pytest.mark.both_servers

#: A time of the server that is over, and one that never comes.
PAST_MS, NEVER_MS = 1, 10**15
EVERYWHERE = [READY, delayed(NEVER_MS), parked(9), exact(9), passed(NEVER_MS)]


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    made = Pool(redis_url)
    yield made
    await made.close()


async def put_into(
    pool: Pool, place: Place, *, run: str = RUN, batch: str = "b", lane: str = "default", parts: int = 1
) -> None:
    """Enqueue a job and let it wait there."""
    await pool.put(1, run=run, batch=batch, lane=lane, parts=parts)
    for entry in await pool.take(parts, runs=[run]):
        assert await pool.give_back(entry, place)


def calls_of(pool: Pool, *commands: str) -> int:
    """How often the server has run these commands."""
    stats: Any = pool.blocking.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in commands)


# Exact


async def test_an_exact_job_goes_only_to_a_host_on_exactly_its_version(pool: Pool) -> None:
    await put_into(pool, exact(7))
    assert [await pool.take(version=version) for version in (6, 8, 0, 70)] == [[]] * 4
    assert jobs_of(await pool.take(version=7, by="b:1")) == ["b/0"]
    await pool.check("b")


async def test_exact_jobs_of_one_version_wait_beside_those_of_others(pool: Pool) -> None:
    for version in (9, 7, 8):
        await put_into(pool, exact(version), batch=f"for-{version}")
    assert jobs_of(await pool.take(version=8)) == ["for-8/0"]
    assert await pool.take(version=8) == []
    assert jobs_of(await pool.take(version=9)) == ["for-9/0"]
    await pool.check("for-7", "for-8", "for-9")


async def test_an_exact_job_is_stale_once_its_version_is_over_and_nobody_serves_it(pool: Pool) -> None:
    await put_into(pool, exact(5))
    await pool.publish(6)
    assert pool.sweep(6, 7).ended == 1
    [group] = await pool.results()
    assert (group.outcome, group.policy_version) == ("stale", 5)
    assert group.error == "exact job for policy 5, which no host serves any more"
    assert await pool.places() == {}
    assert pool.sweep(6).ended == 0
    await pool.check("b")


async def test_an_exact_job_of_a_version_that_a_host_serves_waits_on(pool: Pool) -> None:
    await put_into(pool, exact(5))
    await pool.publish(6)
    assert pool.sweep(5, 6).ended == 0
    assert jobs_of(await pool.take(version=5)) == ["b/0"]


@pytest.mark.parametrize("version", [6, 7])
async def test_an_exact_job_of_the_current_policy_or_a_newer_one_waits_on(pool: Pool, version: int) -> None:
    await put_into(pool, exact(version))
    await pool.publish(6)
    assert pool.sweep().ended == 0
    assert jobs_of(await pool.take(version=version)) == ["b/0"]


async def test_before_the_first_policy_no_exact_job_is_stale(pool: Pool) -> None:
    await put_into(pool, exact(0))
    assert pool.sweep(4).ended == 0
    await pool.check("b")


async def test_many_exact_jobs_that_wait_for_a_host_hide_no_stale_one(pool: Pool) -> None:
    size = AT_ONCE + 50
    await put_into(pool, exact(6), batch="stale")
    await pool.put(size)
    entries = await pool.take(size)
    back = [GiveBack(entry=entry, record=Record(), place=exact(5)) for entry in entries]
    await give_back(pool.client, pool.keys, consumer="a:1", jobs=back)
    await pool.publish(7)
    assert pool.sweep(5).ended == 1
    assert await pool.outcomes("stale") == {"0": "stale"}
    assert pool.sweep(7).ended == AT_ONCE
    assert pool.sweep(7).ended == 50
    await pool.check("b", "stale")


async def test_hosts_hear_once_of_a_batch_that_became_stale(pool: Pool) -> None:
    await pool.put(3)
    for entry in await pool.take():
        await pool.give_back(entry, exact(5))
    await pool.publish(6)
    async with heard(pool) as channel:
        assert pool.sweep(6).ended == 3
        assert await next_of(channel) == b"run:b"
        assert await channel.get_message(timeout=0) is None


async def test_each_run_has_a_current_policy_of_its_own_once_it_publishes_adapters(pool: Pool) -> None:
    for run in ("lora", "plain"):
        await put_into(pool, exact(8), run=run)
    await pool.publish(6)
    assert pool.sweep(6).ended == 0  # newer than the checkpoint: a host may still come to it
    await pool.server.set(pool.keys.run_policy("lora"), 9)
    assert pool.sweep(6).ended == 1
    assert await pool.outcomes(run="lora") == {"0": "stale"}
    assert await pool.outcomes(run="plain") == {"0": "open"}


async def test_an_adapter_serves_its_own_run_alone(pool: Pool) -> None:
    for run in ("lora", "other"):
        await put_into(pool, exact(8), run=run)
    await pool.publish(9)
    assert pool.sweep(9, adapters=[("lora", 8)]).ended == 1
    assert await pool.outcomes(run="other") == {"0": "stale"}
    assert pool.sweep(9, adapters=[("lora", 7)]).ended == 1
    assert await pool.outcomes(run="lora") == {"0": "stale"}


async def test_a_checkpoint_serves_every_run(pool: Pool) -> None:
    await put_into(pool, exact(8), run="lora")
    await pool.server.set(pool.keys.run_policy("lora"), 9)
    await pool.publish(10)
    assert pool.sweep(8, 10, adapters=[("lora", 9)]).ended == 0


async def test_a_checkpoint_that_ended_a_runs_adapters_makes_its_old_exact_jobs_stale(pool: Pool) -> None:
    """`policy:RUN` stays where it was: no adapter of that number can be published any more."""
    await put_into(pool, exact(11))
    await pool.server.set(pool.keys.run_policy(RUN), 10)
    await pool.publish(12)
    assert pool.sweep(12).ended == 1


async def test_a_run_without_any_policy_of_the_pool_has_its_adapters(pool: Pool) -> None:
    """They are on the hosts' own initial model."""
    await put_into(pool, exact(1))
    await pool.server.set(pool.keys.run_policy(RUN), 2)
    assert pool.sweep(0, adapters=[(RUN, 1)]).ended == 0
    assert pool.sweep(0, adapters=[(RUN, 2)]).ended == 1


async def test_many_runs_whose_exact_jobs_wait_hide_no_stale_one(pool: Pool) -> None:
    for at in range(30):
        await put_into(pool, exact(6), run=f"run-{at:02}")
    await put_into(pool, exact(7), run="run-07", batch="stale")
    await pool.publish(8)
    assert pool.sweep(6).ended == 1
    assert await pool.outcomes("stale", run="run-07") == {"0": "stale"}


# Offers


async def test_each_run_is_offered_what_the_host_serves_to_it(pool: Pool) -> None:
    """A host on checkpoint 6, with adapters 7 and 9 of one run."""
    for run in ("lora", "plain"):
        for place in (parked(6), parked(9), parked(10), exact(6), exact(7), exact(8), exact(9)):
            await put_into(pool, place, run=run, batch=f"{place.name}-{place.score}")
    pulled = await pool.pull_offered(RunOffer("lora", 9, (6, 7, 9)), RunOffer("plain", 6, (6,)), wanted=20)
    jobs = {run: {entry.job for entry in pulled.entries if entry.run == run} for run in ("lora", "plain")}
    assert jobs == {
        "lora": {"parked-6/0", "parked-9/0", "exact-6/0", "exact-7/0", "exact-9/0"},
        "plain": {"parked-6/0", "exact-6/0"},
    }


@pytest.mark.parametrize("place", [None, READY, parked(0), exact(5)], ids=str)
async def test_a_host_that_serves_nothing_to_a_run_gets_none_of_its_jobs(pool: Pool, place: Place | None) -> None:
    for run in ("lora", "other"):
        await pool.put(1, run=run)
        if place is not None:
            [entry] = await pool.take(runs=[run])
            await pool.give_back(entry, place)
    offers = [RunOffer("lora", 5, (5,)), RunOffer("other", None, ())]
    assert [entry.run for entry in (await pool.pull_offered(*offers)).entries] == ["lora"]
    assert (await pool.pull_offered(*offers)).entries == []
    assert [entry.run for entry in await pool.take(runs=["lora", "other"])] == ["other"]
    assert await pool.take(runs=[]) == []


async def test_a_run_over_its_bound_does_not_hide_that_another_has_none(pool: Pool) -> None:
    await pool.put(2)
    await pool.settle(*map(ended, await pool.take(1)))
    pulled = await pool.pull_offered(RunOffer(RUN, None, ()), bound=1)
    assert (pulled.entries, pulled.full) == ([], frozenset())
    pulled = await pool.pull_offered(RunOffer(RUN, 5, (5,)), bound=1)
    assert (pulled.entries, pulled.full) == ([], frozenset({RUN}))


async def test_what_waits_for_a_policy_is_released_of_every_run_that_is_reached(pool: Pool) -> None:
    """No run's many keep another's few waiting."""
    runs = [f"run-{at}" for at in range(3)]
    for run in runs:
        await pool.put(20, run=run)
        entries = await pool.take(20, runs=[run])
        back = [GiveBack(entry=entry, record=Record(), place=parked(7)) for entry in entries]
        await give_back(pool.client, pool.keys, consumer="a:1", jobs=back)
    taken = await pool.take(6, version=7, runs=runs)
    assert sorted(entry.run for entry in taken) == sorted(runs * 2)


async def test_a_parked_job_of_a_more_urgent_lane_goes_before_the_backlog_of_others(pool: Pool) -> None:
    await put_into(pool, parked(7), run="one", batch="urgent", lane="high")
    await pool.put(5, run="other")
    assert [entry.run for entry in await pool.take(1, version=7, runs=["other", "one"])] == ["one"]


async def test_one_call_releases_so_much_and_the_next_goes_on(pool: Pool) -> None:
    """A new policy lets very many jobs go at once: the server serves others between."""
    runs = [f"run-{at}" for at in range(6)]
    for run in runs:
        await pool.put(1500, run=run)
        entries = await pool.take(1500, runs=[run])
        back = [GiveBack(entry=entry, record=Record(), place=parked(7)) for entry in entries]
        await give_back(pool.client, pool.keys, consumer="a:1", jobs=back)
    assert await pool.take(1500, version=6, runs=runs) == []
    taken = await pool.take(1500, version=7, runs=runs)
    assert len(taken) == 1500
    left = sum([await pool.server.zcard(pool.keys.parked(run)) for run in runs])
    assert left >= 6 * 1500 - 2 * 4000
    while more := await pool.take(1500, version=7, runs=runs):
        taken += more
    assert len({(entry.run, entry.job) for entry in taken}) == len(taken) == 6 * 1500


# Ready


@pytest.mark.parametrize("place", [READY, delayed(PAST_MS), parked(5), exact(5)], ids=lambda place: place.name)
async def test_what_waited_goes_before_the_backlog_of_its_lane(pool: Pool, place: Place) -> None:
    await put_into(pool, place, batch="waited", lane="low")
    await pool.put(2, batch="backlog", lane="low")
    await pool.put(1, batch="urgent", lane="high")
    assert jobs_of(await pool.take()) == ["urgent/0", "waited/0", "backlog/0", "backlog/1"]
    await pool.check("waited", "backlog", "urgent")


async def test_what_a_worker_lost_twice_is_left_to_the_others_in_its_place(pool: Pool) -> None:
    await pool.put(4)
    records = [Record(losses=2, avoid="a"), Record(losses=1, avoid="a"), Record(losses=2, avoid="b"), Record()]
    for entry, record in zip(await pool.take(4), records, strict=True):
        assert await pool.give_back(entry, record=record)
    offers = [RunOffer(RUN, 5, (5,))]
    mine = await pull(pool.client, pool.keys, offers=offers, consumer="a:1", wanted=2, leave="a")
    assert jobs_of(mine.entries) == ["b/1", "b/2"]
    theirs = await pull(pool.client, pool.keys, offers=offers, consumer="b:1", wanted=1, leave="b")
    assert jobs_of(theirs.entries) == ["b/0"], "it went first, and kept its place"
    rest = await pull(pool.client, pool.keys, offers=offers, consumer="a:1", wanted=9)
    assert jobs_of(rest.entries) == ["b/3"]


async def test_a_worker_that_leaves_nothing_to_others_gets_what_it_lost(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.give_back(entry, record=Record(losses=5, avoid="a"))
    offers = [RunOffer(RUN, 5, (5,))]
    assert not (await pull(pool.client, pool.keys, offers=offers, consumer="a:1", wanted=9, leave="a")).entries
    assert jobs_of((await pull(pool.client, pool.keys, offers=offers, consumer="a:1", wanted=9)).entries) == ["b/0"]


async def pass_on(pool: Pool, worker: str, until_ms: int, count: int = 1) -> None:
    """Jobs 0 to `count` - 1 wait for this worker."""
    await pool.put(count)
    for entry in await pool.take(count):
        assert await pool.give_back(entry, passed(until_ms), record=Record(passed=worker))


async def test_what_is_passed_on_is_for_its_worker_alone_until_its_time(pool: Pool) -> None:
    soon = await pool.now_ms() + 600_000
    await pass_on(pool, "a", soon, 3)
    assert await pool.take(by="b:1") == []
    mine = await pool.take(2, by="a:7")
    assert jobs_of(mine) == ["b/0", "b/1"]
    assert {entry.record for entry in mine} == {Record(passed="a")}, "it cost nothing"
    assert 600_000 <= await pool.server.pexpiretime(pool.keys.passed("a")) - (soon - 600_000) <= 602_000
    await pool.server.zadd(pool.keys.delayed, {"run:default:b/2": PAST_MS})  # its time comes
    assert jobs_of(await pool.take(by="b:1")) == ["b/2"]
    await pool.check("b")


async def test_a_job_whose_time_was_over_and_that_is_delayed_since_waits_for_its_new_time(pool: Pool) -> None:
    await pass_on(pool, "a", await pool.now_ms() + 600_000)
    name = "run:default:b/0"
    await pool.server.zadd(pool.keys.delayed, {name: NEVER_MS})  # a loss elsewhere: its backoff
    assert await pool.take(by="a:1") == []
    assert await pool.server.zscore(pool.keys.delayed, name) == NEVER_MS
    await pool.check("b")


async def test_what_is_passed_on_and_cancelled_is_no_more(pool: Pool) -> None:
    await pass_on(pool, "a", await pool.now_ms() + 600_000, 2)
    assert await pool.finish(0, 0) == 1
    assert jobs_of(await pool.take(by="a:1")) == ["b/1"]
    assert await pool.server.exists(pool.keys.passed("a")) == 0
    await pool.check("b")


async def test_what_a_dead_worker_had_was_passed_on_all_the_same(pool: Pool) -> None:
    await pass_on(pool, "a", await pool.now_ms() + 600_000)
    await pool.take(by="a:1")
    assert pool.reclaim() == 1
    [entry] = await pool.take(by="b:1")
    assert entry.record == Record(attempts=1, losses=1, avoid="a", history="lost\n", passed="a")


async def test_a_key_of_another_type_keeps_nobody_from_being_asked(pool: Pool) -> None:
    await pool.server.set(pool.keys.passed("a"), "mine")
    assert await pool.take(by="a:1") == []
    await pass_on(pool, "a", await pool.now_ms() + 600_000)
    assert jobs_of(await pool.take(by="a:1")) == ["b/0"]


async def test_what_waited_off_its_lane_is_leased_and_reclaimed_like_any_other(pool: Pool) -> None:
    await put_into(pool, READY)
    [entry] = await pool.take(by="a:1")
    await pool.leave_idle(entry, by="a:1", ms=HOUR_MS)
    assert pool.renew(entry, by="a:1") == set()
    assert pool.reclaim(idle_ms=HOUR_MS) == 0
    assert pool.reclaim() == 1
    [again] = await pool.take(by="b:1")
    assert again.record == Record(attempts=1, losses=1, avoid="a", history="lost\n")
    assert pool.renew(entry, by="a:1") == {entry.id}
    await pool.check("b")


async def test_hosts_that_take_what_waits_at_once_share_it(pool: Pool) -> None:
    await pool.put(20)
    for entry in await pool.take(20):
        await pool.give_back(entry)
    shares = await asyncio.gather(*(pool.take(5, by=f"{host}:1") for host in "abcd"))
    assert sorted(job for share in shares for job in jobs_of(share)) == sorted(f"b/{index}" for index in range(20))
    await pool.check("b")


# Finish


@pytest.mark.parametrize("place", EVERYWHERE, ids=lambda place: place.name)
async def test_a_job_that_waits_is_cancelled_and_leaves_nothing(pool: Pool, place: Place) -> None:
    await put_into(pool, place)
    assert await pool.finish(0, 0) == 1
    assert await pool.places() == {}
    assert not await pool.server.exists(
        pool.keys.waiting, pool.keys.delayed, pool.keys.parked(RUN), pool.keys.exact(RUN)
    )
    assert await pool.take(version=9) == []
    assert await pool.server.keys(pool.keys.ready("run", "*")) == []
    await pool.check("b")


@pytest.mark.parametrize("place", EVERYWHERE, ids=lambda place: place.name)
async def test_the_parts_of_a_group_that_wait_are_cancelled_with_it(pool: Pool, place: Place) -> None:
    await put_into(pool, place, parts=3)
    assert await pool.finish(0, 0) == 1
    assert not await pool.server.exists(
        pool.keys.waiting, pool.keys.delayed, pool.keys.parked(RUN), pool.keys.exact(RUN)
    )
    assert await pool.take(version=9) == []
    await pool.check("b", parts=3)


async def test_a_cancelled_group_says_why_and_who_asked_for_it(pool: Pool) -> None:
    await pool.put(1, policy=12)
    await pool.finish(0, 0)
    [group] = await pool.results()
    assert (group.id, group.outcome, group.policy_version) == ("b/0", "cancelled", 12)
    assert (group.error, group.worker, group.samples) == ("not wanted", "", ())


async def test_only_the_open_jobs_of_a_range_are_cancelled(pool: Pool) -> None:
    await pool.put(6)
    entries = await pool.take(3)
    await pool.settle(*map(ended, entries[:2]))
    assert await pool.finish(1, 4) == 3
    assert await pool.outcomes() == {
        **dict.fromkeys("01", "ok"),
        **dict.fromkeys("234", "cancelled"),
        "5": "open",
    }
    assert await pool.settle(ended(entries[2])) == [Settled(False, "cancelled")]
    assert jobs_of(await pool.take()) == ["b/5"]
    await pool.check("b")


@pytest.mark.parametrize(("first", "last"), [(0, 2**62), (-(2**62), 2**62), (-5, 10**9)])
async def test_a_range_beyond_the_batch_ends_what_there_is(pool: Pool, first: int, last: int) -> None:
    await pool.put(3)
    assert await pool.finish(first, last) == 3
    assert await pool.finish(first, last) == 0
    await pool.check("b")


@pytest.mark.parametrize(("first", "last"), [(3, 2**62), (2, 1), (-9, -1)])
async def test_a_range_without_jobs_ends_none(pool: Pool, first: int, last: int) -> None:
    await pool.put(3)
    assert await pool.finish(first, last) == 0
    assert await pool.finish(0, 2**62, batch="unknown") == 0
    await pool.check("b")


async def test_a_batch_of_thousands_is_cancelled_in_bounded_steps(pool: Pool) -> None:
    size = 3 * AT_ONCE + 7
    await pool.put(size)
    await pool.finish(0, 0)  # the server knows the script from here on
    before = calls_of(pool, "evalsha")
    assert await pool.finish(0, 2**62) == size - 1
    assert calls_of(pool, "evalsha") - before == 4
    assert await pool.take() == []
    assert await pool.server.xlen(pool.lane()) == 0
    await pool.check("b")


async def test_a_cancelled_batch_keeps_no_pull_busy_for_long_and_hides_nothing(pool: Pool) -> None:
    size = 12_000
    await pool.put(size)
    await pool.put(1, batch="behind")
    assert await pool.finish(0, size) == size
    before = calls_of(pool, "evalsha", "eval")
    assert jobs_of(await pool.take(1)) == ["behind/0"]
    assert calls_of(pool, "evalsha", "eval") - before >= 3
    await pool.check("b", "behind")


async def test_hosts_hear_of_what_was_ended_from_outside(pool: Pool) -> None:
    await pool.put(2)
    async with heard(pool) as channel:
        await pool.finish(0, 1)
        assert await next_of(channel) == b"run:b"
        await pool.finish(0, 1)
        assert await channel.get_message(timeout=0) is None


# Deadlines


async def test_a_job_whose_deadline_is_over_expires_wherever_it_is(pool: Pool) -> None:
    await pool.put(6, deadline_ms=PAST_MS)
    entries = await pool.take(5)
    for entry, place in zip(entries, EVERYWHERE, strict=False):
        await pool.give_back(entry, place)
    assert pool.expire() == 6
    assert {group.error for group in await pool.results()} == {"its deadline is over"}
    assert await pool.settle(ended(entries[4])) == [Settled(False, "expired")]
    assert await pool.take(version=9) == []
    assert await pool.places() == {}
    await pool.check("b")


async def test_a_deadline_waits_for_its_grace(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the module's full name: in its package, `finish` is the function.
    monkeypatch.setattr(sys.modules["rollpool.schemas.scripts.finish"], "EXPIRE_GRACE_MS", HOUR_MS)
    now = await pool.now_ms()
    await pool.put(1, batch="over", deadline_ms=now - HOUR_MS)
    await pool.put(1, batch="near", deadline_ms=now - 1)
    assert pool.expire() == 1
    assert (await pool.outcomes("over"), await pool.outcomes("near")) == ({"0": "expired"}, {"0": "open"})
    await pool.check("over", "near")


async def test_what_was_settled_in_time_stays_as_it_is(pool: Pool) -> None:
    await pool.put(3, deadline_ms=PAST_MS)
    await pool.settle(*map(ended, await pool.take(2)))
    assert await expire_async(pool.client, pool.keys) == 1
    assert sorted((await pool.outcomes()).values()) == ["expired", "ok", "ok"]
    await pool.check("b")


async def test_a_batch_of_thousands_expires_in_bounded_steps(pool: Pool) -> None:
    size = 3 * AT_ONCE + 1
    await pool.put(size, deadline_ms=PAST_MS)
    await pool.put(2, batch="next", deadline_ms=PAST_MS + 1)
    before = calls_of(pool, "evalsha")
    assert pool.expire() == size + 2
    assert calls_of(pool, "evalsha") - before >= 4
    await pool.check("b", "next")


async def test_one_call_expires_no_more_than_it_may_and_the_next_goes_on(pool: Pool) -> None:
    size = EXPIRE_CALLS * AT_ONCE + 10
    await pool.put(size, deadline_ms=PAST_MS)
    assert pool.expire() == EXPIRE_CALLS * AT_ONCE
    assert pool.expire() == 10
    await pool.check("b")


async def test_hundreds_of_batches_expire_in_one_call(pool: Pool) -> None:
    for number in range(230):
        await pool.put(1, batch=f"b{number}", deadline_ms=PAST_MS)
    assert pool.expire() == 230
    assert not await pool.server.exists(pool.keys.deadlines)


async def test_a_group_of_many_parts_counts_as_many_when_it_expires(pool: Pool) -> None:
    batches = [f"b{number}" for number in range(30)]
    for batch in batches:
        await pool.put(1, batch=batch, parts=100, deadline_ms=PAST_MS)
    before = calls_of(pool, "evalsha", "eval")
    assert pool.expire() == 30
    assert calls_of(pool, "evalsha", "eval") - before >= 3
    assert await pool.take() == []
    await pool.check(*batches, parts=100)


async def test_when_no_deadline_is_over_to_expire_costs_one_look(pool: Pool) -> None:
    await pool.put(1, deadline_ms=await pool.now_ms() + HOUR_MS)
    pool.expire()
    commands = ("evalsha", "time", "zrangebyscore", "hmget", "zrem", "hset")
    before = [calls_of(pool, command) for command in commands]
    assert pool.expire() == 0
    assert [calls_of(pool, command) for command in commands] == [
        before[0] + 1,
        before[1] + 1,
        before[2] + 1,
        *before[3:],
    ]


async def test_a_committed_batch_has_no_deadline_any_more(pool: Pool) -> None:
    await pool.put(1, deadline_ms=await pool.now_ms() + HOUR_MS)
    await pool.settle(*map(ended, await pool.take()))
    await pool.commit()
    assert not await pool.server.exists(pool.keys.deadlines)
