"""Typed caller of `publish.lua`: a policy is recorded, current and announced, or none of it."""

from typing import Literal, cast

from redis.asyncio import Redis

from rollpool.schemas.commands import Command
from rollpool.schemas.keys import Keys
from rollpool.schemas.policies import Policy
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.wire import pack_model

_SCRIPT = Script("publish")

Answer = Literal["new", "same", "other", "old", "taken"]


async def publish(client: Redis, keys: Keys, policy: Policy) -> tuple[Answer, int]:
    """Publish `policy`; the second value is the current version for `old`, the one in the way for `taken`."""
    args: list[Arg] = [policy.version, policy.model_dump_json(), pack_model(Command(policy=policy)), policy.checkpoint]
    answer, current = await _SCRIPT(client, keys, args)
    return cast(Answer, answer.decode()), int(current)
