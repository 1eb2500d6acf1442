"""Key names: every key a pool owns, and nothing else builds one.

Invariant: all keys of a pool share one cluster hash tag, `{POOL}`, so that one Lua script may touch them all.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rollpool.schemas.errors import SettingsError
from rollpool.schemas.jobs import LANES, NAME_PATTERN

#: The consumer group of every jobs stream.
GROUP = "workers"


@dataclass(frozen=True)
class Keys:
    """The keys of one pool."""

    pool: str

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME_PATTERN, self.pool):
            raise SettingsError(f"pool {self.pool!r}: a pool's name is letters, digits, '.', '_' and '-'")

    def _key(self, *parts: str) -> str:
        return ":".join((f"rollpool:{{{self.pool}}}", *parts))

    def jobs(self, run: str, lane: str) -> str:
        """Stream: the backlog of one run in one lane."""
        return self._key("jobs", run, lane)

    def lanes(self, run: str) -> list[str]:
        """The jobs streams of one run, most urgent first."""
        return [self.jobs(run, lane) for lane in LANES]

    def streams(self, runs: Iterable[str]) -> list[str]:
        """Every stream on which a job of these runs can be in somebody's hands."""
        return [self.retries, *(stream for run in runs for stream in self.lanes(run))]

    @property
    def prefix(self) -> str:
        """What all keys of the pool begin with."""
        return self._key("")

    @property
    def retries(self) -> str:
        """Stream: jobs that waited off their lane and were given to a host; every entry is in somebody's hands."""
        return self._key("retries")

    @property
    def waiting(self) -> str:
        """Hash: what `retries` is fed from, the fields of each waiting job by its name `RUN:LANE:BATCH/INDEX`."""
        return self._key("waiting")

    def ready(self, run: str, lane: str) -> str:
        """List: names of waiting jobs that a host takes before the backlog of their lane."""
        return self._key("ready", run, lane)

    def parked(self, run: str) -> str:
        """Sorted set: names of jobs of one run that wait for a policy version or a newer one, scored by it."""
        return self._key("parked", run)

    def exact(self, run: str) -> str:
        """Sorted set: names of jobs of one run that wait for a host on one policy version alone, scored by it."""
        return self._key("exact", run)

    @property
    def delayed(self) -> str:
        """Sorted set: names of jobs that wait for a time, scored by it in milliseconds of server time."""
        return self._key("delayed")

    def passed(self, worker: str) -> str:
        """Sorted set, expiring: names in `delayed` that this worker may take before their time, scored by it."""
        return self._key("passed", worker)

    @property
    def deadlines(self) -> str:
        """Sorted set: batches `RUN:ID` with a deadline, scored by it in milliseconds of server time."""
        return self._key("deadlines")

    @property
    def fair(self) -> str:
        """String: the pool's virtual time, by which a run that was idle joins the others."""
        return self._key("fair")

    @property
    def sweep(self) -> str:
        """String with a lease: the worker that looks for what others lost, now; the others need not."""
        return self._key("sweep")

    @property
    def ended(self) -> str:
        """Channel: `RUN:ID` of batches of which jobs were cancelled or ended by the server."""
        return self._key("ended")

    def batch(self, run: str, batch: str) -> str:
        """Hash: each job's state, the content hash, counts."""
        return self._key("batches", run, batch)

    def parts(self, run: str, batch: str) -> str:
        """Hash: finished parts of split groups that are not put together yet."""
        return self._key("parts", run, batch)

    def open_batches(self, run: str) -> str:
        """Sorted set: batches of a run that are not committed, by time of enqueueing."""
        return self._key("open", run)

    def results(self, run: str, batch: str) -> str:
        """Stream: settled groups of one batch."""
        return self._key("results", run, batch)

    @property
    def runs(self) -> str:
        """Set: the names of all runs."""
        return self._key("runs")

    def run(self, run: str) -> str:
        """Hash: weight, counters, and bytes of results that wait to be read, of one run."""
        return self._key("runs", run)

    @property
    def dead(self) -> str:
        """Stream: jobs that used up their attempts."""
        return self._key("dead")

    @property
    def control(self) -> str:
        """Stream: commands, the first to the last."""
        return self._key("control")

    @property
    def acks(self) -> str:
        """Stream: what each worker answered."""
        return self._key("acks")

    @property
    def policies(self) -> str:
        """Hash: every published policy as JSON.

        By VERSION, an adapter by RUN:VERSION; one that its lineage went back from, by the same with @GENERATION.
        """
        return self._key("policies")

    @property
    def policy(self) -> str:
        """String: the version of the current checkpoint."""
        return self._key("policy")

    def run_policy(self, run: str) -> str:
        """String: the version of the current adapter of a run that publishes some."""
        return self._key("policy", run)

    @property
    def generations(self) -> str:
        """Hash: the generation of each lineage that ever went back.

        And at LINEAGE@GENERATION what that left to settle, as `TARGET LAST MS`: jobs enqueued until MS with a tag after
        TARGET, up to LAST. It goes when none of them is open.
        """
        return self._key("generations")

    @property
    def publisher(self) -> str:
        """String with a lease: the one run that may publish checkpoints now."""
        return self._key("publisher")

    @property
    def rollout(self) -> str:
        """Sorted set: workers that are changing their policy now, scored by the end of their lease in server ms."""
        return self._key("rollout")

    def worker(self, name: str) -> str:
        """Hash, expiring: a worker's heartbeat."""
        return self._key("workers", name)
