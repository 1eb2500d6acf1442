"""The doctor, on real servers: silent on a pool that works, and loud on each thing that breaks it."""

import json
import random
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from typer.testing import CliRunner

from rollpool.ops.cli.app import app
from rollpool.ops.doctor import Report, examine
from rollpool.schemas import GROUP, OUTCOMES, Group, Keys, PromptJob, Sample, SamplingParams, VersionSpan
from rollpool.schemas.connection import connect
from rollpool.schemas.scripts import (
    READY,
    Entry,
    GiveBack,
    Place,
    Record,
    RunOffer,
    Settlement,
    commit,
    delayed,
    enqueue,
    exact,
    finish,
    give_back,
    mark_read,
    parked,
    pull,
    reclaim,
    settle,
    sweep,
)
from rollpool.schemas.wire import pack_model, unpack_job

pytestmark = pytest.mark.both_servers

RUN = "math"
VERSION = 5
runner = CliRunner()


class Work:
    """A trainer and a host, by the scripts alone."""

    def __init__(self, client: AsyncRedis, keys: Keys) -> None:
        self.client = client
        self.keys = keys

    async def put(self, batch: str = "b", size: int = 4, *, parts: int = 1, lane: str = "default") -> None:
        jobs = [
            PromptJob.model_validate(
                {
                    **{"run": RUN, "batch": batch, "index": index, "prompt": "two", "policy_version": VERSION},
                    **{"lane": lane, "n": 1, "parts": parts, "part": part},
                }
            )
            for index in range(size)
            for part in range(parts)
        ]
        both = [part for job in jobs for part in (job.preview(), pack_model(job))]
        names: dict[str, Any] = {"run": RUN, "batch": batch, "lane": lane, "content": "c"}
        await enqueue(
            self.client,
            self.keys,
            **names,
            policy=VERSION,
            n=1,
            parts=parts,
            previews_and_bodies=both,
            deadline_ms=9**15,
        )

    async def take(self, wanted: int = 100, *, version: int = VERSION, by: str = "vm:1") -> list[Entry]:
        offers = [RunOffer(RUN, version, (version,))]
        pulled = await pull(self.client, self.keys, offers=offers, consumer=by, wanted=wanted)
        return pulled.entries

    async def settle(self, *entries: Entry, outcome: str = "ok") -> None:
        await settle(self.client, self.keys, [settlement(entry, outcome) for entry in entries])

    async def back(self, *entries: Entry, place: Place = READY, by: str = "vm:1") -> None:
        jobs = [GiveBack(entry=entry, record=Record(), place=place) for entry in entries]
        await give_back(self.client, self.keys, consumer=by, jobs=jobs)


def settlement(entry: Entry, outcome: str) -> Settlement:
    job = unpack_job(entry.body)
    sample = Sample(
        output_ids=np.arange(3, dtype=np.int32),
        logprobs=np.zeros(3, np.float32),
        text="abc",
        finish_reason="stop",
        version_spans=(VersionSpan(VERSION, 0, 3),),
    )
    group = Group.model_validate(
        {
            **{"run": job.run, "batch": job.batch, "index": job.index, "outcome": outcome, "policy_version": VERSION},
            **{"prompt_ids": np.arange(2, dtype=np.int32), "sampling": SamplingParams(), "worker": "vm"},
            "samples": (sample,) if outcome == "ok" else (),
        }
    )
    return Settlement(entry, group, "died" if outcome == "failed" else "", job.part)


