"""The main job, end to end, on real engines; and the proof that its results are what they say.

Invariant: nothing in the last line is assumed. Groups are counted against what was enqueued and against the result
streams themselves, and every log-prob is computed again by an independent model of the policy the result names.
"""

import contextlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rollpool.ops.inspect import read_workers
from rollpool.ops.local.engine_env import cache_dir, ensure_engine_env
from rollpool.ops.local.hosts import LocalHosts, cpu_engine
from rollpool.ops.local.reference import ReferenceModel
from rollpool.ops.local.run import engine_line, wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import Batch, Group, RolloutPool, SamplingParams
from rollpool.schemas import Keys, RollpoolError
from rollpool.schemas.connection import connect

POOL, RUN = "demo", "grpo-demo"

#: The job: 64 groups of 4 samples of 16 new tokens.
GROUPS, SAMPLES, NEW_TOKENS = 64, 4, 16

#: Groups tagged with policy 1. A few more than half, so that there is work while the hosts change over.
FIRST_GROUPS = 40

#: Groups after which policy 2 is published.
PUBLISH_AFTER = 32

#: Seconds the collection of all groups may take: two engine restarts on two busy cores, several times over.
COLLECT_S = 600.0


@dataclass(frozen=True)
class Checked:
    """What the independent model found."""

    max_error: float
    #: Median |difference| between the two policies' log-probs of the same tokens: what a wrong name would cost.
    median_gap: float


def run_demo() -> None:
    """Run it; the last line printed is one JSON object."""
    console = Console()
    begin = time.monotonic()
    cache = cache_dir()
    python = ensure_engine_env()
    checkpoints = {version: make_tiny_model(cache / "models" / f"tiny-{version}", seed=version) for version in (1, 2)}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LocalServer())
        engine = cpu_engine(python, cache, engine_line(python))
        hosts = stack.enter_context(LocalHosts(server.url, POOL, cache / "demo", engine))
        pool = stack.enter_context(RolloutPool(server.url, pool=POOL, run=RUN))
        client = stack.enter_context(connect(server.url))
        pool.publish_policy(1, checkpoint=str(checkpoints[1]))
        for name in ("demo-1", "demo-2"):
            hosts.start(name)
        with console.status(f"starting two hosts, each with an engine at tp=8 (logs in {cache / 'demo'})"):
            wait_until_served(pool, hosts, 1)
        console.print(f"both hosts serve policy 1 after {time.monotonic() - begin:.0f} s")
        batches, groups = roll_out(pool, hosts, checkpoints[2], console)
        twice = results_settled_twice(client, batches)
        for batch in batches:
            batch.commit()
        show_workers(client, console)
    checked = check(groups, checkpoints)
    console.print(f"median gap between the two policies' log-probs on the same tokens: {checked.median_gap:.2f}")
    print(json.dumps(summary(groups, twice, checked, time.monotonic() - begin)))


def prompts(first: int, count: int) -> list[str]:
    """Short sums: what a trainer with a verifiable reward would ask."""
    return [f"{number} + {3 * number + 1} =" for number in range(first, first + count)]


def roll_out(
    pool: RolloutPool, hosts: LocalHosts, second_checkpoint: Path, console: Console
) -> tuple[list[Batch], list[Group]]:
    """Collect all groups; after `PUBLISH_AFTER` publish policy 2 and enqueue the rest for it alone."""
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, ignore_eos=True)
    batches = [
        pool.enqueue_prompts(
            prompts(0, FIRST_GROUPS), policy_version=1, n=SAMPLES, sampling=sampling, batch_id="step-1"
        )
    ]
    groups: list[Group] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("policy 1", total=GROUPS)
        collected = pool.groups(timeout=COLLECT_S)
        while len(groups) < GROUPS:
            group = next(collected, None)
            if group is None:  # the rest was settled otherwise than `ok`: lost, in the last line
                break
            groups.append(group)
            progress.update(task, completed=len(groups))
            hosts.check()
            if len(groups) == PUBLISH_AFTER:
                pool.publish_policy(2, checkpoint=str(second_checkpoint))
                batches.append(
                    pool.enqueue_prompts(
                        prompts(FIRST_GROUPS, GROUPS - FIRST_GROUPS),
                        policy_version=2,
                        max_staleness=0,
                        n=SAMPLES,
                        sampling=sampling,
                        batch_id="step-2",
                    )
                )
                progress.update(task, description="policy 2 published")
    if len(batches) == 2:
        wait_until_served(pool, hosts, 2)
    return batches, groups


def results_settled_twice(client: Redis, batches: list[Batch]) -> int:
    """Results beyond one a job, counted on the streams and not by the code that collects them."""
    keys = Keys(POOL)
    jobs: Counter[bytes] = Counter()
    for batch in batches:
        reply: Any = client.xrange(keys.results(RUN, batch.id))
        jobs.update(fields[b"job"] for _, fields in reply)
    return sum(count - 1 for count in jobs.values())


def show_workers(client: Redis, console: Console) -> None:
    """What each host did, and how long after the publication it served policy 2."""
    acks: Any = client.xrange(Keys(POOL).acks)
    for _, ack in acks:
        if ack[b"version"] == b"2" and ack[b"state"] == b"applied":
            seconds = float(ack[b"seconds"])
            console.print(f"{ack[b'worker'].decode()} served policy 2 {seconds:.1f} s after it was published")
    for worker in read_workers(client, Keys(POOL)):
        console.print(
            f"{worker.name}: policy {worker.policy}, {worker.jobs_settled} jobs, {worker.samples_made} samples, "
            f"{worker.tokens_made} tokens, engine {worker.engine}"
        )


def check(groups: list[Group], checkpoints: dict[int, Path]) -> Checked:
    """Compute every log-prob again, by the policy that the result names; and by the other one.

    Raises:
        RollpoolError: a result names a policy that was never published.
    """
    models = {version: ReferenceModel.from_checkpoint(path) for version, path in checkpoints.items()}
    errors, gaps = [np.zeros(1)], [np.zeros(0)]
    for group in groups:
        for sample in group.samples:
            by_policy = {
                version: model.logprobs(group.prompt_ids, sample.output_ids, temperature=group.sampling.temperature)
                for version, model in models.items()
            }
            for span in sample.version_spans:
                if span.version not in by_policy:
                    raise RollpoolError(f"group {group.id} names policy {span.version}, which was never published")
                part = slice(span.start, span.end)
                errors.append(np.abs(by_policy[span.version][part] - sample.logprobs[part]))
            gaps.append(np.abs(by_policy[1] - by_policy[2]))
    # What is not a number is not small.
    worst = np.nan_to_num(np.concatenate(errors), nan=np.inf, posinf=np.inf).max()
    return Checked(max_error=float(worst), median_gap=float(np.median(np.concatenate(gaps))) if groups else 0.0)


def summary(groups: list[Group], twice: int, checked: Checked, seconds: float) -> dict[str, object]:
    """The last line."""
    made_by = Counter(str(version) for group in groups for sample in group.samples for version in sample.versions)
    collected = len({group.id for group in groups})
    return {
        "groups": collected,
        "samples": sum(len(group.samples) for group in groups),
        "tokens": sum(group.tokens for group in groups),
        "by_policy": dict(sorted(made_by.items())),
        "lost": GROUPS - collected,
        "twice": twice + len(groups) - collected,
        "median_policy_gap": round(checked.median_gap, 3),
        "max_logprob_error": round(checked.max_error, 5),
        "seconds": round(seconds, 1),
    }
