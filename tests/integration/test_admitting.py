"""Admission on a real server: the script and the pure formula agree, and a trainer is held back or let in."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_workers import failed, work
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from waiting import until

from rollpool.producer import AsyncRolloutPool, BacklogFull, StalenessRule
from rollpool.producer.admission import COUNTERS, Limits, Load, staleness_room
from rollpool.schemas import Keys, scripts
from rollpool.schemas.connection import connect_async

pytestmark = pytest.mark.both_servers

LONG = 60.0


async def load_of(client: Redis, keys: Keys) -> Load:
    policy: Any = await client.get(keys.policy)
    counters: Any = await client.hmget(keys.run("r"), list(COUNTERS))
    return Load.of(policy, counters)


async def agrees(url: str, limits: Limits, events: list[tuple[str, int]]) -> None:
    client, keys = connect_async(url), Keys("test")
    try:
        await client.flushall()
        for number, (event, count) in enumerate(events):
            if event == "publish":
                await client.set(keys.policy, number)
            elif event == "enqueue":
                before = await load_of(client, keys)
                answer = await scripts.enqueue(
                    client,
                    keys,
                    run="r",
                    batch=f"b{number}",
                    lane="default",
                    content="c",
                    policy=0,
                    n=1,
                    previews_and_bodies=["", b""] * count,
                    backlog_limit=limits.backlog,
                    rule=limits.rule,
                )
                refusal = limits.refusal(before, count)
                assert answer.answer == (refusal or "new")
                if refusal == "stale":
                    assert limits.rule is not None
                    assert answer.count == max(0, staleness_room(limits.rule, before))
                elif refusal == "full":
                    assert answer.count == before.running
                else:
                    after = await load_of(client, keys)
                    assert after.running == before.running + count
            else:
                outcome = "cancelled" if event == "drop" else "ok"
                await end(client, keys, count, outcome)
    finally:
        await client.aclose()


async def end(client: Redis, keys: Keys, count: int, outcome: str) -> None:
    """Move counters as settling does: `count` open jobs get an outcome."""
    count = min(count, int(await client.hget(keys.run("r"), "open") or 0))
    await client.hincrby(keys.run("r"), "open", -count)
    await client.hincrby(keys.run("r"), outcome, count)


@given(
    limits=st.builds(
        Limits,
        st.integers(0, 12),
        st.none() | st.builds(StalenessRule, st.integers(0, 2), st.integers(1, 5)),
    ),
    events=st.lists(
        st.tuples(st.sampled_from(["enqueue", "enqueue", "ok", "drop", "publish"]), st.integers(1, 8)), max_size=25
    ),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_script_and_the_pure_formula_agree(redis_url: str, limits: Limits, events: list[tuple[str, int]]) -> None:
    asyncio.run(agrees(redis_url, limits, events))


@pytest.fixture
async def pool(redis_url: str, keys: Keys) -> AsyncIterator[AsyncRolloutPool]:
    rule = StalenessRule(max_staleness=1, batch_size=2)
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r", staleness_rule=rule) as pool:
        yield pool


async def test_enqueueing_waits_for_the_next_policy(pool: AsyncRolloutPool, redis_client: Redis, keys: Keys) -> None:
    await pool.publish_policy(7, checkpoint="/7", check=False)
    first = await pool.enqueue_prompts(["a", "b", "c", "d"], policy_version=7)
    await work(redis_client, keys)
    with pytest.raises(BacklogFull, match=r"room for 0 jobs at policy 7, and the batch has 2.*publish the next policy"):
        await pool.enqueue_prompts(["e", "f"], policy_version=7)
    waiting = asyncio.create_task(pool.enqueue_prompts(["e", "f"], policy_version=7, timeout=LONG))
    assert len([group async for group in first.collect(LONG)]) == 4
    await first.commit()
    assert not waiting.done()
    await pool.publish_policy(8, checkpoint="/8", check=False)
    assert len(await waiting) == 2


async def test_a_batch_that_never_fits_is_refused_though_it_might_wait(pool: AsyncRolloutPool) -> None:
    with pytest.raises(BacklogFull, match=r"never has room for more than 4 jobs.*several batches"):
        await pool.enqueue_prompts(list("abcde"), policy_version=0, timeout=None)


async def test_jobs_that_were_dropped_make_room(pool: AsyncRolloutPool, redis_client: Redis, keys: Keys) -> None:
    await pool.enqueue_prompts(list("abcd"), policy_version=0)
    await work(redis_client, keys, most=2, result=failed)
    assert len(await pool.enqueue_prompts(["e", "f"], policy_version=0)) == 2


async def test_groups_that_were_not_needed_make_room_once_their_batch_is_committed(
    pool: AsyncRolloutPool, redis_client: Redis, keys: Keys
) -> None:
    await pool.publish_policy(0, checkpoint="/0", check=False)
    for step in range(4):
        batch = await pool.enqueue_prompts(list("abcd"), policy_version=step)
        await work(redis_client, keys)
        assert len([group async for group in batch.collect(LONG, first_k=2)]) == 2
        await batch.commit()
        await pool.publish_policy(step + 1, checkpoint=f"/{step + 1}", check=False)


async def test_a_batch_that_the_server_lost_is_let_in_again_and_counted(
    pool: AsyncRolloutPool, redis_client: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollpool.producer.feed.BLOCK_MS", 20)
    await pool.publish_policy(7, checkpoint="/7", check=False)
    batch = await pool.enqueue_prompts(list("abcd"), policy_version=7)
    await redis_client.flushall()
    collecting = asyncio.create_task(anext(batch.collect(LONG)))
    await until(lambda: redis_client.exists(keys.run("r")))
    await pool.publish_policy(7, checkpoint="/7", check=False)
    with pytest.raises(BacklogFull, match="room for 0 jobs at policy 7"):
        await pool.enqueue_prompts(["e"], policy_version=7)
    await work(redis_client, keys)
    await collecting


async def test_the_weight_is_the_runs(redis_url: str, redis_client: Redis, keys: Keys) -> None:
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r", weight=2.5) as heavy:
        await heavy.enqueue_prompts(["a"], policy_version=0)
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r") as plain:
        await plain.enqueue_prompts(["b"], policy_version=0)
    assert await redis_client.hget(keys.run("r"), "weight") == b"2.5"
