"""A pool with a trainer and hosts in this process, on a real server, with engines that do what the test says.

Each test that uses it ends with the books in order: every job enqueued is settled once or still open in one place, and
nobody holds an entry.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import msgpack
import pytest
from fakes import FakeOwner
from redis.asyncio import Redis as AsyncRedis
from waiting import until

from rollpool.ops.doctor import examine
from rollpool.producer import AsyncBatch, AsyncRolloutPool
from rollpool.schemas import GROUP, Group, Keys, WorkerStatus
from rollpool.schemas.connection import connect, connect_async
from rollpool.schemas.result_entry import group_of
from rollpool.schemas.scripts import Record
from rollpool.worker import host as host_module
from rollpool.worker import puller, suspects
from rollpool.worker.host import Host
from rollpool.worker.policy import follow, turn
from rollpool.worker.settings import WorkerSettings

POOL = "test"
RUN = "r"


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same host with shorter waits."""
    monkeypatch.setattr(puller, "BLOCK_MS", 50)
    monkeypatch.setattr(puller, "LEAVE_S", 0.1)
    monkeypatch.setattr(puller, "LOOK_AGAIN_S", 0.02)
    monkeypatch.setattr(follow, "BLOCK_MS", 50)
    monkeypatch.setattr(follow, "RETRY_S", 0.05)
    monkeypatch.setattr(turn, "TRY_EVERY_S", 0.02)
    monkeypatch.setattr(host_module, "BACKOFF_S", 0.05)
    monkeypatch.setattr(host_module, "BACKOFF_MOST_S", 0.2)
    monkeypatch.setattr(suspects, "BACKOFF_S", 0.05)
    monkeypatch.setattr(suspects, "BACKOFF_MOST_S", 0.2)


class Stage:
    """A pool with a trainer, to which a test adds hosts."""

    def __init__(self, url: str, pool: AsyncRolloutPool, stack: AsyncExitStack) -> None:
        self.url = url
        self.pool = pool
        self.keys = Keys(POOL)
        self.client: AsyncRedis = connect_async(url)
        #: The same, to look at what is there: its own types are unions over every protocol.
        self.server: Any = self.client
        self._stack = stack

    async def host(self, owner: FakeOwner, name: str = "w", *, serving: bool = True, **settings: Any) -> Host:
        """Start a host; it stops with the test."""
        host = self.made(owner, name, **settings)
        await self._stack.enter_async_context(running(host))
        if serving:
            await until(lambda: host.status().state == "serving", f"{name} serves")
        return host

    def hosted(self, owner: FakeOwner, name: str = "w") -> AbstractAsyncContextManager[asyncio.Task[None]]:
        """A host for as long as the context lasts."""
        return running(self.made(owner, name))

    def made(self, owner: FakeOwner, name: str = "w", *, initial: str | None = "/policy/0", **settings: Any) -> Host:
        given = {"lease_s": 1.0, "heartbeat_s": 0.1, "drain_s": 5.0, "engine": {"model_path": initial}, **settings}
        return Host(self.url, POOL, name, WorkerSettings.model_validate(given), owner)

    async def enqueue(self, count: int = 1, **options: Any) -> AsyncBatch:
        prompts = options.pop("prompts", [[index + 1] for index in range(count)])
        return await self.pool.enqueue_prompts(prompts, **{"policy_version": 0, **options})

    async def states(self, batch: str) -> list[str]:
        """Each job's state, in order."""
        fields = await self.server.hgetall(self.keys.batch(RUN, batch))
        by_index = {int(name): state.decode() for name, state in fields.items() if name.isdigit()}
        return [by_index[index] for index in sorted(by_index)]

    async def settled(self, batch: str, *outcomes: str) -> list[Group]:
        """Wait until the batch has these outcomes; its groups, in the order of their prompts."""

        async def done() -> bool:
            return "open" not in await self.states(batch)

        await until(done, f"{batch} is settled")
        assert await self.states(batch) == list(outcomes)
        entries = await self.server.xrange(self.keys.results(RUN, batch))
        groups = [group_of(RUN, batch, fields) for _, fields in entries]
        return sorted(groups, key=lambda group: group.index)

    async def dead(self) -> list[dict[bytes, bytes]]:
        return [fields for _, fields in await self.server.xrange(self.keys.dead)]

    async def records(self) -> dict[str, Record]:
        """What delivery has cost the jobs that wait off their lanes."""
        found = {}
        for packed in await self.server.hvals(self.keys.waiting):
            flat = iter(msgpack.unpackb(packed, raw=True))
            fields = dict(zip(flat, flat, strict=True))
            found[fields[b"job"].decode()] = Record.of(fields)
        return found

    async def acks(self) -> list[str]:
        return [
            f"{fields[b'worker'].decode()} {fields[b'state'].decode()} {fields[b'version'].decode()}"
            for _, fields in await self.server.xrange(self.keys.acks)
        ]

    async def heartbeat(self, name: str) -> WorkerStatus | None:
        fields = await self.server.hgetall(self.keys.worker(name))
        return WorkerStatus.from_fields(fields) if fields else None

    async def pending(self) -> int:
        count = 0
        for stream in self.keys.streams([RUN]):
            if await self.server.exists(stream):
                count += (await self.server.xpending(stream, GROUP))["pending"]
        return count

    async def check_books(self) -> None:
        """The written invariant, as `rollpool doctor` has it; and nothing is held any more."""
        with connect(self.url) as client:
            report = await asyncio.to_thread(examine, client, self.keys)
        assert report.healthy, [str(finding) for finding in report.findings]
        assert await self.pending() == 0


@asynccontextmanager
async def running(host: Host) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(host.run())
    try:
        yield task
    finally:
        host.stop_now()
        await task


@asynccontextmanager
async def staged(url: str) -> AsyncIterator[Stage]:
    async with AsyncRolloutPool(url, pool=POOL, run=RUN) as pool:
        async with AsyncExitStack() as stack:
            stage = Stage(url, pool, stack)
            yield stage
        await stage.check_books()
        await stage.client.aclose()


def answered(owner: FakeOwner) -> int:
    return sum(len(engine.calls) for engine in owner.engines)
