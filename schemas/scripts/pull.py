"""Typed caller of `pull.lua`: the next jobs for one host, in one round trip."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.scripts.entries import Entry

_SCRIPT = Script("pull")


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a host was given."""

    entries: list[Entry]
    #: Runs whose results nobody reads: over the bound, and given nothing.
    full: frozenset[str]


async def pull(
    client: Redis,
    keys: Keys,
    *,
    runs: Sequence[str],
    consumer: str,
    wanted: int,
    version: int,
    unread_bound: int = 0,
) -> Pulled:
    """Take up to `wanted` jobs of `runs`, for a host that serves `version`.

    Args:
        client: of the pool's server.
        keys: of the pool.
        runs: names of the runs to look at.
        consumer: who takes them.
        wanted: jobs at most.
        version: policy version the host serves.
        unread_bound: bytes of unread results over which a run gets no more made; 0: no bound.
    """
    args: list[Arg] = [consumer, wanted, version, unread_bound, *runs]
    entries, full, stopped = await _SCRIPT(client, keys, args)
    while stopped and not entries:  # it met so many settled jobs that it let others have a turn first
        entries, full, stopped = await _SCRIPT(client, keys, args)
    return Pulled(
        [Entry.from_reply(stream.decode(), entry_id, fields) for stream, entry_id, fields in entries],
        frozenset(name.decode() for name in full),
    )
