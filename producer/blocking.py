"""The pool and its batches for blocking code: each method runs its asyncio twin in a portal.

Invariant: there is one implementation, the asyncio one. Only two things are done in the caller's thread: groups are
taken from an inbox, so that a Ctrl-C loses none, and parameters are put, so that a trainer's arrays are used from the
thread that runs its JAX programs.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from rollpool.producer.batch import AsyncBatch, _Facts
from rollpool.producer.feed import Feed
from rollpool.producer.params import ParamsSink
from rollpool.producer.pool import BACKLOG_LIMIT, AsyncRolloutPool
from rollpool.producer.portal import Portal
from rollpool.producer.progress import Show, progress_bar
from rollpool.producer.resume import State
from rollpool.schemas.results import Group
from rollpool.schemas.staleness import StalenessRule

P = ParamSpec("P")
R = TypeVar("R")


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


class Batch(_Facts):
    """A batch for blocking code: the same as `AsyncBatch`; made by `RolloutPool.enqueue_prompts`."""

    def __init__(self, batch: AsyncBatch, portal: Portal) -> None:
        self._batch = batch
        self._portal = portal
        self._inbox = batch.inbox

    @property
    def committed(self) -> bool:
        """True after `commit`."""
        return self._batch.committed

    def collect(
        self, timeout: float | None = None, *, first_k: int | None = None, progress: bool | str = False
    ) -> Generator[Group, None, None]:
        """Set below: the words of `AsyncBatch.collect`."""
        return hand_out(self._batch.feed(timeout, first_k), self._portal, self._batch.bar(progress))

    collect.__doc__ = AsyncBatch.collect.__doc__

    def cancel(self) -> int:
        """Settle every open job `cancelled`, at once; returns how many. See `AsyncBatch.cancel`."""
        return self._portal.run(self._batch.cancel())

    def commit(self) -> None:
        """Say that the batch was consumed; errors as `AsyncBatch.commit`. May be repeated."""
        self._portal.run(self._batch.commit())


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
        return Batch(self._portal.run(method(self._pool, *args, **kwargs)), self._portal)

    return _named_after(method, call, returns=Batch)


def _blocking_put(
    method: Callable[Concatenate[AsyncRolloutPool, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["RolloutPool", P], R]:
    """As `_blocking`, but that parameters are put in the caller's thread, which alone may use its arrays."""

    def call(self: "RolloutPool", /, *args: P.args, **kwargs: P.kwargs) -> R:
        published = self._put(*args, **kwargs)  # type: ignore[arg-type]
        return self._portal.run(method(self._pool, *args, **published))

    return _named_after(method, call)


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
        weight: float | None = None,
        staleness_rule: StalenessRule | None = None,
        model_roots: Sequence[str] | None = None,
        params: ParamsSink | None = None,
    ) -> None:
        self._pool = AsyncRolloutPool(
            url,
            pool=pool,
            run=run,
            backlog_limit=backlog_limit,
            weight=weight,
            staleness_rule=staleness_rule,
            model_roots=model_roots,
            params=params,
        )
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
        return {name: Batch(batch, self._portal) for name, batch in self._pool.batches.items()}

    enqueue_prompts = _blocking_batch(AsyncRolloutPool.enqueue_prompts)
    cancel = _blocking(AsyncRolloutPool.cancel)
    rollback_policy = _blocking(AsyncRolloutPool.rollback_policy)
    current_policy = _blocking(AsyncRolloutPool.current_policy)
    wait_for_policy = _blocking(AsyncRolloutPool.wait_for_policy)
    publish_policy = _blocking_put(AsyncRolloutPool.publish_policy)

    def _put(
        self, version: int, *, params: Any = None, mapping: Any = None, check: bool = True, **others: Any
    ) -> dict[str, Any]:
        """What is published of these arguments, once parameters among them were put, in the calling thread."""
        if params is None:
            return others | {"check": check}
        sources = [others.pop(name, None) for name in ("checkpoint", "lora_path", "base")]
        known = self._portal.run(self._pool.put_before(version, *sources))
        checkpoint = known or self._pool.put_params(version, params, mapping)
        return others | {"checkpoint": checkpoint, "check": check and known is None and self._pool.checks_params}

    def groups(self, n: int | None = None, timeout: float | None = None) -> Generator[Group, None, None]:
        """Yield `ok` groups of all batches in `batches` as they finish; parameters and errors as `AsyncRolloutPool`."""
        return hand_out(self._pool.feed(timeout), self._portal, progress_bar(False, ""), n)

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
        weight: float | None = None,
        staleness_rule: StalenessRule | None = None,
        model_roots: Sequence[str] | None = None,
        params: ParamsSink | None = None,
    ) -> Self:
        """Go on where a `state_dict` was saved: commit what it calls complete, and attach the rest.

        Parameters and errors as `AsyncRolloutPool.resume`.
        """
        saved = State.of(state)
        resumed = cls(
            url,
            pool=pool,
            run=saved.run,
            backlog_limit=backlog_limit,
            weight=weight,
            staleness_rule=staleness_rule,
            model_roots=model_roots,
            params=params,
        )
        try:
            resumed._portal.run(resumed._pool.restore(saved))
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
