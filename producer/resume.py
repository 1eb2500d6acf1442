"""What a trainer saves of a pool beside its weights, and how another process goes on from it.

Invariant: what a state calls consumed is in the weights that were saved with it, and is never handed out again; all
else that the server has is. So a crash at any point skips nothing and trains nothing twice.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rollpool.producer.batch import AsyncBatch
from rollpool.producer.cancel import commit_batch
from rollpool.producer.inbox import Inbox, Ranges, from_ranges
from rollpool.producer.server import Server
from rollpool.schemas.errors import SchemaMismatch
from rollpool.schemas.wire import first_error

_LOG = logging.getLogger("rollpool.producer")

#: Version of `state_dict`.
STATE_SCHEMA = 1


class SavedBatch(BaseModel):
    """One batch that was not committed when the state was saved."""

    model_config = ConfigDict(frozen=True)

    #: Indexes of the groups that were handed out.
    consumed: Ranges
    #: Everything was settled and handed out.
    complete: bool
    #: Digest of what was enqueued.
    content: str = ""

    @property
    def handed(self) -> int:
        """Groups that were handed out."""
        return sum(end - start for start, end in self.consumed)


class State(BaseModel):
    """What `state_dict` returned, checked."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(alias="schema")
    run: str
    batches: dict[str, SavedBatch]
    #: Content of the batches committed last, by id: a server that lost its last second has them again.
    committed: dict[str, str] = {}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "State":
        """Raises SchemaMismatch when it is no state of this schema."""
        found = state.get("schema") if isinstance(state, Mapping) else type(state).__name__
        if found != STATE_SCHEMA:
            raise SchemaMismatch(f"resume: expected a state_dict of schema {STATE_SCHEMA}, got {found!r}")
        try:
            return cls.model_validate(state)
        except ValidationError as error:
            raise SchemaMismatch(f"resume: not a state_dict: {first_error(error)}") from None

    @property
    def consumed_whole(self) -> dict[str, str]:
        """Content of the batches of which nothing is to be handed out any more, by id."""
        return self.committed | {name: batch.content for name, batch in self.batches.items() if batch.complete}


def state_of(run: str, batches: Mapping[str, AsyncBatch], committed: Mapping[str, str]) -> dict[str, Any]:
    """Plain data, for any checkpoint format."""
    return {
        "schema": STATE_SCHEMA,
        "run": run,
        "batches": {
            name: {
                "consumed": batch.inbox.consumed(),
                "complete": batch.inbox.complete,
                "content": batch.content,
            }
            for name, batch in batches.items()
        },
        "committed": dict(committed),
    }


@dataclass(frozen=True, slots=True)
class Attached:
    """A batch of the server that this process did not enqueue."""

    inbox: Inbox
    content: str


async def attach(server: Server, state: State) -> dict[str, Attached]:
    """Commit what the state calls complete; returns every batch that is open then, by id, in order of enqueueing."""
    for name in state.consumed_whole:
        handed = state.batches[name].handed if name in state.batches else None
        await commit_batch(server, name, handed=handed, consumed_whole=True)
    found = {}
    for name, size, content in await _open_batches(server):
        found[name] = Attached(Inbox(name, size, consumed_of(state, name, content)), content)
    _warn_of_missing(state, found)
    return found


async def _open_batches(server: Server) -> list[tuple[str, int, str]]:
    """Id, size and content of each, the oldest first."""
    with server.doing("resume"):
        names: list[Any] = await server.client.zrange(server.keys.open_batches(server.run), 0, -1)
        async with server.client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hmget(server.keys.batch(server.run, name.decode()), ["size", "content"])
            facts: list[Any] = await pipe.execute() if names else []
    return [
        (name.decode(), int(size), content.decode())
        for name, (size, content) in zip(names, facts, strict=True)
        if size and content
    ]


def consumed_of(state: State | None, name: str, content: str) -> set[int]:
    """Indexes that the state calls consumed of a batch, unless the name stands for another batch by now."""
    saved = state.batches.get(name) if state else None
    if saved is None or saved.content not in ("", content):
        return set()
    return from_ranges(saved.consumed)


def _warn_of_missing(state: State, found: Mapping[str, Attached]) -> None:
    for name, batch in state.batches.items():
        if name not in found and not batch.complete:
            _LOG.warning(
                "batch %s was not consumed when the state was saved, and is not open on the server now: it was "
                "committed since, or the server lost it. Enqueue the same prompts under the same batch_id: if it is "
                "lost, they run again, and what the state calls consumed is not handed out again; if it was committed, "
                "collect says so",
                name,
            )
