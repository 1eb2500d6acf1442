"""Follows the control log: what this pool asks of its hosts.

Invariant: the log is read from its start and folded into one state, so a host that joins late, or lost its connection,
reaches the present by itself; what is to be done once is heard only by hosts that were there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from rollpool.schemas import Command, Keys, SchemaMismatch
from rollpool.schemas.scripts import Entry
from rollpool.schemas.wire import unpack_command
from rollpool.worker.policy.orders import Orders

log = logging.getLogger(__name__)

#: Milliseconds of one blocking read.
BLOCK_MS = 1000

#: Seconds between tries while the server is out of reach.
RETRY_S = 1.0

#: Called with the entry id of a command and the command.
Hear = Callable[[str, Command], Awaitable[None]]


class ControlFollower:
    """One host's view of the control log."""

    def __init__(self, reader: Redis, keys: Keys, worker: str, on_command: Hear) -> None:
        self._reader = reader
        self._keys = keys
        self._worker = worker
        self._on_command = on_command
        self._last_id = "0"
        self._changed = asyncio.Event()
        self.orders = Orders()

    async def catch_up(self) -> None:
        """Read the log to its end; of what it says, only what is still in force is news."""
        heard: dict[str, Command] = {}
        while (entries := await self._read(block=None)) is not None:
            heard.update(entries)
            heard = {entry: heard[entry] for entry in heard.keys() & self.orders.commands}
        for entry in sorted(heard, key=_order):
            await self._on_command(entry, heard[entry])

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                for entry, command in (await self._read(block=BLOCK_MS) or {}).items():
                    await self._on_command(entry, command)
            except RedisError as error:
                log.warning("control: %s; trying again", error)
                await asyncio.sleep(RETRY_S)

    async def changed(self, since: Orders) -> None:
        """Wait until the orders are others than `since`, on which the caller decided to wait."""
        while self.orders is since:
            self._changed.clear()
            await self._changed.wait()

    async def _read(self, *, block: int | None) -> dict[str, Command] | None:
        """Fold what is new; the commands for this host. None when there is nothing new for anybody."""
        reply = await self._reader.xread({self._keys.control: self._last_id}, block=block, count=100)
        entries = Entry.from_streams(reply)
        heard = {}
        for entry in entries:
            self._last_id = entry.id
            command = _understood(entry)
            if command is not None and command.is_for(self._worker):
                self.orders = self.orders.follow(entry.id, command)
                heard[entry.id] = command
        if heard:
            self._changed.set()
        return heard if entries else None


def _understood(entry: Entry) -> Command | None:
    try:
        return unpack_command(entry.body)
    except SchemaMismatch as error:
        log.error("control: command %s is not understood and skipped: %s", entry.id, error)
        return None


def _order(entry: str) -> tuple[int, int]:
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number)
