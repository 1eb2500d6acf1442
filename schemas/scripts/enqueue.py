"""Typed caller of `enqueue.lua`: a batch is on the stream whole, or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script

_SCRIPT = Script("enqueue")


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What the server answered: a new batch, the same as before, another under this name, or no room."""

    answer: Literal["new", "same", "other", "full"]
    #: Jobs of the batch; for `full`, the open jobs of the run.
    count: int


async def enqueue(
    client: Redis,
    keys: Keys,
    *,
    run: str,
    batch: str,
    lane: str,
    content: str,
    policy: int,
    n: int,
    previews_and_bodies: Sequence[str | bytes],
    backlog_limit: int = 0,
) -> Enqueued:
    """Enqueue a batch whose jobs are given as preview, body, preview, body, and so on."""
    script_keys = [
        keys.batch(run, batch),
        keys.open_batches(run),
        keys.runs,
        keys.run(run),
        keys.jobs(run, lane),
    ]
    args: list[Arg] = [run, batch, content, backlog_limit, policy, n, *previews_and_bodies]
    # By its text and not by its digest: beside a batch the text is nothing, and on a fresh server a digest would
    # cost sending the batch twice.
    answer, count = await client.eval(_SCRIPT.text, len(script_keys), *script_keys, *args)
    return Enqueued(cast(Literal["new", "same", "other", "full"], answer.decode()), int(count))
