"""What this host answers to commands.

Invariant: every command a host hears of is acknowledged as received, and later once as applied or failed, unless the
host dies or a newer command comes first.
"""

import logging
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Ack, Keys

log = logging.getLogger(__name__)

#: Answers kept, about: some hundred hosts times some hundred changes.
KEPT = 50_000


async def acknowledge(client: Redis, keys: Keys, ack: Ack) -> None:
    """Add an answer to `acks`; one that cannot be delivered is logged, since heartbeats say the same."""
    fields: dict[str, str | int | float] = {
        name: "" if value is None else value for name, value in ack.model_dump().items()
    }
    try:
        await client.xadd(keys.acks, fields, maxlen=KEPT, approximate=True)  # type: ignore[arg-type]
    except RedisError as error:
        log.warning("acknowledging policy %d as %s: %s", ack.version, ack.state, error)


async def failures_of(client: Redis, keys: Keys, command: str) -> list[tuple[str, str]]:
    """On which workers a command failed, each with what it said."""
    answers: Any = await client.xrange(keys.acks, min=command)  # an answer is younger than its command
    return [
        (fields.get(b"worker", b"").decode(errors="replace"), fields.get(b"error", b"").decode(errors="replace"))
        for _, fields in answers
        if fields.get(b"command") == command.encode() and fields.get(b"state") == b"failed"
    ]
