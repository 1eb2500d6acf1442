"""Typed callers of `commit.lua` and `read.lua`: results leave the server once the trainer has them for good."""

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Script

_COMMIT = Script("commit")
_READ = Script("read")

#: Seconds a committed batch is remembered: longer than any lease or any trainer's retry of an enqueue.
RETENTION_S = 24 * 3600


async def commit(client: Redis, keys: Keys, *, run: str, batch: str, handed: int | None = None) -> int:
    """Commit a batch; returns its open jobs (0: committed, now or before; -1: the batch is unknown).

    `handed`: `ok` groups that the trainer was handed; the others take no room under its staleness rule. None: all.
    """
    return int(await _COMMIT(client, keys, [run, batch, RETENTION_S, "" if handed is None else handed]))


async def mark_read(client: Redis, keys: Keys, *, run: str, batch: str, size: int) -> None:
    """Say that `size` bytes of a batch's results were read in all: so much less waits on the server."""
    await _READ(client, keys, [run, batch, size])
