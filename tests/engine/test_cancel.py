"""Cancelling on a real engine: what runs is stopped, what waits in the engine too, and the slots are free again."""

import asyncio

import pytest
from real_pool import WORKERS, RealPool, wait_for

from rollpool.producer import SamplingParams
from rollpool.worker.engines.http_engine import HttpEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

#: As long as the engine allows, so that nothing ends by itself before it is cancelled.
LONG = SamplingParams(max_new_tokens=230, ignore_eos=True)


def test_cancelled_work_leaves_the_engine_and_the_next_batch_has_its_slots(real_pool: RealPool) -> None:
    trainer, restarts = real_pool.trainer, engine_restarts(real_pool)
    # More samples than both engines run at once: some wait inside the engine, where a careless abort leaks them.
    batch = trainer.enqueue_prompts(["1 + 1 ="] * 12, policy_version=1, n=4, sampling=LONG)
    for name in WORKERS:
        wait_for(lambda name=name: in_engine(real_pool, name) > 16)  # type: ignore[misc]
    cancelled = batch.cancel()
    assert cancelled == 12
    wait_for(lambda: all(in_engine(real_pool, name) == 0 for name in WORKERS), timeout=30)
    for name in WORKERS:
        assert running_in(real_pool, name) in (0, None)
    assert list(batch.collect(timeout=30)) == []
    assert batch.report().cancelled == 12
    batch.commit()
    after = trainer.enqueue_prompts(
        ["2 + 2 ="] * 8, policy_version=1, n=4, sampling=SamplingParams(max_new_tokens=8, ignore_eos=True)
    )
    groups = list(after.collect(timeout=240))
    after.commit()
    assert len(groups) == 8
    assert real_pool.logprob_error(groups) < 0.05
    assert engine_restarts(real_pool) == restarts, "no engine died of it"


def engine_restarts(real_pool: RealPool) -> list[int]:
    """Of each worker."""
    return [status.engine_restarts for name in WORKERS if (status := real_pool.status(name))]


def in_engine(real_pool: RealPool, name: str) -> int:
    """Samples that the worker has in its engine."""
    status = real_pool.status(name)
    return 0 if status is None else status.samples_in_flight


def running_in(real_pool: RealPool, name: str) -> int | None:
    """Requests that the engine says it runs, once it has had time to notice; None where its line does not say."""

    async def ask() -> int | None:
        async with await HttpEngine.attach(real_pool.engine(name).url) as engine:
            running = None
            for _ in range(50):
                load = await engine.load()
                running = None if load is None else load.running
                if not running:
                    break
                await asyncio.sleep(0.2)
            return running

    return asyncio.run(ask())
