"""What a host says of itself every few seconds, and what it hears of the others.

Invariant: a heartbeat expires soon after its host stops; whoever is listed is alive or died moments ago.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Keys, PromptJob, WorkerStatus
from rollpool.schemas.status import SERVING_FIELDS, Serving
from rollpool.worker.clock import ServerClock

log = logging.getLogger(__name__)

#: Heartbeats a host may miss before it is no longer listed.
MISSES = 5


class Heartbeat:
    """Writes one worker's status."""

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        clock: ServerClock,
        *,
        every_s: float,
        status: Callable[[], WorkerStatus],
    ) -> None:
        self._client = client
        self._keys = keys
        self._clock = clock
        self._every_s = every_s
        self._status = status

    async def beat(self) -> None:
        """Write it once."""
        await self._clock.sync(self._client)
        status = self._status().model_copy(update={"seen_ms": self._clock.now_ms()})
        key = self._keys.worker(status.name)
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping=status.fields())  # type: ignore[arg-type]
            pipe.pexpire(key, int(1000 * MISSES * self._every_s))
            await pipe.execute()

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            try:
                await self.beat()
            except RedisError as error:
                log.warning("heartbeat: %s; trying again", error)
            await asyncio.sleep(self._every_s)

    async def end(self, name: str) -> None:
        """The host stops: it is listed no more."""
        await self._client.delete(self._keys.worker(name))


class Neighbours:
    """What the listed hosts serve, looked up at most once a heartbeat: they do not say it more often."""

    def __init__(
        self, client: Redis, keys: Keys, *, every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._keys = keys
        self._every_s = every_s
        self._clock = clock
        self._seen_at = -math.inf
        self._seen: list[Serving] = []

    async def anyone_serves(self, run: str, version: int) -> bool:
        """True when a listed host serves `version` to this run, or starts its engine on it, or changes to it."""
        await self._look()
        return any(host.will_serve(run, version) for host in self._seen)

    async def anyone_else_may_run(self, job: PromptJob, worker: str) -> bool:
        """True when a host other than `worker` serves a policy that the job's tag allows."""
        await self._look()
        return any(host.name != worker and _may_run(host, job) for host in self._seen)

    async def may_run(self, job: PromptJob, worker: str) -> bool:
        """True when `worker` serves a policy that the job's tag allows."""
        await self._look()
        return any(host.name == worker and _may_run(host, job) for host in self._seen)

    async def _look(self) -> None:
        if self._clock() - self._seen_at < self._every_s:
            return
        keys = [key async for key in self._client.scan_iter(match=self._keys.worker("*"), count=1000)]
        async with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hmget(key, SERVING_FIELDS)
            found: list[Any] = await pipe.execute(raise_on_error=False)
        hosts = (Serving.read(values) for values in found if isinstance(values, list))  # else somebody's own key
        self._seen = [host for host in hosts if host is not None]
        self._seen_at = self._clock()


def _may_run(host: Serving, job: PromptJob) -> bool:
    return host.state == "serving" and any(map(job.may_run_on, host.versions_for(job.run)))


async def works(client: Redis, keys: Keys, name: str) -> bool:
    """True when this worker is listed and serves, whatever policy."""
    return await client.hget(keys.worker(name), "state") in (b"serving", b"suspended", b"paused")
