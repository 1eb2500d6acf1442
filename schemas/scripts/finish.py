"""Typed callers of `finish.lua`, `expire.lua` and `sweep.lua`: jobs that end without a host's doing."""

from collections.abc import Iterable
from typing import NamedTuple

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from rollpool.schemas.keys import Keys
from rollpool.schemas.results import Outcome
from rollpool.schemas.scripts.base import Script
from rollpool.schemas.scripts.commit import RETENTION_S

_FINISH = Script("finish")
_EXPIRE = Script("expire")
_SWEEP = Script("sweep")

#: Jobs, or parts of them, looked at by one call: bounds how long it keeps the server busy, some 10 ms.
AT_ONCE = 1000

#: Calls of one `expire`: who makes them has leases to renew. The rest waits for the next turn.
EXPIRE_CALLS = 25

#: Milliseconds after a deadline in which a host settles by itself what it has of a job; only then the server does.
EXPIRE_GRACE_MS = 2000

#: Milliseconds after which a run that has nothing open and nothing uncommitted is forgotten: longer than the pause
#: between two steps of a trainer, so that its streams are there when it goes on.
IDLE_RUN_MS = 15 * 60 * 1000


class Swept(NamedTuple):
    """What a sweep found."""

    ended: int
    forgotten: int


async def finish(
    client: AsyncRedis, keys: Keys, *, run: str, batch: str, outcome: Outcome, error: str, first: int, last: int
) -> int:
    """End the open jobs of a batch with an index from `first` to `last`, wherever they are; returns how many.

    In bounded steps, between which others have a turn; indexes that the batch does not have are ignored.
    """
    total, start = 0, max(0, first)
    while start >= 0:
        ended, start = await _FINISH(client, keys, [run, batch, outcome, error, start, last, AT_ONCE])
        total += int(ended)
    return total


def expire(client: Redis, keys: Keys) -> int:
    """Settle `expired` what is open of batches whose deadline is over; returns how many jobs.

    Of very many, those that `EXPIRE_CALLS` steps reach.
    """
    total = 0
    for _ in range(EXPIRE_CALLS):
        ended, more = _EXPIRE.blocking(client, keys, [EXPIRE_GRACE_MS, AT_ONCE])
        total += int(ended)
        if not more:
            break
    return total


async def expire_async(client: AsyncRedis, keys: Keys) -> int:
    """The same on an asyncio client."""
    total = 0
    for _ in range(EXPIRE_CALLS):
        ended, more = await _EXPIRE(client, keys, [EXPIRE_GRACE_MS, AT_ONCE])
        total += int(ended)
        if not more:
            break
    return total


def sweep(
    client: Redis,
    keys: Keys,
    *,
    served: Iterable[int],
    adapters: Iterable[tuple[str, int]] = (),
    idle_ms: int = IDLE_RUN_MS,
) -> Swept:
    """Settle `stale` the exact jobs of versions that no host comes to any more, and forget runs that ended.

    Args:
        client: of the pool's server.
        keys: of the pool.
        served: versions of the checkpoints that hosts serve, or are on their way to.
        adapters: run and version of the adapters, the same.
        idle_ms: a run is forgotten so long after it ended.
    """
    named = [f"{run}:{version}" for run, version in (*(("", version) for version in served), *adapters)]
    ended, forgotten = _SWEEP.blocking(client, keys, [idle_ms, RETENTION_S, AT_ONCE, *named])
    return Swept(int(ended), int(forgotten))
