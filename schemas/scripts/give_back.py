"""Typed caller of `give_back.lua`: a job goes back unsettled, and nobody else's lease is touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.scripts.entries import Entry, Record

_SCRIPT = Script("give_back")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job waits; made by the functions below."""

    name: Literal["ready", "delayed", "parked", "exact", "passed"]
    score: int = 0


#: First in its lane, at once.
READY = Place("ready")


def delayed(until_ms: int) -> Place:
    """Until a time of the server."""
    return Place("delayed", until_ms)


def parked(version: int) -> Place:
    """For a host that serves this version or a newer one."""
    return Place("parked", version)


def exact(version: int) -> Place:
    """For a host that serves this version."""
    return Place("exact", version)


def passed(until_ms: int) -> Place:
    """For the worker that its record calls `passed`; from a time of the server on for anybody."""
    return Place("passed", until_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveBack:
    """A job to return."""

    entry: Entry
    #: From now on.
    record: Record
    place: Place = READY
    #: Samples that are finished, encoded.
    done: bytes = b""


async def give_back(client: Redis, keys: Keys, *, consumer: str, jobs: Sequence[GiveBack]) -> list[bool]:
    """Return jobs in one round trip; False where the job was not this consumer's any more."""
    args: list[Arg] = [consumer]
    for back in jobs:
        carried: list[Arg] = [part for pair in back.record.fields().items() for part in pair]
        if back.done:
            carried += ["done", back.done]
        args += [back.entry.stream, back.entry.id, back.place.name, back.place.score, len(carried), *carried]
    return [bool(given) for given in await _SCRIPT(client, keys, args)]
