"""The trainer's side against a real server; workers are played by the scripts they run."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_workers import failed, finished, work
from redis import Redis
from redis.exceptions import ConnectionError
from waiting import until

from rollpool.producer import (
    AsyncRolloutPool,
    BacklogFull,
    InvalidPrompt,
    NotPermitted,
    PolicyRejected,
    PolicyUnknown,
    PoolTimeout,
    RolloutPool,
    RollpoolError,
    SchemaMismatch,
    SettingsError,
    enqueue_prompts,
    feed,
)
from rollpool.schemas import Ack, WorkerStatus, scripts
from rollpool.schemas.connection import connect_async
from rollpool.schemas.wire import unpack_job

#: A wait that should succeed; far over what a loaded machine needs.
LONG = 60.0


def work_blocking(url, keys, **options):
    """As `work`, for tests of blocking code; a test that has a loop of its own calls it too."""

    async def run():
        client = connect_async(url)
        try:
            return await work(client, keys, **options)
        finally:
            await client.aclose()

    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, run()).result()


async def blocked(client):
    return (await client.info("clients"))["blocked_clients"] >= 1


@pytest.fixture
async def pool(redis_url, keys):
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r") as pool:
        yield pool


@pytest.fixture
def blocking_pool(redis_url, keys):
    with RolloutPool(redis_url, pool=keys.pool, run="r") as pool:
        yield pool


async def collected(source):
    return [group.index async for group in source]


# Enqueueing


async def test_groups_come_back_with_what_was_asked(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=4, n=3, metadata=["x", {"y": 1}], batch_id="step-4")
    await work(redis_client, keys)
    groups = [group async for group in batch.collect(LONG)]
    assert [(group.batch, group.index, group.metadata) for group in groups] == [
        ("step-4", 0, "x"),
        ("step-4", 1, {"y": 1}),
    ]
    assert all(len(group.samples) == 3 and group.policy_version == 4 for group in groups)
    assert batch.report().ok == len(batch) == 2


async def test_a_bad_prompt_in_the_middle_leaves_the_server_untouched(pool, redis_client):
    with pytest.raises(InvalidPrompt, match=r"prompts\[1\]"):
        await pool.enqueue_prompts(["a", "", "c"], policy_version=0)
    assert await redis_client.dbsize() == 0


@pytest.mark.both_servers
async def test_a_large_batch_is_one_call(pool, redis_client, keys):
    await redis_client.config_resetstat()
    prompts = [f"prompt {index}" for index in range(5000)]
    batch = await pool.enqueue_prompts(prompts, policy_version=0)
    stats = await redis_client.info("commandstats")
    assert stats["cmdstat_eval"]["calls"] == 1
    assert "cmdstat_evalsha" not in stats
    assert await redis_client.xlen(keys.jobs("r", "default")) == len(batch) == 5000


async def test_the_same_call_again_returns_the_first_batch(pool, redis_client, keys):
    async def enqueue():
        return await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s", deadline=60.0)

    first = await enqueue()
    await work(redis_client, keys, most=1)
    assert await anext(first.collect(LONG))
    again = await enqueue()
    assert await redis_client.hget(keys.run("r"), "enqueued") == b"2"
    await work(redis_client, keys)
    # The first batch, with what it handed out already.
    assert await collected(again.collect(LONG)) == [1]


async def test_another_process_that_repeats_the_call_gets_the_first_batch_whole(pool, redis_url, redis_client, keys):
    await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r") as other:
        batch = await other.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
        assert await collected(batch.collect(LONG)) == [0, 1]


async def test_other_content_under_the_same_name_is_refused(pool):
    await pool.enqueue_prompts(["a"], policy_version=0, batch_id="s")
    with pytest.raises(InvalidPrompt, match="batch_id: 's'"):
        await pool.enqueue_prompts(["b"], policy_version=0, batch_id="s")


async def test_a_deadline_is_a_time_of_the_server(pool, redis_client, keys):
    await pool.enqueue_prompts(["a"], policy_version=0, deadline=100.0)
    seconds, _ = await redis_client.time()
    ((_, fields),) = await redis_client.xrange(keys.jobs("r", "default"))
    assert abs(unpack_job(fields[b"body"]).deadline_ms / 1000 - (seconds + 100)) < LONG  # type: ignore[operator]


async def test_a_full_backlog_refuses_the_batch_whole(redis_url, redis_client, keys):
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r", backlog_limit=3) as pool:
        await pool.enqueue_prompts(["a", "b"], policy_version=0)
        with pytest.raises(BacklogFull, match=r"2 open jobs.*backlog_limit of 3"):
            await pool.enqueue_prompts(["c", "d"], policy_version=0)
        assert await redis_client.xlen(keys.jobs("r", "default")) == 2
        assert len(pool.batches) == 1


async def test_enqueueing_waits_for_room_when_asked(redis_url, redis_client, keys):
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r", backlog_limit=3) as pool:
        await pool.enqueue_prompts(["a", "b"], policy_version=0)
        waiting = asyncio.create_task(pool.enqueue_prompts(["c", "d"], policy_version=0, timeout=None))
        await work(redis_client, keys)
        assert len(await waiting) == 2


async def test_a_batch_over_the_limit_enters_an_empty_backlog(redis_url, keys):
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r", backlog_limit=1) as pool:
        assert len(await pool.enqueue_prompts(["a", "b"], policy_version=0)) == 2


def test_the_function_uses_the_pool_of_the_environment(redis_url, keys, monkeypatch):
    monkeypatch.setenv("ROLLPOOL_URL", redis_url)
    monkeypatch.setenv("ROLLPOOL_POOL", keys.pool)
    monkeypatch.setenv("ROLLPOOL_RUN", "from-env")
    batch = enqueue_prompts(["a"], policy_version=0)
    work_blocking(redis_url, keys, run="from-env")
    assert [group.run for group in batch.collect(LONG)] == ["from-env"]


# Collecting


async def test_groups_are_handed_out_as_they_finish(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b", "c"], policy_version=0)
    groups = batch.collect(LONG)
    for index in range(3):
        await work(redis_client, keys, most=1)
        assert (await anext(groups)).index == index
    with pytest.raises(StopAsyncIteration):
        await anext(groups)


async def test_a_second_collect_goes_on_where_the_first_stopped(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b", "c"], policy_version=0)
    await work(redis_client, keys)
    first = batch.collect(LONG)
    assert (await anext(first)).index == 0
    await first.aclose()
    assert await collected(batch.collect(LONG)) == [1, 2]
    assert await collected(batch.collect(LONG)) == []


async def test_a_timeout_says_how_far_it_got_and_loses_nothing(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b", "c"], policy_version=0)
    await work(redis_client, keys, most=1)
    seen = []

    async def train():
        async for group in batch.collect(0.05):
            seen.append(group.index)

    with pytest.raises(PoolTimeout, match=r"1 of 3 jobs arrived \(ok 1, open 2\)"):
        await train()
    await work(redis_client, keys)
    assert seen + await collected(batch.collect(LONG)) == [0, 1, 2]


async def test_a_cancelled_collect_loses_nothing(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0)
    waiting = asyncio.create_task(collected(batch.collect(LONG)))
    await until(lambda: blocked(redis_client))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await work(redis_client, keys)
    assert await collected(batch.collect(LONG)) == [0, 1]


async def test_dropped_jobs_are_reported_and_not_handed_out(pool, redis_client, keys, caplog):
    batch = await pool.enqueue_prompts(["a", "b", "c"], policy_version=0)
    await work(redis_client, keys, most=2, result=failed)
    await work(redis_client, keys)
    with caplog.at_level(logging.WARNING):
        assert await collected(batch.collect(LONG)) == [2]
    assert [(group.index, group.outcome, group.error) for group in batch.dropped] == [
        (0, "failed", "the engine said no"),
        (1, "failed", "the engine said no"),
    ]
    assert len([record for record in caplog.records if "dropped as failed" in record.message]) == 1
    assert (batch.report().ok, batch.report().failed, batch.report().open) == (1, 2, 0)


@pytest.fixture
def short_block(monkeypatch):
    """It is seen at once that a batch vanished."""
    monkeypatch.setattr(feed, "BLOCK_MS", 20)


async def test_a_batch_that_the_server_lost_is_enqueued_again(pool, redis_client, keys, caplog, short_block):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s", deadline=900.0)
    deadline = await redis_client.zscore(keys.deadlines, "r:s")
    await work(redis_client, keys, most=1)
    groups = batch.collect(LONG)
    assert (await anext(groups)).index == 0
    await redis_client.flushall()
    rest = asyncio.create_task(anext(groups))
    await until(lambda: work(redis_client, keys))
    assert (await rest).index == 1
    assert await redis_client.zscore(keys.deadlines, "r:s") == deadline
    assert len([record for record in caplog.records if "lost it" in record.message]) == 1
    assert await collected(batch.collect(LONG)) == []
    await batch.commit()


async def test_a_lost_batch_that_was_cancelled_stays_cancelled(pool, redis_client, keys, short_block):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0)
    assert await pool.cancel() == 2
    await redis_client.flushall()
    assert await collected(batch.collect(LONG)) == []
    assert batch.report().cancelled == 2


async def test_of_a_lost_batch_that_was_cancelled_what_is_here_runs_again_for_a_trainer_that_dies(
    pool, redis_url, redis_client, keys, short_block
):
    batch = await pool.enqueue_prompts(list("abcd"), policy_version=0, batch_id="s")
    await work(redis_client, keys, most=2)
    state = pool.state_dict()
    groups = batch.collect(LONG)
    await anext(groups)
    await batch.cancel()
    await redis_client.flushall()
    assert await collected(groups) == [1]
    assert (batch.report().ok, batch.report().cancelled) == (2, 2)
    await work(redis_client, keys)
    async with await AsyncRolloutPool.resume(state, redis_url, pool=keys.pool) as resumed:
        assert await collected(resumed.batches["s"].collect(LONG)) == [0, 1]


async def test_a_lost_batch_is_read_from_its_beginning_though_the_reply_to_its_enqueueing_was_lost(
    pool, redis_client, keys, monkeypatch
):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys, most=1)
    groups = batch.collect(LONG)
    assert (await anext(groups)).index == 0
    await redis_client.flushall()
    sent = scripts.enqueue

    async def lost(*args, **options):
        await sent(*args, **options)
        raise ConnectionError("the reply was lost")

    monkeypatch.setattr(scripts, "enqueue", lost)
    with pytest.raises(RollpoolError, match="the reply was lost"):
        await anext(groups)
    monkeypatch.setattr(scripts, "enqueue", sent)
    assert batch.inbox.cursor == "0-0"
    await work(redis_client, keys)
    assert await collected(batch.collect(LONG)) == [1]


async def test_results_with_lower_ids_than_those_that_were_read_are_found(pool, redis_client, keys):
    """As after a failover to a replica that lagged, and whose clock is behind."""
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys, most=1)
    groups = batch.collect(LONG)
    assert (await anext(groups)).index == 0
    await work(redis_client, keys)
    stream = keys.results("r", "s")
    (_, first), (_, second) = await redis_client.xrange(stream)
    await redis_client.delete(stream)
    await redis_client.xadd(stream, first, id="1-1")
    await redis_client.xadd(stream, second, id="1-2")
    assert (await anext(groups)).index == 1
    assert await collected(batch.collect(LONG)) == []


async def test_what_was_collected_whole_can_be_committed_though_the_server_lost_it(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a"], policy_version=0)
    await work(redis_client, keys)
    assert await collected(batch.collect(LONG)) == [0]
    await redis_client.flushall()
    await batch.commit()
    assert batch.committed


async def test_a_batch_that_the_server_lost_is_told_and_can_be_enqueued_again(pool, redis_url, redis_client, keys):
    """Where its prompts are not: another process enqueued it."""
    await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys, most=1)
    async with await AsyncRolloutPool.resume(pool.state_dict(), redis_url, pool=keys.pool) as resumed:
        groups = resumed.batches["s"].collect(LONG)
        assert (await anext(groups)).index == 0
        await redis_client.flushall()
        with pytest.raises(RollpoolError, match=r"does not know it any more.*same batch_id"):
            await anext(groups)
        again = await resumed.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
        await work(redis_client, keys)
        assert await collected(again.collect(LONG)) == [1]


async def test_a_resumed_trainer_enqueues_what_was_lost_and_gets_only_the_rest(pool, redis_url, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    assert (await anext(batch.collect(LONG))).index == 0
    state = pool.state_dict()
    await redis_client.flushall()
    async with await AsyncRolloutPool.resume(state, redis_url, pool=keys.pool) as resumed:
        again = await resumed.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
        await work(redis_client, keys)
        assert await collected(again.collect(LONG)) == [1]
        # Other content under the name is another batch.
        await redis_client.flushall()
        other = await resumed.enqueue_prompts(["x", "b"], policy_version=0, batch_id="s")
        await work(redis_client, keys)
        assert await collected(other.collect(LONG)) == [0, 1]


async def test_prompts_are_let_go_once_everything_was_read(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=3)
    await work(redis_client, keys, most=1)
    groups = batch.collect(LONG)
    await anext(groups)
    assert batch.policy_version == 3
    await work(redis_client, keys)
    await anext(groups)
    assert batch.policy_version is None


async def test_another_batch_under_the_name_of_a_lost_one_is_another_batch(pool, redis_client, keys):
    first = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await redis_client.flushall()
    other = await pool.enqueue_prompts(["c"], policy_version=0, batch_id="s")
    with pytest.raises(RollpoolError, match="another batch was enqueued under its name"):
        await collected(first.collect(LONG))
    await work(redis_client, keys)
    assert await collected(other.collect(LONG)) == [0]
    assert len(other) == 1


async def test_results_that_somebody_deleted_end_the_wait(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    await redis_client.delete(keys.results("r", "s"))
    with pytest.raises(RollpoolError, match="1 results are missing"):
        await collected(batch.collect(LONG))


async def test_two_runs_do_not_see_one_another(redis_url, redis_client, keys):
    async with (
        AsyncRolloutPool(redis_url, pool=keys.pool, run="one") as one,
        AsyncRolloutPool(redis_url, pool=keys.pool, run="two") as two,
    ):
        first = await one.enqueue_prompts(["a"], policy_version=0, batch_id="s")
        second = await two.enqueue_prompts(["b", "c"], policy_version=0, batch_id="s")
        await work(redis_client, keys, run="one")
        await work(redis_client, keys, run="two")
        assert [group.run async for group in first.collect(LONG)] == ["one"]
        assert [group.run async for group in second.collect(LONG)] == ["two", "two"]


async def test_groups_of_all_batches_come_as_they_finish(pool, redis_client, keys):
    first = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="first")
    await pool.enqueue_prompts(["c", "d"], policy_version=0, batch_id="second")
    await work(redis_client, keys, most=3)
    assert [group.id async for group in pool.groups(n=2, timeout=LONG)] == ["first/0", "first/1"]
    await work(redis_client, keys)
    assert [group.id async for group in pool.groups(timeout=LONG)] == ["second/0", "second/1"]
    await first.commit()
    assert list(pool.batches) == ["second"]


async def test_groups_include_a_batch_enqueued_meanwhile(pool, redis_client, keys):
    await pool.enqueue_prompts(["a"], policy_version=0, batch_id="first")
    await work(redis_client, keys)
    groups = pool.groups(timeout=LONG)
    assert (await anext(groups)).id == "first/0"
    await pool.enqueue_prompts(["b"], policy_version=0, batch_id="second")
    await work(redis_client, keys)
    assert (await anext(groups)).id == "second/0"


# Split groups, and groups that may be short


async def test_a_split_group_comes_back_whole_in_the_order_of_its_parts(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, n=6, split=3, metadata=["x", "y"])
    entries = await redis_client.xrange(keys.jobs("r", "default"))
    jobs = [unpack_job(fields[b"body"]) for _, fields in entries]
    assert [(job.index, job.part, job.parts, job.n, job.prompt) for job in jobs] == [
        (index, part, 3, 2, prompt) for index, prompt in enumerate("ab") for part in range(3)
    ]
    assert await work(redis_client, keys, most=4) == 4
    groups = batch.collect(LONG)
    first = await anext(groups)
    assert (first.index, first.metadata) == (0, "x")
    assert [sample.text for sample in first.samples] == [f"part {part}" for part in (0, 0, 1, 1, 2, 2)]
    assert batch.report().open == 1
    await work(redis_client, keys)
    assert [group.index async for group in groups] == [1]
    report = batch.report()
    assert (report.enqueued, report.ok, report.open, report.kept_outputs.count, report.kept_prompts.count) == (
        2, 2, 0, 12, 2,
    )  # fmt: skip
    await batch.commit()


async def test_a_part_that_fails_drops_its_group_once(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, n=2, split=2)
    await work(redis_client, keys, most=1)
    await work(redis_client, keys, most=1, result=failed)
    await work(redis_client, keys)
    assert await collected(batch.collect(LONG)) == [1]
    assert [(group.index, group.outcome) for group in batch.dropped] == [(0, "failed")]
    assert (batch.report().ok, batch.report().failed, batch.report().open) == (1, 1, 0)


async def test_a_split_batch_can_be_cancelled_and_attached(pool, redis_url, redis_client, keys):
    await pool.enqueue_prompts(["a", "b", "c"], policy_version=0, n=4, split=2, batch_id="s")
    await work(redis_client, keys, most=3)
    async with await AsyncRolloutPool.resume(pool.state_dict(), redis_url, pool=keys.pool) as resumed:
        batch = resumed.batches["s"]
        assert len(batch) == 3
        assert await batch.cancel() == 2
        assert await collected(batch.collect(LONG)) == [0]
        assert batch.report().cancelled == 2
        await batch.commit()


async def test_a_group_with_fewer_samples_counts_as_one(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, n=4, min_samples=2)
    await work(redis_client, keys, most=1, result=lambda job: finished(job, samples=job.fewest_samples))
    await work(redis_client, keys)
    assert [len(group.samples) async for group in batch.collect(LONG)] == [2, 4]
    assert (batch.report().ok, batch.report().kept_outputs.count) == (2, 6)


# Enough groups


async def test_the_first_k_groups_are_handed_out_and_the_rest_is_cancelled(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(list("abcdef"), policy_version=0)
    await work(redis_client, keys, most=2)
    groups = batch.collect(LONG, first_k=3)
    assert [(await anext(groups)).index, (await anext(groups)).index] == [0, 1]
    assert batch.report().open == 4
    await work(redis_client, keys, most=2)
    assert (await anext(groups)).index == 2
    # Already: a consumer that takes no more than it needs does not come back here.
    assert await redis_client.hget(keys.run("r"), "open") == b"0"
    assert await collected(groups) == []
    report = batch.report()
    assert (report.ok, report.surplus, report.cancelled, report.open) == (3, 1, 2, 0)
    assert report.ok + report.dropped + report.open == report.enqueued
    assert report.kept_prompts.count == report.kept_outputs.count == 3
    assert report.dropped_prompts.count == 1
    assert pool.state_dict()["batches"][batch.id]["complete"]
    await batch.commit()


async def test_the_first_k_count_over_interruptions_and_restarts(pool, redis_url, redis_client, keys):
    batch = await pool.enqueue_prompts(list("abcdef"), policy_version=0, batch_id="s")
    await work(redis_client, keys, most=1)
    with pytest.raises(PoolTimeout):
        await collected(batch.collect(0.05, first_k=3))
    async with await AsyncRolloutPool.resume(pool.state_dict(), redis_url, pool=keys.pool) as resumed:
        batch = resumed.batches["s"]
        await work(redis_client, keys, most=4)
        assert await collected(batch.collect(LONG, first_k=3)) == [1, 2]
        assert await collected(batch.collect(LONG, first_k=3)) == []
        assert (batch.report().surplus, batch.report().cancelled) == (2, 1)


@pytest.mark.parametrize("first_k", [2, 3, 9])
async def test_more_groups_than_there_are_is_all_of_them(pool, redis_client, keys, first_k):
    batch = await pool.enqueue_prompts(["a", "b", "c"], policy_version=0)
    await work(redis_client, keys, most=1, result=failed)
    await work(redis_client, keys)
    assert await collected(batch.collect(LONG, first_k=first_k)) == [1, 2]
    assert batch.report().surplus == 0


async def test_fewer_than_were_taken_ends_the_batch_at_once(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(list("abcd"), policy_version=0)
    await work(redis_client, keys, most=3)
    groups = batch.collect(LONG)
    await anext(groups)
    await anext(groups)
    assert await collected(batch.collect(LONG, first_k=1)) == []
    assert (batch.report().ok, batch.report().surplus, batch.report().cancelled) == (2, 1, 1)


@pytest.mark.parametrize("first_k", [0, -1])
async def test_no_group_at_all_is_refused(pool, first_k):
    batch = await pool.enqueue_prompts(["a"], policy_version=0)
    with pytest.raises(SettingsError, match="first_k"):
        batch.collect(first_k=first_k)


# Results nobody reads, and deadlines


async def test_what_is_read_no_longer_counts_as_unread(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, n=2, split=2)
    await work(redis_client, keys)
    assert int(await redis_client.hget(keys.run("r"), "unread")) > 0
    await collected(batch.collect(LONG))
    assert await redis_client.hget(keys.run("r"), "unread") == b"0"
    await batch.commit()
    assert await redis_client.hget(keys.run("r"), "unread") == b"0"


async def test_results_of_a_later_batch_do_not_keep_hosts_from_the_one_that_is_collected(
    pool, redis_client, keys, short_block
):
    first = await pool.enqueue_prompts(["a"], policy_version=0, lane="low")
    await pool.enqueue_prompts(["b", "c"], policy_version=0)
    await work(redis_client, keys, most=2)
    assert await work(redis_client, keys, unread_bound=1) == 0
    waiting = asyncio.create_task(collected(first.collect(LONG)))
    await until(lambda: work(redis_client, keys, unread_bound=1))
    assert await waiting == [0]
    assert [group.batch != first.id async for group in pool.groups(timeout=LONG)] == [True, True]


async def test_a_deadline_ends_jobs_though_no_host_lives(pool, redis_client, keys, short_block):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, deadline=0.01)
    assert await collected(batch.collect(LONG)) == []
    assert batch.report().expired == 2


# Committing and cancelling


async def test_a_commit_drops_the_results_and_may_be_repeated(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    await collected(batch.collect(LONG))
    await batch.commit()
    await batch.commit()
    assert batch.committed
    assert not await redis_client.exists(keys.results("r", "s"))
    assert pool.state_dict()["batches"] == {}


async def test_a_commit_with_open_jobs_is_refused(pool):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0)
    with pytest.raises(RollpoolError, match="2 of 2 jobs are open"):
        await batch.commit()
    assert not batch.committed


async def test_a_committed_batch_that_is_enqueued_again_says_so(pool, redis_url, redis_client, keys):
    batch = await pool.enqueue_prompts(["a"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    await collected(batch.collect(LONG))
    await batch.commit()
    async with AsyncRolloutPool(redis_url, pool=keys.pool, run="r") as other:
        again = await other.enqueue_prompts(["a"], policy_version=0, batch_id="s")
        with pytest.raises(RollpoolError, match="was committed"):
            await collected(again.collect(LONG))


async def test_cancelling_settles_what_is_open(pool, redis_client, keys):
    batch = await pool.enqueue_prompts([f"p{index}" for index in range(600)], policy_version=5)
    await work(redis_client, keys, most=1)
    assert await batch.cancel() == 599
    assert await batch.cancel() == 0
    assert await collected(batch.collect(LONG)) == [0]
    assert {(group.outcome, group.policy_version) for group in batch.dropped} == {("cancelled", 5)}
    assert batch.report().cancelled == 599
    await batch.commit()
    # Hosts discard the entries when they meet them.
    await pool.enqueue_prompts(["next"], policy_version=5)
    assert await work(redis_client, keys) == 1
    assert await redis_client.xlen(keys.jobs("r", "default")) == 0


async def test_cancelling_a_run_reaches_batches_of_other_processes(pool, redis_url, redis_client, keys):
    async with (
        AsyncRolloutPool(redis_url, pool=keys.pool, run="r") as other,
        AsyncRolloutPool(redis_url, pool=keys.pool, run="another") as another,
    ):
        await other.enqueue_prompts(["a", "b"], policy_version=1)
        await other.enqueue_prompts(["c"], policy_version=2, n=4, split=2)
        await another.enqueue_prompts(["d"], policy_version=1)
    assert await pool.cancel(policy_version=1) == 2
    assert await pool.cancel(policy_version=1) == 0
    assert await pool.cancel() == 1
    assert await redis_client.hget(keys.run("r"), "open") == b"0"
    assert await redis_client.hget(keys.run("another"), "open") == b"1"


# Resuming

TRAINER = """
import json, os, sys
from rollpool.producer import RolloutPool
url, name, file = sys.argv[1:]
pool = RolloutPool(url, pool=name, run="r")
done = pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="done")
half = pool.enqueue_prompts(["c", "d", "e", "f"], policy_version=0, batch_id="half")
trained = [group.id for group in done.collect(60)]
trained += [group.id for _, group in zip(range(2), half.collect(60))]
with open(file, "w") as out:
    json.dump({"state": pool.state_dict(), "trained": trained}, out)
