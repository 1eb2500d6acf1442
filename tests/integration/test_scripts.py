"""The scripts of delivery on real servers: a job is settled once and never lost, whoever calls, however often."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import RedisError

from rollpool.schemas import (
    GROUP,
    LANES,
    OUTCOMES,
    Command,
    Group,
    Keys,
    Outcome,
    Policy,
    PromptJob,
    Sample,
    VersionSpan,
)
from rollpool.schemas.connection import connect, connect_async
from rollpool.schemas.scripts import (
    Enqueued,
    Entry,
    GiveBack,
    Script,
    Settled,
    Settlement,
    commit,
    enqueue,
    give_back,
    publish,
    pull,
    reclaim,
    renew,
    settle,
)
from rollpool.schemas.scripts.leases import RECLAIM_AT_MOST
from rollpool.schemas.wire import pack_model, unpack_command, unpack_group, unpack_job

pytestmark = pytest.mark.both_servers

RUN = "run"
HOUR_MS = 3_600_000


class Pool:
    """The scripts, called as one trainer and its hosts call them."""

    def __init__(self, url: str) -> None:
        self.client: AsyncRedis = connect_async(url)
        #: The same, to look at what the scripts left: its own types are unions over every protocol.
        self.server: Any = self.client
        self.blocking: Redis = connect(url)
        self.keys = Keys("test")

    async def close(self) -> None:
        self.blocking.close()
        await self.client.aclose()

    async def put(
        self,
        size: int = 1,
        *,
        batch: str = "b",
        lane: str = "default",
        content: str = "content",
        limit: int = 0,
        prompt: str = "prompt",
    ) -> Enqueued:
        jobs = [
            PromptJob.model_validate(
                {
                    "run": RUN,
                    "batch": batch,
                    "index": index,
                    "prompt": prompt,
                    "policy_version": 5,
                    "lane": lane,
                    "n": 2,
                }
            )
            for index in range(size)
        ]
        previews_and_bodies = [part for job in jobs for part in (job.preview(), pack_model(job))]
        return await enqueue(
            self.client,
            self.keys,
            run=RUN,
            batch=batch,
            lane=lane,
            content=content,
            policy=5,
            n=2,
            previews_and_bodies=previews_and_bodies,
            backlog_limit=limit,
        )

    async def take(self, wanted: int = 10, *, by: str = "a:1", version: int = 5) -> list[Entry]:
        streams = self.keys.lanes(RUN)
        return await pull(self.client, self.keys, streams=streams, consumer=by, wanted=wanted, version=version)

    async def settle(self, *settlements: Settlement) -> list[Settled]:
        return await settle(self.client, self.keys, settlements)

    async def give_back(self, entry: Entry, *, by: str = "a:1", **options: Any) -> bool:
        counts = {"attempts": entry.attempts, "faults": entry.faults}
        back = GiveBack(entry=entry, job=unpack_job(entry.body), **{**counts, **options})
        [given] = await give_back(self.client, self.keys, consumer=by, jobs=[back])
        return given

    def renew(self, *entries: Entry, by: str = "a:1") -> list[str]:
        return renew(self.blocking, self.lane(), consumer=by, entries=[entry.id for entry in entries])

    def reclaim(self, *, idle_ms: int = 0, by: str = "rescuer:1", prefix: str = "", lane: str = "default") -> int:
        return reclaim(self.blocking, self.lane(lane), idle_ms=idle_ms, caller=by, prefix=prefix)

    async def commit(self, batch: str = "b") -> int:
        return await commit(self.client, self.keys, run=RUN, batch=batch)

    def lane(self, lane: str = "default") -> str:
        return self.keys.jobs(RUN, lane)

    async def outcomes(self, batch: str = "b") -> dict[str, str]:
        fields = await self.server.hgetall(self.keys.batch(RUN, batch))
        return {name.decode(): state.decode() for name, state in fields.items() if name.isdigit()}

    async def counters(self) -> dict[str, int]:
        fields = await self.server.hgetall(self.keys.run(RUN))
        return {name.decode(): int(count) for name, count in fields.items()}

    async def results(self, batch: str = "b") -> list[Group]:
        entries = await self.server.xrange(self.keys.results(RUN, batch))
        return [unpack_group(fields[b"body"]) for _, fields in entries]

    async def dead(self) -> list[dict[bytes, bytes]]:
        return [fields for _, fields in await self.server.xrange(self.keys.dead)]

    async def backlog(self) -> int:
        """Entries that no host has been given."""
        count = 0
        for stream in self.keys.lanes(RUN):
            if await self.server.exists(stream):
                pending = await self.server.xpending(stream, GROUP)
                count += await self.server.xlen(stream) - int(pending["pending"])
        return count

    async def consumers(self, lane: str = "default") -> set[str]:
        return {row["name"].decode() for row in await self.server.xinfo_consumers(self.lane(lane), GROUP)}

    async def leave_idle(self, entry: Entry, *, by: str, ms: int) -> None:
        """As if its holder had not renewed for so long."""
        await self.server.xclaim(entry.stream, GROUP, by, 0, [entry.id], idle=ms, justid=True)

    async def now_ms(self) -> int:
        seconds, micros = await self.server.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def whereabouts(self) -> Counter[str]:
        """Every job that is somewhere in the pool: on a lane (given to a host or not), parked or delayed."""
        places: list[dict[bytes, bytes]] = []
        for stream in self.keys.lanes(RUN):
            places += [fields for _, fields in await self.server.xrange(stream)]
        for waiting in (self.keys.parked, self.keys.delayed):
            for member in await self.server.zrange(waiting, 0, -1):
                flat = iter(msgpack.unpackb(member, raw=True)[1])
                places.append(dict(zip(flat, flat, strict=True)))
        return Counter(fields[b"job"].decode() for fields in places)

    async def check(self, *batches: str) -> None:
        """Promise 1, as far as the server shows it: counters agree, and every open job is in exactly one place."""
        counters = Counter(await self.counters())
        states = {
            f"{batch}/{index}": state for batch in batches for index, state in (await self.outcomes(batch)).items()
        }
        open_jobs = {job for job, state in states.items() if state == "open"}
        settled = Counter(state for state in states.values() if state != "open")
        assert counters["enqueued"] == len(states)
        assert counters["open"] == len(open_jobs)
        assert {outcome: counters[outcome] for outcome in settled} == settled
        for batch in batches:
            done = [group.id for group in await self.results(batch)]
            assert sorted(done) == sorted(job for job in states if job.startswith(f"{batch}/") and job not in open_jobs)
        places = await self.whereabouts()
        assert {job: places[job] for job in open_jobs} == dict.fromkeys(open_jobs, 1)


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    made = Pool(redis_url)
    yield made
    await made.close()


def ended(entry: Entry, outcome: Outcome = "ok", *, worker: str = "a", dead: str = "", tokens: int = 3) -> Settlement:
    """A job's settlement, with one sample where it is ok."""
    job = unpack_job(entry.body)
    sample = Sample(
        output_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.zeros(tokens, np.float32),
        text="t",
        finish_reason="stop",
        version_spans=(VersionSpan(5, 0, tokens),),
    )
    group = Group(
        run=job.run,
        batch=job.batch,
        index=job.index,
        outcome=outcome,
        policy_version=job.policy_version,
        prompt_ids=np.zeros(1, np.int32),
        samples=(sample,) if outcome == "ok" else (),
        sampling=job.sampling,
        worker=worker,
    )
    return Settlement(entry, group, dead)


