"""What anybody may add to a pool's keys by hand is dead-lettered with a reason or discarded, and the work goes on."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from fakes import FakeOwner, job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stage import RUN, Stage, make_quick, staged
from waiting import until

from rollpool.schemas.wire import pack, pack_model

pytestmark = pytest.mark.both_servers

#: More than any honest job: a prompt of 25 million tokens.
LARGE_BYTES = 100 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


GOOD = pack_model(job(run=RUN, batch="b"))


def damaged(body: bytes) -> st.SearchStrategy[bytes]:
    """Cut short, or with some bytes overwritten."""
    cut = st.integers(0, len(body)).map(lambda end: body[:end])
    overwritten = st.tuples(st.integers(0, len(body) - 1), st.binary(min_size=1, max_size=8)).map(
        lambda change: body[: change[0]] + change[1] + body[change[0] + len(change[1]) :]
    )
    return cut | overwritten


VALUES = st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.text(max_size=20) | st.floats(allow_nan=False)

#: Maps that look like jobs, with fields of any kind in place of their own.
MAPS = st.dictionaries(
    st.sampled_from(["schema", "run", "batch", "index", "prompt", "n", "parts", "part", "sampling", "policy_version"])
    | st.text(max_size=10),
    VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    max_size=12,
).map(pack)

BODIES = st.binary(max_size=200) | damaged(GOOD) | MAPS

NAMES = st.sampled_from(
    [b"b/0", b"b/1", b"b/77", b"b/0#1", b"b/0#0", b"/", b"#", b"\xff/0", b"b/-1", b"b/" + b"9" * 20]
)

COUNTS = st.sampled_from([b"", b"-1", b"1", b"2", b"99", b"x", b"9" * 400, b"\xff", b"1.5", b"nan"])

ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        b"job": NAMES | st.binary(max_size=20),
        b"run": st.sampled_from([RUN.encode(), b"other", b"", b"a:b", b"\xff"]),
        b"lane": st.sampled_from([b"high", b"default", b"", b"a:b", b"\xff"]),
        b"n": COUNTS,
        b"body": BODIES,
        b"attempts": COUNTS,
        b"faults": COUNTS,
        b"losses": COUNTS,
        b"company": COUNTS,
        b"avoid": st.binary(max_size=10),
        b"history": st.binary(max_size=50),
        b"done": BODIES,
        b"foreign": st.binary(max_size=10),
    },
).filter(bool)


async def goes_on(stage: Stage, entries: list[Mapping[bytes, bytes]]) -> None:
    """Add them among jobs; a host comes; every job of ours that was not named by a forgery is done."""
    await stage.server.flushall()
    await stage.enqueue(2, batch_id="b")  # what forgeries may name: those may end failed
    stream = stage.keys.jobs(RUN, "default")
    for fields in entries:
        await stage.server.xadd(stream, dict(fields))
    await stage.enqueue(5, batch_id="mine")
    owner = FakeOwner()
    host = stage.made(owner)
    serving = asyncio.create_task(host.run())
    try:
        await stage.settled("mine", *["ok"] * 5)
        await until(lambda: not host.busy, "everything pulled is settled, buried or discarded")
        states = await stage.states("b")
        assert set(states) <= {"ok", "failed"}, states
        assert await stage.server.xlen(stream) == 0
        assert not serving.done(), "the host lives"
    finally:
        host.stop_now()
        await serving


@given(entries=st.lists(ENTRIES, min_size=1, max_size=6))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_entry_that_anyone_adds_by_hand_stops_a_host(redis_url: str, entries: list[Mapping[bytes, bytes]]) -> None:
    async def run() -> None:
        async with staged(redis_url) as stage:
            await goes_on(stage, entries)

    asyncio.run(run())


async def test_an_entry_of_a_hundred_megabytes_is_a_dead_letter_and_the_host_goes_on(stage: Stage) -> None:
    await stage.enqueue(1, batch_id="b")
    stream = stage.keys.jobs(RUN, "default")
    [(entry, fields)] = await stage.server.xrange(stream)
    await stage.server.xdel(stream, entry)
    await stage.server.xadd(stream, {**fields, b"body": b"\xc1" * LARGE_BYTES})
    host = await stage.host(FakeOwner())
    await stage.settled("b", "failed")
    await stage.enqueue(1, batch_id="after")
    await stage.settled("after", "ok")
    await until(lambda: not host.busy)
    [letter] = await stage.dead()
    assert len(letter[b"body"]) == LARGE_BYTES
    assert letter[b"error"]


async def test_a_job_of_a_newer_schema_is_a_dead_letter_that_says_so(stage: Stage) -> None:
    await stage.enqueue(1, batch_id="b")
    stream = stage.keys.jobs(RUN, "default")
    [(entry, fields)] = await stage.server.xrange(stream)
    await stage.server.xdel(stream, entry)
    newer: dict[str, Any] = {"schema": 2, "run": RUN}
    await stage.server.xadd(stream, {**fields, b"body": pack(newer)})
    await stage.host(FakeOwner())
    [group] = await stage.settled("b", "failed")
    assert "schema 2" in (group.error or "")
    [letter] = await stage.dead()
    assert b"same version on both sides" in letter[b"error"]


GARBAGE = st.binary(max_size=30)


@given(
    members=st.lists(
        st.tuples(st.sampled_from([f"parked:{RUN}", "delayed", f"exact:{RUN}", "deadlines"]), GARBAGE), max_size=6
    ),
    waiting=st.dictionaries(GARBAGE, BODIES, max_size=4),
    ready=st.lists(GARBAGE, max_size=4),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_anyone_lets_wait_by_hand_stops_a_host(
    redis_url: str, members: list[tuple[str, bytes]], waiting: dict[bytes, bytes], ready: list[bytes]
) -> None:
    async def run() -> None:
        async with staged(redis_url) as stage:
            await stage.server.flushall()
            for place, member in members:
                await stage.server.zadd(f"{stage.keys.prefix}{place}", {member: 0})
            for name, fields in waiting.items():
                await stage.server.hset(stage.keys.waiting, name, fields)
            if ready:
                await stage.server.rpush(stage.keys.ready(RUN, "default"), *ready, *waiting)
            await stage.enqueue(5, batch_id="mine")
            async with stage.hosted(FakeOwner()):
                await stage.settled("mine", *["ok"] * 5)
            await stage.server.delete(stage.keys.waiting)  # forged names in no place are the doctor's to find

    asyncio.run(run())
