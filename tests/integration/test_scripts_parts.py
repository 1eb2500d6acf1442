"""Groups that are split into parts: settled once, when the last part is there, or as soon as one of them fails."""

from collections.abc import AsyncIterator, Sequence

import pytest
from delivery import HOUR_MS, RUN, Pool, ended, heard, jobs_of, next_of
from redis.exceptions import ResponseError

from rollpool.schemas import OUTCOMES, Group, Outcome
from rollpool.schemas.result_entry import bodies_of, size_of
from rollpool.schemas.scripts import PART, Enqueued, Entry, Settled, Settlement, delayed, enqueue, exact, parked
from rollpool.schemas.wire import pack_model, unpack_group

pytestmark = pytest.mark.both_servers

NOW, WAITING = Settled(True, "ok"), Settled(True, PART)


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    made = Pool(redis_url)
    yield made
    await made.close()


async def split(pool: Pool, parts: int = 3, *, size: int = 1) -> list[Entry]:
    """Enqueue groups and take all their parts."""
    assert await pool.put(size, parts=parts) == Enqueued("new", size)
    return await pool.take(size * parts)


def texts(group: Group) -> list[str]:
    return [sample.text for sample in group.samples]


async def test_a_split_group_counts_as_one_job_and_is_delivered_as_many(pool: Pool) -> None:
    entries = await split(pool, parts=2, size=2)
    assert jobs_of(entries) == ["b/0#0", "b/0#1", "b/1#0", "b/1#1"]
    assert await pool.counters() == {"enqueued": 2, "open": 2}
    assert await pool.outcomes() == {"0": "open", "1": "open"}
    await pool.check("b", parts=2)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_the_last_part_puts_the_group_together_in_order(pool: Pool, order: Sequence[int]) -> None:
    entries = await split(pool)
    replies = [await pool.settle(ended(entries[part], worker=f"w{part}")) for part in order]
    assert replies == [[WAITING], [WAITING], [NOW]]
    [group] = await pool.results()
    assert (group.id, group.outcome, texts(group)) == ("b/0", "ok", ["part 0", "part 1", "part 2"])
    assert group.worker == "w0,w1,w2"
    assert not await pool.server.exists(pool.keys.parts(RUN, "b"))
    assert await pool.pending() == set()
    counters = await pool.counters()
    assert (counters["ok"], counters["samples"], counters["tokens"]) == (1, 3, 9)
    await pool.check("b", parts=3)


async def test_a_person_reads_what_made_the_parts(pool: Pool) -> None:
    entries = await split(pool, parts=3)
    settlements = [ended(entry, version=version) for entry, version in zip(entries, (5, 5, 6), strict=True)]
    await pool.settle(*settlements)
    [(_, fields)] = await pool.server.xrange(pool.keys.results(RUN, "b"))
    plain = {name.decode(): value.decode() for name, value in fields.items() if not name.startswith(b"body")}
    assert plain == {
        "job": "b/0",
        "outcome": "ok",
        "policy": "5,6",
        "samples": "3",
        "tokens": "9",
        "worker": "a",
    }
    assert bodies_of(fields) == [pack_model(settlement.group) for settlement in settlements]
    assert size_of(fields) == (await pool.counters())["unread"]


async def test_all_parts_in_one_call_settle_the_group_once(pool: Pool) -> None:
    entries = await split(pool, size=2)
    replies = await pool.settle(*map(ended, entries))
    assert replies == [WAITING, WAITING, NOW] * 2
    await pool.check("b", parts=3)


async def test_a_part_that_is_settled_again_changes_nothing(pool: Pool) -> None:
    first, second, third = await split(pool)
    assert await pool.settle(ended(first), ended(first, tokens=9)) == [WAITING, Settled(False, PART)]
    assert await pool.settle(ended(first, tokens=9)) == [Settled(False, PART)]
    await pool.check("b", parts=3)
    await pool.settle(ended(second), ended(third))
    assert await pool.settle(ended(first)) == [Settled(False, "ok")]
    [group] = await pool.results()
    assert [len(sample.output_ids) for sample in group.samples] == [3, 3, 3]
    await pool.check("b", parts=3)


