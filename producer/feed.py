"""Reads results streams into inboxes, and knows when there is nothing more to wait for.

Invariant: a cursor moves only past entries that are in their inbox; so a read that is cancelled, or whose connection
breaks, is read again and loses nothing. A wait ends: with a group, with the end of the batches, at its deadline, or
with an error that says why no more can come. What is read is told to the server, which lets hosts make more.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rollpool.producer.inbox import Inbox
from rollpool.producer.server import BLOCK_MS, Server
from rollpool.schemas import scripts
from rollpool.schemas.errors import PoolTimeout, RollpoolError
from rollpool.schemas.result_entry import group_of, size_of
from rollpool.schemas.results import OUTCOMES, Group

#: Entries read at once from each batch: bounds the memory of groups that nobody has asked for yet.
READ_COUNT = 64

_COUNTS = ("size", "open", "committed", *OUTCOMES)


class Source(Protocol):
    """A batch, as far as it is read here."""

    content: str

    @property
    def inbox(self) -> Inbox:
        """What has arrived."""

    async def cancel(self) -> int:
        """Settle what is open."""

    async def enqueue_again(self) -> bool:
        """Send it to a server that lost it; False where its prompts are not here."""

    def arrived(self, group: Group) -> None:
        """One of its groups was read."""

    def all_was_read(self) -> None:
        """Nothing more is to come."""


@dataclass(frozen=True, slots=True)
class _State:
    """What the server says of one batch."""

    content: str | None
    counts: dict[str, int]
    deadline: bool

    @classmethod
    def of(cls, fields: Sequence[bytes | None], deadline: float | None) -> "_State":
        content, *values = fields
        counts = {name: int(value) for name, value in zip(_COUNTS, values, strict=True) if value}
        return cls(content.decode() if content else None, counts, deadline is not None)


class Feed:
    """Groups of some batches as they finish, until all are handed out."""

    def __init__(
        self,
        server: Server,
        sources: Callable[[], Sequence[Source]],
        timeout: float | None,
        *,
        first_k: int | None = None,
        ahead: Callable[[], Iterable[Source]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read some batches of one run.

        Args:
            server: of the pool.
            sources: The batches; asked at each read, so that those enqueued meanwhile are read too.
            timeout: Seconds from now until waiting ends; None: never.
            first_k: Groups of each batch to hand out at most; before the last of them the rest is cancelled.
            ahead: Further batches to read from while nothing comes of the others.
            clock: Monotonic seconds.
        """
        self._server = server
        self._sources = sources
        self._timeout = timeout
        self._first_k = first_k
        self._ahead = ahead
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout

    def ready(self) -> Inbox | None:
        """An inbox with a group to hand out, the oldest batch first; None when there is none, or `wait` must look."""
        if self._to_close():
            return None
        return next((source.inbox for source in self._sources() if source.inbox.ready), None)

    async def wait(self) -> Inbox | None:
        """An inbox with a group to hand out, as soon as there is one; None when all was handed out.

        Raises:
            PoolTimeout: The deadline passed; calling again goes on where this stopped.
            RollpoolError: A batch can bring nothing more.
        """
        while not (found := self.ready()):
            if source := self._to_close():
                await self._close(source)
                continue
            waiting = [source for source in self._sources() if not source.inbox.all_read]
            if not waiting:
                return None
            await self._more(waiting)
        return found

    def _to_close(self) -> Source | None:
        if (count := self._first_k) is None:
            return None
        return next((source for source in self._sources() if source.inbox.reached(count)), None)

    async def _close(self, source: Source) -> None:
        """Cancel what is open of a batch, and read to its end."""
        assert self._first_k is not None
        if not source.inbox.all_read:
            await source.cancel()
        source.inbox.keep_first(self._first_k)
        while not source.inbox.all_read:
            await self._more([source])

    async def _more(self, waiting: Sequence[Source]) -> None:
        """Read what is there, or wait a while for something to come."""
        if await self._read(waiting, block_ms=None):
            return
        await self._check(waiting)
        if not await self._read(waiting, block_ms=await self._block_ms(waiting)):
            await self._read_ahead()

    async def _block_ms(self, waiting: Sequence[Source]) -> int:
        if self._deadline is None:
            return BLOCK_MS
        left = self._deadline - self._clock()
        if left <= 0:
            raise PoolTimeout(await self._progress(waiting))
        # BLOCK 0 would be for ever.
        return max(1, min(BLOCK_MS, int(left * 1000)))

    async def _read(self, waiting: Sequence[Source], block_ms: int | None) -> bool:
        """Read once; True when anything came."""
        run = self._server.run
        by_stream = {self._stream(source.inbox): source for source in waiting}
        cursors: dict[Any, Any] = {stream: source.inbox.cursor for stream, source in by_stream.items()}
        with self._server.doing("collect"):
            reply: Any = await self._server.reader.xread(cursors, count=READ_COUNT, block=block_ms)
        read = [(by_stream[stream.decode()], entries) for stream, entries in reply or ()]
        for source, entries in read:
            inbox = source.inbox
            for entry_id, fields in entries:
                group = group_of(run, inbox.batch, fields)
                inbox.add(entry_id.decode(), group, size_of(fields))
                source.arrived(group)
            if inbox.all_read:
                source.all_was_read()
        for source, _ in read:
            await self._tell_read(source.inbox)
        return bool(read)

    async def _tell_read(self, inbox: Inbox) -> None:
        server = self._server
        with server.doing("collect"):
            await scripts.mark_read(
                server.client, server.keys, run=server.run, batch=inbox.batch, size=inbox.read_bytes
            )

    async def _read_ahead(self) -> None:
        """Take in some of what others of this run have finished.

        A host makes no more for a run with too many unread results. Those of a batch that is collected later must not
        keep it from the one that is collected now.
        """
        if ahead := [source for source in self._ahead() if not source.inbox.all_read]:
            await self._read(ahead, block_ms=None)

    def _stream(self, inbox: Inbox) -> str:
        return self._server.keys.results(self._server.run, inbox.batch)

    async def _states(self, waiting: Sequence[Source]) -> list[_State]:
        """What the server says of each batch."""
        server = self._server
        with server.doing("collect"):
            async with server.client.pipeline(transaction=False) as pipe:
                for source in waiting:
                    pipe.hmget(server.keys.batch(server.run, source.inbox.batch), ["content", *_COUNTS])
                    pipe.zscore(server.keys.deadlines, f"{server.run}:{source.inbox.batch}")
                replies: list[Any] = await pipe.execute()
        return [_State.of(*pair) for pair in zip(replies[::2], replies[1::2], strict=True)]

    async def _check(self, waiting: Sequence[Source]) -> None:
        """Mend or raise where a batch can bring nothing more, although not all of it was read."""
        states = await self._states(waiting)
        finished = []
        for source, state in zip(waiting, states, strict=True):
            if state.content is None:
                await self._send_again(source)
                continue
            self._raise_if_gone(source, state)
            if not state.counts.get("open"):
                finished.append(source)
        if any(state.deadline for state in states):
            # Hosts do it too; here it is done although there may be none.
            with self._server.doing("collect"):
                await scripts.expire_async(self._server.client, self._server.keys)
        await self._read_to_the_end(finished)

    async def _send_again(self, source: Source) -> None:
        inbox = source.inbox
        if not await source.enqueue_again():
            raise RollpoolError(
                f"batch {inbox.batch}: the server at {self._server.place} does not know it any more, after "
                f"{inbox.settled} of {inbox.size} jobs arrived (FLUSHALL, or a restart without its append-only "
                "file), and its prompts are not here, since another process enqueued it. Enqueue it again under the "
                "same batch_id; groups that were collected stay collected"
            )

    def _raise_if_gone(self, source: Source, state: _State) -> None:
        batch = source.inbox.batch
        if state.content != source.content:
            raise RollpoolError(
                f"batch {batch}: the server lost it, and another batch was enqueued under its name since; collect that "
                "one, and enqueue this one under another batch_id"
            )
        if state.counts.get("committed"):
            raise RollpoolError(
                f"batch {batch}: it was committed, so its results are gone; enqueue under another batch_id to run the "
                "prompts again"
            )

    async def _read_to_the_end(self, finished: Sequence[Source]) -> None:
        """Of batches without open jobs everything must be there.

        A job may have been settled between the read and the look, so they are read once more; and then from the
        beginning, since a server that took over may have begun a stream at earlier ids than the lost one had reached.
        """
        behind = await self._read_all(finished)
        for source in behind:
            source.inbox.rewind()
        for source in await self._read_all(behind):
            inbox = source.inbox
            raise RollpoolError(
                f"batch {inbox.batch}: all {inbox.size} jobs are settled but {inbox.size - inbox.settled} results "
                f"are missing from {self._stream(inbox)}: somebody deleted them, or the server lost them. Commit "
                "the batch and enqueue what is missing under another batch_id"
            )

    async def _read_all(self, sources: Sequence[Source]) -> list[Source]:
        """Read as long as anything comes; returns the batches of which something is missing then."""
        behind = list(sources)
        while behind and await self._read(behind, block_ms=None):
            behind = [source for source in behind if not source.inbox.all_read]
        return behind

    async def _progress(self, waiting: Sequence[Source]) -> str:
        parts = []
        for source, state in zip(waiting, await self._states(waiting), strict=True):
            inbox, counted = source.inbox, state.counts
            counts = ", ".join(f"{name} {counted[name]}" for name in (*OUTCOMES, "open") if counted.get(name))
            parts.append(f"batch {inbox.batch}: {inbox.settled} of {inbox.size} jobs arrived ({counts or 'unknown'})")
        return (
            f"{'; '.join(parts)} after {self._timeout:g} s. Nothing is lost: collect again to go on; `rollpool status` "
            "shows whether workers serve a policy that the jobs allow"
        )
