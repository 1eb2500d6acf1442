"""Commands to the hosts of a pool, and what they answer.

Invariant: a wait for answers ends as soon as nobody is left who can still give one: each host that the command binds
has said applied or failed, is gone, or was given a later command that makes this one void.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from rollpool.producer.server import Server
from rollpool.producer.waiting import live_workers
from rollpool.schemas.commands import Ack, Command
from rollpool.schemas.control_log import ack_of, command_fields, command_of, order_of
from rollpool.schemas.errors import PoolTimeout
from rollpool.schemas.keys import Keys
from rollpool.schemas.policies import CHECKPOINTS
from rollpool.schemas.status import WorkerStatus

#: Seconds between looks at answers and heartbeats.
POLL_S = 0.25

#: Entries read at once.
_PAGE = 1000

#: Characters of a host's error among those of others.
_ERROR_CHARS = 200

#: Commands that bind only the hosts that were there; the others are states, which a host that joins reaches too.
_ONCE = ("cancel", "flush", "shutdown")

#: Commands of which the last one counts, whichever it is.
STANDING = ("pause", "drain", "resume")


async def send(client: Redis, keys: Keys, command: Command) -> str:
    """Add a command to the log; its entry id. Harmless to repeat, but for what hosts then do twice."""
    fields: dict[Any, Any] = dict(command_fields(command))
    entry: Any = await client.xadd(keys.control, fields)
    return str(entry.decode())


@dataclass(frozen=True, slots=True)
class Heard:
    """How far the hosts are with one command."""

    #: Answers that came since the look before, in their order.
    new: tuple[Ack, ...]
    #: The last answer of each host; not of those that were gone before the wait.
    latest: Mapping[str, Ack]
    #: Hosts whose last word is awaited, by name.
    waiting: tuple[WorkerStatus, ...]
    #: Hosts that this command bound and that are gone without a last word.
    gone: tuple[str, ...]
    #: The later command that makes this one void for the hosts in `voided`, by host.
    voided: Mapping[str, str]

    @property
    def failed(self) -> list[Ack]:
        """Of whom it could not be done, by name."""
        return [ack for _, ack in sorted(self.latest.items()) if ack.state == "failed"]

    @property
    def applied(self) -> list[Ack]:
        """Of whom it is done, by name."""
        return [ack for _, ack in sorted(self.latest.items()) if ack.state == "applied"]


async def wait_for_acks(
    server: Server, entry: str, command: Command, timeout: float | None = None
) -> AsyncGenerator[Heard, None]:
    """Follow the answers to a command until every host that it binds has given its last; yields at each look.

    Args:
        server: of the pool.
        entry: the command's entry on `control`, as `send` returned it.
        command: what was sent.
        timeout: seconds; None: for ever.

    Raises:
        PoolTimeout: some have not answered in time; the message names them. The command stays in force.
        RollpoolError: the server cannot be reached.
    """
    over = None if timeout is None else time.monotonic() + timeout
    log = _Log(server, entry, command)
    while True:
        heard = await log.look()
        yield heard
        if not heard.waiting:
            return
        if over is not None and time.monotonic() >= over:
            raise PoolTimeout(_who_is_missing(entry, command, heard, timeout))
        await asyncio.sleep(POLL_S if over is None else max(0.0, min(POLL_S, over - time.monotonic())))


class _Log:
    """What was said since one command, read once and then followed."""

    def __init__(self, server: Server, entry: str, command: Command) -> None:
        self._server = server
        self._entry = entry
        self._command = command
        self._acks = _Cursor(server, server.keys.acks, _just_before(entry))
        self._control = _Cursor(server, server.keys.control, entry)
        self._latest: dict[str, Ack] = {}
        self._voided: dict[str, str] = {}
        #: Every host that the command binds, gone ones included, as it was when it was seen first.
        self._bound: dict[str, WorkerStatus] | None = None

    async def look(self) -> Heard:
        live = {worker.name: worker for worker in await live_workers(self._server)}
        bound = self._bound = self._now_bound(live)
        new = await self._new_answers()
        await self._find_later(bound)
        open_to = [name for name in sorted(bound) if not self._answered(name) and name not in self._voided]
        here = [name for name in open_to if name in live and self._hears(bound[name], live[name])]
        return Heard(
            new=tuple(new),
            latest={name: ack for name, ack in self._latest.items() if self._command.kind in _ONCE or name in bound},
            waiting=tuple(live[name] for name in here),
            gone=tuple(name for name in open_to if name not in here),
            voided={name: by for name, by in self._voided.items() if not self._answered(name)},
        )

    def _now_bound(self, live: Mapping[str, WorkerStatus]) -> dict[str, WorkerStatus]:
        named = {name: worker for name, worker in live.items() if self._command.is_for(name)}
        if self._bound is None:
            return named
        return self._bound if self._command.kind in _ONCE else {**named, **self._bound}

    def _hears(self, bound: WorkerStatus, now: WorkerStatus) -> bool:
        """A host that was started anew is bound by states alone."""
        return self._command.kind not in _ONCE or (bound.host, bound.pid) == (now.host, now.pid)

    def _answered(self, name: str) -> bool:
        return name in self._latest and self._latest[name].state != "received"

    async def _new_answers(self) -> list[Ack]:
        entries = await self._acks.read()
        answers = [ack_of(fields) for _, fields in entries if fields.get(b"command") == self._entry.encode()]
        new = [ack for ack in answers if ack is not None]
        self._latest.update({ack.worker: ack for ack in new})
        return new

    async def _find_later(self, names: Iterable[str]) -> None:
        for entry, fields in await self._control.read():
            later = command_of(fields)
            if later is not None and makes_void(later, self._command):
                self._voided.update({name: entry for name in names if later.is_for(name)})


class _Cursor:
    """What is new on a stream."""

    def __init__(self, server: Server, stream: str, after: str) -> None:
        self._server = server
        self._stream = stream
        self._after = after

    async def read(self) -> list[tuple[str, dict[bytes, bytes]]]:
        found: list[tuple[str, dict[bytes, bytes]]] = []
        while True:
            with self._server.doing("reading what the hosts answered"):
                page: Any = await self._server.client.xrange(self._stream, min=f"({self._after}", count=_PAGE)
            found += [(entry.decode(), fields) for entry, fields in page]
            if found:
                self._after = found[-1][0]
            if len(page) < _PAGE:
                return found


def _just_before(entry: str) -> str:
    """Answers are younger than their command, by the clock: streams number the entries of a millisecond apart."""
    milliseconds, _ = order_of(entry)
    return f"{milliseconds - 1}-0"


def makes_void(later: Command, command: Command) -> bool:
    """True when hosts need not do `command` any more once they heard `later`."""
    if later.policy is not None and command.policy is not None:
        same = later.policy.lineage == command.policy.lineage
        rebased = later.policy.lineage == CHECKPOINTS and command.policy.base != later.policy.checkpoint
        return same or rebased
    if command.kind in STANDING:
        return later.kind in STANDING
    return command.kind == later.kind == "concurrency"


def named(command: Command) -> str:
    """The command in a few words, for messages."""
    policy = command.policy
    if policy is not None:
        return f"policy {policy.version}" + ("" if policy.lora_path is None else f" of run {policy.run}")
    words = {"cancel": f" of run {command.run}", "concurrency": f" {command.concurrency or 'default'}"}
    return command.kind + words.get(command.kind, "")


def _who_is_missing(entry: str, command: Command, heard: Heard, timeout: float | None) -> str:
    missing = ", ".join(f"{worker.name} ({_state_of(worker, heard)})" for worker in heard.waiting)
    return (
        f"{named(command)} (command {entry}): {len(heard.applied)} applied and {len(heard.failed)} failed after "
        f"{timeout:g} s; not answered by {missing}. It stays on the log, and they go on with it: see "
        "`rollpool policies --acks`"
    )


def _state_of(worker: WorkerStatus, heard: Heard) -> str:
    received = "" if worker.name in heard.latest else ", has not received it"
    staging = f", {worker.staging}" if worker.staging else ""
    error = f", {worker.error:.{_ERROR_CHARS}}" if worker.error else ""
    return f"{worker.state}{staging}{received}{error}"
