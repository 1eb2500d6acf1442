"""The scripts of delivery on real servers: a job is settled once and never lost, whoever calls, however often."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from delivery import HOUR_MS, RUN, Pool, ended, jobs_of, with_record
from delivery_model import Model
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from redis.exceptions import RedisError

from rollpool.schemas import GROUP, LANES, Command, Policy, PromptJob
from rollpool.schemas.scripts import (
    Enqueued,
    Entry,
    GiveBack,
    Record,
    Settled,
    Settlement,
    delayed,
    enqueue,
    give_back,
    parked,
    publish,
    roll_back,
)
from rollpool.schemas.scripts.leases import RECLAIM_AT_MOST
from rollpool.schemas.wire import pack_model, unpack_command, unpack_job

pytestmark = pytest.mark.both_servers


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    made = Pool(redis_url)
    yield made
    await made.close()


# Enqueue


async def test_a_batch_is_on_the_stream_whole_and_a_person_can_read_it(pool: Pool) -> None:
    assert await pool.put(2, prompt="x" * 100) == Enqueued("new", 2)
    [_, (_, fields)] = await pool.server.xrange(pool.lane())
    body = fields.pop(b"body")
    assert fields == {b"job": b"b/1", b"policy": b"5", b"n": b"2", b"run": b"run", b"preview": b"x" * 80}
    assert unpack_job(body).id == "b/1"
    assert await pool.outcomes() == {"0": "open", "1": "open"}
    assert await pool.counters() == {"enqueued": 2, "open": 2}
    assert await pool.server.zrange(pool.keys.open_batches(RUN), 0, -1) == [b"b"]
    assert await pool.server.smembers(pool.keys.runs) == {b"run"}


async def test_the_same_batch_again_changes_nothing(pool: Pool) -> None:
    await pool.put(2)
    assert await pool.put(2) == Enqueued("same", 2)
    assert await pool.backlog() == 2
    await pool.check("b")


async def test_another_content_under_the_same_name_changes_nothing(pool: Pool) -> None:
    await pool.put(2)
    assert await pool.put(3, content="other") == Enqueued("other", 0)
    assert await pool.backlog() == 2
    await pool.check("b")


async def test_a_batch_over_the_limit_leaves_nothing_behind(pool: Pool) -> None:
    await pool.put(2)
    assert await pool.put(2, batch="c", limit=3) == Enqueued("full", 2)
    assert not await pool.server.exists(pool.keys.batch(RUN, "c"))
    assert await pool.backlog() == 2
    assert await pool.put(1, batch="c", limit=3) == Enqueued("new", 1)
    await pool.check("b", "c")


async def test_a_batch_larger_than_the_limit_is_let_into_an_empty_pool(pool: Pool) -> None:
    assert await pool.put(5, limit=3) == Enqueued("new", 5)


async def test_room_is_made_by_settling_and_not_by_pulling(pool: Pool) -> None:
    await pool.put(2)
    entries = await pool.take()
    assert (await pool.put(1, batch="c", limit=2)).answer == "full"
    await pool.settle(ended(entries[0]))
    assert (await pool.put(1, batch="c", limit=2)).answer == "new"


async def test_a_committed_batch_is_still_known_by_its_name(pool: Pool) -> None:
    await pool.put(1)
    await pool.settle(*map(ended, await pool.take()))
    assert await pool.commit() == 0
    assert await pool.put(1) == Enqueued("same", 1)
    assert await pool.take() == []


async def test_a_batch_of_a_hundred_thousand_jobs_is_enqueued_whole(pool: Pool) -> None:
    size = 100_000
    body = pack_model(PromptJob(run=RUN, batch="b", index=0, prompt="p", policy_version=5))
    answer = await enqueue(
        pool.client,
        pool.keys,
        run=RUN,
        batch="b",
        lane="low",
        content="c",
        policy=5,
        n=1,
        previews_and_bodies=["p", body] * size,
    )
    assert answer == Enqueued("new", size)
    assert await pool.server.xlen(pool.lane("low")) == size
    assert Counter((await pool.outcomes()).values()) == {"open": size}
    assert len(await pool.take(2000)) == 2000


@asynccontextmanager
async def no_memory(pool: Pool) -> AsyncIterator[None]:
    await pool.server.config_set("maxmemory", 1)
    try:
        yield
    finally:
        await pool.server.config_set("maxmemory", 0)


async def test_a_server_without_memory_takes_no_part_of_a_batch(pool: Pool) -> None:
    async with no_memory(pool):
        with pytest.raises(RedisError, match="maxmemory"):
            await pool.put(3)
    assert await pool.server.dbsize() == 0


async def test_a_server_without_memory_settles_later_and_commits_now(pool: Pool) -> None:
    await pool.put(1, batch="done")
    await pool.settle(*map(ended, await pool.take()))
    await pool.put(1)
    [entry] = await pool.take()
    async with no_memory(pool):
        with pytest.raises(RedisError, match="maxmemory"):
            await pool.settle(ended(entry))
        await pool.check("b", "done")
        assert await pool.commit("done") == 0
    assert await pool.settle(ended(entry)) == [Settled(True, "ok")]


# Pull


async def test_lanes_are_emptied_in_order_of_urgency(pool: Pool) -> None:
    for lane in reversed(LANES):
        await pool.put(2, batch=lane, lane=lane)
    assert jobs_of(await pool.take(3)) == ["high/0", "high/1", "default/0"]
    assert jobs_of(await pool.take(9)) == ["default/1", "low/0", "low/1"]
    assert await pool.take() == []


async def test_no_more_is_taken_than_is_wanted(pool: Pool) -> None:
    await pool.put(3)
    assert await pool.take(0) == []
    assert len(await pool.take(2)) == 2
    assert await pool.backlog() == 1


async def test_two_hosts_never_get_the_same_job(pool: Pool) -> None:
    await pool.put(4)
    one, other = await asyncio.gather(pool.take(2, by="a:1"), pool.take(2, by="b:1"))
    assert sorted(jobs_of([*one, *other])) == ["b/0", "b/1", "b/2", "b/3"]


async def test_a_parked_job_waits_for_a_host_that_serves_its_version(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    record = Record(attempts=1, faults=2, losses=3, company=8, avoid="a", history="lost\n")
    assert await pool.give_back(entry, parked(7), record=record)
    assert await pool.take(version=6) == []
    [back] = await pool.take(version=7, by="b:1")
    assert (jobs_of([back]), back.record) == (["b/0"], record)
    assert back.body == entry.body
    await pool.check("b")


async def test_a_job_that_waited_is_read_from_the_stream_of_retries(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.give_back(entry)
    [back] = await pool.take()
    assert (entry.stream, back.stream) == (pool.lane(), pool.keys.retries)
    assert await pool.settle(ended(back)) == [Settled(True, "ok")]
    assert await pool.server.xlen(pool.keys.retries) == 0
    assert await pool.pending() == set()
    await pool.check("b")


async def test_what_a_host_was_given_of_the_retries_nobody_who_reads_on_is_given_again(pool: Pool) -> None:
    await pool.put(2)
    for entry in await pool.take():
        await pool.give_back(entry)
    for _ in range(2):
        await pool.take(1)
        assert await pool.server.xreadgroup(GROUP, "other:1", {pool.keys.retries: ">"}) == []


async def test_a_job_that_waited_keeps_its_lane_wherever_it_goes(pool: Pool) -> None:
    await pool.put(1, lane="low")
    await pool.put(1, batch="urgent")
    for _ in range(3):
        entries = await pool.take()
        assert jobs_of(entries) == ["urgent/0", "b/0"]
        for entry in entries:
            await pool.give_back(entry)
    assert pool.reclaim() == 0
    await pool.take()
    assert pool.reclaim() == 2
    assert jobs_of(await pool.take()) == ["urgent/0", "b/0"]


async def test_a_parked_job_is_released_before_the_backlog_is_read(pool: Pool) -> None:
    await pool.put(1, batch="parked")
    await pool.give_back((await pool.take())[0], parked(7))
    await pool.put(1, batch="waiting")
    assert jobs_of(await pool.take(1, version=7)) == ["parked/0"]


async def test_a_parked_job_of_a_lane_waits_behind_the_lanes_before_it(pool: Pool) -> None:
    await pool.put(1, batch="parked", lane="low")
    await pool.give_back((await pool.take())[0], parked(7))
    await pool.put(1, batch="urgent")
    assert jobs_of(await pool.take(1, version=7)) == ["urgent/0"]
    await pool.check("parked", "urgent")
    assert jobs_of(await pool.take(1, version=6)) == ["parked/0"]


async def test_no_more_parked_jobs_are_released_than_are_wanted(pool: Pool) -> None:
    await pool.put(3)
    for entry in await pool.take():
        await pool.give_back(entry, parked(7))
    assert len(await pool.take(2, version=7)) == 2
    assert await pool.server.zcard(pool.keys.parked(RUN)) == 1


async def test_a_delayed_job_waits_for_the_servers_time(pool: Pool) -> None:
    await pool.put(2)
    due, later = await pool.take()
    now = await pool.now_ms()
    await pool.give_back(due, delayed(now))
    await pool.give_back(later, delayed(now + HOUR_MS))
    assert jobs_of(await pool.take()) == ["b/0"]
    assert await pool.server.zcard(pool.keys.delayed) == 1


async def test_entries_of_settled_jobs_are_discarded_where_they_are_met(pool: Pool) -> None:
    await pool.put(3)
    assert await pool.finish(0, 0) == 1
    assert jobs_of(await pool.take(2)) == ["b/1", "b/2"]
    assert await pool.server.xlen(pool.lane()) == 2
    await pool.check("b")


async def test_what_somebody_added_by_hand_reaches_the_host_to_be_judged(pool: Pool) -> None:
    await pool.put(1)
    await pool.server.xadd(pool.lane(), {"hello": "world"})
    [_, foreign] = await pool.take()
    assert foreign.fields == {b"hello": b"world"}


@pytest.mark.parametrize("lose", ["flushall", "delete", "destroy group"])
async def test_a_stream_that_the_server_lost_begins_again(pool: Pool, lose: str) -> None:
    await pool.put(1)
    if lose == "flushall":
        await pool.server.flushall()
    elif lose == "delete":
        await pool.server.delete(pool.lane())
    else:
        await pool.server.xgroup_destroy(pool.lane(), GROUP)
    lost = lose != "destroy group"
    assert len(await pool.take()) == (0 if lost else 1)
    await pool.put(1, batch="after")
    assert jobs_of(await pool.take()) == ["after/0"]


async def test_a_stream_of_retries_that_the_server_lost_begins_again(pool: Pool) -> None:
    await pool.put(2)
    first, second = await pool.take()
    await pool.give_back(first)
    [first] = await pool.take()
    await pool.server.xgroup_destroy(pool.keys.retries, GROUP)
    await pool.give_back(second)
    [second] = await pool.take()
    assert pool.renew(first, second) == {first.id}
    assert await pool.settle(ended(first), ended(second)) == [Settled(True, "ok")] * 2


# Settle


async def test_a_job_is_settled_with_its_result_and_its_counts(pool: Pool) -> None:
    await pool.put(2)
    first, second = await pool.take()
    settled = await pool.settle(ended(first, tokens=3), ended(second, "failed"))
    assert settled == [Settled(True, "ok"), Settled(True, "failed")]
    assert await pool.outcomes() == {"0": "ok", "1": "failed"}
    assert await pool.counters() == {
        "enqueued": 2,
        "open": 0,
        "ok": 1,
        "failed": 1,
        "samples": 1,
        "tokens": 3,
        "unread": sum(len(pack_model(group)) for group in await pool.results()),
    }
    assert [group.outcome for group in await pool.results()] == ["ok", "failed"]
    assert await pool.server.xlen(pool.lane()) == 0
    assert await pool.dead() == []
    await pool.check("b")


async def test_settling_again_answers_what_was_recorded_and_changes_nothing(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.settle(ended(entry))
    before = await pool.counters()
    assert await pool.settle(ended(entry, "failed", dead="late")) == [Settled(False, "ok")]
    assert await pool.counters() == before
    assert await pool.dead() == []
    await pool.check("b")


async def test_one_call_that_names_a_job_twice_settles_it_once(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    assert await pool.settle(ended(entry), ended(entry, "stale")) == [Settled(True, "ok"), Settled(False, "ok")]
    await pool.check("b")


async def test_of_two_hosts_the_first_finisher_wins(pool: Pool) -> None:
    await pool.put(1)
    [early] = await pool.take(by="a:1")
    assert pool.reclaim() == 1
    [late] = await pool.take(by="b:1")
    assert await pool.settle(ended(early, worker="a")) == [Settled(True, "ok")]
    assert await pool.settle(ended(late, "failed", worker="b")) == [Settled(False, "ok")]
    assert [group.worker for group in await pool.results()] == ["a"]
    assert await pool.server.xlen(pool.lane()) == 0
    await pool.check("b")


async def test_a_job_settled_by_a_late_host_is_not_delivered_again(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    pool.reclaim()
    await pool.settle(ended(entry))
    assert await pool.take(by="b:1") == []
    assert await pool.server.xlen(pool.lane()) == 0


async def test_concurrent_settlements_of_one_job_settle_it_once(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    replies = await asyncio.gather(*(pool.settle(ended(entry, worker=f"w{host}")) for host in range(8)))
    assert sum(settled.now for [settled] in replies) == 1
    assert len(await pool.results()) == 1


async def test_a_job_of_an_unknown_batch_is_gone_and_its_entry_too(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.server.delete(pool.keys.batch(RUN, "b"))
    assert await pool.settle(ended(entry)) == [Settled(False, "gone")]
    assert await pool.server.xlen(pool.lane()) == 0
    assert await pool.results() == []


async def test_after_commit_a_late_host_meets_the_recorded_outcome(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.settle(ended(entry))
    await pool.commit()
    assert await pool.settle(ended(entry)) == [Settled(False, "ok")]
    assert await pool.results() == []


async def test_a_dead_letter_says_why_and_can_be_sent_again(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    settlement = ended(entry, "failed", dead="it crashed three engines")
    await pool.settle(settlement)
    await pool.settle(settlement)
    [letter] = await pool.dead()
    assert letter == {**entry.fields, b"error": b"it crashed three engines", b"worker": b"a"}


async def test_a_dead_letter_whose_entry_was_reclaimed_has_its_payload_all_the_same(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    pool.reclaim()
    await pool.settle(ended(entry, "failed", dead="too late"))
    [letter] = await pool.dead()
    expected = {b"error": b"too late", b"worker": b"a", b"job": b"b/0", b"run": RUN.encode(), b"body": entry.body}
    assert letter == expected


async def test_a_dead_letter_of_an_unknown_batch_is_kept_once(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.server.delete(pool.keys.batch(RUN, "b"))
    settlement = ended(entry, "failed", dead="not a job")
    await pool.settle(settlement)
    await pool.settle(settlement)
    assert [letter[b"body"] for letter in await pool.dead()] == [entry.body]


async def test_a_settlement_without_an_entry_settles_a_job_wherever_it_is(pool: Pool) -> None:
    await pool.put(2)
    [held] = await pool.take(1)
    cancel = Settlement(Entry(held.stream, "", {}), ended(held, "cancelled").group)
    assert await pool.settle(cancel) == [Settled(True, "cancelled")]
    assert await pool.settle(ended(held)) == [Settled(False, "cancelled")]
    assert await pool.settle(cancel) == [Settled(False, "cancelled")]
    assert jobs_of(await pool.take()) == ["b/1"]
    await pool.check("b")


async def test_a_late_host_settles_a_job_that_waits_to_be_run_again(pool: Pool) -> None:
    await pool.put(3)
    entries = await pool.take(by="a:1")
    assert pool.reclaim() == 3
    waiting = await pool.take(2, by="b:1")
    await pool.give_back(waiting[0], delayed(10**15), by="b:1")
    await pool.give_back(waiting[1], parked(9), by="b:1")
    assert await pool.settle(*map(ended, entries)) == [Settled(True, "ok")] * 3
    assert await pool.take(version=9) == []
    assert not await pool.server.exists(pool.keys.waiting, pool.keys.delayed, pool.keys.parked(RUN))
    await pool.check("b")


async def test_settling_nothing_is_no_error(pool: Pool) -> None:
    assert await pool.settle() == []


async def test_one_call_settles_jobs_of_several_batches_lanes_and_runs(pool: Pool) -> None:
    runs = ("one", "two")
    for run in runs:
        for lane in LANES:
            await pool.put(3, run=run, batch=lane, lane=lane)
    entries = await pool.take(100, runs=runs)
    assert await pool.settle(*map(ended, entries)) == [Settled(True, "ok")] * 18
    await pool.check_runs({run: dict.fromkeys(LANES, 1) for run in runs})
    assert await pool.pending(runs) == set()


async def test_many_settlements_of_one_call_are_answered_in_order(pool: Pool) -> None:
    await pool.put(600)
    entries = await pool.take(600)
    await pool.settle(*map(ended, entries[::2]))
    replies = await pool.settle(*map(ended, entries))
    assert [settled.now for settled in replies] == [False, True] * 300
    await pool.check("b")


# Give back


async def test_a_job_given_back_is_delivered_again_at_no_charge(pool: Pool) -> None:
    await pool.put(2)
    [entry] = await pool.take(1)
    assert await pool.give_back(entry)
    [back, other] = await pool.take(by="b:1")
    assert jobs_of([back, other]) == ["b/0", "b/1"]
    assert back.record == entry.record == Record()
    await pool.check("b")


async def test_jobs_given_back_keep_their_order(pool: Pool) -> None:
    await pool.put(5)
    for entry in await pool.take(4):
        await pool.give_back(entry)
    assert jobs_of(await pool.take(5)) == ["b/0", "b/1", "b/2", "b/3", "b/4"]


async def test_what_delivery_cost_is_kept_however_often_a_job_moves(pool: Pool) -> None:
    await pool.put(1)
    for attempts in range(1, 4):
        [entry] = await pool.take()
        record = with_record(entry, attempts=attempts, faults=2 * attempts, history=f"{entry.record.history}lost\n")
        await pool.give_back(entry, record=record, done=b"samples" if attempts == 2 else b"")
        assert entry.done == (b"samples" if attempts == 3 else b"")
    [entry] = await pool.take()
    assert entry.record == Record(attempts=3, faults=6, history="lost\n" * 3)
    ours = {b"job", b"policy", b"n", b"run", b"lane", b"preview", b"body"}
    assert set(entry.fields) == ours | {name.encode() for name in Record().fields()}


async def test_giving_back_twice_does_it_once(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    assert await pool.give_back(entry)
    assert not await pool.give_back(entry)
    await pool.check("b")


async def test_what_another_host_holds_by_now_cannot_be_given_back(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take(by="a:1")
    pool.reclaim()
    [theirs] = await pool.take(by="b:1")
    assert not await pool.give_back(entry, by="a:1")
    assert not await pool.give_back(theirs, by="a:1")
    assert pool.renew(theirs, by="b:1") == set()
    await pool.check("b")


async def test_a_settled_job_is_not_revived(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.finish(0, 0)
    assert not await pool.give_back(entry)
    assert await pool.places() == {}


async def test_giving_back_to_a_server_that_lost_everything_is_harmless(pool: Pool) -> None:
    await pool.put(2)
    entries = await pool.take()
    await pool.server.flushall()
    assert not await pool.give_back(entries[0])
    assert await pool.server.dbsize() == 0


async def test_many_jobs_are_given_back_in_one_call(pool: Pool) -> None:
    await pool.put(600)
    entries = await pool.take(600)
    jobs = [GiveBack(entry=entry, record=Record()) for entry in entries]
    assert await give_back(pool.client, pool.keys, consumer="a:1", jobs=jobs) == [True] * 600
    assert await pool.backlog() == 0
    assert len(await pool.take(600)) == 600
    await pool.check("b")


# Leases


async def test_renewal_starts_the_lease_anew(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.leave_idle(entry, by="a:1", ms=HOUR_MS)
    assert pool.renew(entry) == set()
    assert pool.reclaim(idle_ms=HOUR_MS) == 0


async def test_renewal_takes_nothing_back_from_a_new_owner(pool: Pool) -> None:
    await pool.put(2)
    mine, lost = await pool.take(by="a:1")
    await pool.leave_idle(lost, by="a:1", ms=HOUR_MS)
    assert pool.reclaim(idle_ms=HOUR_MS) == 1
    [theirs] = await pool.take(by="b:1")
    assert pool.renew(mine, lost, theirs, by="a:1") == {lost.id, theirs.id}
    assert pool.renew(theirs, by="b:1") == set()


async def test_thousands_of_leases_are_renewed_in_one_call(pool: Pool) -> None:
    await pool.put(5000)
    entries = await pool.take(5000)
    assert pool.renew(*entries) == set()
    assert await pool.finish(0, 2499) == 2500
    assert pool.renew(*entries[::-1]) == {entry.id for entry in entries[:2500]}
    assert await pool.pending() == {(entry.stream, entry.id) for entry in entries[2500:]}


async def test_renewal_tells_and_removes_what_was_settled_elsewhere(pool: Pool) -> None:
    await pool.put(4)
    by_host, by_trainer, kept, unnamed = await pool.take()
    await pool.settle(Settlement(Entry(by_host.stream, "", {}), ended(by_host).group))
    await pool.finish(1, 1)
    assert pool.renew(by_host, by_trainer, kept) == {by_host.id, by_trainer.id}
    assert await pool.pending() == {(kept.stream, kept.id), (unnamed.stream, unnamed.id)}
    assert await pool.server.xlen(pool.lane()) == 2
    assert pool.renew(by_host, by_trainer, kept) == {by_host.id, by_trainer.id}


async def test_renewal_keeps_what_is_not_a_job(pool: Pool) -> None:
    await pool.put(1)
    await pool.server.xadd(pool.lane(), {"hello": "world"})
    entries = await pool.take()
    assert pool.renew(*entries) == set()


async def test_renewal_asks_only_for_what_it_names(pool: Pool) -> None:
    await pool.put(3)
    first, middle, last = await pool.take()
    await pool.leave_idle(middle, by="a:1", ms=HOUR_MS)
    assert pool.renew(last, first) == set()
    assert pool.reclaim(idle_ms=HOUR_MS) == 1
    assert pool.renew(middle) == {middle.id}


async def test_on_a_server_that_lost_everything_every_lease_is_lost(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.server.flushall()
    assert pool.renew(entry) == {entry.id}
    assert pool.reclaim() == 0


async def test_reclaiming_charges_one_attempt_and_no_fault(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.give_back(entry, record=Record(attempts=2, faults=1, losses=3, history="before\n"), done=b"samples")
    [entry] = await pool.take(by="tpu-1:host@7-8")
    assert pool.reclaim(reason="its lease ended") == 1
    [back] = await pool.take(by="b:1")
    history = "before\nits lease ended\n"
    assert back.record == Record(attempts=3, faults=1, losses=4, company=1, avoid="tpu-1", history=history)
    assert (back.body, back.done) == (entry.body, b"samples")
    await pool.check("b")


@pytest.mark.parametrize(
    ("losses", "before", "after"),
    [
        (0, None, None),
        (1, None, None),
        (1, 64, 64),
        (2, None, 8),
        (2, 64, 8),
        (2, 3, 3),
        (3, None, 1),
        (3, 8, 1),
        (7, 64, 1),
    ],
)
async def test_two_losses_are_nobodys_fault_and_from_the_third_on_company_shrinks(
    pool: Pool, losses: int, before: int | None, after: int | None
) -> None:
    await pool.put(20)
    suspect, *_ = await pool.take(20)
    await pool.give_back(suspect, record=Record(attempts=losses, losses=losses, company=before))
    await pool.take(1)
    assert pool.reclaim() == 20
    [record] = [entry.record for entry in await pool.take(20) if entry.job == suspect.job]
    assert (record.company, record.attempts, record.faults, record.losses) == (after, losses + 1, 0, losses + 1)


async def test_a_job_that_ran_alone_is_charged_itself(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.give_back(entry, record=Record(attempts=2, losses=2, company=1))
    for faults in (1, 2):
        await pool.take()
        assert pool.reclaim() == 1
        [entry] = await pool.take()
        expected = Record(attempts=2, faults=faults, losses=2 + faults, company=1, avoid="a", history="lost\n" * faults)
        assert entry.record == expected


@pytest.mark.parametrize("other", ["same stream", "lane", "run"])
async def test_a_job_that_waited_for_the_others_of_its_host_to_leave_is_charged_nothing(pool: Pool, other: str) -> None:
    runs = ("one", "two")
    await pool.put(1, run="one", batch="suspect")
    [suspect] = await pool.take(runs=runs)
    await pool.give_back(suspect, record=Record(attempts=4, losses=4, company=1))
    await pool.put(1, run="two" if other == "run" else "one", batch="other", lane="low")
    entries = await pool.take(runs=runs)
    if other == "same stream":
        await pool.give_back(entries[1])
        await pool.take(runs=runs)
    assert pool.reclaim(runs=runs) == 2
    [after] = [entry.record for entry in await pool.take(runs=runs) if entry.job == suspect.job]
    assert after == Record(attempts=4, faults=0, losses=5, company=1, avoid="a", history="lost\n")


async def test_what_other_consumers_hold_is_no_company(pool: Pool) -> None:
    await pool.put(2)
    await pool.take(1, by="a:1")
    [suspect] = await pool.take(1, by="b:1")
    await pool.give_back(suspect, record=Record(attempts=4, losses=4, company=1), by="b:1")
    await pool.take(1, by="b:1")
    assert pool.reclaim(prefix="b:") == 1
    [back] = await pool.take(1)
    assert (back.job, back.record.faults) == (suspect.job, 1)


async def test_a_history_keeps_its_last_lines(pool: Pool) -> None:
    await pool.put(1)
    for number in range(60):
        await pool.take()
        assert pool.reclaim(reason=f"{number:03} {'x' * 96}") == 1
    [entry] = await pool.take()
    history = entry.record.history
    assert len(history) == 4000
    assert [line[:3] for line in history.splitlines()[-39:]] == [f"{number:03}" for number in range(21, 60)]


async def test_a_reclaimed_job_goes_before_the_backlog_of_its_lane(pool: Pool) -> None:
    await pool.put(3, lane="low")
    await pool.put(1, batch="urgent", lane="high")
    await pool.take(2, by="a:1")
    assert pool.reclaim() == 2
    assert jobs_of(await pool.take()) == ["urgent/0", "b/0", "b/1", "b/2"]


async def test_what_was_settled_is_not_run_again_when_its_host_is_lost(pool: Pool) -> None:
    await pool.put(2)
    await pool.take()
    await pool.finish(0, 0)
    assert pool.reclaim() == 2
    assert jobs_of(await pool.take()) == ["b/1"]
    assert await pool.server.xlen(pool.lane()) == 0
    await pool.check("b")


async def test_what_was_renewed_in_time_is_not_reclaimed(pool: Pool) -> None:
    await pool.put(2)
    fresh, idle = await pool.take()
    await pool.leave_idle(idle, by="a:1", ms=HOUR_MS)
    assert pool.reclaim(idle_ms=HOUR_MS // 2) == 1
    assert pool.renew(fresh, idle) == {idle.id}


async def test_reclaiming_with_a_prefix_takes_from_those_consumers_alone(pool: Pool) -> None:
    await pool.put(3)
    for consumer in ("tpu-1:old", "tpu-11:old", "tpu-2:tpu-1:"):
        await pool.take(1, by=consumer)
    assert pool.reclaim(prefix="tpu-1:") == 1
    assert jobs_of(await pool.take()) == ["b/0"]


async def test_a_delivery_whose_reply_was_lost_comes_back_to_the_caller_too(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take(by="a:1")
    await pool.leave_idle(entry, by="a:1", ms=HOUR_MS)
    assert pool.reclaim(idle_ms=HOUR_MS, by="a:1") == 1


async def test_a_consumer_that_holds_something_is_never_deleted(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take(by="idle:1")
    assert pool.reclaim(idle_ms=HOUR_MS) == 0
    assert "idle:1" in await pool.consumers(pool.lane())
    assert pool.renew(entry, by="idle:1") == set()


async def test_consumers_that_were_idle_and_hold_nothing_are_deleted_but_not_the_caller(pool: Pool) -> None:
    await pool.put(2)
    await pool.take(1, by="gone:1")
    await pool.take(1, by="me:1")
    assert pool.reclaim(idle_ms=HOUR_MS, by="me:1") == 0
    assert await pool.consumers(pool.lane()) == {"gone:1", "me:1"}
    assert pool.reclaim(by="me:1") == 2
    while "gone:1" in await pool.consumers(pool.lane()):  # until the server has counted a millisecond of idleness
        assert pool.reclaim(by="me:1") == 0
    assert await pool.consumers(pool.lane()) == {"me:1"}
    await pool.check("b")


async def test_a_large_loss_is_reclaimed_in_bounded_steps(pool: Pool) -> None:
    size = RECLAIM_AT_MOST + 10
    await pool.put(size)
    await pool.take(RECLAIM_AT_MOST - 10, by="a:1")
    await pool.take(size, by="b:1")
    assert [pool.reclaim(), pool.reclaim(), pool.reclaim()] == [RECLAIM_AT_MOST, 10, 0]
    assert await pool.pending() == set()
    await pool.check("b")


async def test_an_entry_of_thousands_of_fields_stops_nobody(pool: Pool) -> None:
    await pool.put(1)
    await pool.server.xadd(pool.lane(), {f"field-{at}": "x" for at in range(5000)})
    [job, foreign] = await pool.take()
    settlement = Settlement(foreign, ended(job).group.model_copy(update={"batch": "unknown"}), "not a job")
    assert await pool.settle(settlement, ended(job)) == [Settled(False, "gone"), Settled(True, "ok")]
    [letter] = await pool.dead()
    assert letter[b"field-0"] == b"x"


async def test_an_entry_of_thousands_of_fields_can_be_reclaimed(pool: Pool) -> None:
    await pool.put(1)
    await pool.server.xadd(pool.lane(), {f"field-{at}": "x" for at in range(5000)})
    await pool.take()
    assert pool.reclaim() == 2
    [job, foreign] = await pool.take()
    assert (job.job, foreign.stream, foreign.fields[b"field-0"]) == ("b/0", pool.lane(), b"x")


async def test_counts_that_somebody_made_up_are_read_as_none() -> None:
    for made_up in (b"-1", b"1e9", b"9" * 5000, b""):
        fields = {name.encode(): made_up for name in ("attempts", "faults", "losses", "company")}
        assert Entry("stream", "1-0", fields).record == Record()


@pytest.mark.parametrize("made_up", ["-1", "1e9", "nan", "inf", "9" * 50, "", "x"])
async def test_counts_that_somebody_made_up_count_as_none_when_a_job_is_reclaimed(pool: Pool, made_up: str) -> None:
    await pool.put(1)
    fields = dict((await pool.server.xrange(pool.lane()))[0][1])
    await pool.server.delete(pool.lane())
    await pool.server.xadd(pool.lane(), fields | dict.fromkeys(["attempts", "faults", "losses", "company"], made_up))
    await pool.take()
    assert pool.reclaim(reason="") == 1
    [back] = await pool.take()
    assert back.record == Record(attempts=1, losses=1, avoid="a")


async def test_a_body_of_a_megabyte_survives_every_move(pool: Pool) -> None:
    await pool.put(1, prompt="x" * 2**20)
    [entry] = await pool.take()
    await pool.give_back(entry, parked(7))
    [again] = await pool.take(version=7)
    await pool.give_back(again, delayed(await pool.now_ms()))
    await pool.take()
    assert pool.reclaim() == 1
    [last] = await pool.take()
    await pool.settle(ended(last, "failed", dead="why"))
    [letter] = await pool.dead()
    assert letter[b"body"] == last.body == entry.body


# Commit


async def test_a_batch_with_open_jobs_is_not_committed(pool: Pool) -> None:
    await pool.put(3)
    await pool.settle(*map(ended, await pool.take(1)))
    assert await pool.commit() == 2
    assert len(await pool.results()) == 1
    assert await pool.server.zrange(pool.keys.open_batches(RUN), 0, -1) == [b"b"]
    assert await pool.server.ttl(pool.keys.batch(RUN, "b")) == -1


async def test_commit_frees_the_results_and_remembers_the_outcomes_for_a_while(pool: Pool) -> None:
    await pool.put(1)
    await pool.settle(*map(ended, await pool.take()))
    assert [await pool.commit(), await pool.commit()] == [0, 0]
    assert not await pool.server.exists(pool.keys.results(RUN, "b"))
    assert await pool.server.zcard(pool.keys.open_batches(RUN)) == 0
    assert await pool.outcomes() == {"0": "ok"}
    assert await pool.server.ttl(pool.keys.batch(RUN, "b")) > 0


async def test_an_unknown_batch_is_not_committed(pool: Pool) -> None:
    assert await pool.commit() == -1
    assert await pool.server.dbsize() == 0


# Publish


def checkpoint(version: int, path: str = "") -> Command:
    return Command(policy=Policy(version=version, checkpoint=path or f"/ckpt/{version}", run=RUN))


async def test_a_policy_is_recorded_current_and_announced(pool: Pool) -> None:
    command = checkpoint(3)
    answer = await publish(pool.client, pool.keys, command, lease_ms=60_000)
    assert (answer.answer, answer.number) == ("new", 3)
    recorded = await pool.server.hget(pool.keys.policies, "3")
    assert Policy.model_validate_json(recorded) == command.policy == Policy.model_validate_json(answer.text)
    assert await pool.server.get(pool.keys.policy) == b"3"
    assert await pool.server.get(pool.keys.publisher) == RUN.encode()
    assert 0 < await pool.server.pttl(pool.keys.publisher) <= 60_000
    [(_, fields)] = await pool.server.xrange(pool.keys.control)
    assert unpack_command(fields.pop(b"body")) == command
    assert fields == {b"kind": b"policy", b"policy": b"3", b"source": b"/ckpt/3", b"run": RUN.encode()}


@pytest.mark.parametrize(
    ("version", "path", "answer"),
    [
        (3, "/ckpt/3", ("same", 3)),
        (3, "/ckpt/other", ("other", 3)),
        (2, "/ckpt/2", ("old", 3)),
        (4, "/ckpt/3", ("taken", 3)),
        (4, "/ckpt/4", ("new", 4)),
        (10, "/ckpt/10", ("new", 10)),
    ],
)
async def test_a_version_rises_and_names_one_source_for_ever(
    pool: Pool, version: int, path: str, answer: tuple[str, int]
) -> None:
    await publish(pool.client, pool.keys, checkpoint(3))
    assert (await publish(pool.client, pool.keys, checkpoint(version, path)))[:2] == answer
    announced = answer[0] == "new"
    assert await pool.server.xlen(pool.keys.control) == 1 + announced
    assert await pool.server.hlen(pool.keys.policies) == 1 + announced
    assert await pool.server.get(pool.keys.policy) == str(version if announced else 3).encode()


async def test_the_first_version_may_be_nought(pool: Pool) -> None:
    assert (await publish(pool.client, pool.keys, checkpoint(0))).answer == "new"


async def test_policies_that_somebody_made_by_hand_are_in_nobodys_way(pool: Pool) -> None:
    by_hand = {
        "1": "no JSON",
        "2": "[]",
        "3": "3",
        "x": '"checkpoint":"/ckpt/7"',
        "4": '{"x":{"checkpoint":"/ckpt/7"}}',
    }
    await pool.server.hset(pool.keys.policies, mapping=by_hand)
    assert (await publish(pool.client, pool.keys, checkpoint(1))).answer == "other"
    assert (await publish(pool.client, pool.keys, checkpoint(7))).answer == "new"
    back = Command(policy=Policy(version=3, checkpoint="/ckpt/3", run=RUN, generation=1))
    answer = await roll_back(pool.client, pool.keys, back, run=RUN, generation=0, current=7, lease_ms=1000)
    assert (answer.answer, answer.number) == ("new", 1)
    assert set(await pool.server.hkeys(pool.keys.policies)) == {b"1", b"2", b"3", b"x", b"4@0", b"7@0"}


async def test_a_lineage_that_moved_meanwhile_is_not_gone_back_in(pool: Pool) -> None:
    for version in (1, 2, 3):
        await publish(pool.client, pool.keys, checkpoint(version))
    before = await pool.server.dump(pool.keys.policies)
    back = Command(policy=Policy(version=1, checkpoint="/ckpt/1", run=RUN, generation=1))
    for read in ({"generation": 0, "current": 2}, {"generation": 1, "current": 3}):
        answer = await roll_back(pool.client, pool.keys, back, run=RUN, lease_ms=1000, **read)
        assert (answer.answer, answer.number) == ("moved", 0)
    assert await pool.server.dump(pool.keys.policies) == before


# The call itself


async def test_a_script_that_the_server_forgot_is_sent_again(pool: Pool) -> None:
    await pool.put(1)
    await pool.take()
    await pool.server.script_flush()
    assert await pool.take() == []
    await pool.server.script_flush()
    assert pool.reclaim() == 1


async def test_a_script_that_fails_says_so(pool: Pool) -> None:
    await pool.server.set(pool.keys.batch(RUN, "b"), "not a hash")
    with pytest.raises(RedisError, match="WRONGTYPE"):
        await pool.put(1)


# All of them at once, in any order


def test_no_interleaving_loses_a_job_or_settles_it_twice(redis_url: str) -> None:
    class Here(Model):
        def __init__(self) -> None:
            super().__init__(redis_url)

    run_state_machine_as_test(Here, settings=settings(max_examples=30, stateful_step_count=40, deadline=None))
