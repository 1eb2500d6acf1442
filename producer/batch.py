"""What one `enqueue_prompts` call enqueued: its groups as they finish, its report, its commit.

Invariant: over the life of one batch object each group is handed out exactly once, however often collecting is
interrupted and begun again; until the commit the server keeps the results, so a restarted trainer gets them again.
"""

import logging
from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from rollpool.producer.feed import Feed
from rollpool.producer.inbox import Inbox
from rollpool.producer.portal import Portal
from rollpool.producer.progress import Show, progress_bar
from rollpool.producer.report import BatchReport
from rollpool.producer.server import Server
from rollpool.schemas import scripts
from rollpool.schemas.errors import RollpoolError
from rollpool.schemas.jobs import SamplingParams
from rollpool.schemas.results import Group

_LOG = logging.getLogger("rollpool.producer")

#: Jobs settled by one script when a batch is cancelled: bounds how long it keeps the server busy.
_CANCEL_COUNT = 256


class _Facts:
    """What both kinds of batch say without asking the server."""

    _inbox: Inbox

    @property
    def id(self) -> str:
        """The `batch_id`."""
        return self._inbox.batch

    @property
    def size(self) -> int:
        """Jobs in the batch, one a prompt."""
        return self._inbox.size

    def __len__(self) -> int:
        return self._inbox.size

    @property
    def dropped(self) -> list[Group]:
        """Groups that were settled and are not `ok`, as far as they were read; `outcome` and `error` say why."""
        return self._inbox.dropped

    def report(self) -> BatchReport:
        """Counts and lengths of what was read so far: what was dropped and why, and how it differs from the kept."""
        return self._inbox.report()

    def __repr__(self) -> str:
        inbox = self._inbox
        return (
            f"<{type(self).__name__} {inbox.batch}: {inbox.size} jobs, {inbox.settled} arrived, {inbox.given} consumed>"
        )


class AsyncBatch(_Facts):
    """A batch for asyncio code; made by `AsyncRolloutPool.enqueue_prompts`."""

    def __init__(self, server: Server, inbox: Inbox, content: str) -> None:
        """For the pool, not for users; `content` is the digest of what was enqueued."""
        self.content = content
        self._server = server
        self._inbox = inbox
        self._committed = False

    @property
    def committed(self) -> bool:
        """True after `commit`."""
        return self._committed

    @property
    def inbox(self) -> Inbox:
        """What has arrived; for the pool, not for users."""
        return self._inbox

    def collect(self, timeout: float | None = None, *, progress: bool | str = False) -> AsyncGenerator[Group, None]:
        """Yield `ok` groups as they finish, each exactly once over the life of this object.

        A second call goes on where the first stopped, after a break, a timeout or a cancellation alike. Jobs that ended
        otherwise are in `dropped`. Ends when every job is settled and every group was handed out.

        Args:
            timeout: Seconds from the call until waiting ends; None waits for ever. Groups that are here are
                handed out even after it.
            progress: True, or a label, draws a bar on stderr (needs `rollpool[ops]`).

        Raises:
            PoolTimeout: Not all jobs are settled in time; nothing is lost.
            RollpoolError: The server lost the batch; the message says what to do.
            SettingsError: The bar cannot be drawn.
        """
        feed = Feed(self._server, lambda: [self._inbox], timeout)
        return hand_out_async(feed, self.bar(progress))

    def bar(self, progress: bool | str) -> AbstractContextManager[Show]:
        """The progress bar of this batch; for the pool, not for users."""
        return progress_bar(progress, f"batch {self.id}")

    async def cancel(self) -> int:
        """Settle every open job `cancelled`, at once; hosts discard them when they meet them.

        Groups that were finished before are still handed out by `collect`; the cancelled ones are in `dropped`.

        Returns:
            Jobs that this call cancelled.

        Raises:
            RollpoolError: The server cannot be reached.
        """
        server, cancelled = self._server, 0
        with server.doing(f"cancel of batch {self.id}"):
            states: Any = await server.client.hgetall(server.keys.batch(server.run, self.id))
            policy = int(states.get(b"policy", 0))
            indexes = [int(name) for name, state in states.items() if state == b"open" and name.isdigit()]
            for start in range(0, len(indexes), _CANCEL_COUNT):
                chosen = [self._cancelled(index, policy) for index in indexes[start : start + _CANCEL_COUNT]]
                cancelled += sum(done.now for done in await scripts.settle(server.client, server.keys, chosen))
        return cancelled

    def _cancelled(self, index: int, policy: int) -> scripts.Settlement:
        """A settlement without an entry: the jobs stream is named and not touched."""
        entry = scripts.Entry(self._server.keys.jobs(self._server.run, "default"), "", {})
        nothing = np.empty(0, np.int32)
        group = Group(
            run=self._server.run,
            batch=self.id,
            index=index,
            outcome="cancelled",
            policy_version=policy,
            prompt_ids=nothing,
            samples=(),
            sampling=SamplingParams(),
            error="cancelled by the trainer",
        )
        return scripts.Settlement(entry, group)

    async def commit(self) -> None:
        """Say that the batch was consumed: the server drops its results, and a restart does not get them again.

        Call it after the checkpoint that the groups were trained into is saved. May be repeated.

        Raises:
            RollpoolError: Jobs are still open, or the server does not know the batch.
        """
        if self._committed:
            return
        with self._server.doing(f"commit of batch {self.id}"):
            open_jobs = await scripts.commit(
                self._server.client, self._server.keys, run=self._server.run, batch=self.id
            )
        if open_jobs > 0:
            raise RollpoolError(
                f"batch {self.id}: {open_jobs} of {self.size} jobs are open, so it cannot be committed; collect it "
                "to the end first, or cancel() it"
            )
        if open_jobs < 0:
            raise RollpoolError(
                f"batch {self.id}: the server at {self._server.place} does not know it, so there is nothing to commit: "
                "it was committed long ago, or the server lost its data"
            )
        if not self._inbox.complete:
            _LOG.warning("batch %s was committed before all its groups were collected; the rest is gone", self.id)
        self._committed = True


