"""Whether a run has room for more jobs; pure, no I/O.

Invariant: this decides as `enqueue.lua` does, which has the last word; here it is only asked whether sending the batch
again is worth while, and why there was no room.

The rule is that of AReaL (areal/core/staleness_manager.py, `StalenessManager.get_capacity`):

    capacity = min(max_concurrent - running, (max_staleness + version + 1) * batch_size - (accepted + running))

with two additions. A run that comes to the rule late is counted from there on: from the version and the jobs it had.
And since batches are enqueued whole, one larger than `max_concurrent` is admitted alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rollpool.schemas.staleness import StalenessRule

#: Counters of a run from which its `Load` is read.
COUNTERS = ("open", "ok", "rule_version", "rule_jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the server counts of a run."""

    #: Jobs that are open.
    running: int = 0
    #: Jobs that settled `ok`.
    accepted: int = 0
    #: The current policy; None before the first.
    version: int | None = None
    #: The policy and the jobs from which the rule counts; None until there are any.
    from_version: int | None = None
    from_jobs: int | None = None

    @classmethod
    def of(cls, policy: bytes | None, counters: Sequence[bytes | None]) -> "Load":
        """Read the current policy and `COUNTERS` as the server has them."""
        running, accepted, from_version, from_jobs = (_number(counter) for counter in counters)
        return cls(
            running=running or 0,
            accepted=accepted or 0,
            version=_number(policy),
            from_version=from_version,
            from_jobs=from_jobs,
        )

    @property
    def trained(self) -> int:
        """Versions published since the run came to the rule."""
        if self.version is None or self.from_version is None:
            return 0
        return self.version - self.from_version

    @property
    def counted(self) -> int:
        """Jobs, open or `ok`, since then."""
        jobs = self.accepted + self.running
        return jobs - (jobs if self.from_jobs is None else self.from_jobs)


def staleness_room(rule: StalenessRule, load: Load) -> int:
    """Jobs for which the rule has room; below 0 when it came to have less than there are."""
    return (rule.max_staleness + load.trained + 1) * rule.batch_size - load.counted


def capacity(load: Load, *, backlog_limit: int, rule: StalenessRule | None) -> float:
    """AReaL's: jobs that may be enqueued now; `backlog_limit` is its `max_concurrent`, 0 for none."""
    by_limit = backlog_limit - load.running if backlog_limit else math.inf
    return min(by_limit, math.inf if rule is None else staleness_room(rule, load))


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run is held to."""

    #: Open jobs above which nothing is enqueued; 0: none.
    backlog: int
    rule: StalenessRule | None = None

    def refusal(self, load: Load, size: int) -> Literal["full", "stale"] | None:
        """Why `size` jobs may not be enqueued now; None when they may."""
        if load.running and size > capacity(load, backlog_limit=self.backlog, rule=None):
            return "full"
        if size > capacity(load, backlog_limit=0, rule=self.rule):
            return "stale"
        return None

    def too_large(self, size: int) -> bool:
        """True for a batch that the rule has no room for even when all before it was trained on."""
        return self.rule is not None and size > (self.rule.max_staleness + 1) * self.rule.batch_size

    def reason(self, run: str, load: Load, size: int) -> str:
        """Why `size` jobs may not be enqueued, with the numbers, and what to do."""
        if self.rule is None or self.refusal(load, size) == "full":
            return (
                f"run {run!r} has {load.running} open jobs; {size} more are over its backlog_limit of {self.backlog}. "
                "Nothing was enqueued: collect first, pass timeout= to wait, or raise the limit"
            )
        rule = self.rule
        if self.too_large(size):
            return (
                f"run {run!r} is held to {rule}, which never has room for more than "
                f"{(rule.max_staleness + 1) * rule.batch_size} jobs at once, and the batch has {size}. Nothing was "
                "enqueued: enqueue it as several batches, or give the rule the batch_size of a training step"
            )
        policy = "before the first policy" if load.version is None else f"at policy {load.version}"
        return (
            f"run {run!r} is held to {rule}, which has room for {max(0, staleness_room(rule, load))} jobs {policy}, "
            f"and the batch has {size}: since the run came to the rule, {load.trained} versions ago, {load.counted} "
            "jobs were finished or are open. Nothing was enqueued: train on what is there and publish the next "
            "policy, or pass timeout= to wait for it"
        )


def _number(counter: bytes | None) -> int | None:
    return None if counter is None else int(counter)
