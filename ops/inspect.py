"""What a pool holds now, read with plain commands: nothing here changes anything.

Invariant: backlog, in flight and waiting are read in one transaction, so that their sum is the open jobs of that moment
(unfinished parts, where groups are split), and with them the entries of jobs that were settled meanwhile, by a cancel
say, and that no host has met yet. Which is which, `rollpool doctor` tells.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from redis import Redis

from rollpool.schemas import GROUP, LANES, OUTCOMES, Keys, WorkerStatus

#: Entries looked at to tell the backlog by policy: the oldest, which is what hosts take next.
SCANNED = 10_000


@dataclass(frozen=True)
class LaneStatus:
    """One run in one lane, in entries."""

    run: str
    lane: str
    #: That no host has yet.
    backlog: int
    #: In the hands of hosts, those that waited before included.
    in_flight: int
    #: That waited, and are taken before the backlog.
    ready: int
    #: Entries of the lane's stream by policy tag, of the first `SCANNED`.
    by_policy: dict[str, int]


@dataclass(frozen=True)
class RunStatus:
    """Counters of one run, in jobs, samples and tokens since it began."""

    run: str
    weight: float
    enqueued: int
    open: int
    outcomes: dict[str, int]
    samples: int
    tokens: int
    #: Of results that no trainer has read yet.
    unread_bytes: int


@dataclass(frozen=True)
class PoolStatus:
    """Everything `rollpool status` shows."""

    pool: str
    policy: int | None
    #: Workers that are changing their policy, by name.
    changing: str | None
    #: Entries that wait: for a time, for a policy or a newer one, for one policy alone.
    delayed: int
    parked: int
    exact: int
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
        pipe.zrange(keys.rollout, 0, -1, withscores=True)
        pipe.zcard(keys.delayed)
        pipe.xlen(keys.dead)
        pipe.eval(_RETRIES, 1, keys.retries)
        for run in runs:
            pipe.hgetall(keys.run(run))
        for run, lane in streams:
            pipe.xlen(keys.jobs(run, lane))
            pipe.eval(_PENDING, 1, keys.jobs(run, lane), GROUP)
            pipe.llen(keys.ready(run, lane))
        for run in runs:
            pipe.zcard(keys.parked(run))
            pipe.zcard(keys.exact(run))
        policy, slots, delayed, dead, retried, *rest = pipe.execute()
    workers = read_workers(client, keys)
    again = Counter((run.decode(errors="replace"), lane.decode(errors="replace")) for run, lane in retried)
    counts = rest[len(runs) : len(runs) + 3 * len(streams)]
    waiting = rest[len(runs) + len(counts) :]
    return PoolStatus(
        pool=keys.pool,
        policy=int(policy) if policy else None,
        changing=_changing(slots, workers),
        delayed=delayed,
        parked=sum(waiting[::2]),
        exact=sum(waiting[1::2]),
        dead=dead,
        lanes=[
            LaneStatus(
                run, lane, length - held, held + again[run, lane], ready, _by_policy(client, keys.jobs(run, lane))
            )
            for (run, lane), length, held, ready in zip(streams, counts[::3], counts[1::3], counts[2::3], strict=True)
            if length or ready or again[run, lane]
        ],
        runs=[_run_status(run, counters) for run, counters in zip(runs, rest, strict=False)],
        workers=workers,
    )


def _changing(slots: list[tuple[bytes, float]], workers: list[WorkerStatus]) -> str | None:
    """Who has a slot of a roll-out whose lease is not over, by the server's time in the newest heartbeat."""
    now_ms = max((worker.seen_ms for worker in workers), default=0)
    return ", ".join(sorted(name.decode(errors="replace") for name, end in slots if end > now_ms)) or None


#: XPENDING fails on a stream that nobody enqueued to yet, and a failure would end the transaction.
_PENDING = """
local summary = redis.pcall('XPENDING', KEYS[1], ARGV[1])
return summary.err and 0 or summary[1]
"""

#: Run and lane of each entry of `retries`, which holds what is in the hands of hosts and no more; the bodies stay.
_RETRIES = """
local found, from = {}, '-'
while true do
  local entries = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 100)
  for _, entry in ipairs(entries) do
    local place = {'', 'default'}
    for at = 1, #entry[2], 2 do
      if entry[2][at] == 'run' then place[1] = entry[2][at + 1] end
      if entry[2][at] == 'lane' then place[2] = entry[2][at + 1] end
    end
    found[#found + 1] = place
  end
  if #entries < 100 then return found end
  from = '(' .. entries[#entries][1]
end
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
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in counters.items()}
    count = {name: int(value) for name, value in text.items() if value.lstrip("-").isdecimal()}
    return RunStatus(
        run=run,
        weight=_weight(text.get("weight", "")),
        enqueued=count.get("enqueued", 0),
        open=count.get("open", 0),
        samples=count.get("samples", 0),
        tokens=count.get("tokens", 0),
        unread_bytes=count.get("unread", 0),
        outcomes={outcome: count[outcome] for outcome in OUTCOMES if count.get(outcome)},
    )


def _weight(text: str) -> float:
    """1 where none was set, or somebody else set something, as hosts read it."""
    try:
        return float(text)
    except ValueError:
        return 1.0
