"""Typed caller of `rollback.lua`: a lineage goes back in one step, and what that leaves to do is on the server."""

from collections.abc import Mapping
from typing import NamedTuple

from redis.asyncio import Redis

from rollpool.schemas.commands import Command
from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.scripts.publish import Answered, field_prefix, flat, policy_of

_SCRIPT = Script("rollback")


class Pending(NamedTuple):
    """What was asked of abandoned versions, as far as it may still be open."""

    #: Where it stands in the hash of generations.
    field: str
    #: Batches with a tag after `target`, up to `last`.
    target: int
    last: int
    #: And enqueued until this time, server milliseconds: afterwards the same tag means a version published anew.
    until_ms: int


async def roll_back(
    client: Redis, keys: Keys, command: Command, *, run: str, generation: int, current: int, lease_ms: int
) -> Answered:
    """Go back to the policy of a command, and send the command.

    Args:
        client: of the pool's server.
        keys: of the pool.
        command: for a policy that its lineage has, in the generation after `generation`.
        run: that goes back.
        generation: that the lineage has.
        current: its current version.
        lease_ms: for which no other run may publish checkpoints.
    """
    policy = policy_of(command)
    args: list[Arg] = [run, policy.lineage, field_prefix(policy), policy.version, policy.model_dump_json()]
    args += [generation, current, lease_ms, *flat(command)]
    return Answered.of(await _SCRIPT(client, keys, args))


def pending_of(lineage: str, generations: Mapping[bytes, bytes]) -> list[Pending]:
    """What going back has left to do in a lineage, from the hash of generations."""
    found = []
    for field, value in generations.items():
        name, at, _ = field.decode(errors="replace").partition("@")
        numbers = value.decode(errors="replace").split()
        if at and name == lineage and len(numbers) == 3 and all(number.isdigit() for number in numbers):
            found.append(Pending(field.decode(), *map(int, numbers)))
    return found


async def settled_pending(client: Redis, keys: Keys, pending: Pending) -> None:
    """Say that nothing of it is open any more."""
    await client.hdel(keys.generations, pending.field)