@pytest.mark.parametrize("outcome", [outcome for outcome in OUTCOMES if outcome != "ok"])
async def test_a_part_that_is_not_ok_ends_the_whole_group(pool: Pool, outcome: Outcome) -> None:
    first, second, third = await split(pool)
    await pool.settle(ended(first))
    assert await pool.settle(ended(second, outcome)) == [Settled(True, outcome)]
    [group] = await pool.results()
    assert (group.outcome, group.samples) == (outcome, ())
    assert not await pool.server.exists(pool.keys.parts(RUN, "b"))
    assert await pool.settle(ended(third), ended(first)) == [Settled(False, outcome)] * 2
    assert not await pool.server.exists(pool.keys.parts(RUN, "b"))
    assert await pool.pending() == set()
    await pool.check("b", parts=3)


async def test_a_part_that_fails_ends_those_that_wait_anywhere(pool: Pool) -> None:
    held, *others = await split(pool, parts=5)
    for entry, place in zip(others, [delayed(10**15), parked(9), exact(9)], strict=False):
        await pool.give_back(entry, place)
    await pool.give_back(others[3])
    await pool.settle(ended(held, "failed", dead="it crashed the engine"))
    assert await pool.take(version=9) == []
    assert await pool.places() == {}
    assert not await pool.server.exists(
        pool.keys.waiting, pool.keys.delayed, pool.keys.parked(RUN), pool.keys.exact(RUN)
    )
    [letter] = await pool.dead()
    assert (letter[b"job"], letter[b"body"]) == (b"b/0#0", held.body)


async def test_hosts_that_run_other_parts_of_a_failed_group_are_told_to_stop(pool: Pool) -> None:
    failed, running = await split(pool, parts=2)
    async with heard(pool) as channel:
        await pool.settle(ended(failed, "failed"))
        assert await next_of(channel) == b"run:b"
    assert pool.renew(running) == {running.id}
    assert await pool.pending() == set()


async def test_a_part_that_is_finished_is_not_run_again(pool: Pool) -> None:
    first, second = await split(pool, parts=2)
    assert pool.reclaim() == 2
    [again, _] = await pool.take(by="b:1")
    assert await pool.settle(ended(first)) == [WAITING]
    assert pool.renew(again, by="b:1") == {again.id}
    assert not await pool.give_back(again, by="b:1")
    assert pool.reclaim(by="c:1") == 1
    assert jobs_of(await pool.take(by="c:1")) == ["b/0#1"]
    assert await pool.settle(ended(second)) == [NOW]
    await pool.check("b", parts=2)


async def test_a_finished_part_that_waits_is_taken_out(pool: Pool) -> None:
    first, second = await split(pool, parts=2)
    pool.reclaim()
    await pool.settle(ended(first))
    await pool.check("b", parts=2)
    assert jobs_of(await pool.take()) == ["b/0#1"]
    await pool.settle(ended(second))
    await pool.check("b", parts=2)


async def test_a_cancelled_group_forgets_its_finished_parts(pool: Pool) -> None:
    first, second, third = await split(pool)
    await pool.settle(ended(first))
    assert await pool.finish(0, 0) == 1
    assert not await pool.server.exists(pool.keys.parts(RUN, "b"))
    assert await pool.settle(ended(second), ended(third)) == [Settled(False, "cancelled")] * 2
    assert not await pool.server.exists(pool.keys.parts(RUN, "b"))
    await pool.check("b", parts=3)


async def test_commit_leaves_no_parts(pool: Pool) -> None:
    entries = await split(pool)
    assert await pool.settle(ended(entries[0])) == [WAITING]
    assert await pool.commit() == 1
    await pool.settle(*map(ended, entries))
    await pool.server.hset(pool.keys.parts(RUN, "b"), "0#0", "somebody's own")
    assert await pool.commit() == 0
    assert not await pool.server.exists(pool.keys.parts(RUN, "b"))


async def test_a_whole_group_given_up_as_no_job_ends_all_its_parts(pool: Pool) -> None:
    """A host that cannot read an entry's body knows its index alone."""
    first, second = await split(pool, parts=2)
    await pool.settle(ended(first))
    failed = Settlement(second, ended(second, "failed").group, "not a job")
    assert await pool.settle(failed) == [Settled(True, "failed")]
    assert not await pool.server.exists(pool.keys.parts(RUN, "b"))
    assert await pool.server.xlen(pool.keys.dead) == 1
    await pool.check("b", parts=2)


