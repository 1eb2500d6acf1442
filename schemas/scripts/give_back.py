"""Typed caller of `give_back.lua`: a job goes back unsettled, and nobody else's lease is touched."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from rollpool.schemas.jobs import PromptJob
from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.scripts.entries import Entry

_SCRIPT = Script("give_back")


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveBack:
    """A job to return. With neither `parked_for` nor `delayed_until_ms` it goes to its own lane at once."""

    entry: Entry
    job: PromptJob
    attempts: int
    faults: int
    #: The oldest policy version that may run it.
    parked_for: int | None = None
    #: Server time.
    delayed_until_ms: int | None = None


async def give_back(client: Redis, keys: Keys, *, consumer: str, jobs: Sequence[GiveBack]) -> list[bool]:
    """Return jobs in one round trip; False where the job was not this consumer's any more."""
    script_keys, args = list[str](), list[Arg]([consumer])
    for back in jobs:
        target, score = back.entry.stream, ""
        if back.parked_for is not None:
            target, score = keys.parked, str(back.parked_for)
        elif back.delayed_until_ms is not None:
            target, score = keys.delayed, str(back.delayed_until_ms)
        script_keys += (back.entry.stream, keys.batch(back.job.run, back.job.batch), target)
        args += (back.entry.id, back.job.index, score, back.attempts, back.faults)
    return [bool(given) for given in await _SCRIPT(client, script_keys, args)]
