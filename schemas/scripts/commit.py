"""Typed caller of `commit.lua`: results leave the server once the trainer has them for good."""

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Script

_SCRIPT = Script("commit")

#: Seconds a committed batch is remembered: longer than any lease or any trainer's retry of an enqueue.
RETENTION_S = 24 * 3600


async def commit(client: Redis, keys: Keys, *, run: str, batch: str) -> int:
    """Commit a batch; returns its open jobs (0: committed, now or before; -1: the batch is unknown)."""
    script_keys = [keys.batch(run, batch), keys.results(run, batch), keys.open_batches(run)]
    return int(await _SCRIPT(client, script_keys, [batch, RETENTION_S]))