def without_entry(entry: Entry) -> Entry:
    """As a cancellation names a job: no host's entry is meant."""
    return Entry(entry.stream, "", {})


def jobs_of(entries: Iterable[Entry]) -> list[str]:
    return [entry.fields[b"job"].decode() for entry in entries]


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
    assert await pool.give_back(entry, parked_for=7, attempts=1, faults=2)
    assert await pool.take(version=6) == []
    [back] = await pool.take(version=7, by="b:1")
    assert (jobs_of([back]), back.attempts, back.faults) == (["b/0"], 1, 2)
    assert back.body == entry.body
    await pool.check("b")


async def test_a_parked_job_is_released_before_the_backlog_is_read(pool: Pool) -> None:
    await pool.put(1, batch="parked", lane="high")
    await pool.give_back((await pool.take())[0], parked_for=7)
    await pool.put(1, batch="waiting")
    assert jobs_of(await pool.take(1, version=7)) == ["parked/0"]


async def test_no_more_parked_jobs_are_released_than_are_wanted(pool: Pool) -> None:
    await pool.put(3)
    for entry in await pool.take():
        await pool.give_back(entry, parked_for=7)
    assert len(await pool.take(2, version=7)) == 2
    assert await pool.server.zcard(pool.keys.parked) == 1


async def test_a_delayed_job_waits_for_the_servers_time(pool: Pool) -> None:
    await pool.put(2)
    due, later = await pool.take()
    now = await pool.now_ms()
    await pool.give_back(due, delayed_until_ms=now)
    await pool.give_back(later, delayed_until_ms=now + HOUR_MS)
    assert jobs_of(await pool.take()) == ["b/0"]
    assert await pool.server.zcard(pool.keys.delayed) == 1


