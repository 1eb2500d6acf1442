"""What one `enqueue_prompts` call enqueued: its groups as they finish, its report, its commit.

Invariant: over the life of one batch object each group is handed out exactly once, however often collecting is
interrupted and begun again, and whatever the server loses as long as the prompts are here; until the commit the server
keeps the results, so a restarted trainer gets them again.
"""

import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AbstractContextManager

from rollpool.producer.affinity import Homes
from rollpool.producer.cancel import cancel_batch, commit_batch
from rollpool.producer.feed import Feed
from rollpool.producer.inbox import Inbox
from rollpool.producer.progress import Show, progress_bar
from rollpool.producer.report import BatchReport
from rollpool.producer.submit import Order, Submitter
from rollpool.schemas.errors import RollpoolError, SettingsError
from rollpool.schemas.results import Group

_LOG = logging.getLogger("rollpool.producer")


class _Facts:
    """What both kinds of batch say without asking the server."""

    _inbox: Inbox

    @property
    def id(self) -> str:
        """The `batch_id`."""
        return self._inbox.batch

    @property
    def size(self) -> int:
        """Groups in the batch, one a prompt."""
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

    def __init__(
        self,
        submitter: Submitter,
        inbox: Inbox,
        content: str,
        order: Order | None = None,
        siblings: Callable[[], Iterable["AsyncBatch"]] = tuple,
        consumed_before: bool = False,
        homes: Homes | None = None,
    ) -> None:
        """For the pool, not for users.

        Args:
            submitter: That of the pool.
            inbox: For its groups.
            content: Digest of what was enqueued.
            order: What was sent; None where another process did.
            siblings: All batches of the pool.
            consumed_before: An earlier process collected it whole and committed it: nothing is to come.
            homes: Where the keys of its prompts are made, for those that come after them.
        """
        self.content = content
        self._submitter = submitter
        self._server = submitter.server
        self._inbox = inbox
        self._order = order
        self._siblings = siblings
        self._homes = homes
        self._cancelled = False
        self._committed = self._consumed_before = consumed_before

    @property
    def committed(self) -> bool:
        """True after `commit`."""
        return self._committed

    @property
    def inbox(self) -> Inbox:
        """What has arrived; for the pool, not for users."""
        return self._inbox

    def collect(
        self, timeout: float | None = None, *, first_k: int | None = None, progress: bool | str = False
    ) -> AsyncGenerator[Group, None]:
        """Yield `ok` groups as they finish, each exactly once over the life of this object.

        A second call goes on where the first stopped, after a break, a timeout or a cancellation alike. Groups that
        ended otherwise are in `dropped`. Ends when every job is settled and every group was handed out. A batch that
        the server lost is enqueued again, under the same id; what was handed out is not handed out again.

        Args:
            timeout: Seconds from the call until waiting ends; None waits for ever. Groups that are here are
                handed out even after it.
            first_k: Groups that are enough, those handed out before included: when the last of them is handed out, all
                that is open is cancelled. What finished meanwhile is not handed out; the report has it as `surplus`.
            progress: True, or a label, draws a bar on stderr (needs `rollpool[ops]`).

        Raises:
            PoolTimeout: Not all jobs are settled in time; nothing is lost.
            RollpoolError: The server lost the batch, and the prompts are not here since another process enqueued them.
            SettingsError: The bar cannot be drawn, or `first_k` is below 1.
        """
        return hand_out_async(self.feed(timeout, first_k), self.bar(progress))

    def feed(self, timeout: float | None, first_k: int | None) -> Feed:
        """The groups still to be handed out; for the pool, not for users."""
        if first_k is not None and first_k < 1:
            raise SettingsError(f"first_k: expected 1 group or more, got {first_k!r}; cancel() ends the batch at once")
        return Feed(self._server, self._to_collect, timeout, first_k=first_k, ahead=self._others)

    def _to_collect(self) -> list["AsyncBatch"]:
        return [] if self._consumed_before else [self]

    def _others(self) -> list["AsyncBatch"]:
        return [batch for batch in self._siblings() if batch is not self]

    def bar(self, progress: bool | str) -> AbstractContextManager[Show]:
        """The progress bar of this batch; for the pool, not for users."""
        return progress_bar(progress, f"batch {self.id}")

    def sent(self, order: Order) -> None:
        """Its prompts were sent, again or by another process before; for the pool, not for users."""
        self._inbox.rewind()
        if not self._inbox.all_read:
            self._order = order

    def arrived(self, group: Group) -> None:
        """Remember where it was made; for the pool, not for users."""
        keys = self._order.draft.affinity if self._order else ()
        if self._homes is not None and group.outcome == "ok" and group.index < len(keys) and (key := keys[group.index]):
            self._homes.remember(key, group.worker)

    def all_was_read(self) -> None:
        """Let go of the prompts; for the pool, not for users."""
        self._order = None

    async def enqueue_again(self) -> bool:
        """Send it to a server that lost it; False where its prompts are not here; for the pool, not for users."""
        if self._order is None:
            return False
        _LOG.warning(
            "batch %s: the server at %s lost it, after %d of %d jobs arrived; it is enqueued again, and what was "
            "handed out is not handed out again",
            self.id,
            self._server.place,
            self._inbox.settled,
            self.size,
        )
        # First: the reply of the next line may be lost, and then nobody comes by here again.
        self._inbox.rewind()
        await self._submitter.send_again(self._order)
        if self._cancelled:
            # What is here runs again all the same: this process may die before the trainer saves what it made of it.
            for start, end in self._inbox.not_kept():
                await cancel_batch(self._server, self.id, start, end - 1)
        return True

    def was_cancelled(self) -> None:
        """It stays so should the server lose it; for the pool, not for users."""
        self._cancelled = True

    @property
    def policy_version(self) -> int | None:
        """The tag; None where another process enqueued it, or all was read; for the pool, not for users."""
        return None if self._order is None else int(self._order.draft.shared["policy_version"])

    async def cancel(self) -> int:
        """Settle every open job `cancelled`, at once; hosts discard what waits and stop what runs.

        Groups that were finished before are still handed out by `collect`; the cancelled ones are in `dropped`.

        Returns:
            Groups that this call cancelled.

        Raises:
            RollpoolError: The server cannot be reached.
        """
        self.was_cancelled()
        return await cancel_batch(self._server, self.id)

    async def commit(self) -> None:
        """Say that the batch was consumed: the server drops its results, and a restart does not get them again.

        Call it after the checkpoint that the groups were trained into is saved. May be repeated.

        Raises:
            RollpoolError: Jobs are still open, or the server does not know the batch and not all of it was collected.
        """
        if self._committed:
            return
        server, inbox = self._server, self._inbox
        open_jobs = await commit_batch(server, self.id, handed=inbox.handed, consumed_whole=inbox.complete)
        if open_jobs > 0:
            raise RollpoolError(
                f"batch {self.id}: {open_jobs} of {self.size} jobs are open, so it cannot be committed; collect it "
                "to the end first, or cancel() it"
            )
        if open_jobs < 0 and not inbox.complete:
            raise RollpoolError(
                f"batch {self.id}: the server at {server.place} does not know it, so there is nothing to commit: "
                "it was committed long ago, or the server lost its data; collect() enqueues again what it can"
            )
        if not inbox.complete:
            _LOG.warning("batch %s was committed before all its groups were collected; the rest is gone", self.id)
        self._committed = True


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
