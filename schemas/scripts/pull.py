"""Typed caller of `pull.lua`: the next jobs for one host, in one round trip."""

from collections.abc import Sequence

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Script
from rollpool.schemas.scripts.entries import Entry

_SCRIPT = Script("pull")


async def pull(
    client: Redis, keys: Keys, *, streams: Sequence[str], consumer: str, wanted: int, version: int
) -> list[Entry]:
    """Take up to `wanted` jobs from `streams`, read in the order given, for a host that serves `version`."""
    script_keys = [keys.parked, keys.delayed, *streams]
    reply = await _SCRIPT(client, script_keys, [consumer, wanted, version, keys.batch_prefix])
    return [Entry.from_reply(stream.decode(), entry_id, fields) for stream, entry_id, fields in reply]