async def test_entries_of_settled_jobs_are_discarded_where_they_are_met(pool: Pool) -> None:
    await pool.put(3)
    [(entry_id, fields), *_] = await pool.server.xrange(pool.lane())
    cancelled = Entry(pool.lane(), entry_id.decode(), fields)
    settlement = ended(cancelled, "cancelled")
    assert await pool.settle(Settlement(without_entry(cancelled), settlement.group)) == [Settled(True, "cancelled")]
    assert jobs_of(await pool.take(2)) == ["b/1", "b/2"]
    assert await pool.server.xlen(pool.lane()) == 2
    await pool.check("b")


async def test_a_parked_job_that_was_cancelled_is_discarded(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.give_back(entry, parked_for=7)
    await pool.settle(Settlement(without_entry(entry), ended(entry, "cancelled").group))
    assert await pool.take(version=7) == []
    assert await pool.whereabouts() == {}


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


async def test_a_stream_without_its_group_is_read_from_its_first_entry_at_once(pool: Pool) -> None:
    await pool.server.xadd(pool.lane(), {"hello": "world"})
    assert len(await pool.take()) == 1


# Settle


async def test_a_job_is_settled_with_its_result_and_its_counts(pool: Pool) -> None:
    await pool.put(2)
    first, second = await pool.take()
    settled = await pool.settle(ended(first, tokens=3), ended(second, "failed"))
    assert settled == [Settled(True, "ok"), Settled(True, "failed")]
    assert await pool.outcomes() == {"0": "ok", "1": "failed"}
    assert await pool.counters() == {"enqueued": 2, "open": 0, "ok": 1, "failed": 1, "samples": 1, "tokens": 3}
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
    assert (letter[b"error"], letter[b"job"], letter[b"body"]) == (b"too late", b"b/0", entry.body)


async def test_a_dead_letter_of_an_unknown_batch_is_kept_once(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.server.delete(pool.keys.batch(RUN, "b"))
    settlement = ended(entry, "failed", dead="not a job")
    await pool.settle(settlement)
    await pool.settle(settlement)
    assert [letter[b"body"] for letter in await pool.dead()] == [entry.body]


async def test_cancelling_settles_a_job_wherever_it_is(pool: Pool) -> None:
    await pool.put(2)
    [held] = await pool.take(1)
    cancel = Settlement(without_entry(held), ended(held, "cancelled").group)
    assert await pool.settle(cancel) == [Settled(True, "cancelled")]
    assert await pool.settle(ended(held)) == [Settled(False, "cancelled")]
    assert await pool.settle(cancel) == [Settled(False, "cancelled")]
    assert jobs_of(await pool.take()) == ["b/1"]
    await pool.check("b")


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
    assert jobs_of(await pool.take(by="b:1")) == ["b/1", "b/0"]
    await pool.check("b")


async def test_counts_are_kept_however_often_a_job_moves(pool: Pool) -> None:
    await pool.put(1)
    for attempts in range(1, 4):
        [entry] = await pool.take()
        await pool.give_back(entry, attempts=attempts, faults=2 * attempts)
    [entry] = await pool.take()
    assert (entry.attempts, entry.faults) == (3, 6)
    assert set(entry.fields) == {b"job", b"policy", b"n", b"run", b"preview", b"body", b"attempts", b"faults"}


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
    assert pool.renew(theirs, by="b:1") == []
    await pool.check("b")


async def test_a_settled_job_is_not_revived(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.settle(Settlement(without_entry(entry), ended(entry, "cancelled").group))
    assert not await pool.give_back(entry)
    assert await pool.whereabouts() == {}


async def test_giving_back_to_a_server_that_lost_everything_is_harmless(pool: Pool) -> None:
    await pool.put(2)
    entries = await pool.take()
    await pool.server.flushall()
    assert not await pool.give_back(entries[0])
    assert await pool.server.dbsize() == 0


async def test_many_jobs_are_given_back_in_one_call(pool: Pool) -> None:
    await pool.put(600)
    entries = await pool.take(600)
    jobs = [GiveBack(entry=entry, job=unpack_job(entry.body), attempts=0, faults=0) for entry in entries]
    assert await give_back(pool.client, pool.keys, consumer="a:1", jobs=jobs) == [True] * 600
    assert await pool.backlog() == 600


# Leases


async def test_renewal_starts_the_lease_anew(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.leave_idle(entry, by="a:1", ms=HOUR_MS)
    assert pool.renew(entry) == []
    assert pool.reclaim(idle_ms=HOUR_MS) == 0


async def test_renewal_takes_nothing_back_from_a_new_owner(pool: Pool) -> None:
    await pool.put(2)
    mine, lost = await pool.take(by="a:1")
    await pool.leave_idle(lost, by="a:1", ms=HOUR_MS)
    assert pool.reclaim(idle_ms=HOUR_MS) == 1
    [theirs] = await pool.take(by="b:1")
    assert pool.renew(mine, lost, theirs, by="a:1") == [lost.id, theirs.id]
    assert pool.renew(theirs, by="b:1") == []


async def test_thousands_of_leases_are_renewed_in_one_call(pool: Pool) -> None:
    await pool.put(5000)
    entries = await pool.take(5000)
    assert pool.renew(*entries) == []


async def test_on_a_server_that_lost_everything_every_lease_is_lost(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.server.flushall()
    assert pool.renew(entry) == [entry.id]
    assert pool.reclaim() == 0


async def test_reclaiming_charges_one_attempt_and_no_fault(pool: Pool) -> None:
    await pool.put(1)
    [entry] = await pool.take()
    await pool.give_back(entry, attempts=2, faults=1)
    [entry] = await pool.take()
    assert pool.reclaim() == 1
    [back] = await pool.take(by="b:1")
    assert (back.attempts, back.faults, back.body) == (3, 1, entry.body)
    await pool.check("b")


async def test_what_was_renewed_in_time_is_not_reclaimed(pool: Pool) -> None:
    await pool.put(2)
    fresh, idle = await pool.take()
    await pool.leave_idle(idle, by="a:1", ms=HOUR_MS)
    assert pool.reclaim(idle_ms=HOUR_MS // 2) == 1
    assert pool.renew(fresh, idle) == [idle.id]


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
    assert "idle:1" in await pool.consumers()
    assert pool.renew(entry, by="idle:1") == []


async def test_consumers_that_were_idle_and_hold_nothing_are_deleted_but_not_the_caller(pool: Pool) -> None:
    await pool.put(2)
    await pool.take(1, by="gone:1")
    await pool.take(1, by="me:1")
    assert pool.reclaim(idle_ms=HOUR_MS, by="me:1") == 0
    assert await pool.consumers() == {"gone:1", "me:1"}
    assert pool.reclaim(by="me:1") == 2
    while "gone:1" in await pool.consumers():  # until the server has counted a millisecond of idleness
        assert pool.reclaim(by="me:1") == 0
    assert await pool.consumers() == {"me:1"}
    assert await pool.backlog() == 2


async def test_a_large_loss_is_reclaimed_in_bounded_steps(pool: Pool) -> None:
    size = RECLAIM_AT_MOST + 10
    await pool.put(size)
    await pool.take(RECLAIM_AT_MOST - 10, by="a:1")
    await pool.take(size, by="b:1")
    assert [pool.reclaim(), pool.reclaim(), pool.reclaim()] == [RECLAIM_AT_MOST, 10, 0]
    assert await pool.backlog() == size
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
    assert jobs_of((await pool.take())[:1]) == ["b/0"]


async def test_counts_that_somebody_made_up_are_read_as_none() -> None:
    for made_up in (b"-1", b"1e9", b"9" * 5000, b""):
        entry = Entry("stream", "1-0", {b"attempts": made_up, b"faults": made_up})
        assert (entry.attempts, entry.faults) == (0, 0)


async def test_a_body_of_a_megabyte_survives_every_move(pool: Pool) -> None:
    await pool.put(1, prompt="x" * 2**20)
    [entry] = await pool.take()
    await pool.give_back(entry, parked_for=7)
    [parked] = await pool.take(version=7)
    await pool.give_back(parked, delayed_until_ms=await pool.now_ms())
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


async def test_a_policy_is_recorded_current_and_announced(pool: Pool) -> None:
    policy = Policy(version=3, checkpoint="/ckpt/3", run=RUN)
    assert await publish(pool.client, pool.keys, policy) == ("new", 0)
    recorded = await pool.server.hget(pool.keys.policies, "3")
    assert Policy.model_validate_json(recorded) == policy
    assert await pool.server.get(pool.keys.policy) == b"3"
    [(_, fields)] = await pool.server.xrange(pool.keys.control)
    assert unpack_command(fields[b"body"]) == Command(policy=policy)


@pytest.mark.parametrize(
    ("version", "checkpoint", "answer"),
    [
        (3, "/ckpt/3", ("same", 0)),
        (3, "/ckpt/other", ("other", 0)),
        (2, "/ckpt/2", ("old", 3)),
        (4, "/ckpt/4", ("new", 0)),
        (10, "/ckpt/10", ("new", 0)),
    ],
)
async def test_a_version_rises_and_names_one_source_for_ever(
    pool: Pool, version: int, checkpoint: str, answer: tuple[str, int]
) -> None:
    await publish(pool.client, pool.keys, Policy(version=3, checkpoint="/ckpt/3", run=RUN))
    assert await publish(pool.client, pool.keys, Policy(version=version, checkpoint=checkpoint, run=RUN)) == answer
    announced = answer[0] == "new"
    assert await pool.server.xlen(pool.keys.control) == 1 + announced
    assert await pool.server.get(pool.keys.policy) == str(version if announced else 3).encode()


async def test_the_first_version_may_be_nought(pool: Pool) -> None:
    assert await publish(pool.client, pool.keys, Policy(version=0, checkpoint="/ckpt/0", run=RUN)) == ("new", 0)


# The call itself


async def test_a_script_that_the_server_forgot_is_sent_again(pool: Pool) -> None:
    await pool.put(1)
    await pool.take()
    await pool.server.script_flush()
    assert await pool.take() == []
    await pool.server.script_flush()
    assert pool.reclaim() == 1


async def test_a_script_that_fails_says_so(pool: Pool) -> None:
    await pool.server.set(pool.lane(), "not a stream")
    with pytest.raises(RedisError, match="WRONGTYPE"):
        await pool.take()
    with pytest.raises(RedisError):
        await Script("commit")(pool.client, [], [])


# All of them at once, in any order


T = TypeVar("T")
HOSTS = ("a:1", "b:1", "c:1")
hosts = st.sampled_from(HOSTS)
picks = st.integers(0, 10**6)

#: Steps, as a method of the model and its arguments. One rule for all of them: hypothesis leaves whole rules out of
#: a run, and a run in which nobody pulls tests nothing.
enqueues = st.tuples(st.just("enqueue"), st.sampled_from(LANES), st.integers(1, 4))
pulls = st.tuples(
    st.just("pull"), hosts, st.sampled_from([3, 0, 1, 6]), st.integers(5, 8), st.sampled_from([False, False, True])
)
returns = st.tuples(st.just("give_back"), picks, st.sampled_from(["lane", "parked", "delayed"]))
others = [st.tuples(st.just(name), picks) for name in ("settle", "cancel")]
leases = [st.tuples(st.just(name), hosts) for name in ("reclaim", "renew")]
steps = st.one_of(pulls, pulls, returns, returns, *others, *leases, enqueues)


@dataclass(eq=False)
class Delivery:
    """One delivery of a job to a host."""

    entry: Entry
    job: str
    host: str
    #: The server counts it as this host's, until it is settled, given back or reclaimed.
    held: bool = True
    #: False when the reply was lost: the host never knew of it.
    known: bool = True


class Model(RuleBasedStateMachine):
    """What a pool of a few hosts may do, against what the promises say becomes of every job.

    Hosts settle and give back what they remember, also what was taken from them long ago.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.pool = Pool(url)
        self.pool.blocking.flushall()
        self.batches: list[str] = []
        self.states: dict[str, str] = {}
        self.counts: dict[str, tuple[int, int]] = {}
        #: Jobs that wait for a version.
        self.parked: dict[str, int] = {}
        self.deliveries: list[Delivery] = []

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def teardown(self) -> None:
        try:
            self.finish_everything()
        finally:
            self.run(self.pool.close())
            self.runner.close()

    def is_open(self, job: str) -> bool:
        return self.states[job] == "open"

    def chosen(self, pick: int) -> list[Delivery]:
        """One delivery, if there is any; mostly one that the host still holds: the others are many more."""
        known = [delivery for delivery in self.deliveries if delivery.known]
        held = [delivery for delivery in known if delivery.held]
        candidates = held if held and pick % 4 != 3 else known
        return [candidates[pick % len(candidates)]] if candidates else []

    @initialize()
    def begin(self) -> None:
        for lane in LANES:
            self.enqueue(lane, 3)

    @rule(step=steps)
    def do(self, step: tuple[Any, ...]) -> None:
        getattr(self, step[0])(*step[1:])

    def enqueue(self, lane: str, size: int) -> None:
        batch = f"{lane}-{len(self.batches)}"
        assert self.run(self.pool.put(size, batch=batch, lane=lane)) == Enqueued("new", size)
        self.batches.append(batch)
        for index in range(size):
            self.states[f"{batch}/{index}"] = "open"
            self.counts[f"{batch}/{index}"] = (0, 0)

    def pull(self, host: str, wanted: int, version: int, reply_lost: bool) -> None:
        held = {delivery.job for delivery in self.deliveries if delivery.held}
        waiting = self.run(self.waiting())
        ready = {job for job in self.states if self.is_open(job) and job not in held | waiting}
        entries = self.run(self.pool.take(wanted, by=host, version=version))
        released = waiting - self.run(self.waiting())
        assert all(self.parked[job] <= version for job in released)
        ready |= {job for job in released if self.is_open(job)}
        taken = jobs_of(entries)
        assert len(set(taken)) == len(taken) == min(wanted, len(ready))
        assert set(taken) <= ready
        lanes = [self.pool.keys.lanes(RUN).index(entry.stream) for entry in entries]
        assert lanes == sorted(lanes)
        for job, entry in zip(taken, entries, strict=True):
            assert (entry.attempts, entry.faults) == self.counts[job]
            self.deliveries.append(Delivery(entry, job, host, known=not reply_lost))

    async def waiting(self) -> set[str]:
        """Jobs that are parked or delayed, open or not."""
        lanes = Counter[str]()
        for stream in self.pool.keys.lanes(RUN):
            lanes.update(fields[b"job"].decode() for _, fields in await self.pool.server.xrange(stream))
        return set(await self.pool.whereabouts() - lanes)

    def settle(self, pick: int) -> None:
        for delivery in self.chosen(pick):
            self.settled(ended(delivery.entry, OUTCOMES[pick % len(OUTCOMES)]), delivery.job)
            delivery.held = False

    def cancel(self, pick: int) -> None:
        for delivery in self.chosen(pick):
            group = ended(delivery.entry, "cancelled").group
            self.settled(Settlement(without_entry(delivery.entry), group), delivery.job)

    def settled(self, settlement: Settlement, job: str) -> None:
        now = self.is_open(job)
        if now:
            self.states[job] = settlement.group.outcome
        assert self.run(self.pool.settle(settlement)) == [Settled(now, self.states[job])]

    def give_back(self, pick: int, where: str) -> None:
        options: dict[str, Any] = {"parked": {"parked_for": 7}, "delayed": {"delayed_until_ms": 10**15}}.get(where, {})
        for delivery in self.chosen(pick):
            faults = delivery.entry.faults + pick % 2
            given = self.run(self.pool.give_back(delivery.entry, by=delivery.host, faults=faults, **options))
            assert given == (delivery.held and self.is_open(delivery.job))
            delivery.held = False
            if given:
                self.counts[delivery.job] = (delivery.entry.attempts, faults)
                self.parked[delivery.job] = 7 if where == "parked" else 10**6

    def reclaim(self, host: str) -> None:
        lost = [delivery for delivery in self.deliveries if delivery.held and delivery.host == host]
        taken = sum(self.pool.reclaim(prefix=host, lane=lane) for lane in LANES)
        assert taken == len(lost)
        for delivery in lost:
            delivery.held = False
            self.counts[delivery.job] = (delivery.entry.attempts + 1, delivery.entry.faults)

    def renew(self, host: str) -> None:
        for stream in self.pool.keys.lanes(RUN):
            mine = [known for known in self.deliveries if known.host == host and known.entry.stream == stream]
            entries = [delivery.entry.id for delivery in mine]
            lost = renew(self.pool.blocking, stream, consumer=host, entries=entries)
            assert lost == [delivery.entry.id for delivery in mine if not delivery.held]

    def finish_everything(self) -> None:
        """Hosts are lost, everything that waits comes due, and one host does it all."""
        for host in HOSTS:
            self.reclaim(host)
        self.run(self.everything_is_due())
        while entries := self.run(self.pool.take(6, by=HOSTS[0], version=10**6)):
            for entry in entries:
                [job] = jobs_of([entry])
                assert self.is_open(job)
                self.settled(ended(entry), job)
        assert "open" not in self.states.values()
        assert self.run(self.pool.whereabouts()) == {}

    async def everything_is_due(self) -> None:
        for member in await self.pool.server.zrange(self.pool.keys.delayed, 0, -1):
            await self.pool.server.zadd(self.pool.keys.delayed, {member: 0}, xx=True)

    @invariant()
    def every_job_is_settled_once_or_open_in_one_place(self) -> None:
        self.run(self.pool.check(*self.batches))

    @invariant()
    def the_server_counts_as_held_what_was_delivered(self) -> None:
        pending = self.run(self.pending())
        assert pending == {delivery.entry.id for delivery in self.deliveries if delivery.held}

    async def pending(self) -> set[str]:
        found = set[str]()
        for stream in self.pool.keys.lanes(RUN):
            if await self.pool.server.exists(stream):
                rows = await self.pool.server.xpending_range(stream, GROUP, "-", "+", 1000)
                found |= {row["message_id"].decode() for row in rows}
        return found


def test_no_interleaving_loses_a_job_or_settles_it_twice(redis_url: str) -> None:
    class Here(Model):
        def __init__(self) -> None:
            super().__init__(redis_url)

    run_state_machine_as_test(Here, settings=settings(max_examples=30, stateful_step_count=40, deadline=None))
