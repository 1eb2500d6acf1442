"""Credits: how much work a host takes on. Pure arithmetic.

Invariant: the samples in the engine never exceed the target, and a host with room asks for at least one job.
"""

import math


def concurrency_target(max_running_requests: int, oversubscription: float) -> int:
    """Samples to keep in the engine: above what it runs at once, so that it never waits for the next.

    Args:
        max_running_requests: what the engine really runs at once.
        oversubscription: 1.25 keeps a quarter of a batch waiting inside the engine, which covers the round trip of a
            pull; much more only moves the backlog into the engine, where it cannot be given to another host.
    """
    return math.ceil(oversubscription * max_running_requests)


def jobs_wanted(room: int, mean_n: float, unsettled: int, unsettled_limit: int) -> int:
    """Jobs to pull now.

    Args:
        room: credits, in samples: target minus in the engine minus held and waiting.
        mean_n: recent mean of samples a job.
        unsettled: finished jobs whose settlement is not confirmed yet.
        unsettled_limit: bound on those; a server that is slow or away must not make this host grow.
    """
    if room <= 0 or unsettled >= unsettled_limit:
        return 0
    return min(max(1, math.ceil(room / mean_n)), unsettled_limit - unsettled)


class MeanN:
    """Recent mean of samples a job, exponentially weighted."""

    #: Weight of the newest job: the mean follows a change of `n` within about ten jobs.
    WEIGHT = 0.2

    def __init__(self) -> None:
        #: Infinite until a job was seen, so that the first pull asks for one: to guess low would take a room full of
        #: large groups from hosts that are idle.
        self.value = math.inf

    def add(self, n: int) -> None:
        """Count one pulled job."""
        self.value = n if math.isinf(self.value) else self.value + self.WEIGHT * (n - self.value)
