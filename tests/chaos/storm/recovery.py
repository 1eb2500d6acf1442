"""How long the jobs of a killed worker were in nobody's hands.

Invariant: a job counts from the kill on, and until it is seen to be in another consumer's hands, or settled; one that
is never seen so has no time, and is told as still missing.
"""

import threading
import time
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from storm.wire import Held, Pending

#: Seconds between two looks; the figures are as exact as that.
LOOK_S = 0.1


@dataclass
class _Lost:
    """What one killed worker held."""

    killed_at: float
    #: The consumer that held it, by job.
    jobs: dict[tuple[str, str], str] = field(default_factory=dict)


class Recovery(threading.Thread):
    """Watches the jobs of killed workers come back; ends with `finish`."""

    def __init__(self, pending: Pending) -> None:
        super().__init__(name="storm-recovery", daemon=True)
        self._pending = pending
        self._lost: list[_Lost] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        #: Jobs that came back, `RUN:BATCH/INDEX`, and the seconds it took, in the order in which they did.
        self.seconds: list[tuple[str, float]] = []

    def killed(self, held: list[Held], at: float) -> None:
        """A worker that held these was killed at that monotonic time."""
        with self._lock:
            self._lost.append(_Lost(at, {(each.run, each.job): each.consumer for each in held}))

    @property
    def missing(self) -> list[str]:
        """Jobs that did not come back so far."""
        with self._lock:
            return [f"{run}:{job}" for lost in self._lost for run, job in lost.jobs]

    def run(self) -> None:
        """The thread."""
        while not self._ended.wait(LOOK_S):
            try:
                self._look()
            except RedisError:  # the server is being killed too
                continue

    def finish(self) -> None:
        """Look no more."""
        self._ended.set()
        if self.is_alive():
            self.join()

    def _look(self) -> None:
        with self._lock:
            watched = [(lost, dict(lost.jobs)) for lost in self._lost if lost.jobs]
        if not watched:
            return
        held = {(each.run, each.job): each.consumer for each in self._pending.read()}
        for lost, jobs in watched:
            for (run, job), consumer in jobs.items():
                now_with = held.get((run, job))
                again = now_with != consumer if now_with else self._pending.outcome(run, job) not in (None, "open")
                if again:
                    name = f"{run}:{job.partition('#')[0]}"
                    self.seconds.append((name, time.monotonic() - lost.killed_at))
                    with self._lock:
                        del lost.jobs[run, job]
