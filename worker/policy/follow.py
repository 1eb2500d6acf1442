"""Follows the control log: which policy this pool is to serve.

Invariant: the log is read from its start and folded into one target, so a host that joins late, or lost its
connection, reaches the present by itself.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Keys, Policy, SchemaMismatch
from rollpool.schemas.scripts import Entry
from rollpool.schemas.wire import unpack_command

log = logging.getLogger(__name__)

#: Milliseconds of one blocking read.
BLOCK_MS = 1000

#: Commands remembered: a host whose newest policy does not start looks so far back for one that may.
KEPT = 16

#: Seconds between tries while the server is out of reach.
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A policy to serve, and the command that said so."""

    policy: Policy
    command: str


class PolicyFollower:
    """The pool's target policy, as the control log has it."""

    def __init__(self, reader: Redis, keys: Keys, on_command: Callable[[Target], Awaitable[None]]) -> None:
        self._reader = reader
        self._keys = keys
        self._on_command = on_command
        self._last_id = "0"
        self._changed = asyncio.Event()
        #: The last commands, oldest first.
        self.targets: deque[Target] = deque(maxlen=KEPT)

    @property
    def target(self) -> Target | None:
        """The newest; None until a policy was published."""
        return self.targets[-1] if self.targets else None

    async def catch_up(self) -> None:
        """Read the log to its end; of what it says, only the last is news."""
        while await self._read(block=None, news=False):
            pass
        if self.target is not None:
            await self._on_command(self.target)

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._read(block=BLOCK_MS, news=True)
            except RedisError as error:
                log.warning("control: %s; trying again", error)
                await asyncio.sleep(RETRY_S)

    async def changed(self, since: Target | None) -> None:
        """Wait until the target is another than `since`, on which the caller decided to wait."""
        while self.target == since:
            self._changed.clear()
            await self._changed.wait()

    async def _read(self, *, block: int | None, news: bool) -> bool:
        reply = await self._reader.xread({self._keys.control: self._last_id}, block=block, count=100)
        entries = Entry.from_streams(reply)
        for entry in entries:
            self._last_id = entry.id
            await self._follow(entry.id, entry.body, news=news)
        return bool(entries)

    async def _follow(self, command: str, body: bytes, *, news: bool) -> None:
        try:
            policy = unpack_command(body).policy
        except SchemaMismatch as error:
            log.error("control: command %s is not understood and skipped: %s", command, error)
            return
        target = Target(policy, command)
        self.targets.append(target)
        self._changed.set()
        if news:
            await self._on_command(target)
