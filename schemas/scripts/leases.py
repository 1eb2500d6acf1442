"""Typed callers of `renew.lua` and `reclaim.lua`: who holds a job, and what happens when it stops saying so.

They run on a blocking client: leases are kept by a thread of their own, which a busy event loop cannot delay.
"""

from collections.abc import Sequence

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.scripts.entries import Entry

_RENEW = Script("renew")
_RECLAIM = Script("reclaim")

#: Jobs returned by one call of `reclaim`: bounds how long it keeps the server busy.
RECLAIM_AT_MOST = 256


def renew(client: Redis, keys: Keys, stream: str, *, consumer: str, entries: Sequence[Entry]) -> set[str]:
    """Renew this consumer's leases on entries of one stream; returns the ids it has lost.

    Lost is what another consumer holds by now, and what was settled elsewhere.
    """
    return _lost(_RENEW.blocking(client, keys, _renewal(stream, consumer, entries)))


async def renew_async(
    client: AsyncRedis, keys: Keys, stream: str, *, consumer: str, entries: Sequence[Entry]
) -> set[str]:
    """The same on an asyncio client."""
    return _lost(await _RENEW(client, keys, _renewal(stream, consumer, entries)))


def _renewal(stream: str, consumer: str, entries: Sequence[Entry]) -> list[Arg]:
    return [stream, consumer, *(part for entry in entries for part in (entry.id, entry.run, entry.job))]


def _lost(reply: list[bytes]) -> set[str]:
    return {entry.decode() for entry in reply}


def reclaim(
    client: Redis, keys: Keys, stream: str, *, idle_ms: int, caller: str, prefix: str = "", reason: str = ""
) -> int:
    """Take what any consumer held for `idle_ms` without renewing, to be run first in its lane; returns how many jobs.

    With `prefix`, only of consumers whose name begins so: those of a predecessor that is known to have ended. `reason`
    goes into the history of each job.
    """
    return int(_RECLAIM.blocking(client, keys, [stream, idle_ms, prefix, caller, RECLAIM_AT_MOST, reason]))
