"""The trainer's view of a pool: enqueue, collect, commit, publish, resume.

Invariant: a batch is on the server whole or not at all, and under one `batch_id` there is one batch. There is one
implementation, the asyncio one; `RolloutPool` runs it in a portal. What a pool object handed out is in its
`state_dict`, so that a trainer that saves it with its weights trains nothing twice and skips nothing.
"""

import asyncio
import functools
import inspect
import logging
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from rollpool.producer import publish
from rollpool.producer.batch import AsyncBatch, Batch, hand_out, hand_out_async
from rollpool.producer.enqueue import Draft, PromptInput, draft
from rollpool.producer.feed import Feed
from rollpool.producer.inbox import BEGIN, Inbox, from_ranges
from rollpool.producer.portal import Portal
from rollpool.producer.progress import progress_bar
from rollpool.producer.server import Server
from rollpool.schemas import scripts, wire
from rollpool.schemas.errors import BacklogFull, InvalidPrompt, SchemaMismatch, SettingsError
from rollpool.schemas.jobs import Endpoint, Lane, SamplingParams
from rollpool.schemas.policies import Policy
from rollpool.schemas.results import Group

_LOG = logging.getLogger("rollpool.producer")

#: Open jobs of a run above which nothing is enqueued. It bounds the server's memory: with prompts of 2 KB, 200 MB.
BACKLOG_LIMIT = 100_000

#: Seconds between two looks whether the backlog has room.
_ROOM_POLL_S = 0.1

#: Version of `state_dict`.
STATE_SCHEMA = 1

P = ParamSpec("P")
R = TypeVar("R")


