"""Typed callers of `renew.lua` and `reclaim.lua`: who holds a job, and what happens when it stops saying so.

Both run on a blocking client: leases are kept by a thread of their own, which a busy event loop cannot delay.
"""

from collections.abc import Sequence

from redis import Redis

from rollpool.schemas.scripts.base import Script

_RENEW = Script("renew")
_RECLAIM = Script("reclaim")

#: Jobs returned by one call of `reclaim`: bounds how long it keeps the server busy.
RECLAIM_AT_MOST = 256


def renew(client: Redis, stream: str, *, consumer: str, entries: Sequence[str]) -> list[str]:
    """Renew this consumer's leases on `entries`; returns those it no longer holds."""
    return [entry.decode() for entry in _RENEW.blocking(client, [stream], [consumer, *entries])]


def reclaim(client: Redis, stream: str, *, idle_ms: int, caller: str, prefix: str = "") -> int:
    """Return to the lane what any consumer held for `idle_ms` without renewing; returns how many jobs.

    With `prefix`, only of consumers whose name begins so: those of a predecessor that is known to have ended.
    """
    return int(_RECLAIM.blocking(client, [stream], [idle_ms, prefix, caller, RECLAIM_AT_MOST]))
