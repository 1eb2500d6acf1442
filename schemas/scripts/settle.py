"""Typed caller of `settle.lua`: one terminal outcome for each job."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.results import Group
from rollpool.schemas.scripts.base import Arg, Script
from rollpool.schemas.scripts.entries import Entry
from rollpool.schemas.wire import pack_model

_SCRIPT = Script("settle")

#: What `Settled` says of a part whose siblings are still to come.
PART = "part"


@dataclass(frozen=True, slots=True)
class Settlement:
    """A group that is finished, or a part of one, and the entry it came from."""

    entry: Entry
    group: Group
    #: Why the job is also a dead letter; empty: it is not.
    dead: str = ""
    part: int = 0
    #: As its job says; the server goes by what was enqueued.


@dataclass(frozen=True, slots=True)
class Settled:
    """`now` is True for the call that settled the job, or its part; `outcome` is what is recorded, or `PART`."""

    now: bool
    outcome: str


async def settle(client: Redis, keys: Keys, settlements: Sequence[Settlement]) -> list[Settled]:
    """Settle jobs of one worker in one round trip; replies in the same order. Harmless to repeat."""
    places: dict[tuple[str, str, str], int] = {}
    args: list[Arg] = []
    for settlement in settlements:
        entry, group = settlement.entry, settlement.group
        args += (
            places.setdefault((entry.stream, group.run, group.batch), len(places)),
            entry.id,
            group.index,
            settlement.part,
            group.outcome,
            versions_text(group),
            len(group.samples),
            group.tokens,
            pack_model(group),
            settlement.dead,
            entry.body if settlement.dead else b"",
        )
    head: list[Arg] = [settlements[0].group.worker if settlements else "", len(places)]
    named = [part for place in places for part in place]
    reply = await _SCRIPT(client, keys, [*head, *named, *args])
    return [Settled(bool(now), outcome.decode()) for now, outcome in zip(reply[::2], reply[1::2], strict=True)]


def versions_text(group: Group) -> str:
    """The versions that made a group's tokens, for people: `12` or `12,13`."""
    versions = {span[0] for sample in group.samples for span in sample.version_spans}
    return ",".join(map(str, sorted(versions)))
