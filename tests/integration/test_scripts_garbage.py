"""What somebody puts into a pool by hand may cost him his own jobs, and nobody else's."""

import random
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest
from delivery import RUN, Pool, ended, jobs_of

from rollpool.schemas.scripts import READY, Place, Settled, delayed, exact, parked

pytestmark = pytest.mark.both_servers

PAST_MS, NEVER_MS = 1, 10**15
#: Names as somebody might add them, and some that are almost ours.
NAMES: list[bytes] = [
    b"",
    b":",
    b"::",
    b"x",
    b"a:b",
    b"run:default",
    b"run:default:",
    b"run:default:b",
    b"run:default:b/",
    b"run:default:b/x",
    b"run:default:b/0#",
    b"run:default:b/0#x",
    b"run:default:b/99",
    b"run:default:b/0#7",
    b"run:nolane:b/0",
    b"run:default:nobatch/0",
    b"run:default:b/-1",
    b"run:default:b/1e9",
    b"run:default:b/99999999999999999999",
    b"norun:default:b/0",
    b"run}:default:b/0",
    b"run:default:b/0/0",
    b"\x00\xff:\xfe:\x80",
    b"%s%d%n:%a:%",
    bytes(range(256)),
    b"x" * 100_000,
]
NAMES += [random.Random(seed).randbytes(seed) for seed in range(1, 40)]
#: Fields of a waiting job as somebody might write them.
FIELDS: list[bytes] = [
    b"",
    b"\xc1",
    b"\xdd\xff\xff\xff\xff",
    b"\x91" * 10_000,
    msgpack.packb(None),
    msgpack.packb(7),
    msgpack.packb("text"),
    msgpack.packb([]),
    msgpack.packb({}),
    msgpack.packb({"job": "b/0"}),
    msgpack.packb(["job"]),
    msgpack.packb(["job", 1]),
    msgpack.packb(["job", None]),
    msgpack.packb(["job", ["b/0"]]),
    msgpack.packb([True, {}]),
    msgpack.packb(["x", "y"]),
    msgpack.packb(["x", "y"] * 5000),
    msgpack.packb(["job", "b/0", "run", "norun"]),
    msgpack.packb(["job", "b/0", "run", RUN, "odd"]),
    msgpack.packb(["job", "b/0", "run", RUN] + ["x", "y"] * 600),
    msgpack.packb(["job", "b/0", "run", RUN] + ["x", "y"] * 6000),
    msgpack.packb(["job", "b/0", "run", "a:b"]),
]


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    made = Pool(redis_url)
    yield made
    await made.close()


async def still_works(pool: Pool, run: str = "other") -> None:
    """Another run goes through everything that can happen to a job."""
    runs = [RUN, run]
    places: list[Place] = [READY, delayed(PAST_MS), parked(4), exact(5)]
    await pool.put(len(places) + 3, run=run, batch="fine")
    await pool.put(1, run=run, batch="late", deadline_ms=PAST_MS)
    await pool.put(1, run=run, batch="split", parts=2)
    assert pool.expire() >= 1
    theirs = [entry for entry in await everything(pool, runs) if entry.run == run]
    assert sorted(jobs_of(theirs)) == [*(f"fine/{index}" for index in range(7)), "split/0#0", "split/0#1"]
    for entry, place in zip(theirs, places, strict=False):
        assert await pool.give_back(entry, place)
    assert pool.reclaim(runs=[run]) >= 5
    pool.sweep(5, idle_ms=-1)
    back = [entry for entry in await everything(pool, runs) if entry.run == run]
    assert sorted(jobs_of(back)) == sorted(jobs_of(theirs))
    assert not pool.renew(*back)
    settled = await pool.settle(*map(ended, back))
    assert all(reply.now for reply in settled)
    assert set((await pool.outcomes("fine", run=run)).values()) == {"ok"}
    assert await pool.outcomes("late", run=run) == {"0": "expired"}
    assert await pool.outcomes("split", run=run) == {"0": "ok"}
    for batch in ("fine", "late", "split"):
        assert await pool.commit(batch, run=run) == 0


def key_of(pool: Pool, kind: str) -> str:
    """Of the whole pool, or of the run that somebody meddles with."""
    key: Any = getattr(pool.keys, kind)
    return str(key if isinstance(key, str) else key(RUN))


async def everything(pool: Pool, runs: list[str]) -> list[Any]:
    entries: list[Any] = []
    while more := await pool.take(20, version=5, runs=runs):
        entries += more
    return entries


@pytest.mark.parametrize("place", ["delayed", "parked", "exact", "deadlines"])
async def test_names_of_any_bytes_in_a_sorted_set_stop_nobody(pool: Pool, place: str) -> None:
    await pool.publish(9)
    await pool.put(1)
    scores = [0, 5, float("-inf"), float("inf"), 1e300, -3.5, 5.5]
    for at, name in enumerate(NAMES):
        await pool.server.zadd(key_of(pool, place), {name: scores[at % len(scores)]})
    await still_works(pool)
    await pool.check("b")
    assert await pool.server.keys(pool.keys.ready("*", "*")) == []


