"""Reads results streams into inboxes, and knows when there is nothing more to wait for.

Invariant: a cursor moves only past entries that are in their inbox; so a read that is cancelled, or whose connection
breaks, is read again and loses nothing. A wait ends: with a group, with the end of the batches, at its deadline, or
with an error that says why no more can come.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rollpool.producer.inbox import Inbox
from rollpool.producer.server import BLOCK_MS, Server
from rollpool.schemas.errors import PoolTimeout, RollpoolError
from rollpool.schemas.results import OUTCOMES
from rollpool.schemas.wire import unpack_group

#: Entries read at once from each batch: bounds the memory of groups that nobody has asked for yet.
READ_COUNT = 64

_STATE_FIELDS = ("size", "open", "committed", *OUTCOMES)


class Feed:
    """Groups of some batches as they finish, until all are handed out."""

    def __init__(
        self,
        server: Server,
        inboxes: Callable[[], Sequence[Inbox]],
        timeout: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`inboxes` is asked at each read, so that batches enqueued meanwhile are read too; `timeout` in seconds."""
        self._server = server
        self._inboxes = inboxes
        self._timeout = timeout
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout

    def ready(self) -> Inbox | None:
        """An inbox with a group to hand out, the oldest batch first; None when all are empty."""
        return next((inbox for inbox in self._inboxes() if inbox.ready), None)

    async def wait(self) -> Inbox | None:
        """An inbox with a group to hand out, as soon as there is one; None when all was handed out.

        Raises:
            PoolTimeout: The deadline passed; calling again goes on where this stopped.
            RollpoolError: A batch is gone from the server.
        """
        while not self.ready():
            waiting = [inbox for inbox in self._inboxes() if not inbox.all_read]
            if not waiting:
                return None
            if not await self._read(waiting, block_ms=None):
                await self._check(waiting)
                await self._read(waiting, block_ms=await self._block_ms(waiting))
        return self.ready()

    async def _block_ms(self, waiting: Sequence[Inbox]) -> int:
        if self._deadline is None:
            return BLOCK_MS
        left = self._deadline - self._clock()
        if left <= 0:
            raise PoolTimeout(await self._progress(waiting))
        # BLOCK 0 would be for ever.
        return max(1, min(BLOCK_MS, int(left * 1000)))

    async def _read(self, waiting: Sequence[Inbox], block_ms: int | None) -> bool:
        """Read once; True when anything came."""
        by_stream = {self._stream(inbox): inbox for inbox in waiting}
        cursors: dict[Any, Any] = {stream: inbox.cursor for stream, inbox in by_stream.items()}
        with self._server.doing("collect"):
            reply: Any = await self._server.reader.xread(cursors, count=READ_COUNT, block=block_ms)
        for stream, entries in reply or ():
            inbox = by_stream[stream.decode()]
            for entry_id, fields in entries:
                inbox.add(entry_id.decode(), unpack_group(fields[b"body"]))
        return bool(reply)

    def _stream(self, inbox: Inbox) -> str:
        return self._server.keys.results(self._server.run, inbox.batch)

    async def _states(self, waiting: Sequence[Inbox]) -> Iterator[tuple[Inbox, dict[str, int]]]:
        """What the server says of each batch; an empty dict where it does not know the batch."""
        server = self._server
        async with server.client.pipeline(transaction=False) as pipe:
            for inbox in waiting:
                pipe.hmget(server.keys.batch(server.run, inbox.batch), list(_STATE_FIELDS))
            with server.doing("collect"):
                replies = await pipe.execute()
        states = (
            {name: int(value) for name, value in zip(_STATE_FIELDS, reply, strict=True) if value} for reply in replies
        )
        return zip(waiting, states, strict=True)

    async def _check(self, waiting: Sequence[Inbox]) -> None:
        """Raise when a batch can bring nothing more, although not all of it was read."""
        finished = []
        for inbox, state in await self._states(waiting):
            if "size" not in state:
                raise RollpoolError(
                    f"batch {inbox.batch}: the server at {self._server.place} does not know it any more, after "
                    f"{inbox.settled} of {inbox.size} jobs arrived (FLUSHALL, or a restart without its append-only "
                    "file). Enqueue it again under the same batch_id; groups that were collected stay collected"
                )
            if state.get("committed"):
                raise RollpoolError(
                    f"batch {inbox.batch}: it was committed, so its results are gone; enqueue under another "
                    "batch_id to run the prompts again"
                )
            if not state["open"]:
                finished.append(inbox)
        # A job may have been settled between the read and the look; after one more read there is no excuse.
        while finished and await self._read(finished, block_ms=None):
            finished = [inbox for inbox in finished if not inbox.all_read]
        for inbox in finished:
            raise RollpoolError(
                f"batch {inbox.batch}: all {inbox.size} jobs are settled but {inbox.size - inbox.settled} results "
                f"are missing from {self._stream(inbox)}: somebody deleted them, or the server lost them. Commit "
                "the batch and enqueue what is missing under another batch_id"
            )

    async def _progress(self, waiting: Sequence[Inbox]) -> str:
        parts = []
        for inbox, state in await self._states(waiting):
            counts = ", ".join(f"{name} {state[name]}" for name in (*OUTCOMES, "open") if state.get(name))
            parts.append(f"batch {inbox.batch}: {inbox.settled} of {inbox.size} jobs arrived ({counts or 'unknown'})")
        return (
            f"{'; '.join(parts)} after {self._timeout:g} s. Nothing is lost: collect again to go on; `rollpool status` "
            "shows whether workers serve a policy that the jobs allow"
        )
