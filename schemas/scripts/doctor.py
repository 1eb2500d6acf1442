"""Typed callers of `doctor.lua` and `doctor_results.lua`: a whole pool, seen in one moment.

Invariant: nothing here can change anything: the server runs both scripts read-only. What comes back is counts and
names; bodies of jobs and results stay where they are.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import msgpack
from pydantic import BaseModel, BeforeValidator, ConfigDict
from redis import Redis

from rollpool.schemas.keys import Keys
from rollpool.schemas.scripts.base import Arg, Script

_SCRIPT = Script("doctor")
_RESULTS = Script("doctor_results")

#: Every kind of key a pool has: its name, how many names follow it ("*": one, which may hold colons), its type.
KEY_KINDS: tuple[tuple[str, int | str, str], ...] = (
    ("jobs", 2, "stream"),
    ("ready", 2, "list"),
    ("batches", 2, "hash"),
    ("parts", 2, "hash"),
    ("results", 2, "stream"),
    ("open", 1, "zset"),
    ("runs", 1, "hash"),
    ("runs", 0, "set"),
    ("retries", 0, "stream"),
    ("waiting", 0, "hash"),
    ("delayed", 0, "zset"),
    ("passed", "*", "zset"),
    ("parked", 1, "zset"),
    ("exact", 1, "zset"),
    ("deadlines", 0, "zset"),
    ("fair", 0, "string"),
    ("sweep", 0, "string"),
    ("dead", 0, "stream"),
    ("control", 0, "stream"),
    ("acks", 0, "stream"),
    ("policies", 0, "hash"),
    ("policy", 0, "string"),
    ("policy", 1, "string"),
    ("generations", 0, "hash"),
    ("publisher", 0, "string"),
    ("rollout", 0, "zset"),
    ("workers", "*", "hash"),
)

#: Results looked at by one call: some milliseconds of the server's time where they are large.
RESULTS_PAGE = 200


def _map(value: Any) -> Any:
    """An empty Lua table comes as a list."""
    return value or {}


class RunFacts(BaseModel):
    """What there is of one run, in jobs; where its places are meant, in open jobs or unfinished parts of split ones."""

    model_config = ConfigDict(frozen=True)

    run: str
    #: Hosts look at it.
    listed: bool
    #: Its counters will vanish.
    expires: bool
    #: The hash of the run, as it is.
    counters: Annotated[dict[str, str], BeforeValidator(_map)]
    #: Not committed ones.
    batches: int
    committed: int
    #: States that are open in its batches.
    open: int
    #: Places that must be found.
    pieces: int
    #: Bytes of results not read, by its batches.
    unread: int
    backlog: int
    in_flight: int
    ready: int
    delayed: int
    parked: int
    exact: int
    #: Entries of its lanes whose job is settled already.
    tombstones: int


class PoolFacts(BaseModel):
    """What `doctor.lua` found."""

    model_config = ConfigDict(frozen=True)

    runs: list[RunFacts]
    #: By kind: how many, and subject and detail of the first ones.
    trouble: Annotated[dict[str, tuple[int, list[tuple[str, str]]]], BeforeValidator(_map)]
    #: Of each batch that has results: run, batch, entries, bytes that its hash counts.
    results: list[tuple[str, str, int, int]]
    counts: dict[str, int]


class ResultsPage(BaseModel):
    """Some results of a batch."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    jobs: list[str]
    #: Job, outcome of its result, and the one that is recorded.
    wrong: list[tuple[str, str, str]]


def look(client: Redis, keys: Keys, *, named: int, quiescent: bool) -> PoolFacts:
    """Look at a pool, in one moment.

    Args:
        client: of the pool's server.
        keys: of the pool.
        named: of each kind of trouble, how many are named.
        quiescent: tell also what must not be there once nothing is open and everything is committed.
    """
    args: list[Arg] = [named, int(quiescent), *(part for kind in KEY_KINDS for part in kind)]
    reply: Any = client.eval_ro(_SCRIPT.text, 1, keys.runs, *args)
    return PoolFacts.model_validate(msgpack.unpackb(reply, raw=False, unicode_errors="replace"))


def results_of(client: Redis, keys: Keys, *, run: str, batch: str) -> Iterator[ResultsPage]:
    """The results of a batch, page by page, each a call of its own: they can be many gigabytes."""
    after = "-"
    while after:
        reply: Any = client.eval_ro(_RESULTS.text, 1, keys.runs, run, batch, after, RESULTS_PAGE)
        last, size, jobs, wrong = reply
        yield ResultsPage(bytes=size, jobs=_text(jobs), wrong=list(zip(*[iter(_text(wrong))] * 3, strict=True)))
        after = last.decode()


def _text(values: list[bytes]) -> list[str]:
    return [value.decode(errors="replace") for value in values]