@pytest.mark.parametrize("place", ["delayed", "parked", "exact", "ready"])
async def test_fields_of_any_bytes_stop_nobody(pool: Pool, place: str) -> None:
    await pool.put(1)
    for at, fields in enumerate(FIELDS):
        name = f"{RUN}:default:b/{100 + at}"
        await pool.server.hset(pool.keys.waiting, name, fields)
        if place == "ready":
            await pool.server.rpush(pool.keys.ready(RUN, "default"), name)
        else:
            await pool.server.zadd(key_of(pool, place), {name: 5 if place == "exact" else 0})
    await still_works(pool)
    assert await pool.server.hlen(pool.keys.waiting) == 0


async def test_names_of_any_bytes_in_the_list_of_a_lane_stop_nobody(pool: Pool) -> None:
    await pool.put(1)
    for name in NAMES:
        for run in (RUN, "other"):
            await pool.server.rpush(pool.keys.ready(run, "default"), name)
        await pool.server.hset(pool.keys.waiting, name, random.Random(1).randbytes(20))
    await still_works(pool)
    for run in (RUN, "other"):
        assert not await pool.server.exists(pool.keys.ready(run, "default"))


async def test_entries_that_somebody_added_to_the_retries_are_given_to_nobody(pool: Pool) -> None:
    await pool.put(2)
    await pool.server.xadd(pool.keys.retries, {"hello": "world"})
    await pool.server.xadd(pool.keys.retries, {"job": "b/1", "run": RUN})
    [entry, _] = await pool.take()
    await pool.give_back(entry)
    assert jobs_of(await pool.take()) == ["b/0"]
    await pool.server.xadd(pool.keys.retries, {"job": "b/1", "run": RUN})
    await still_works(pool)
    assert await pool.server.xlen(pool.keys.retries) == 4
    assert jobs_of(await pool.take()) == []


async def test_an_exact_name_without_fields_ends_no_job(pool: Pool) -> None:
    await pool.publish(9)
    await pool.put(1)
    await pool.server.zadd(pool.keys.exact(RUN), {f"{RUN}:default:b/0": 1})
    assert pool.sweep().ended == 0
    assert not await pool.server.exists(pool.keys.exact(RUN))
    await pool.check("b")


@pytest.mark.parametrize("index", ["7", "99999999999999999999", "9" * 300])
async def test_an_exact_name_with_fields_of_no_job_ends_none(pool: Pool, index: str) -> None:
    await pool.publish(9)
    await pool.put(1)
    name = f"{RUN}:default:b/{index}"
    await pool.server.hset(pool.keys.waiting, name, b"fields")
    await pool.server.zadd(pool.keys.exact(RUN), {name: 1})
    assert pool.sweep().ended == 0
    assert not await pool.server.exists(pool.keys.exact(RUN))
    assert await pool.outcomes() == {"0": "open"}


async def test_an_entry_of_thousands_of_fields_that_names_an_open_job_is_given_back(pool: Pool) -> None:
    await pool.put(1)
    [(_, fields)] = await pool.server.xrange(pool.lane())
    await pool.server.delete(pool.lane())
    await pool.server.xadd(pool.lane(), {**fields, **{f"field-{at}": "x" for at in range(5000)}})
    for _ in range(3):
        [entry] = await pool.take()
        assert (entry.job, entry.body) == ("b/0", fields[b"body"])
        assert await pool.give_back(entry)
    await pool.take()
    assert pool.reclaim() == 1
    [entry] = await pool.take()
    assert await pool.settle(ended(entry)) == [Settled(True, "ok")]


async def test_jobs_whose_batch_is_of_another_type_are_of_no_batch(pool: Pool) -> None:
    await pool.put(3)
    [entry] = await pool.take(1)
    await pool.server.delete(pool.keys.batch(RUN, "b"))
    await make(pool, pool.keys.batch(RUN, "b"), "string")
    assert await pool.take() == []
    assert pool.renew(entry) == {entry.id}
    assert await pool.settle(ended(entry)) == [Settled(False, "gone")]
    assert await pool.server.xlen(pool.lane()) == 0


@pytest.mark.parametrize(
    "key", ["waiting", "delayed", "parked", "exact", "deadlines", "retries", "dead", "fair", "run_policy", "rollout"]
)
@pytest.mark.parametrize("made", ["string", "list", "hash"])
async def test_a_key_of_the_pool_of_another_type_stops_nobody(pool: Pool, key: str, made: str) -> None:
    await pool.publish(9)
    await make(pool, key_of(pool, key), made)
    await still_works(pool)


