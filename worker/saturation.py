"""How well this host kept its engine fed: the figure the pool exists for.

Invariant: every moment between the first observation and the last is counted once, under the state that held then.
"""

from collections.abc import Callable


class Saturation:
    """Seconds with backlog, and the part of them with fewer than `max_running_requests` samples in the engine."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: float | None = None
        self._backlog = False
        self._underfull = False
        self.backlog_seconds = 0.0
        self.underfull_seconds = 0.0

    def observe(self, *, in_flight: int, full: int, backlog: bool) -> None:
        """Note the state from now on; call it whenever one of the three changes.

        Args:
            in_flight: our samples in the engine.
            full: its `max_running_requests`.
            backlog: True while jobs wait that this host could run.
        """
        now = self._clock()
        if self._since is not None and self._backlog:
            self.backlog_seconds += now - self._since
            if self._underfull:
                self.underfull_seconds += now - self._since
        self._since, self._backlog, self._underfull = now, backlog, in_flight < full

    def pause(self) -> None:
        """Stop counting: no engine serves now, which is another figure."""
        self.observe(in_flight=0, full=0, backlog=False)