class AsyncRolloutPool:
    """A pool of rollout workers, seen from one training run; for asyncio code, on one event loop.

    Nothing is sent before the first call. Use it as an async context manager, or `await pool.close()`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        pool: str | None = None,
        run: str | None = None,
        backlog_limit: int = BACKLOG_LIMIT,
    ) -> None:
        """Name the pool.

        Args:
            url: `redis://` or `rediss://`; by default $ROLLPOOL_URL, then redis://127.0.0.1:6379/0.
            pool: The namespace shared with the workers; by default $ROLLPOOL_POOL, then `default`.
            run: The training run; by default $ROLLPOOL_RUN, then `default`. Runs do not see one another's batches.
            backlog_limit: Open jobs of the run above which enqueueing waits or is refused; 0: no limit. A batch
                larger than the limit is accepted when nothing else is open.

        Raises:
            SettingsError: A name or the URL is malformed.
            SchemaMismatch: The msgpack module is not msgpack.
        """
        wire.check_msgpack()
        if backlog_limit < 0:
            raise SettingsError(f"backlog_limit: expected 0 (none) or more jobs, got {backlog_limit}")
        self._server = Server(url, pool, run)
        self._backlog_limit = backlog_limit
        self._batches: dict[str, AsyncBatch] = {}

    @property
    def run(self) -> str:
        """The training run."""
        return self._server.run

    @property
    def batches(self) -> dict[str, AsyncBatch]:
        """Batches of this object that are not committed, by id, in order of enqueueing."""
        return {name: batch for name, batch in self._batches.items() if not batch.committed}

    async def enqueue_prompts(
        self,
        prompts: Sequence[PromptInput],
        *,
        policy_version: int,
        n: int = 1,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        max_staleness: int | None = None,
        exact: bool = False,
        lane: Lane = "default",
        batch_id: str | None = None,
        metadata: Sequence[Any] | None = None,
        deadline: float | None = None,
        endpoint: Endpoint = "generate",
        logprobs: bool = True,
        timeout: float | None = 0.0,
    ) -> AsyncBatch:
        """Enqueue one job a prompt: all of them, or, when anything is wrong, none.

        Args:
            prompts: Text, token ids ([T] integers, list or numpy) or chat messages; all of one kind.
            policy_version: The tag: which policy the samples are wanted from.
            n: Samples of each prompt; together they are its group.
            sampling: How to sample, by sglang's names; unknown names are refused.
            max_staleness: The jobs may run on any policy from `policy_version - max_staleness` on, newer ones included;
                None: on any.
            exact: The jobs may run on `policy_version` alone.
            lane: `high`, `default` or `low`; hosts take the jobs of a run in this order.
            batch_id: Name of the batch. The same name with the same content returns the first batch, so the call may
                be repeated after any failure. By default a new one.
            metadata: One entry a prompt, what msgpack carries (numpy arrays included); comes back with the group.
            deadline: Seconds from now after which open jobs settle `expired`.
            endpoint: `generate`, or `chat` for evaluation: text alone, without token ids and log-probs.
            logprobs: Must be False for `endpoint="chat"`; `generate` returns log-probs in any case.
            timeout: Seconds to wait for room in the backlog; None: for ever.

        Returns:
            The batch; `len(batch)` is the number of prompts.

        Raises:
            InvalidPrompt: A prompt or a parameter is wrong, named with its index, or `batch_id` names a batch with
                other content. Nothing was sent, or nothing was changed.
            BacklogFull: There was no room in time.
            NotPermitted: The server's access list refuses this user.
        """
        batch = draft(
            prompts,
            run=self.run,
            policy_version=policy_version,
            n=n,
            sampling=sampling,
            max_staleness=max_staleness,
            exact=exact,
            lane=lane,
            batch_id=batch_id,
            metadata=metadata,
            deadline=deadline,
            endpoint=endpoint,
            logprobs=logprobs,
        )
        return self._remembered(batch, await self._enqueue(batch, timeout))

    def _remembered(self, batch: Draft, enqueued: scripts.Enqueued) -> AsyncBatch:
        """The batch object: the one this pool has, with what it has handed out, or a new one."""
        # Committed ones are forgotten here, so that a long training run does not gather them.
        self._batches = self.batches
        known = self._batches.get(batch.batch)
        if known is None or known.content != batch.content:
            known = AsyncBatch(self._server, Inbox(batch.batch, enqueued.count), batch.content)
            self._batches[batch.batch] = known
        elif enqueued.answer == "new":
            # The server had lost it; its results may begin at an earlier id now.
            known.inbox.cursor = BEGIN
        return known

    async def _enqueue(self, batch: Draft, timeout: float | None) -> scripts.Enqueued:
        """Send the batch, waiting for room."""
        server, what = self._server, f"enqueue of batch {batch.batch}"
        with server.doing(what):
            previews_and_bodies = batch.previews_and_bodies(await self._deadline_ms(batch.deadline_s))
            until = None if timeout is None else time.monotonic() + timeout
            while True:
                enqueued = await scripts.enqueue(
                    server.client,
                    server.keys,
                    run=server.run,
                    batch=batch.batch,
                    lane=batch.shared["lane"],
                    content=batch.content,
                    policy=batch.shared["policy_version"],
                    n=batch.shared["n"],
                    previews_and_bodies=previews_and_bodies,
                    backlog_limit=self._backlog_limit,
                )
                if enqueued.answer == "other":
                    raise InvalidPrompt(
                        f"batch_id: {batch.batch!r} names a batch of run {server.run!r} with other content; give "
                        "this one another name"
                    )
                if enqueued.answer != "full":
                    return enqueued
                await self._wait_for_room(len(batch.own), until)

    async def _deadline_ms(self, deadline_s: float | None) -> int | None:
        """A deadline is a time of the server: the clocks of trainer and hosts may differ."""
        if deadline_s is None:
            return None
        seconds, microseconds = await self._server.client.time()
        return int(seconds * 1000 + microseconds // 1000 + deadline_s * 1000)

    async def _wait_for_room(self, size: int, until: float | None) -> None:
        """Return when the batch may fit; asking is cheaper than sending it again."""
        while True:
            open_jobs = int(await self._server.client.hget(self._server.keys.run(self.run), "open") or 0)
            if open_jobs == 0 or open_jobs + size <= self._backlog_limit:
                return
            if until is not None and time.monotonic() >= until:
                raise BacklogFull(
                    f"run {self.run!r} has {open_jobs} open jobs; {size} more are over its backlog_limit of "
                    f"{self._backlog_limit}. Nothing was enqueued: collect first, pass timeout= to wait, or raise "
                    "the limit"
                )
            await asyncio.sleep(_ROOM_POLL_S)

    def groups(self, n: int | None = None, timeout: float | None = None) -> AsyncGenerator[Group, None]:
        """Yield `ok` groups of all batches in `batches` as they finish, the oldest batch first among those here.

        `group.batch` says which batch a group is of. Batches enqueued meanwhile are included. Ends after `n` groups, or
        when every batch is settled and handed out.

        Args:
            n: Groups to yield at most; None: all.
            timeout: Seconds from the call until waiting ends; None: never.

        Raises:
            PoolTimeout: Nothing finished in time; nothing is lost, and another call goes on.
            RollpoolError: The server lost a batch.
        """
        return hand_out_async(self._feed(timeout), progress_bar(False, ""), n)

    def _feed(self, timeout: float | None) -> Feed:
        return Feed(self._server, lambda: [batch.inbox for batch in self.batches.values()], timeout)

    async def publish_policy(self, version: int, *, checkpoint: str) -> Policy:
        """Make a checkpoint the current policy: the hosts begin to move to it. May be repeated.

        Args:
            version: Higher than every version published before in this pool.
            checkpoint: Directory in Hugging Face layout, as the hosts see it.

        Raises:
            PolicyRejected: The version names another source already, or does not rise.
            NotPermitted: The server's access list refuses this user.
        """
        return await publish.publish_policy(self._server, version, checkpoint)

    async def current_policy(self) -> Policy | None:
        """The policy published last; None before the first."""
        return await publish.current_policy(self._server)

    async def wait_for_policy(self, version: int, *, fraction: float = 1.0, timeout: float | None = None) -> None:
        """Wait until enough of the live workers serve `version` or a newer one.

        Args:
            version: A published version.
            fraction: Part of the workers that have a heartbeat and are not stopping, more than 0 and at most 1; at
                least one worker in any case.
            timeout: Seconds; None: for ever.

        Raises:
            PolicyUnknown: Nobody published the version.
            PolicyRejected: A worker failed to apply it; the message carries the worker's error.
            PoolTimeout: Too few in time; the message names those who are not there yet.
        """
        await publish.wait_for_policy(self._server, version, fraction, timeout)

    def state_dict(self) -> dict[str, Any]:
        """What was handed out of the batches that are not committed: plain data for the trainer's checkpoint.

        Save it together with the weights, then commit what it calls complete. Returns
        `{"schema", "run", "batches": {id: {"consumed": [[start, end], …], "complete"}}}`, indexes in half-open ranges.
        """
        return {
            "schema": STATE_SCHEMA,
            "run": self.run,
            "batches": {
                name: {"consumed": batch.inbox.consumed(), "complete": batch.inbox.complete}
                for name, batch in self.batches.items()
            },
        }

    @classmethod
    async def resume(
        cls,
        state: Mapping[str, Any],
        url: str | None = None,
        *,
        pool: str | None = None,
        backlog_limit: int = BACKLOG_LIMIT,
    ) -> Self:
        """Go on where a `state_dict` was saved: commit what it calls complete, and attach the rest.

        Every open batch of the run is in `batches` afterwards, and yields what the state does not name; a batch that
        the state does not know is yielded whole.

        Args:
            state: What `state_dict` returned.
            url: As for the constructor.
            pool: As for the constructor.
            backlog_limit: As for the constructor.

        Raises:
            SchemaMismatch: The state is of another version of rollpool, or not a state.
        """
        resumed = cls(url, pool=pool, run=_run_of(state), backlog_limit=backlog_limit)
        await resumed._restore(state)
        return resumed

    async def _restore(self, state: Mapping[str, Any]) -> None:
        server, named = self._server, state["batches"]
        with server.doing("resume"):
            for name, batch in named.items():
                if batch["complete"]:
                    await scripts.commit(server.client, server.keys, run=server.run, batch=name)
            open_names: list[Any] = await server.client.zrange(server.keys.open_batches(server.run), 0, -1)
            for name in (member.decode() for member in open_names):
                key = server.keys.batch(server.run, name)
                facts: list[Any] = await server.client.hmget(key, ["size", "content"])
                size, content = facts
                if size and content:
                    consumed = from_ranges(named.get(name, {"consumed": []})["consumed"])
                    self._batches[name] = AsyncBatch(server, Inbox(name, int(size), consumed), content.decode())
        self._warn_of_missing(named)

    def _warn_of_missing(self, named: Mapping[str, Any]) -> None:
        for name, batch in named.items():
            if name not in self._batches and not batch["complete"]:
                _LOG.warning(
                    "batch %s was not consumed when the state was saved, and is not open on the server now: it was "
                    "committed since, or the server lost it; enqueue its prompts again under another batch_id",
                    name,
                )

    async def close(self) -> None:
        """Close the connections; batches stay on the server."""
        await self._server.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _run_of(state: Mapping[str, Any]) -> str:
    if not isinstance(state, Mapping) or state.get("schema") != STATE_SCHEMA:
        found = state.get("schema") if isinstance(state, Mapping) else type(state).__name__
        raise SchemaMismatch(f"resume: expected a state_dict of schema {STATE_SCHEMA}, got {found!r}")
    return str(state["run"])


def _blocking(
    method: Callable[Concatenate[AsyncRolloutPool, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["RolloutPool", P], R]:
    """The blocking twin of a method, with its parameters and documentation."""

    def call(self: "RolloutPool", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._portal.run(method(self._pool, *args, **kwargs))

    return _named_after(method, call)


def _blocking_batch(
    method: Callable[Concatenate[AsyncRolloutPool, P], Coroutine[Any, Any, AsyncBatch]],
) -> Callable[Concatenate["RolloutPool", P], Batch]:
    """As `_blocking`, for a method that makes a batch."""

    def call(self: "RolloutPool", /, *args: P.args, **kwargs: P.kwargs) -> Batch:
        return self._facade(self._portal.run(method(self._pool, *args, **kwargs)))

    return _named_after(method, call, returns=Batch)


def _named_after(method: Callable[..., Any], twin: Callable[P, R], **returns: type[Any]) -> Callable[P, R]:
    """Give the twin the name, documentation and signature of its method, for `help` and editors."""
    functools.update_wrapper(twin, method)
    twin.__qualname__ = f"RolloutPool.{method.__name__}"
    signature = inspect.signature(method)
    shown = signature.replace(return_annotation=returns.get("returns", signature.return_annotation))
    twin.__signature__ = shown  # type: ignore[attr-defined]
    return twin


class RolloutPool:
    """A pool of rollout workers, seen from one training run; for blocking code, notebooks included.

    Nothing is sent before the first call. Use it as a context manager, or call `close()`. Not to be used across a fork.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        pool: str | None = None,
        run: str | None = None,
        backlog_limit: int = BACKLOG_LIMIT,
    ) -> None:
        self._pool = AsyncRolloutPool(url, pool=pool, run=run, backlog_limit=backlog_limit)
        self._portal = Portal()
        # Also at the end of the interpreter: open sockets would be warned of.
        self._close = weakref.finalize(self, _close, self._pool, self._portal)

    __init__.__doc__ = AsyncRolloutPool.__init__.__doc__

    @property
    def run(self) -> str:
        """The training run."""
        return self._pool.run

    @property
    def batches(self) -> dict[str, Batch]:
        """Batches of this object that are not committed, by id, in order of enqueueing."""
        return {name: self._facade(batch) for name, batch in self._pool.batches.items()}

    def _facade(self, batch: AsyncBatch) -> Batch:
        return Batch(batch, self._portal, self._pool._server)

    enqueue_prompts = _blocking_batch(AsyncRolloutPool.enqueue_prompts)
    publish_policy = _blocking(AsyncRolloutPool.publish_policy)
    current_policy = _blocking(AsyncRolloutPool.current_policy)
    wait_for_policy = _blocking(AsyncRolloutPool.wait_for_policy)

    def groups(self, n: int | None = None, timeout: float | None = None) -> Generator[Group, None, None]:
        """Yield `ok` groups of all batches in `batches` as they finish; parameters and errors as `AsyncRolloutPool`."""
        return hand_out(self._pool._feed(timeout), self._portal, progress_bar(False, ""), n)

    def state_dict(self) -> dict[str, Any]:
        """What was handed out of the batches that are not committed: plain data for the trainer's checkpoint.

        Save it together with the weights, then commit what it calls complete.
        """
        return self._pool.state_dict()

    @classmethod
    def resume(
        cls,
        state: Mapping[str, Any],
        url: str | None = None,
        *,
        pool: str | None = None,
        backlog_limit: int = BACKLOG_LIMIT,
    ) -> Self:
        """Go on where a `state_dict` was saved: commit what it calls complete, and attach the rest.

        Parameters and errors as `AsyncRolloutPool.resume`.
        """
        resumed = cls(url, pool=pool, run=_run_of(state), backlog_limit=backlog_limit)
        try:
            resumed._portal.run(resumed._pool._restore(state))
        except BaseException:
            resumed.close()
            raise
        return resumed

    def close(self) -> None:
        """Close the connections and end the thread; batches stay on the server. May be repeated."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(pool: AsyncRolloutPool, portal: Portal) -> None:
    if portal.usable:
        portal.run(pool.close())
    portal.close()
