"""Typed callers of `turn.lua`: who may change its policy now, so that enough hosts go on serving."""

from collections.abc import Sequence
from typing import NamedTuple

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script

_SCRIPT = Script("turn")


class Turn(NamedTuple):
    """What the server answered to a worker that wants to change."""

    #: It has a slot, from now or from before.
    granted: bool
    #: Other hosts that go on serving.
    serving: int
    #: Of these, so many must.
    floor: int


async def take_turn(
    client: Redis, keys: Keys, worker: str, *, workers: Sequence[str], lease_ms: int, min_serving: int | None = None
) -> Turn:
    """Ask for a slot. Harmless to repeat: it renews the slot that the worker has.

    A worker that does not serve gets one whatever the others do: it takes nothing away.

    Args:
        client: of the pool's server.
        keys: of the pool.
        worker: who asks.
        workers: names of those with a heartbeat. Serving ones that are missing only make the answer more careful.
        lease_ms: how long the slot is kept without renewal.
        min_serving: hosts that go on serving while others change; None: three quarters of those there are, and all but
            one of up to four.
    """
    args: list[Arg] = ["take", worker, lease_ms, "" if min_serving is None else min_serving, *workers]
    granted, serving, floor = await _SCRIPT(client, keys, args)
    return Turn(bool(granted), int(serving), int(floor))


async def renew_turn(client: Redis, keys: Keys, worker: str, *, lease_ms: int) -> bool:
    """Keep the slot of a worker that has one; False where it has none."""
    return bool(await _SCRIPT(client, keys, ["renew", worker, lease_ms]))


async def release_turn(client: Redis, keys: Keys, worker: str) -> bool:
    """Free the slot of a worker; False where it has none."""
    return bool(await _SCRIPT(client, keys, ["release", worker]))