pool.enqueue_prompts(["g"], policy_version=0, batch_id="unknown")
os._exit(9)
"""

RESUMED = """
import json, sys
from rollpool.producer import RolloutPool
url, name, file = sys.argv[1:]
with open(file) as saved:
    state = json.load(saved)["state"]
with RolloutPool.resume(state, url, pool=name) as pool:
    batches = list(pool.batches)
    trained = [group.id for group in pool.groups(timeout=60)]
    state = pool.state_dict()
print(json.dumps({"batches": batches, "trained": trained, "state": state}))
"""


async def test_a_crash_between_saving_and_committing_trains_nothing_twice_and_skips_nothing(
    redis_url, redis_client, keys, tmp_path
):
    arguments = [redis_url, keys.pool, str(tmp_path / "checkpoint.json")]
    trainer = await asyncio.create_subprocess_exec(sys.executable, "-c", TRAINER, *arguments)
    settled = 0

    async def five():
        nonlocal settled
        settled += await work(redis_client, keys, most=5 - settled)
        return settled == 5

    await until(five)
    assert await asyncio.wait_for(trainer.wait(), LONG) == 9
    before = json.loads((tmp_path / "checkpoint.json").read_text())
    await work(redis_client, keys)
    command = [sys.executable, "-W", "error", "-c", RESUMED, *arguments]
    output = await asyncio.to_thread(subprocess.check_output, command, timeout=LONG)
    after = json.loads(output)
    assert after["batches"] == ["half", "unknown"]
    everything = {"done/0", "done/1", "half/0", "half/1", "half/2", "half/3", "unknown/0"}
    assert sorted(before["trained"] + after["trained"]) == sorted(everything)
    assert {name: batch["complete"] for name, batch in after["state"]["batches"].items()} == {
        "half": True,
        "unknown": True,
    }
    assert after["state"]["batches"]["half"]["consumed"] == [[0, 4]]


async def test_a_resumed_state_can_be_saved_before_anything_is_read(pool, redis_url, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    assert (await anext(batch.collect(LONG))).index == 0
    state = pool.state_dict()
    assert state["batches"] == {"s": {"consumed": [[0, 1]], "complete": False, "content": batch.content}}
    async with await AsyncRolloutPool.resume(state, redis_url, pool=keys.pool) as resumed:
        assert resumed.state_dict() == state
        assert await collected(resumed.batches["s"].collect(LONG)) == [1]


async def test_a_batch_that_was_consumed_whole_before_a_restart_yields_nothing_when_it_is_enqueued_again(
    pool, redis_url, redis_client, keys
):
    """The trainer saved after the last group of a step, and died before it saved the next step."""
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    await collected(batch.collect(LONG))
    state = json.loads(json.dumps(pool.state_dict()))
    for _ in range(2):
        async with await AsyncRolloutPool.resume(state, redis_url, pool=keys.pool) as resumed:
            again = await resumed.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
            assert len(again) == 2
            assert await collected(again.collect(LONG)) == []
            await again.commit()
            # Whatever is saved from here on still knows.
            state = resumed.state_dict()
            assert state["batches"] == {}
    assert await redis_client.hget(keys.run("r"), "enqueued") == b"2"


async def test_a_commit_that_the_server_lost_is_made_again_when_resuming(pool, redis_url, redis_client, keys):
    """As after a restart that cost it the last second."""
    batch = await pool.enqueue_prompts(["a"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    await collected(batch.collect(LONG))
    before = {name: await redis_client.dump(name) for name in await redis_client.keys()}
    await batch.commit()
    state = pool.state_dict()
    for name, value in before.items():
        await redis_client.restore(name, 0, value, replace=True)
    async with await AsyncRolloutPool.resume(state, redis_url, pool=keys.pool) as resumed:
        assert resumed.batches == {}
        assert not await redis_client.exists(keys.open_batches("r"))


async def test_what_was_collected_whole_can_be_committed_though_it_was_enqueued_again(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    await collected(batch.collect(LONG))
    await redis_client.flushall()
    assert await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s") is batch
    await batch.commit()
    assert await redis_client.hget(keys.run("r"), "open") == b"0"


async def test_a_batch_that_is_gone_is_told_when_resuming(redis_url, keys, caplog):
    state = {"schema": 1, "run": "r", "batches": {"lost": {"consumed": [], "complete": False}}}
    async with await AsyncRolloutPool.resume(state, redis_url, pool=keys.pool) as resumed:
        assert resumed.batches == {}
    assert "batch lost" in caplog.text


@pytest.mark.parametrize("state", [{}, {"schema": 2, "run": "r", "batches": {}}, None], ids=str)
def test_what_is_no_state_is_refused(state, redis_url):
    with pytest.raises(SchemaMismatch):
        RolloutPool.resume(state, redis_url)


# Policies


async def heartbeat(client, keys, name, state="serving", policy=None):
    status = WorkerStatus(name=name, host="h", pid=1, state=state, policy=policy)
    await client.hset(keys.worker(name), mapping=status.fields())


async def acknowledge(client, keys, **fields):
    """An answer of w1 to the last command, unless told otherwise."""
    [(entry, _)] = await client.xrevrange(keys.control, count=1)
    ack = Ack(**{"worker": "w1", "command": entry.decode(), "version": 7, "seconds": 1.0, **fields})
    await client.xadd(keys.acks, {name: "" if value is None else value for name, value in ack.model_dump().items()})


async def test_a_published_policy_is_the_current_one(pool):
    assert await pool.current_policy() is None
    published = await pool.publish_policy(3, checkpoint="/weights/3", check=False)
    assert await pool.current_policy() == published
    assert (published.version, published.checkpoint, published.run) == (3, "/weights/3", "r")
    assert await pool.publish_policy(3, checkpoint="/weights/3", check=False) == published


async def test_two_versions_of_one_path_are_refused(pool: AsyncRolloutPool) -> None:
    await pool.publish_policy(1, checkpoint="/checkpoints/latest", check=False)
    with pytest.raises(PolicyRejected, match="that of policy 1 already"):
        await pool.publish_policy(2, checkpoint="/checkpoints/latest", check=False)
    assert (await pool.publish_policy(1, checkpoint="/checkpoints/latest", check=False)).version == 1


async def test_more_batches_are_collected_at_once_than_there_are_connections(pool: AsyncRolloutPool) -> None:
    batches = [await pool.enqueue_prompts(["x"], policy_version=0) for _ in range(120)]

    async def collected(batch):
        try:
            return str([group async for group in batch.collect(timeout=2)])
        except PoolTimeout:
            return "waited"

    assert set(await asyncio.gather(*map(collected, batches))) == {"waited"}


@pytest.mark.parametrize(
    ("version", "checkpoint", "why"),
    [
        (3, "/other", "already names '/weights/3'"),
        (2, "/weights/2", "older than the current policy 3"),
        (-1, "/weights", "version"),
        (4, "", "checkpoint"),
    ],
)
async def test_a_policy_that_cannot_be_is_rejected(pool, version, checkpoint, why):
    await pool.publish_policy(3, checkpoint="/weights/3", check=False)
    with pytest.raises(PolicyRejected, match=why):
        await pool.publish_policy(version, checkpoint=checkpoint, check=False)


async def test_waiting_ends_when_the_fraction_serves(pool, redis_client, keys):
    await pool.publish_policy(7, checkpoint="/weights/7", check=False)
    for name, policy in (("w1", 7), ("w2", 6), ("w3", 8)):
        await heartbeat(redis_client, keys, name, policy=policy)
    await heartbeat(redis_client, keys, "w4", state="stopping", policy=6)
    await pool.wait_for_policy(7, fraction=0.6, timeout=LONG)
    waiting = asyncio.create_task(pool.wait_for_policy(7, timeout=LONG))
    await heartbeat(redis_client, keys, "w2", policy=7)
    await waiting


async def test_a_timeout_names_who_is_missing(pool, redis_client, keys):
    await pool.publish_policy(7, checkpoint="/weights/7", check=False)
    await heartbeat(redis_client, keys, "w1", policy=7)
    await heartbeat(redis_client, keys, "w2", state="changing", policy=6)
    await heartbeat(redis_client, keys, "w3", state="starting")
    missing = r"1 of 3 do; not yet: w2 \(changing, policy 6\), w3 \(starting, policy none\)"
    with pytest.raises(PoolTimeout, match=missing):
        await pool.wait_for_policy(7, timeout=0.05)


async def test_at_least_one_worker_must_serve(pool):
    await pool.publish_policy(7, checkpoint="/weights/7", check=False)
    with pytest.raises(PoolTimeout, match="no live worker"):
        await pool.wait_for_policy(7, fraction=0.1, timeout=0.05)


async def test_a_host_that_failed_ends_the_wait_with_its_error(pool, redis_client, keys):
    await pool.publish_policy(7, checkpoint="/weights/7", check=False)
    await heartbeat(redis_client, keys, "w1", policy=6)
    await acknowledge(redis_client, keys, state="received")
    await acknowledge(redis_client, keys, state="failed", error="no such file", version=6)
    waiting = asyncio.create_task(pool.wait_for_policy(7, timeout=LONG))
    await acknowledge(redis_client, keys, state="failed", error="bad shard")
    with pytest.raises(PolicyRejected, match="policy 7 could not be applied by worker w1: bad shard"):
        await waiting


async def test_a_failure_of_a_host_that_is_gone_or_tried_again_does_not_count(pool, redis_client, keys):
    await pool.publish_policy(7, checkpoint="/weights/7", check=False)
    await heartbeat(redis_client, keys, "w1", state="changing", policy=6)
    await acknowledge(redis_client, keys, state="failed", error="died", worker="gone")
    await acknowledge(redis_client, keys, state="failed", error="first try")
    await acknowledge(redis_client, keys, state="received")
    with pytest.raises(PoolTimeout):
        await pool.wait_for_policy(7, timeout=0.05)


async def test_waiting_for_a_version_nobody_published_is_refused(pool):
    with pytest.raises(PolicyUnknown, match="policy 9"):
        await pool.wait_for_policy(9)
    with pytest.raises(PolicyRejected, match="fraction"):
        await pool.wait_for_policy(9, fraction=0.0)


# The blocking façade


def test_the_blocking_pool_does_all_of_it(blocking_pool, redis_url, keys):
    batch = blocking_pool.enqueue_prompts([[1, 2], [3]], policy_version=0, n=2, batch_id="s")
    work_blocking(redis_url, keys, most=1)
    with pytest.raises(PoolTimeout):
        list(batch.collect(0.05))
    work_blocking(redis_url, keys)
    assert blocking_pool.state_dict()["batches"]["s"]["consumed"] == [[0, 1]]
    assert [group.index for group in blocking_pool.groups(timeout=LONG)] == [1]
    assert list(batch.collect()) == []
    batch.commit()
    assert blocking_pool.batches == {}
    blocking_pool.publish_policy(1, checkpoint="/weights/1", check=False)
    assert blocking_pool.current_policy().version == 1


async def test_it_works_where_a_loop_is_running_as_in_a_notebook(blocking_pool, redis_url, keys):
    batch = blocking_pool.enqueue_prompts(["a"], policy_version=0)
    work_blocking(redis_url, keys)
    assert [group.index for group in batch.collect(LONG)] == [0]


def test_ctrl_c_ends_the_wait_and_loses_nothing(blocking_pool, redis_url, keys):
    batch = blocking_pool.enqueue_prompts(["a", "b", "c"], policy_version=0)
    work_blocking(redis_url, keys, most=1)
    seen: list[int] = []

    def press():
        with Redis.from_url(redis_url) as client:
            while client.info("clients")["blocked_clients"] == 0:
                pass
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        seen.extend(group.index for group in batch.collect(LONG))
    presser.join()
    work_blocking(redis_url, keys)
    assert seen + [group.index for group in batch.collect(LONG)] == [0, 1, 2]


def test_a_closed_pool_says_so(redis_url):
    pool = RolloutPool(redis_url)
    pool.close()
    pool.close()
    with pytest.raises(RollpoolError, match="closed"):
        pool.current_policy()


# JAX, where another test has used it, warns of every fork.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_told_to_make_its_own_pool(blocking_pool):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        message = "nothing was raised"
        try:
            blocking_pool.current_policy()
        except RollpoolError as error:
            message = str(error)
        os.write(writing, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert "forked" in pipe.read()


def test_a_progress_bar_is_drawn_on_request(blocking_pool, redis_url, keys, capsys):
    batch = blocking_pool.enqueue_prompts(["a", "b"], policy_version=0)
    work_blocking(redis_url, keys)
    assert len(list(batch.collect(LONG, progress="step 12"))) == 2
    drawn = capsys.readouterr()
    assert "step 12" in drawn.err
    assert "2/2" in drawn.err
    assert not drawn.out


def test_a_progress_bar_without_its_library_is_refused_at_once(blocking_pool, monkeypatch):
    batch = blocking_pool.enqueue_prompts(["a"], policy_version=0)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(SettingsError, match=r"rollpool\[ops\]"):
        batch.collect(progress=True)


# Failures of the server


@pytest.fixture
def restricted_url(redis_url):
    """As a user that may read and not enqueue."""
    with Redis.from_url(redis_url) as client:
        client.acl_setuser(
            "reader", enabled=True, passwords=["+secret"], keys=["*"], categories=["+@read"], commands=["+time"]
        )
        yield redis_url.replace("redis://", "redis://reader:secret@")
        client.acl_deluser("reader")


async def test_a_user_without_the_role_is_told(restricted_url):
    async with AsyncRolloutPool(restricted_url) as pool:
        with pytest.raises(NotPermitted, match="enqueue of batch s"):
            await pool.enqueue_prompts(["a"], policy_version=0, batch_id="s")
        with pytest.raises(NotPermitted, match="publish_policy"):
            await pool.publish_policy(0, checkpoint="/weights", check=False)


async def test_a_wrong_password_is_told_without_repeating_it(restricted_url):
    async with AsyncRolloutPool(restricted_url.replace("secret", "guess")) as pool:
        with pytest.raises(NotPermitted) as refused:
            await pool.current_policy()
    assert "guess" not in str(refused.value)


async def test_a_full_server_takes_nothing_of_the_batch(pool, redis_client):
    used = (await redis_client.info("memory"))["used_memory"]
    await redis_client.config_set("maxmemory", used // 2)
    try:
        with pytest.raises(BacklogFull, match="memory limit"):
            await pool.enqueue_prompts(["a", "b"], policy_version=0)
        assert await redis_client.dbsize() == 0
    finally:
        await redis_client.config_set("maxmemory", 0)


@pytest.mark.parametrize(
    "options",
    [
        {"run": "a b"},
        {"pool": "{x}"},
        {"backlog_limit": -1},
        {"url": "http://x"},
        {"weight": 0},
        {"weight": -1.0},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"weight": True},
        {"weight": "2"},
        {"staleness_rule": (1, 8)},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(options):
    with pytest.raises(SettingsError, match=next(iter(options))):
        RolloutPool(**options)