@pytest.fixture
def blocking(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def work(redis_client: AsyncRedis, keys: Keys) -> Work:
    return Work(redis_client, keys)


@pytest.fixture
async def spread(work: Work) -> Work:
    """A pool with one open job in each place, one settled, and one cancelled whose entry is still there."""
    await work.put("b", 8)
    taken = await work.take(5)
    await work.back(taken[0])
    await work.back(taken[1], place=delayed(9**15))
    await work.back(taken[2], place=parked(7))
    await work.back(taken[3], place=exact(9))
    await work.settle((await work.take(1, by="vm:2"))[0])  # the one that was ready
    await work.back(taken[4])
    await finish(work.client, work.keys, run=RUN, batch="b", outcome="cancelled", error="", first=7, last=7)
    again = await work.take(2)
    assert [entry.job for entry in again] == ["b/4", "b/5"]
    await work.back(again[1])
    return work


def places(report: Report) -> tuple[int, int, int, int, int]:
    (row,) = report.rows
    return row.settled, row.open, row.backlog, row.in_flight, row.waiting


def found(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


async def test_a_pool_with_jobs_in_every_place_is_healthy(spread: Work, blocking: Redis, keys: Keys) -> None:
    report = examine(blocking, keys)
    assert report.findings == []
    assert places(report) == (2, 6, 1, 1, 4)
    assert report.rows[0].holds
    assert report.counts["tombstones"] == 1


async def test_a_pool_of_which_nobody_heard_is_healthy(blocking: Redis, keys: Keys) -> None:
    assert examine(blocking, keys, quiescent=True).healthy


async def test_nothing_is_changed_by_looking(spread: Work, blocking: Redis, keys: Keys) -> None:
    def everything() -> dict[bytes, Any]:
        return {name: blocking.dump(name) for name in blocking.scan_iter()}

    before = everything()
    examine(blocking, keys, quiescent=True)
    assert everything() == before


async def test_the_finished_parts_of_a_split_group_are_in_no_place(work: Work, blocking: Redis, keys: Keys) -> None:
    await work.put("b", 2, parts=3)
    taken = await work.take(4)
    await work.settle(taken[0], taken[3])
    report = examine(blocking, keys)
    assert report.findings == []
    assert (report.rows[0].open, report.rows[0].pieces) == (2, 4)
    await work.settle(*taken[1:3])
    assert examine(blocking, keys).rows[0].pieces == 2


Break = Callable[[Redis, Keys], object]


def move(client: Redis, keys: Keys) -> None:
    """A second copy of the job that is in the backlog."""
    stream = keys.jobs(RUN, "default")
    entries: Any = client.xrange(stream)
    for _, fields in entries:
        client.xadd(stream, fields)


def without_entry(client: Redis, keys: Keys) -> None:
    """Delete what a host holds, and leave it pending."""
    rows: Any = client.xpending_range(keys.retries, GROUP, "-", "+", 10)
    client.xdel(keys.retries, rows[0]["message_id"])


def acknowledged(client: Redis, keys: Keys) -> None:
    rows: Any = client.xpending_range(keys.retries, GROUP, "-", "+", 10)
    client.xack(keys.retries, GROUP, rows[0]["message_id"])


def unseen(client: Redis, keys: Keys) -> None:
    name = f"{RUN}:default:b/5"
    fields = {"job": "b/5", "run": RUN, "lane": "default"}
    client.hdel(keys.waiting, name)
    client.lrem(keys.ready(RUN, "default"), 0, name)
    client.xadd(keys.retries, fields)  # type: ignore[arg-type]


def result_again(client: Redis, keys: Keys) -> None:
    stream = keys.results(RUN, "b")
    entries: Any = client.xrange(stream)
    client.xdel(stream, entries[1][0])
    client.xadd(stream, entries[0][1])


BREAKS: dict[str, tuple[Break, set[str], str]] = {
    "an entry of the backlog is gone": (
        lambda client, keys: client.xtrim(keys.jobs(RUN, "default"), maxlen=0, approximate=False),
        {"lost"},
        "job b/6 of run math: is open and in no place",
    ),
    "a job is in two places": (move, {"twice"}, "job b/6 of run math: is in two places: jobs:math:default"),
    "a pending entry is deleted": (without_entry, {"lost", "pending-gone"}, "job b/4 of run math"),
    "an entry is acknowledged and not deleted": (acknowledged, {"lost", "stranded"}, "job b/4 of run math"),
    "an entry waits on retries": (unseen, {"unseen"}, "job b/5 of run math: waits unseen"),
    "a name is gone from delayed": (
        lambda client, keys: client.delete(keys.delayed),
        {"lost", "waiting-nowhere"},
        "waiting job math:default:b/1",
    ),
    "the fields of a waiting job are gone": (
        lambda client, keys: client.hdel(keys.waiting, f"{RUN}:default:b/2"),
        {"lost"},
        "job b/2 of run math",
    ),
    "a settled job waits": (
        lambda client, keys: (
            client.hset(keys.waiting, f"{RUN}:default:b/0", ""),
            client.zadd(keys.parked(RUN), {f"{RUN}:default:b/0": 9}),
        ),
        {"waiting-settled"},
        "waiting job math:default:b/0: waits in parked:math and is not open",
    ),
    "an open job is counted away": (
        lambda client, keys: client.hincrby(keys.run(RUN), "open", -1),
        {"counter-enqueued", "counter-open"},
        "run math: its counter says 5 open jobs, its batches have 6",
    ),
    "unread bytes are counted away": (
        lambda client, keys: client.hincrby(keys.run(RUN), "unread", -1),
        {"counter-unread"},
        "run math: its counter says",
    ),
    "a state is gone": (
        lambda client, keys: client.hdel(keys.batch(RUN, "b"), "6"),
        {"batch-counts", "counter-open"},
        "batch b of run math: its size is 8, and it has the states of 7 jobs",
    ),
    "a result is gone": (
        lambda client, keys: client.xtrim(keys.results(RUN, "b"), maxlen=1, approximate=False),
        {"batch-results", "batch-bytes"},
        "batch b of run math: 1 results for 2 settled jobs",
    ),
    "a job has two results": (
        result_again,
        {"results-twice", "batch-bytes"},
        "batch b of run math: 1 results are of jobs",
    ),
    "a result contradicts what is recorded": (
        lambda client, keys: client.hset(keys.batch(RUN, "b"), mapping={"0": "failed", "ok": 0, "failed": 1}),
        {"results-wrong"},
        "the result of b/0 says ok, recorded is failed",
    ),
    "more was read than there is": (
        lambda client, keys: (
            client.hset(keys.batch(RUN, "b"), "read", 10**6),
            client.hset(keys.run(RUN), "unread", 0),
        ),
        {"batch-read", "counter-unread"},
        "batch b of run math: its trainer says it read 1000000 bytes",
    ),
    "a batch will vanish": (
        lambda client, keys: client.expire(keys.batch(RUN, "b"), 1000),
        {"batch-expires"},
        "PERSIST",
    ),
    "a batch is not listed": (
        lambda client, keys: client.delete(keys.open_batches(RUN)),
        {"batch-unlisted"},
        "batch b of run math: is not committed and not in open:RUN",
    ),
    "a batch is listed and gone": (
        lambda client, keys: client.zadd(keys.open_batches(RUN), {"other": 1}),
        {"batch-missing"},
        "batch other of run math",
    ),
    "results of no batch": (
        lambda client, keys: client.xadd(keys.results(RUN, "other"), {"job": "other/0"}),
        {"orphan"},
        "rollpool:{test}:results:math:other",
    ),
    "a finished part of no job": (
        lambda client, keys: client.hset(keys.parts(RUN, "b"), "0#0", ""),
        {"part-unexpected"},
        "batch b of run math: keeps the finished part 0#0",
    ),
    "a run is not listed": (lambda client, keys: client.srem(keys.runs, RUN), {"run-unlisted"}, "SADD it to runs"),
    "a key that no pool has": (
        lambda client, keys: client.set(f"{keys.prefix}notes:mine", "x"),
        {"key-unknown"},
        "rollpool:{test}:notes:mine: is a string that no pool has",
    ),
    "a key of another type": (
        lambda client, keys: client.set(keys.jobs(RUN, "low"), "x"),
        {"key-type"},
        "rollpool:{test}:jobs:math:low: is a string and must be a stream",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
async def test_what_is_broken_is_found_and_named(spread: Work, blocking: Redis, keys: Keys, what: str) -> None:
    breaks, kinds, line = BREAKS[what]
    breaks(blocking, keys)
    report = examine(blocking, keys)
    assert found(report) == kinds
    assert any(line in str(finding) for finding in report.findings), [str(each) for each in report.findings]


async def test_a_group_with_all_its_parts_that_is_open_is_found(work: Work, blocking: Redis, keys: Keys) -> None:
    await work.put("b", 1, parts=2)
    await work.settle((await work.take(1))[0])
    blocking.hset(keys.parts(RUN, "b"), "0#1", "")
    assert "parts-complete" in found(examine(blocking, keys))


async def test_a_committed_batch_must_be_over_and_expire(work: Work, blocking: Redis, keys: Keys) -> None:
    await work.put("b", 1)
    await work.settle(*await work.take())
    await commit(work.client, keys, run=RUN, batch="b")
    assert examine(blocking, keys).healthy
    blocking.persist(keys.batch(RUN, "b"))
    blocking.hset(keys.batch(RUN, "b"), "open", 1)
    assert found(examine(blocking, keys)) == {"batch-stays", "batch-counts"}


async def test_what_hosts_discard_or_bury_is_counted_and_no_trouble(spread: Work, blocking: Redis, keys: Keys) -> None:
    blocking.xadd(keys.jobs(RUN, "default"), {"hello": "world"})
    blocking.xadd(keys.jobs(RUN, "default"), {"job": "nobody/0", "run": RUN})
    blocking.rpush(keys.ready(RUN, "high"), "math:high:gone/0")
    report = examine(blocking, keys)
    assert report.findings == []
    assert (report.counts["foreign"], report.counts["tombstones"]) == (1, 3)


async def test_a_pool_at_rest_must_be_empty(spread: Work, blocking: Redis, keys: Keys) -> None:
    left = {finding.subject for finding in examine(blocking, keys, quiescent=True).findings}
    of_run = ("batches:math:b", "results:math:b", "open:math", "jobs:math:default", "ready:math:default")
    waiting = ("waiting", "delayed", "parked:math", "exact:math", "deadlines", "retries")
    assert left == {f"{keys.prefix}{name}" for name in (*of_run, *waiting)}


async def test_a_pool_whose_batches_are_committed_is_at_rest(work: Work, blocking: Redis, keys: Keys) -> None:
    await work.put("a", 3, parts=2)
    await work.put("b", 3, lane="high")
    await work.settle(*await work.take())
    for batch in ("a", "b"):
        assert await commit(work.client, keys, run=RUN, batch=batch) == 0
    report = examine(blocking, keys, quiescent=True)
    assert report.findings == []
    assert places(report) == (6, 0, 0, 0, 0)


async def test_a_run_that_was_forgotten_leaves_nothing(work: Work, blocking: Redis, keys: Keys) -> None:
    await work.put("a", 3)
    await work.settle(*await work.take())
    await commit(work.client, keys, run=RUN, batch="a")
    assert sweep(blocking, keys, served=[], idle_ms=-1).forgotten == 1
    assert examine(blocking, keys, quiescent=True).healthy


@pytest.mark.parametrize("seed", range(8))
async def test_no_order_of_work_is_taken_for_trouble(work: Work, blocking: Redis, keys: Keys, seed: int) -> None:
    """A random walk over every script, examined after each step: it finds what a script forgets, too."""
    draw, names = random.Random(seed), count()
    held: list[tuple[str, Entry]] = []
    batches: list[str] = []

    async def put() -> None:
        batches.append(f"b{next(names)}")
        await work.put(batches[-1], draw.randint(1, 4), parts=draw.randint(1, 3), lane=draw.choice(["high", "low"]))

    async def take() -> None:
        by = draw.choice(["vm:1", "vm:2"])
        held.extend((by, entry) for entry in await work.take(draw.randint(1, 5), version=draw.randint(4, 8), by=by))

    async def back() -> None:
        by, entry = draw.choice(held)  # which may be somebody else's by now, or settled
        await work.back(entry, place=draw.choice([READY, delayed(0), delayed(9**15), parked(7), exact(6)]), by=by)

    async def end() -> None:
        await work.settle(draw.choice(held)[1], outcome=draw.choice(OUTCOMES))

    async def lose() -> None:
        for stream in keys.streams([RUN]):
            reclaim(blocking, keys, stream, idle_ms=0, caller="vm:3", prefix=draw.choice(["vm:1", "vm:2"]))

    async def cancel() -> None:
        first, batch = draw.randint(0, 2), draw.choice(batches)
        await finish(
            work.client, keys, run=RUN, batch=batch, outcome="cancelled", error="", first=first, last=first + 1
        )

    async def read() -> None:
        batch = draw.choice(batches)
        size: Any = blocking.hget(keys.batch(RUN, batch), "bytes")
        await mark_read(work.client, keys, run=RUN, batch=batch, size=draw.randint(0, int(size or 0)))

    async def over() -> None:
        await commit(work.client, keys, run=RUN, batch=draw.choice(batches))

    async def tidy() -> None:
        blocking.set(keys.policy, 7)
        sweep(blocking, keys, served=[], idle_ms=draw.choice([-1, 10**6]))

    steps: list[Callable[[], Awaitable[None]]] = [put, take, take, back, end, end, lose, cancel, read, over, tidy]
    await put()
    await take()
    for _ in range(60):
        step = draw.choice(steps if held else [put, take])
        await step()
        report = examine(blocking, keys)
        assert report.findings == [], f"{step.__name__}: {[str(finding) for finding in report.findings]}"
        assert all(row.holds for row in report.rows)


async def test_the_command_tells_by_its_exit_status(spread: Work, redis_url: str, keys: Keys, blocking: Redis) -> None:
    command = ["doctor", "--url", redis_url, "--pool", keys.pool]
    wide = {"COLUMNS": "200"}
    result = runner.invoke(app, command, env=wide)
    assert result.exit_code == 0, result.output
    assert "healthy" in result.output
    assert "yes" in result.output
    blocking.xtrim(keys.jobs(RUN, "default"), maxlen=0, approximate=False)
    result = runner.invoke(app, command, env=wide)
    assert result.exit_code == 1
    assert "1 finding" in result.output
    assert "job b/6 of run math: is open and in no place, so nobody will run it; cancel its batch" in result.output
    result = runner.invoke(app, [*command, "--json"])
    assert result.exit_code == 1
    shown = json.loads(result.output)
    assert shown["healthy"] is False
    assert shown["findings"][0]["kind"] == "lost"
    assert shown["rows"][0] | {"run": RUN, "enqueued": 8, "backlog": 0} == shown["rows"][0]


async def test_the_command_names_so_many_of_a_kind_and_counts_the_rest(
    work: Work, redis_url: str, blocking: Redis, keys: Keys
) -> None:
    await work.put("b", 30)
    blocking.delete(keys.jobs(RUN, "default"))
    result = runner.invoke(app, ["doctor", "--url", redis_url, "--pool", keys.pool, "--named", "3"])
    assert result.output.count("is open and in no place") == 4
    assert "27 more" in result.output
