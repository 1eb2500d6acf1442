"""Follows the control log: which policy this pool is to serve.

Invariant: the log is read from its start and folded into one target, so a host that joins late, or lost its
connection, reaches the present by itself.
"""

import asyncio
import logging
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
        #: None until a policy was published.
        self.target: Target | None = None

    async def catch_up(self) -> None:
        """Read the log to its end."""
        while await self._read(block=None):
            pass

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self._read(block=BLOCK_MS)
            except RedisError as error:
                log.warning("control: %s; trying again", error)
                await asyncio.sleep(RETRY_S)

    async def changed(self, since: Target | None) -> None:
        """Wait until the target is another than `since`, on which the caller decided to wait."""
        while self.target == since:
            self._changed.clear()
            await self._changed.wait()

    async def _read(self, *, block: int | None) -> bool:
        reply = await self._reader.xread({self._keys.control: self._last_id}, block=block, count=100)
        entries = Entry.from_streams(reply)
        for entry in entries:
            self._last_id = entry.id
            await self._follow(entry.id, entry.body)
        return bool(entries)

    async def _follow(self, command: str, body: bytes) -> None:
        try:
            policy = unpack_command(body).policy
        except SchemaMismatch as error:
            log.error("control: command %s is not understood and skipped: %s", command, error)
            return
        self.target = Target(policy, command)
        self._changed.set()
        await self._on_command(self.target)
