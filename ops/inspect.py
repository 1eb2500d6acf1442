"""What a pool holds now, read with plain commands: nothing here changes anything.

Invariant: backlog, in flight and waiting jobs are read in one transaction, so that their sum is the number of open jobs
of that moment.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from redis import Redis

from rollpool.schemas import GROUP, LANES, Keys, WorkerStatus

#: Entries looked at to tell the backlog by policy: the oldest, which is what hosts take next.
SCANNED = 10_000


@dataclass(frozen=True)
class LaneStatus:
    """The backlog of one run in one lane, in jobs."""

    run: str
    lane: str
    backlog: int
    in_flight: int
    #: Jobs on the stream by policy tag, of the first `SCANNED`.
    by_policy: dict[str, int]


@dataclass(frozen=True)
class RunStatus:
    """Counters of one run, in jobs, samples and tokens since it began."""

    run: str
    enqueued: int
    open: int
    outcomes: dict[str, int]
    samples: int
    tokens: int


@dataclass(frozen=True)
class PoolStatus:
    """Everything `rollpool status` shows."""

    pool: str
    policy: int | None
    changing: str | None
    parked: int
    delayed: int
    dead: int
    lanes: list[LaneStatus] = field(default_factory=list)
    runs: list[RunStatus] = field(default_factory=list)
    workers: list[WorkerStatus] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {**asdict(self), "workers": [worker.model_dump() for worker in self.workers]}


def read_status(client: Redis, keys: Keys) -> PoolStatus:
    """Read the status of one pool."""
    members: Any = client.smembers(keys.runs)
    runs = sorted(member.decode() for member in members)
    streams = [(run, lane) for run in runs for lane in LANES]
    with client.pipeline(transaction=True) as pipe:
        pipe.get(keys.policy)
        pipe.get(keys.rollout)
        pipe.zcard(keys.parked)
        pipe.zcard(keys.delayed)
        pipe.xlen(keys.dead)
        for run in runs:
            pipe.hgetall(keys.run(run))
        for run, lane in streams:
            pipe.xlen(keys.jobs(run, lane))
            pipe.eval(_PENDING, 1, keys.jobs(run, lane), GROUP)
        policy, changing, parked, delayed, dead, *rest = pipe.execute()
    counts = rest[len(runs) :]
    return PoolStatus(
        pool=keys.pool,
        policy=int(policy) if policy else None,
        changing=changing.decode() if changing else None,
        parked=parked,
        delayed=delayed,
        dead=dead,
        lanes=[
            LaneStatus(run, lane, length - pending, pending, _by_policy(client, keys.jobs(run, lane)))
            for (run, lane), length, pending in zip(streams, counts[::2], counts[1::2], strict=True)
            if length
        ],
        runs=[_run_status(run, counters) for run, counters in zip(runs, rest, strict=False)],
        workers=read_workers(client, keys),
    )


#: XPENDING fails on a stream that nobody enqueued to yet, and a failure would end the transaction.
_PENDING = """
local summary = redis.pcall('XPENDING', KEYS[1], ARGV[1])
return summary.err and 0 or summary[1]
"""


def read_workers(client: Redis, keys: Keys) -> list[WorkerStatus]:
    """The workers that have a heartbeat, by name."""
    names = list(client.scan_iter(match=keys.worker("*"), count=1000))
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hgetall(name)
        found = [WorkerStatus.from_fields(fields) for fields in pipe.execute() if fields]
    return sorted(found, key=lambda worker: worker.name)


def _by_policy(client: Redis, stream: str) -> dict[str, int]:
    reply: Any = client.xrange(stream, count=SCANNED)
    policies = Counter(fields.get(b"policy", b"?").decode(errors="replace") for _, fields in reply)
    return dict(sorted(policies.items()))


def _run_status(run: str, counters: dict[bytes, bytes]) -> RunStatus:
    count = {name.decode(): int(value) for name, value in counters.items() if value.lstrip(b"-").isdigit()}
    return RunStatus(
        run=run,
        enqueued=count.pop("enqueued", 0),
        open=count.pop("open", 0),
        samples=count.pop("samples", 0),
        tokens=count.pop("tokens", 0),
        outcomes=count,
    )