class Batch(_Facts):
    """A batch for blocking code: the same as `AsyncBatch`; made by `RolloutPool.enqueue_prompts`."""

    def __init__(self, batch: AsyncBatch, portal: Portal, server: Server) -> None:
        self._batch = batch
        self._portal = portal
        self._server = server
        self._inbox = batch.inbox

    @property
    def committed(self) -> bool:
        """True after `commit`."""
        return self._batch.committed

    def collect(self, timeout: float | None = None, *, progress: bool | str = False) -> Generator[Group, None, None]:
        """Yield `ok` groups as they finish; parameters and errors as `AsyncBatch.collect`."""
        feed = Feed(self._server, lambda: [self._inbox], timeout)
        return hand_out(feed, self._portal, self._batch.bar(progress))

    def cancel(self) -> int:
        """Settle every open job `cancelled`, at once; returns how many. See `AsyncBatch.cancel`."""
        return self._portal.run(self._batch.cancel())

    def commit(self) -> None:
        """Say that the batch was consumed; errors as `AsyncBatch.commit`. May be repeated."""
        self._portal.run(self._batch.commit())


async def hand_out_async(
    feed: Feed, bar: AbstractContextManager[Show], n: int | None = None
) -> AsyncGenerator[Group, None]:
    """Yield up to `n` groups of a feed (None: all)."""
    with bar as show:
        while n is None or n > 0:
            inbox = feed.ready() or await feed.wait()
            if inbox is None:
                return
            group = inbox.head()
            show(inbox.settled, len(inbox.dropped), inbox.size)
            n = None if n is None else n - 1
            inbox.given += 1
            yield group


def hand_out(
    feed: Feed, portal: Portal, bar: AbstractContextManager[Show], n: int | None = None
) -> Generator[Group, None, None]:
    """As `hand_out_async`, for blocking code.

    Groups are taken from the inbox in the caller's thread, and only the wait runs in the portal: a result that came
    back just as the caller was interrupted would be lost.
    """
    with bar as show:
        while n is None or n > 0:
            inbox = feed.ready() or portal.run(feed.wait())
            if inbox is None:
                return
            group = inbox.head()
            show(inbox.settled, len(inbox.dropped), inbox.size)
            n = None if n is None else n - 1
            inbox.given += 1
            yield group
