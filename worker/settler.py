"""Settles finished jobs and gives back the others, many in one round trip.

Invariant: a job handed in is held (leased, counted) until the server has confirmed what became of it; while the
server is out of reach the settler keeps trying, and since both scripts may be repeated, trying again is harmless.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Group, Keys
from rollpool.schemas.scripts import Entry, GiveBack, Settled, Settlement, give_back, settle
from rollpool.schemas.wire import pack_model
from rollpool.worker.held import HeldJob

log = logging.getLogger(__name__)

Reply = TypeVar("Reply")

#: Jobs in one call of a script: bounds how long one call keeps the server busy.
BATCH = 128

#: Tokens in one call, about: some 30 MB. A server drops a client that sends a gigabyte at once, which a host that kept
#: its outcomes through an outage would otherwise do for ever.
BATCH_TOKENS = 2_000_000

#: Seconds between tries while the server is out of reach; the client has retried on its own by then.
RETRY_S = 1.0


class Settler:
    """Brings the outcomes of one host to the server."""

    def __init__(
        self,
        client: Redis,
        keys: Keys,
        *,
        consumer: str,
        on_done: Callable[[Entry], None],
        on_settled: Callable[[Sequence[Settled]], None],
    ) -> None:
        self._client = client
        self._keys = keys
        self._consumer = consumer
        self._on_done = on_done
        self._on_settled = on_settled
        self._settlements: list[Settlement] = []
        self._returns: list[GiveBack] = []
        self._unconfirmed = 0
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def unconfirmed(self) -> int:
        """Jobs handed in whose fate the server has not confirmed."""
        return self._unconfirmed

    def settle(self, held: HeldJob, group: Group, *, dead: str = "") -> None:
        """Settle a job; `dead` says why it is a dead letter as well."""
        held.left = True
        self.settle_entry(held.entry, group, dead=dead)

    def settle_entry(self, entry: Entry, group: Group, *, dead: str = "") -> None:
        """The same for an entry that is no job."""
        self._settlements.append(Settlement(entry, group, dead))
        self._added()

    def give_back(
        self,
        held: HeldJob,
        *,
        lost: bool = False,
        parked_for: int | None = None,
        delayed_until_ms: int | None = None,
    ) -> None:
        """Give a job back; `lost` charges one attempt to the infrastructure, a planned move charges nothing."""
        held.left = True
        self._returns.append(
            GiveBack(
                entry=held.entry,
                job=held.job,
                attempts=held.entry.attempts + lost,
                faults=held.entry.faults,
                parked_for=parked_for,
                delayed_until_ms=delayed_until_ms,
            )
        )
        self._added()

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            await self._work.wait()
            # One turn of the loop lets the samples that finished together be settled together.
            await asyncio.sleep(0)
            await self._flush()

    async def flushed(self) -> None:
        """Wait until everything handed in is confirmed."""
        await self._idle.wait()

    def _added(self) -> None:
        self._unconfirmed += 1
        self._idle.clear()
        self._work.set()

    async def _flush(self) -> None:
        settlements = self._take_settlements()
        returns, self._returns = self._returns[:BATCH], self._returns[BATCH:]
        if settlements:
            self._on_settled(await self._settle(settlements))
        if returns:
            await self._until_heard(lambda: give_back(self._client, self._keys, consumer=self._consumer, jobs=returns))
        for entry in [each.entry for each in settlements] + [back.entry for back in returns]:
            self._on_done(entry)
        self._unconfirmed -= len(settlements) + len(returns)
        if not self._settlements and not self._returns:
            self._work.clear()
        if not self._unconfirmed:
            self._idle.set()

    def _take_settlements(self) -> list[Settlement]:
        """The next to go together, oldest first; at least one."""
        count = tokens = 0
        for settlement in self._settlements[:BATCH]:
            tokens += settlement.group.tokens
            if count and tokens > BATCH_TOKENS:
                break
            count += 1
        taken, self._settlements = self._settlements[:count], self._settlements[count:]
        return taken

    async def _settle(self, settlements: list[Settlement]) -> list[Settled]:
        try:
            return await self._until_heard(lambda: settle(self._client, self._keys, settlements))
        except (TypeError, ValueError, OverflowError):  # one of them cannot be encoded: the others must not wait for it
            writable = [_writable(settlement) for settlement in settlements]
            return await self._until_heard(lambda: settle(self._client, self._keys, writable))

    async def _until_heard(self, call: Callable[[], Awaitable[Reply]]) -> Reply:
        while True:
            try:
                return await call()
            except RedisError as error:
                log.warning("settling: %s; %d outcomes are kept and tried again", error, self._unconfirmed)
                await asyncio.sleep(RETRY_S)


def _writable(settlement: Settlement) -> Settlement:
    """The same, or what says that its group cannot be encoded (an engine's text with half a surrogate pair)."""
    try:
        pack_model(settlement.group)
    except (TypeError, ValueError, OverflowError) as error:
        reason = f"its group cannot be encoded: {error}"
        log.error("job %s fails: %s", settlement.group.id, reason)
        changes = {"outcome": "failed", "samples": (), "metadata": None, "error": reason}
        return Settlement(settlement.entry, settlement.group.model_copy(update=changes), dead=reason)
    return settlement
