"""Settles finished jobs and gives back the others, many in one round trip.

Invariant: a job handed in is held (leased, counted) until the server has confirmed what became of it; while the
server is out of reach, or refuses everybody, the settler keeps trying, and since both scripts may be repeated, trying
again is harmless. One that the server can never take (somebody's key of another type stands in its way) is let go, and
keeps no other waiting.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from rollpool.schemas import Group, Keys
from rollpool.schemas.scripts import (
    READY,
    Entry,
    GiveBack,
    Place,
    Record,
    Settled,
    Settlement,
    give_back,
    settle,
)
from rollpool.schemas.wire import pack_model, pack_samples
from rollpool.worker.held import HeldJob

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Reply = TypeVar("Reply")

#: Jobs in one call of a script: bounds how long one call keeps the server busy.
BATCH = 128

#: Tokens in one call, about: some 30 MB. A server drops a client that sends a gigabyte at once, which a host that kept
#: its outcomes through an outage would otherwise do for ever.
BATCH_TOKENS = 2_000_000

#: Bytes of finished samples given back in one call, about; for the same reason.
BATCH_BYTES = 32 << 20

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
        self._settlements.append(Settlement(held.entry, group, dead, held.job.part))
        self._added()

    def settle_entry(self, entry: Entry, group: Group, *, dead: str) -> None:
        """The same for an entry that is no job."""
        self._settlements.append(Settlement(entry, group, dead))
        self._added()

    def give_back(self, held: HeldJob, place: Place = READY, *, record: Record | None = None) -> None:
        """Give a job back, with what was made of it; `record` says what it cost, without one it was a planned move."""
        held.left = True
        done = _encoded(held) if held.samples or held.pieces else b""
        self._returns.append(GiveBack(entry=held.entry, record=record or held.record, place=place, done=done))
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
        settlements = _take(self._settlements, lambda settlement: settlement.group.tokens, BATCH_TOKENS)
        returns = _take(self._returns, lambda back: len(back.done), BATCH_BYTES)
        if settlements:
            self._on_settled(await self._each(self._settle, settlements))
        if returns:
            await self._each(self._give_back, returns)
        for entry in [each.entry for each in settlements] + [back.entry for back in returns]:
            self._on_done(entry)
        self._unconfirmed -= len(settlements) + len(returns)
        if not self._settlements and not self._returns:
            self._work.clear()
        if not self._unconfirmed:
            self._idle.set()

    async def _settle(self, settlements: Sequence[Settlement]) -> list[Settled]:
        try:
            return await settle(self._client, self._keys, settlements)
        except (TypeError, ValueError, OverflowError):  # one of them cannot be encoded: the others must not wait for it
            return await settle(self._client, self._keys, [_writable(settlement) for settlement in settlements])

    async def _give_back(self, jobs: Sequence[GiveBack]) -> list[bool]:
        return await give_back(self._client, self._keys, consumer=self._consumer, jobs=jobs)

    async def _each(self, call: Callable[[Sequence[Item]], Awaitable[list[Reply]]], items: list[Item]) -> list[Reply]:
        """Call for all, and again until the server has heard; where it refuses one of them for ever, one by one."""
        while True:
            try:
                return await call(items)
            except RedisError as error:
                if not _is_final(error):
                    log.warning("settling: %s; %d outcomes are kept and tried again", error, self._unconfirmed)
                    await asyncio.sleep(RETRY_S)
                elif len(items) > 1:
                    return [reply for item in items for reply in await self._each(call, [item])]
                else:
                    log.error("settling: the server refuses it for ever: %s; let go: %.200r", error, items[0])
                    return []


def _take(items: list[Item], size_of: Callable[[Item], int], most: int) -> list[Item]:
    """Take away the next to go together, oldest first; at least one where there is one."""
    count = size = 0
    for item in items[:BATCH]:
        size += size_of(item)
        if count and size > most:
            break
        count += 1
    taken = items[:count]
    del items[:count]
    return taken


#: Words of answers that pass by themselves, or once an operator has done something; the rest is about one call's keys.
#: What redis-py knows by name (READONLY, OOM, NOPERM, a cluster's) is of this kind too, and comes as a class of its own
#: without that name. The last two are what a script hears of an access list.
_PASSING = ("BUSY", "MISCONF", "NOREPLICAS", "The user executing the script", "ACL failure")


def _is_final(error: RedisError) -> bool:
    return type(error) is ResponseError and not any(word in str(error) for word in _PASSING)


def _encoded(held: HeldJob) -> bytes:
    """What was made of it; none where it cannot be encoded: it is made again, and judged when it settles."""
    try:
        return pack_samples({**held.pieces, **held.samples}, held.generation)
    except (TypeError, ValueError, OverflowError):
        return b""


def _writable(settlement: Settlement) -> Settlement:
    """The same, or what says that its group cannot be encoded (an engine's text with half a surrogate pair)."""
    try:
        pack_model(settlement.group)
    except (TypeError, ValueError, OverflowError) as error:
        reason = f"its group cannot be encoded: {error}"
        log.error("job %s fails: %s", settlement.group.id, reason)
        changes = {"outcome": "failed", "samples": (), "metadata": None, "error": reason}
        return replace(settlement, group=settlement.group.model_copy(update=changes), dead=reason)
    return settlement