@pytest.mark.parametrize("made", ["string", "list", "set"])
@pytest.mark.parametrize(
    "kind", ["jobs", "ready", "batches", "results", "runs", "parts", "open"], ids=lambda kind: f"{kind} of the run"
)
@pytest.mark.parametrize("deadline_ms", [None, PAST_MS])
async def test_a_key_of_one_run_of_another_type_stops_no_other(
    pool: Pool, kind: str, made: str, deadline_ms: int | None
) -> None:
    await pool.publish(9)
    keys = pool.keys
    names = {
        "jobs": keys.jobs(RUN, "default"),
        "ready": keys.ready(RUN, "default"),
        "batches": keys.batch(RUN, "b"),
        "results": keys.results(RUN, "b"),
        "runs": keys.run(RUN),
        "parts": keys.parts(RUN, "b"),
        "open": keys.open_batches(RUN),
    }
    await pool.put(3, parts=2 if kind == "parts" else 1, deadline_ms=deadline_ms)
    first, *_ = await pool.take(2)
    await pool.give_back(first, delayed(PAST_MS))
    await pool.server.delete(names[kind])
    await make(pool, names[kind], made)
    await still_works(pool)


async def make(pool: Pool, key: str, made: str) -> None:
    match made:
        case "string":
            await pool.server.set(key, "somebody's own")
        case "list":
            await pool.server.rpush(key, "somebody's own")
        case "set":
            await pool.server.sadd(key, "somebody's own")
        case "hash":
            await pool.server.hset(key, "somebody's", "own")


async def test_one_call_settles_the_others_where_a_key_of_one_is_of_another_type(pool: Pool) -> None:
    for run in ("bad", "good"):
        await pool.put(2, run=run)
    entries = await pool.take(runs=["bad", "good"])
    await pool.server.set(pool.keys.results("bad", "b"), "somebody's own")
    await pool.server.set(pool.keys.run("bad"), "somebody's own")
    assert await pool.settle(*map(ended, entries)) == [Settled(True, "ok")] * 4
    await pool.check("b", run="good")
    assert len(await pool.results(run="bad")) == 2
    assert await pool.pending(["bad", "good"]) == set()


async def test_a_batch_is_enqueued_whole_where_a_key_it_needs_is_of_another_type(pool: Pool) -> None:
    for key in (pool.keys.deadlines, pool.keys.open_batches(RUN), pool.keys.fair):
        await pool.server.delete(key)
        await make(pool, key, "list")
    await pool.put(2, deadline_ms=PAST_MS)
    await pool.check("b")
    assert pool.expire() == 2
    assert await pool.commit() == 0


async def test_a_lane_of_another_type_refuses_the_batch_whole(pool: Pool) -> None:
    await make(pool, pool.lane(), "string")
    with pytest.raises(Exception, match="holds a string and not a stream: delete it"):
        await pool.put(2)
    assert await pool.server.dbsize() == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"run": "x:y", "job": "b/0"},
        {"run": RUN, "job": "b"},
        {"run": RUN, "job": "a:b/0"},
        {"run": RUN, "job": ""},
        {"job": "b/0"},
        {"run": "", "job": "b/0"},
        {"hello": "world"},
        {"run": RUN, "job": "b/0#x"},
    ],
    ids=str,
)
async def test_a_foreign_entry_stops_nobody_wherever_it_lies(pool: Pool, fields: dict[str, str]) -> None:
    await pool.put(1)
    await pool.server.xadd(pool.lane(), fields)
    await pool.server.xadd(pool.lane(run="other"), fields)
    await still_works(pool)


async def test_a_foreign_entry_whose_host_is_lost_stays_in_its_stream(pool: Pool) -> None:
    await pool.put(1, lane="low")
    await pool.server.xadd(pool.lane("low"), {"hello": "world"})
    assert len(await pool.take()) == 2
    assert pool.reclaim() == 2
    [(_, fields)] = await pool.server.xrange(pool.lane("low"))
    assert fields == {b"hello": b"world"}
    job, foreign = await pool.take()
    assert (job.stream, foreign.stream, foreign.fields) == (pool.keys.retries, pool.lane("low"), fields)


async def test_an_entry_that_names_a_job_of_another_run_goes_back_to_that_run(pool: Pool) -> None:
    await pool.put(1, run="other")
    [(_, fields)] = await pool.server.xrange(pool.lane(run="other"))
    await pool.server.delete(pool.lane(run="other"))
    await pool.put(1)
    await pool.server.xadd(pool.lane(), {**fields, "lane": "nowhere"})
    _, entry = await pool.take()
    assert await pool.give_back(entry)
    [again] = await pool.take(runs=["other"])
    assert await pool.settle(ended(again)) == [Settled(True, "ok")]
