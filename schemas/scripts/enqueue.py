"""Typed caller of `enqueue.lua`: a batch is on the stream whole, or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.staleness import StalenessRule

_SCRIPT = Script("enqueue")

#: Previews and bodies of so many entries are some megabytes: more than the script's own text costs each time.
_MANY = 2 * 2000

Answer = Literal["new", "same", "other", "full", "stale"]


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What the server answered: a new batch, the same as before, another under this name, or no room."""

    answer: Answer
    #: Jobs of the batch; for `full`, the open jobs of the run; for `stale`, jobs for which the staleness rule has room.
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
    parts: int = 1,
    backlog_limit: int = 0,
    deadline_ms: int | None = None,
    weight: float | None = None,
    rule: StalenessRule | None = None,
) -> Enqueued:
    """Enqueue a batch.

    Args:
        client: of the pool's server.
        keys: of the pool.
        run: the training run.
        batch: name of the batch.
        lane: of all its jobs.
        content: digest by which a repeated call is known.
        policy: the version tag.
        n: samples of each entry, for people.
        previews_and_bodies: preview, body, preview, body and so on; a job's parts in order.
        parts: entries of one job.
        backlog_limit: open jobs of the run above which nothing is enqueued; 0: none.
        deadline_ms: server time, milliseconds.
        weight: share of the run among those that compete; None leaves it.
        rule: staleness rule to hold the run to.
    """
    args: list[Arg] = [run, batch, lane, content, backlog_limit, policy, n, parts]
    args += ["" if deadline_ms is None else deadline_ms, "" if weight is None else weight]
    args += ["", ""] if rule is None else [rule.max_staleness, rule.batch_size]
    args += previews_and_bodies
    call = _SCRIPT.by_text if len(previews_and_bodies) > _MANY else _SCRIPT
    answer, count = await call(client, keys, args)
    return Enqueued(cast(Answer, answer.decode()), int(count))
