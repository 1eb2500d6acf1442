"""Health means progress: whether an engine with work in flight still moves.

Invariant: an idle engine is never stalled, and one that showed any progress within the limit is not either.
Pure; the clock is passed in.

What it can see: a request that completes; on the main line every decode step, through the scheduler's own
count; on 0.0.1.post1 the engine's throughput figure, which changes every 40 decode steps. What it cannot
see: a prefill or a compilation that is under way, during which the scheduler answers nothing; so the limit
must be longer than the longest of these. `/health` plays no part: it stays 200 when the scheduler is dead.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from rollpool.worker.engines.protocol import EngineLoad


@dataclass(slots=True)
class ProgressWatch:
    """Counts what is in flight, and remembers when anything last moved."""

    clock: Callable[[], float]
    stall_timeout_s: float
    in_flight: int = 0
    #: Requests that were given up before they ended; the main line never forgets one that waited in its queue then,
    #: and its process does not end by SIGTERM any more.
    given_up: int = 0
    _moved_at: float = field(default=0.0, init=False)
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

    def observed(self, load: EngineLoad) -> None:
        """The engine told of itself; any change since it last did is progress."""
        if load != self._seen:
            self._seen = load
            self._moved_at = self.clock()

    def still_for(self) -> float:
        """Seconds without progress; 0 while nothing is in flight."""
        return self.clock() - self._moved_at if self.in_flight else 0.0

    def stalled(self) -> str | None:
        """The reason why the engine counts as dead, or None."""
        still = self.still_for()
        if still <= self.stall_timeout_s:
            return None
        return (
            f"no progress for {still:.0f} s with {self.in_flight} requests in flight "
            f"(engine.stall_timeout_s={self.stall_timeout_s:.0f})"
        )
