"""Typed caller of `pull.lua`: the next jobs for one host, in one round trip."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.scripts.entries import Entry

_SCRIPT = Script("pull")


@dataclass(frozen=True, slots=True)
class RunOffer:
    """What one host serves to one run."""

    run: str
    #: Jobs parked for a version up to this one are for this host; None: it serves nothing to this run, and gets no job
    #: of it.
    newest: int | None
    #: Exact jobs of each of these are for this host.
    versions: tuple[int, ...]

    def text(self) -> str:
        """As the script reads it."""
        return f"{self.newest}:{','.join(map(str, self.versions))}"


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
    offers: Sequence[RunOffer],
    consumer: str,
    wanted: int,
    unread_bound: int = 0,
    leave: str = "",
) -> Pulled:
    """Take up to `wanted` jobs for a host.

    Args:
        client: of the pool's server.
        keys: of the pool.
        offers: of each run to look at, what the host serves to it.
        consumer: who takes them.
        wanted: jobs at most.
        unread_bound: bytes of unread results over which a run gets no more made; 0: no bound.
        leave: the worker whose jobs are left where they wait, those that it lost more than once; empty: none are.
    """
    args: list[Arg] = [consumer, wanted, unread_bound, leave]
    args += [part for offer in offers if offer.newest is not None for part in (offer.run, offer.text())]
    entries, full, stopped = await _SCRIPT(client, keys, args)
    while stopped and not entries:  # it met so many settled jobs that it let others have a turn first
        entries, full, stopped = await _SCRIPT(client, keys, args)
    return Pulled(
        [Entry.from_reply(stream.decode(), entry_id, fields) for stream, entry_id, fields in entries],
        frozenset(name.decode() for name in full),
    )
