"""Takes turns at changing the policy, so that the pool goes on serving meanwhile.

Invariant: at most one host of a pool is between two policies on purpose; one that dies there frees its turn when its
lease ends.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis.exceptions import LockError, RedisError

from rollpool.schemas import Keys

log = logging.getLogger(__name__)

#: Seconds a host that vanished in the middle of its change blocks the others.
LEASE_S = 30.0

#: Seconds between tries to get the turn, and between renewals of it.
TRY_EVERY_S = 0.5
RENEW_EVERY_S = LEASE_S / 4


class ChangeTurn:
    """One host's claim to change its policy."""

    def __init__(self, client: Redis, keys: Keys, worker: str) -> None:
        self._lock = Lock(client, keys.rollout, timeout=LEASE_S, sleep=TRY_EVERY_S, thread_local=False)
        self._worker = worker

    async def take(self) -> None:
        """Wait for the turn."""
        while True:
            try:
                if await self._lock.acquire(blocking=True, blocking_timeout=LEASE_S, token=self._worker):
                    return
            except RedisError as error:
                log.warning("turn to change the policy: %s; trying again", error)
                await asyncio.sleep(TRY_EVERY_S)

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Keep a turn that was taken until the change is over, then free it."""
        renewal = asyncio.create_task(self._renew())
        try:
            yield
        finally:
            renewal.cancel()
            with contextlib.suppress(LockError, RedisError):  # lost: the lease ends by itself
                await self._lock.release()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            try:
                await self._lock.reacquire()
            except (LockError, RedisError) as error:
                log.warning("turn to change the policy: not renewed (%s)", error)
