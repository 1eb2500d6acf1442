"""What this host answers to commands.

Invariant: every command that is in force for a host is answered once as received, and later once as applied or failed,
unless the host dies or a newer command comes first.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Ack, AckState, Command, CommandKind, Keys

log = logging.getLogger(__name__)

#: Answers kept, about: some hundred hosts times some hundred changes.
KEPT = 50_000

#: Commands of which this host remembers what it said: more than can be in force.
REMEMBERED = 1000


@dataclass(slots=True)
class _Said:
    kind: CommandKind
    version: int | None
    at: float
    state: AckState | None = None


class Answers:
    """One host's answers.

    Args:
        client: the host's client.
        keys: of the pool.
        worker: the name to answer under.
        clock: monotonic seconds.
    """

    def __init__(self, client: Redis, keys: Keys, worker: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._keys = keys
        self._worker = worker
        self._clock = clock
        self._said: dict[str, _Said] = {}

    async def received(self, entry: str, command: Command) -> None:
        """A command came that is in force here."""
        if entry not in self._said:
            self._remember(entry, command.kind, command.policy.version if command.policy else None)
            await self._tell(entry, "received")

    async def applied(self, entry: str, detail: str = "") -> None:
        """It is done; nothing where it was answered so before."""
        await self._tell(entry, "applied", detail=detail)

    async def failed(self, entry: str, error: str) -> None:
        """It cannot be done; likewise."""
        await self._tell(entry, "failed", error=error)

    def about(self, entry: str, version: int) -> bool:
        """Be able to answer a command for a policy of before the present state; False for what nobody asked for."""
        if entry and entry not in self._said:
            self._remember(entry, "policy", version)
        return bool(entry)

    def _remember(self, entry: str, kind: CommandKind, version: int | None) -> None:
        while len(self._said) >= REMEMBERED:
            del self._said[next(iter(self._said))]
        self._said[entry] = _Said(kind, version, self._clock())

    async def failed_on(self, entry: str) -> list[tuple[str, str]]:
        """On which workers a command failed, each with what it said."""
        answers: Any = await self._client.xrange(self._keys.acks, min=entry)  # an answer is younger than its command
        return [
            (fields.get(b"worker", b"").decode(errors="replace"), fields.get(b"error", b"").decode(errors="replace"))
            for _, fields in answers
            if fields.get(b"command") == entry.encode() and fields.get(b"state") == b"failed"
        ]

    async def _tell(self, entry: str, state: AckState, *, error: str | None = None, detail: str = "") -> None:
        """Add an answer; one that cannot be delivered is logged, since heartbeats say the same."""
        said = self._said[entry]
        if said.state == state:
            return
        said.state = state
        seconds = round(self._clock() - said.at, 3)
        ack = Ack(
            worker=self._worker,
            command=entry,
            kind=said.kind,
            version=said.version,
            state=state,
            seconds=seconds,
            error=error,
            detail=detail,
        )
        fields: dict[Any, Any] = {name: "" if value is None else value for name, value in ack.model_dump().items()}
        try:
            await self._client.xadd(self._keys.acks, fields, maxlen=KEPT, approximate=True)
        except RedisError as problem:
            log.warning("acknowledging command %s as %s: %s", entry, state, problem)
