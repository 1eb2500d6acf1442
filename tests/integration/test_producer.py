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

import numpy as np
import pytest
from redis import Redis

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
)
from rollpool.schemas import Ack, Group, Sample, WorkerStatus
from rollpool.schemas.connection import connect_async
from rollpool.schemas.scripts import Settlement, pull, settle
from rollpool.schemas.wire import unpack_job

#: A wait that should succeed; far over what a loaded machine needs.
LONG = 60.0


def finished(job, outcome="ok", tokens=2):
    sample = Sample(
        output_ids=np.arange(tokens, dtype=np.int32),
        logprobs=np.full(tokens, -1.0, np.float32),
        text="",
        finish_reason="stop",
        version_spans=[(job.policy_version, 0, tokens)],
    )
    return Group(
        run=job.run,
        batch=job.batch,
        index=job.index,
        outcome=outcome,
        policy_version=job.policy_version,
        prompt_ids=np.array([1, 2, 3], np.int32),
        samples=[sample] * job.n if outcome == "ok" else [],
        sampling=job.sampling,
        metadata=job.metadata,
        error=None if outcome == "ok" else "the engine said no",
    )


async def work(client, keys, *, run="r", most=1000, outcome="ok"):
    """Pull up to `most` jobs of a run and settle them; returns how many."""
    entries = await pull(client, keys, streams=keys.lanes(run), consumer="w:1", wanted=most, version=0)
    settlements = [Settlement(entry, finished(unpack_job(entry.body), outcome)) for entry in entries]
    if settlements:
        await settle(client, keys, settlements)
    return len(settlements)


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


async def until(condition):
    """Wait for what another task is on its way to do."""
    async with asyncio.timeout(LONG):
        while not await condition():  # noqa: ASYNC110 - what is waited for happens in another process
            await asyncio.sleep(0.01)


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
    await work(redis_client, keys, most=2, outcome="failed")
    await work(redis_client, keys)
    with caplog.at_level(logging.WARNING):
        assert await collected(batch.collect(LONG)) == [2]
    assert [(group.index, group.outcome, group.error) for group in batch.dropped] == [
        (0, "failed", "the engine said no"),
        (1, "failed", "the engine said no"),
    ]
    assert len([record for record in caplog.records if "dropped as failed" in record.message]) == 1
    assert (batch.report().ok, batch.report().failed, batch.report().open) == (1, 2, 0)


async def test_a_batch_that_the_server_lost_is_told_and_can_be_enqueued_again(pool, redis_client, keys):
    batch = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys, most=1)
    groups = batch.collect(LONG)
    assert (await anext(groups)).index == 0
    await redis_client.flushall()
    with pytest.raises(RollpoolError, match=r"does not know it any more.*same batch_id"):
        await anext(groups)
    again = await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await work(redis_client, keys)
    assert await collected(again.collect(LONG)) == [1]


async def test_another_batch_under_the_name_of_a_lost_one_is_another_batch(pool, redis_client, keys):
    await pool.enqueue_prompts(["a", "b"], policy_version=0, batch_id="s")
    await redis_client.flushall()
    other = await pool.enqueue_prompts(["c"], policy_version=0, batch_id="s")
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
    assert await work(redis_client, keys) == 0
    assert await redis_client.xlen(keys.jobs("r", "default")) == 0


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
    assert state["batches"] == {"s": {"consumed": [[0, 1]], "complete": False}}
    async with await AsyncRolloutPool.resume(state, redis_url, pool=keys.pool) as resumed:
        assert resumed.state_dict() == state
        assert await collected(resumed.batches["s"].collect(LONG)) == [1]


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
    ack = Ack(**{"worker": "w1", "command": "1-1", "version": 7, "seconds": 1.0, **fields})
    await client.xadd(keys.acks, {name: "" if value is None else value for name, value in ack.model_dump().items()})


async def test_a_published_policy_is_the_current_one(pool):
    assert await pool.current_policy() is None
    published = await pool.publish_policy(3, checkpoint="/weights/3")
    assert await pool.current_policy() == published
    assert (published.version, published.checkpoint, published.run) == (3, "/weights/3", "r")
    assert await pool.publish_policy(3, checkpoint="/weights/3") == published


async def test_two_versions_of_one_path_are_refused(pool: AsyncRolloutPool) -> None:
    await pool.publish_policy(1, checkpoint="/checkpoints/latest")
    with pytest.raises(PolicyRejected, match="that of policy 1 already"):
        await pool.publish_policy(2, checkpoint="/checkpoints/latest")
    assert (await pool.publish_policy(1, checkpoint="/checkpoints/latest")).version == 1


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
    await pool.publish_policy(3, checkpoint="/weights/3")
    with pytest.raises(PolicyRejected, match=why):
        await pool.publish_policy(version, checkpoint=checkpoint)


async def test_waiting_ends_when_the_fraction_serves(pool, redis_client, keys):
    await pool.publish_policy(7, checkpoint="/weights/7")
    for name, policy in (("w1", 7), ("w2", 6), ("w3", 8)):
        await heartbeat(redis_client, keys, name, policy=policy)
    await heartbeat(redis_client, keys, "w4", state="stopping", policy=6)
    await pool.wait_for_policy(7, fraction=0.6, timeout=LONG)
    waiting = asyncio.create_task(pool.wait_for_policy(7, timeout=LONG))
    await heartbeat(redis_client, keys, "w2", policy=7)
    await waiting


async def test_a_timeout_names_who_is_missing(pool, redis_client, keys):
    await pool.publish_policy(7, checkpoint="/weights/7")
    await heartbeat(redis_client, keys, "w1", policy=7)
    await heartbeat(redis_client, keys, "w2", state="changing", policy=6)
    await heartbeat(redis_client, keys, "w3", state="starting")
    missing = r"1 of 3 do; not yet: w2 \(changing, policy 6\), w3 \(starting, policy none\)"
    with pytest.raises(PoolTimeout, match=missing):
        await pool.wait_for_policy(7, timeout=0.05)


async def test_at_least_one_worker_must_serve(pool):
    await pool.publish_policy(7, checkpoint="/weights/7")
    with pytest.raises(PoolTimeout, match="no live worker"):
        await pool.wait_for_policy(7, fraction=0.1, timeout=0.05)


async def test_a_host_that_failed_ends_the_wait_with_its_error(pool, redis_client, keys):
    await pool.publish_policy(7, checkpoint="/weights/7")
    await heartbeat(redis_client, keys, "w1", policy=6)
    await acknowledge(redis_client, keys, state="received")
    await acknowledge(redis_client, keys, state="failed", error="no such file", version=6)
    waiting = asyncio.create_task(pool.wait_for_policy(7, timeout=LONG))
    await acknowledge(redis_client, keys, state="failed", error="bad shard")
    with pytest.raises(PolicyRejected, match="policy 7 could not be applied by worker w1: bad shard"):
        await waiting


async def test_a_failure_of_a_host_that_is_gone_or_tried_again_does_not_count(pool, redis_client, keys):
    await pool.publish_policy(7, checkpoint="/weights/7")
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
    blocking_pool.publish_policy(1, checkpoint="/weights/1")
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
            await pool.publish_policy(0, checkpoint="/weights")


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
    "options", [{"run": "a b"}, {"pool": "{x}"}, {"backlog_limit": -1}, {"url": "http://x"}], ids=str
)
def test_a_wrong_setting_is_named(options):
    with pytest.raises(SettingsError, match=next(iter(options))):
        RolloutPool(**options)
