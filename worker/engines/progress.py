"""Health means progress: whether an engine with work in flight still moves.

Invariant: an idle engine is never stalled, and one that showed any progress within the limit is not either; nor is one
that changes its weights, within a limit of its own. Pure; the clock is passed in.

What it can see: a request that completes; on the main line every decode step, through the scheduler's own
count; on 0.0.1.post1 the engine's throughput figure, which changes every 40 decode steps. What it cannot
see: a prefill or a compilation that is under way, during which the scheduler answers nothing; so the limit
must be longer than the longest of these. `/health` plays no part: it stays 200 when the scheduler is dead.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rollpool.worker.engines.protocol import EngineLoad


@dataclass(slots=True)
class ProgressWatch:
    """Counts what is in flight, and remembers when anything last moved."""

    clock: Callable[[], float]
    stall_timeout_s: float
    #: How long one change of the engine's weights may take, during which it may answer nothing.
    change_timeout_s: float = float("inf")
    in_flight: int = 0
    #: Requests that were given up before they ended, or aborted: neither line ever forgets one that waited in its queue
    #: then, and its process does not end by SIGTERM any more.
    given_up: int = 0
    _moved_at: float = field(default=0.0, init=False)
    #: Since when each change that is under way has been.
    _changes: list[float] = field(default_factory=list, init=False)
    _seen: EngineLoad | None = field(default=None, init=False)

    def started(self) -> None:
        """A request was sent; the first one after idleness starts the clock."""
        if self.in_flight == 0:
            self._moved_at = self.clock()
        self.in_flight += 1

    def ended(self, *, completed: bool) -> None:
        """A request came back; a cancelled or failed one says nothing of the engine's progress."""
        self.in_flight -= 1
        if completed:
            self._moved_at = self.clock()
        else:
            self.given_up += 1

    def gave_up(self, requests: int) -> None:
        """So many are aborted; that they come back then is no reason to count on them."""
        self.given_up += requests

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The engine changes its weights meanwhile, and need not show progress."""
        began = self.clock()
        self._changes.append(began)
        try:
            yield
        finally:
            self._changes.remove(began)
            self._moved_at = self.clock()

    def observed(self, load: EngineLoad) -> None:
        """The engine told of itself; any change since it last did is progress."""
        if load != self._seen:
            self._seen = load
            self._moved_at = self.clock()

    def still_for(self) -> float:
        """Seconds without progress; 0 while nothing is in flight, or weights are changed."""
        return self.clock() - self._moved_at if self.in_flight and not self._changes else 0.0

    def stalled(self) -> str | None:
        """The reason why the engine counts as dead, or None."""
        if self._changes and (taken := self.clock() - self._changes[0]) > self.change_timeout_s:
            return (
                f"a change of its weights has not ended within {taken:.0f} s "
                f"(engine.start_timeout_s={self.change_timeout_s:.0f})"
            )
        still = self.still_for()
        if still <= self.stall_timeout_s:
            return None
        return (
            f"no progress for {still:.0f} s with {self.in_flight} requests in flight "
            f"(engine.stall_timeout_s={self.stall_timeout_s:.0f})"
        )
