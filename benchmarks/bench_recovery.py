"""How soon do a dead worker's jobs run elsewhere, and is a long job of a live one ever run twice? At default settings.

Real `rq worker` processes with simulated engines (the engine plays no part: what is measured is the lease, its
reclaiming and the next pull). One worker after another is killed with SIGKILL and started again later under another
name, so that nothing is taken over by name; for each job in its hands the seconds count until another consumer has it
or it is settled. Beside them runs one job of `--long` seconds on a worker that nobody touches: it must keep one
delivery, one consumer and no loss from its first second to its last. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis
from rich.console import Console

from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.run import START_S, wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.sim import make_sim_model, sim_engine
from rollpool.producer import RolloutPool, SamplingParams
from rollpool.schemas import GROUP, Keys
from rollpool.schemas.connection import connect
from rollpool.worker.settings import WorkerSettings

POOL = "recovery"
#: Milliseconds of a decode step, and the median length of the short jobs: 2 s each, and every worker has its hands full
#: all the time. A reclaimed job waits for room like any other, and goes first.
STEP_MS, MEDIAN_TOKENS = 20.0, 100
#: The same of the long job's engine: an engine that repeats earlier log-probs, as sglang-jax does, answers tens of
#: thousands of tokens with a reply of gigabytes, which is another matter.
LONG_STEP_MS = 1000.0
#: Seconds between looks at who has what: the resolution of the figures.
LOOK_S = 0.05
console = Console(stderr=True)


def in_hands(client: Redis, keys: Keys, run: str) -> dict[str, str]:
    """Who has each job that a host holds: consumer by job."""
    holders: dict[str, str] = {}
    for stream in keys.streams([run]):
        for fields, holder in delivered(client, stream):
            if fields[b"run"].decode() == run:
                holders[fields[b"job"].decode()] = holder
    return holders


def history_of(fields: dict[bytes, bytes]) -> str:
    """What the losses of a job were."""
    return fields.get(b"history", b"").decode().strip()


def delivered(client: Redis, stream: str) -> Iterator[tuple[dict[bytes, bytes], str]]:
    """The entries of a stream that hosts hold, each with who."""
    if not client.exists(stream):
        return
    pending: Any = client.xpending_range(stream, GROUP, "-", "+", 1000)
    for row in pending:
        entry: Any = client.xrange(stream, row["message_id"], row["message_id"])
        if entry:
            yield entry[0][1], row["consumer"].decode()


def is_settled(client: Redis, keys: Keys, run: str, job: str) -> bool:
    """True when it has its outcome."""
    batch, _, index = job.partition("/")
    return bool(client.hget(keys.batch(run, batch), index) != b"open")


@dataclass
class LongJob:
    """What was seen of the job that outlasts many leases."""

    client: Redis
    keys: Keys
    seen: set[tuple[str, str, str]] = field(default_factory=set)
    begun_at: float = field(default_factory=time.monotonic)

    def look(self) -> bool:
        """Note who has it; True once it is settled."""
        for stream in self.keys.streams(["long"]):
            for fields, holder in delivered(self.client, stream):
                if fields[b"job"] == b"long/0" and (here := (stream, history_of(fields), holder)) not in self.seen:
                    self.seen.add(here)
                    console.print(f"the long job is with {holder} in {stream}, after {here[1] or 'no loss'}")
        return is_settled(self.client, self.keys, "long", "long/0")


def recovery_of_one(client: Redis, keys: Keys, hosts: LocalHosts, victim: str) -> list[float]:
    """Kill a worker; seconds until each of its jobs is elsewhere."""
    while sum(holder.startswith(f"{victim}:") for holder in in_hands(client, keys, "short").values()) < 8:
        time.sleep(LOOK_S)
    before = in_hands(client, keys, "short")
    hosts.workers[victim].kill()
    killed_at = time.monotonic()
    waiting = {job for job, holder in before.items() if holder.startswith(f"{victim}:")}
    seconds = list[float]()
    while waiting:
        now = in_hands(client, keys, "short")
        back = {
            job
            for job in waiting
            if not now.get(job, f"{victim}:").startswith(f"{victim}:") or is_settled(client, keys, "short", job)
        }
        seconds += [time.monotonic() - killed_at] * len(back)
        waiting -= back
        time.sleep(LOOK_S)
    console.print(f"{victim}: {len(seconds)} jobs elsewhere after {min(seconds):.1f} to {max(seconds):.1f} s")
    # The next one is to lose other jobs: what is lost again and again runs alone at last, and waits for that.
    while not all(is_settled(client, keys, "short", job) for job in before):
        time.sleep(LOOK_S)
    return seconds


def run(kills: int, long_s: float, directory: Path) -> dict[str, object]:
    """The whole of it."""
    model = make_sim_model(directory / "model", signature=1)
    slow = sim_engine(max_running_requests=1, step_ms=LONG_STEP_MS)
    with (
        LocalServer() as server,
        LocalHosts(server.url, POOL, directory / "logs", slow, {"oversubscription": 1}) as untouched,
        LocalHosts(
            server.url,
            POOL,
            directory / "logs",
            sim_engine(max_running_requests=16, step_ms=STEP_MS, median_tokens=MEDIAN_TOKENS),
        ) as hosts,
        RolloutPool(server.url, pool=POOL, run="long") as long_pool,
        RolloutPool(server.url, pool=POOL, run="short") as pool,
        connect(server.url) as client,
    ):
        keys = Keys(POOL)
        pool.publish_policy(1, checkpoint=str(model))
        untouched.start("untouched")
        wait_until_served(pool, untouched, 1)
        exactly = SamplingParams(max_new_tokens=int(1000 * long_s / LONG_STEP_MS), ignore_eos=True)
        long_pool.enqueue_prompts([[1, 2, 3]], policy_version=1, sampling=exactly, batch_id="long")
        watched = LongJob(client, keys)
        while not watched.seen:
            watched.look()
        for number in range(3):
            hosts.start(f"worker-{number}")
        pool.wait_for_policy(1, timeout=START_S)
        short = SamplingParams(max_new_tokens=1000)
        pool.enqueue_prompts(
            [[index] for index in range(100, 9100)], policy_version=1, sampling=short, batch_id="short"
        )
        seconds = list[float]()
        for number in range(kills):
            seconds += recovery_of_one(client, keys, hosts, f"worker-{number}")
            hosts.workers.pop(f"worker-{number}")
            hosts.start(f"worker-{number + 3}")
            watched.look()
        while not watched.look():
            time.sleep(1.0)
        took = time.monotonic() - watched.begun_at
        (group,) = long_pool.batches["long"].collect(timeout=10)
        for worker in hosts.workers.values():
            worker.kill()
    return {
        "kills": kills,
        "jobs": len(seconds),
        "lease_s": WorkerSettings().lease_s,
        "recovery_seconds": {"median": round(statistics.median(seconds), 2), "worst": round(max(seconds), 2)},
        "long_job_seconds": round(took, 1),
        "long_job_deliveries": len(watched.seen),
        "long_job_samples": len(group.samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--long", type=float, default=600.0, help="seconds of the long job")
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        print(json.dumps(run(options.kills, options.long, Path(directory))))


if __name__ == "__main__":
    main()