async def test_a_part_that_was_never_enqueued_is_gone(pool: Pool) -> None:
    first, second = await split(pool, parts=2)
    made_up = Settlement(first, ended(first).group, part=2)
    assert await pool.settle(made_up) == [Settled(False, "gone")]
    assert await pool.settle(ended(first), ended(second)) == [WAITING, NOW]
    await pool.check("b", parts=2)


async def test_a_finished_part_that_somebody_overwrote_fails_the_group_and_nobody_else(pool: Pool) -> None:
    first, second = await split(pool, parts=2)
    await pool.put(1, batch="other")
    [other] = await pool.take()
    await pool.settle(ended(first))
    await pool.server.hset(pool.keys.parts(RUN, "b"), "0#0", "somebody's own")
    assert await pool.settle(ended(second), ended(other)) == [Settled(True, "failed"), NOW]
    [group] = await pool.results()
    assert (group.outcome, group.error) == ("failed", "its finished part 0 was overwritten on the server")
    await pool.check_runs({RUN: {"b": 2, "other": 1}})


async def test_unread_bytes_are_those_of_all_parts(pool: Pool) -> None:
    entries = await split(pool)
    await pool.settle(*map(ended, entries[:2]))
    assert (await pool.counters()).get("unread", 0) == 0
    await pool.settle(ended(entries[2]))
    assert (await pool.counters())["unread"] == sum(len(pack_model(ended(entry).group)) for entry in entries)


async def test_parts_reach_different_hosts_and_lanes_keep_their_order(pool: Pool) -> None:
    await pool.put(1, parts=4, lane="low")
    await pool.put(1, batch="urgent", parts=2, lane="high")
    shares = [jobs_of(await pool.take(2, by=f"{host}:1")) for host in "abc"]
    assert shares == [["urgent/0#0", "urgent/0#1"], ["b/0#0", "b/0#1"], ["b/0#2", "b/0#3"]]


async def test_a_lost_host_returns_the_parts_it_held(pool: Pool) -> None:
    await pool.put(2, parts=2)
    mine = await pool.take(2, by="a:1")
    await pool.take(2, by="b:1")
    for entry in mine:
        await pool.leave_idle(entry, by="a:1", ms=HOUR_MS)
    assert pool.reclaim(idle_ms=HOUR_MS) == 2
    back = await pool.take(by="c:1")
    assert [(entry.job, entry.record.company) for entry in back] == [("b/0#0", None), ("b/0#1", None)]


async def test_a_batch_of_a_hundred_thousand_parts_is_enqueued_whole(pool: Pool) -> None:
    size, parts = 12_500, 8
    answer = await enqueue(
        pool.client,
        pool.keys,
        run=RUN,
        batch="b",
        lane="low",
        content="c",
        policy=5,
        n=1,
        parts=parts,
        previews_and_bodies=["p", b"body"] * (size * parts),
    )
    assert answer == Enqueued("new", size)
    assert await pool.server.xlen(pool.lane("low")) == size * parts
    assert len(await pool.outcomes()) == size
    assert jobs_of(await pool.take(9)) == [*(f"b/0#{part}" for part in range(parts)), "b/1#0"]


@pytest.mark.parametrize(
    ("parts", "entries", "what"), [(1001, 1001, "1001 parts; at most 1000"), (2, 3, "has not all of its 2 parts")]
)
async def test_a_split_that_cannot_be_put_together_is_refused_whole(
    pool: Pool, parts: int, entries: int, what: str
) -> None:
    with pytest.raises(ResponseError, match=what):
        await enqueue(
            pool.client,
            pool.keys,
            run=RUN,
            batch="b",
            lane="low",
            content="c",
            policy=5,
            n=1,
            parts=parts,
            previews_and_bodies=["p", b"body"] * entries,
        )
    assert await pool.server.dbsize() == 0


async def test_a_group_of_a_thousand_parts_is_put_together(pool: Pool) -> None:
    entries = await split(pool, parts=1000)
    assert (await pool.settle(*map(ended, entries)))[-2:] == [WAITING, NOW]
    [(_, fields)] = await pool.server.xrange(pool.keys.results(RUN, "b"))
    assert [unpack_group(body).samples[0].text for body in bodies_of(fields)] == [f"part {at}" for at in range(1000)]
    await pool.check("b", parts=1000)
