"""Takes turns at changing the policy, so that the pool goes on serving meanwhile.

Invariant: a host that serves leaves its policy on purpose only with a slot, which it is given only while enough others
go on serving; one that dies in its change frees its slot when its lease ends.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Keys
from rollpool.schemas.scripts import Turn, release_turn, renew_turn, take_turn
from rollpool.worker.tasks import cancelled

log = logging.getLogger(__name__)

#: Seconds a host that vanished in the middle of its change blocks the others.
LEASE_S = 30.0

#: Seconds between tries to get the turn, and between renewals of it.
TRY_EVERY_S = 0.5
RENEW_EVERY_S = LEASE_S / 4

#: Seconds between looks for the names of the hosts, which cost the server a scan of its keys. What is missing meanwhile
#: only makes the answer more careful.
NAMES_EVERY_S = 15.0

#: With so many hosts a try still costs next to nothing; with more they try less often.
MANY_HOSTS = 100

_PAGE = 1000


class ChangeTurn:
    """One host's claim to change its policy, from `take` to `release`."""

    def __init__(self, client: Redis, keys: Keys, worker: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._keys = keys
        self._worker = worker
        self._clock = clock
        self._renewal: asyncio.Task[None] | None = None
        self._names: list[str] = []
        self._names_at = -math.inf
        #: Why the turn is not got yet, for people; empty when nobody waits for it.
        self.waiting_for = ""

    async def take(self, min_serving: int | None = None) -> None:
        """Wait for the turn; from then on it is renewed.

        A host that has it already, from a try whose answer was lost or from before its worker was restarted, gets it at
        once; so does one that does not serve.

        Args:
            min_serving: hosts that go on serving while others change; None: as `take_turn` has it.
        """
        # Before the first try: whoever is cancelled in the middle of one may have the turn.
        self._renewal = self._renewal or asyncio.create_task(self._renew())
        try:
            while not await self._try(min_serving):  # noqa: ASYNC110 - another host frees it
                await asyncio.sleep(TRY_EVERY_S * max(1.0, len(self._names) / MANY_HOSTS))
        finally:
            self.waiting_for = ""

    async def forget(self) -> None:
        """Free the turn that a predecessor of this name may have had when it was killed."""
        with contextlib.suppress(RedisError):
            await release_turn(self._client, self._keys, self._worker)

    async def release(self) -> None:
        """Free the turn, whether it was got or not; harmless to repeat."""
        if self._renewal is None:
            return
        renewal, self._renewal = self._renewal, None
        await cancelled([renewal])
        with contextlib.suppress(RedisError):  # out of reach: the lease ends by itself
            await release_turn(self._client, self._keys, self._worker)

    async def _try(self, min_serving: int | None) -> bool:
        try:
            await self._find_names()
            turn = await take_turn(
                self._client,
                self._keys,
                self._worker,
                workers=self._names,
                lease_ms=int(1000 * LEASE_S),
                min_serving=min_serving,
            )
        except RedisError as error:
            self.waiting_for = f"the server, to take turns: {error}"
            log.warning("turn to change the policy: %s; trying again", error)
            return False
        self.waiting_for = _waiting_for(turn)
        return turn.granted

    async def _find_names(self) -> None:
        if self._clock() - self._names_at < NAMES_EVERY_S:
            return
        prefix = self._keys.worker("")
        found = [key async for key in self._client.scan_iter(match=f"{prefix}*", count=_PAGE)]
        self._names = [key.decode(errors="replace").removeprefix(prefix) for key in found]
        self._names_at = self._clock()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            try:
                await renew_turn(self._client, self._keys, self._worker, lease_ms=int(1000 * LEASE_S))
            except RedisError as error:
                log.warning("turn to change the policy: not renewed (%s)", error)


def _waiting_for(turn: Turn) -> str:
    if turn.granted:
        return ""
    return f"its turn to change: {turn.serving} other hosts would go on serving, and {turn.floor} must"
