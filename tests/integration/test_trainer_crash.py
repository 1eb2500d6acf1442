"""A trainer that dies anywhere, and a server that loses everything: nothing is skipped, nothing is trained twice.

The trainer keeps its weights (here: the list of what it trained on) and the pool's state in one checkpoint. What it had
in memory when it died is gone. Each of its calls to the server may be the last: it dies before the call, or after the
server did what was asked and before the answer came.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from fake_workers import failed, finished, work
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from rollpool.producer import AsyncBatch, AsyncRolloutPool, Group, feed
from rollpool.schemas import Keys, PromptJob, scripts
from rollpool.schemas.connection import connect_async

#: Seconds until a wait fails; far over what a loaded machine needs.
LONG = 60.0

STEPS = 4
PROMPTS = 5
#: Prompts whose job fails.
BAD = {1}
#: What the steps' batches have of their own, in turn; of the last only so many groups are taken.
OPTIONS: list[dict[str, Any]] = [{}, {"n": 4, "split": 2}, {"n": 3, "min_samples": 2}, {}]
FIRST_K = {3: 2}

#: More events than a life has that does not end early.
EVENTS = 110

#: Calls of the server by which a trainer changes something.
CALLS = ("enqueue", "mark_read", "finish", "commit")


class Died(BaseException):
    """SIGKILL, as far as one process can play it."""


@dataclass
class Fate:
    """When the trainer dies and the server forgets, in events."""

    url: str
    #: Events each life of the trainer has; the last life has no end.
    lives: list[int]
    #: Events after which the server loses everything.
    losses: set[int]
    events: int = 0
    left: int | None = None

    def begin(self) -> None:
        """A new life."""
        self.left = self.lives.pop(0) if self.lives else None

    async def event(self) -> None:
        self.events += 1
        if self.events in self.losses:
            client = connect_async(self.url)
            await client.flushall()
            await client.aclose()
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Died

    @contextlib.contextmanager
    def over_the_calls(self) -> Iterator[None]:
        """An event before and after each call of a script."""
        with contextlib.ExitStack() as stack:
            for name in CALLS:
                stack.enter_context(mock.patch.object(scripts, name, self._around(getattr(scripts, name))))
            yield

    def _around(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def fateful(*args: Any, **options: Any) -> Any:
            await self.event()
            reply = await call(*args, **options)
            await self.event()
            return reply

        return fateful


@dataclass
class Trainer:
    """One training run; what is in `checkpoint` outlives its lives."""

    url: str
    fate: Fate
    #: Groups taken between two saves inside a step.
    save_every: int
    checkpoint: dict[str, Any] = field(default_factory=lambda: {"step": 0, "trained": [], "pool": None})

    async def live(self) -> None:
        """From the checkpoint to the end, or to death."""
        self.fate.begin()
        saved = self.checkpoint
        trained = list(saved["trained"])
        if saved["pool"] is None:
            pool = AsyncRolloutPool(self.url, pool="test", run="r")
        else:
            pool = await AsyncRolloutPool.resume(saved["pool"], self.url, pool="test")
        async with pool:
            for step in range(saved["step"], STEPS):
                # One batch ahead; what was enqueued before is enqueued again, since nobody knows whether it arrived.
                batch, *_ = [await self._enqueue(pool, ahead) for ahead in range(step, min(step + 2, STEPS))]
                async for group in batch.collect(LONG, first_k=FIRST_K.get(step)):
                    await self.fate.event()
                    trained.append((group.id, len(group.samples)))
                    if len(trained) % self.save_every == 0:
                        await self._save(step, trained, pool)
                await self._save(step + 1, trained, pool)
                await batch.commit()
            await self.fate.event()

    async def _enqueue(self, pool: AsyncRolloutPool, step: int) -> AsyncBatch:
        prompts = [f"{step}.{number}" for number in range(PROMPTS)]
        return await pool.enqueue_prompts(prompts, policy_version=0, batch_id=f"step-{step}", **OPTIONS[step])

    async def _save(self, step: int, trained: list[Any], pool: AsyncRolloutPool) -> None:
        await self.fate.event()
        self.checkpoint = {"step": step, "trained": list(trained), "pool": pool.state_dict()}
        await self.fate.event()


def settled(job: PromptJob) -> Group:
    return failed(job) if job.index in BAD else finished(job, samples=job.fewest_samples)


async def work_on(client: Redis, keys: Keys, stopped: asyncio.Event) -> None:
    """A host that is never in a hurry."""
    while not stopped.is_set():
        await work(client, keys, most=2, result=settled)
        await asyncio.sleep(0.003)


async def run_to_the_end(url: str, lives: list[int], losses: set[int], save_every: int) -> None:
    client, keys = connect_async(url), Keys("test")
    await client.flushall()
    stopped = asyncio.Event()
    host = asyncio.create_task(work_on(client, keys, stopped))
    fate = Fate(url, list(lives), losses)
    trainer = Trainer(url, fate, save_every)
    try:
        with fate.over_the_calls(), mock.patch.object(feed, "BLOCK_MS", 20):
            for _ in range(len(lives) + 1):
                with contextlib.suppress(Died):
                    await trainer.live()
        assert fate.left is None
        assert fate.events < EVENTS or lives or losses
        check(trainer.checkpoint["trained"])
        if not losses:
            counters: Any = await client.hgetall(keys.run("r"))
            assert (counters[b"open"], counters[b"unread"]) == (b"0", b"0")
            assert not await client.exists(keys.open_batches("r"))
            assert counters[b"enqueued"] == str(STEPS * PROMPTS).encode()
    finally:
        stopped.set()
        await host
        await client.aclose()


def check(trained: list[tuple[str, int]]) -> None:
    """Every group once, with all its samples; of a batch of which some are enough, so many."""
    assert max(Counter(trained).values()) == 1
    for step, options in enumerate(OPTIONS):
        of_step = dict(entry for entry in trained if entry[0].startswith(f"step-{step}/"))
        good = {f"step-{step}/{index}" for index in range(PROMPTS) if index not in BAD}
        assert set(of_step) <= good
        assert len(of_step) == FIRST_K.get(step, len(good))
        assert set(of_step.values()) == {options.get("min_samples", options.get("n", 1))}


@given(
    lives=st.lists(st.integers(0, 60), max_size=5),
    losses=st.sets(st.integers(1, 90), max_size=2),
    save_every=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(lives=[], losses=set(), save_every=1)
@example(lives=[1], losses=set(), save_every=2)
@example(lives=[0, 1, 2, 3, 4, 5], losses=set(), save_every=2)
@example(lives=[24, 50, 13, 6, 31], losses=set(), save_every=2)
@example(lives=[1], losses={26, 52}, save_every=1)
@example(lives=[44, 43], losses={81, 58}, save_every=2)
def test_wherever_the_trainer_dies_nothing_is_skipped_and_nothing_is_trained_twice(
    redis_url: str, lives: list[int], losses: set[int], save_every: int
) -> None:
    asyncio.run(run_to_the_end(redis_url, lives, losses, save_every))


@pytest.mark.parametrize("first", range(4))
def test_each_place_to_die_is_survived(redis_url: str, first: int) -> None:
    """Every fourth event of one life, the four tests together all of them."""
    for at in range(first, EVENTS, 4):
        asyncio.run(run_to_the_end(redis_url, [at], set(), save_every=2))
