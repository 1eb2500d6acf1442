"""Takes turns at changing the policy, so that the pool goes on serving meanwhile.

Invariant: at most one host of a pool is between two policies on purpose; one that dies there frees its turn when its
lease ends.
"""

import asyncio
import contextlib
import logging

from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis.exceptions import LockError, RedisError

from rollpool.schemas import Keys
from rollpool.worker.tasks import cancelled

log = logging.getLogger(__name__)

#: Seconds a host that vanished in the middle of its change blocks the others.
LEASE_S = 30.0

#: Seconds between tries to get the turn, and between renewals of it.
TRY_EVERY_S = 0.5
RENEW_EVERY_S = LEASE_S / 4


class ChangeTurn:
    """One host's claim to change its policy, from `take` to `release`."""

    def __init__(self, client: Redis, keys: Keys, worker: str) -> None:
        # The token is known beforehand, so that a claim whose answer never came can be given up as well.
        self._token = worker.encode()
        self._lock = Lock(client, keys.rollout, timeout=LEASE_S, thread_local=False)
        self._lock.local.token = self._token
        self._renewal: asyncio.Task[None] | None = None

    async def take(self) -> None:
        """Wait for the turn; from then on it is renewed."""
        # Before the first try: whoever is cancelled in the middle of one may have the turn.
        self._renewal = self._renewal or asyncio.create_task(self._renew())
        while not await self._try():  # noqa: ASYNC110 - another host frees it
            await asyncio.sleep(TRY_EVERY_S)

    async def release(self) -> None:
        """Free the turn, whether it was got or not; harmless to repeat."""
        if self._renewal is None:
            return
        renewal, self._renewal = self._renewal, None
        await cancelled([renewal])
        with contextlib.suppress(RedisError):  # never got, or lost; out of reach: the lease ends by itself
            await self._lock.do_release(self._token)

    async def _try(self) -> bool:
        try:
            # Ours already where the answer to an earlier try was lost, or where this worker was restarted in a change.
            return await self._lock.do_acquire(self._token) or await self._lock.owned()
        except RedisError as error:
            log.warning("turn to change the policy: %s; trying again", error)
            return False

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            try:
                await self._lock.reacquire()
            except LockError:  # not got yet, or lost
                continue
            except RedisError as error:
                log.warning("turn to change the policy: not renewed (%s)", error)
