"""The main job, end to end, on real engines, with new policies under way; and the proof that its results are right.

Invariant: nothing in the last line is assumed. Groups are counted against what was enqueued and against the result
streams themselves, and every log-prob is computed again by an independent model of the policy that its span names.
"""

import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
from rollpool.ops.local.tiny_adapter import DEFAULT_RANK, make_tiny_adapter
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import Batch, Group, RolloutPool, SamplingParams
from rollpool.schemas import Ack, Keys, PoolTimeout, RollpoolError
from rollpool.schemas.connection import connect
from rollpool.schemas.control_log import ack_of

POOL, RUN = "demo", "grpo-demo"

#: The job: 64 groups of 4 samples of 16 new tokens.
GROUPS, SAMPLES, NEW_TOKENS = 64, 4, 16

#: Policy 2 is an adapter on policy 1, policy 3 the next checkpoint.
POLICIES = {1: "checkpoint", 2: "adapter", 3: "checkpoint"}

#: Groups for policy 1, of which half are there when policy 2 is published; for policy 2, first for it alone, then for
#: it or newer; and for policy 3 alone.
FOR_FIRST, FOR_ADAPTER, UNDER_WAY, FOR_SECOND = 24, 12, 16, 12

#: Groups of those under way that are there when policy 3 is published: the others meet the change.
UNDER_WAY_DONE = 4

#: Seconds the collection of all groups may take: four engine restarts on two busy cores, several times over.
COLLECT_S = 900.0


@dataclass(frozen=True)
class Checked:
    """What the independent model found."""

    max_error: float
    #: Of the two policies that are most alike the median |difference| between their log-probs of the same tokens: what
    #: a wrong name would cost at the least.
    median_gap: float


def run_demo() -> None:
    """Run it; the last line printed is one JSON object."""
    console = Console()
    begin = time.monotonic()
    cache = cache_dir()
    python = ensure_engine_env()
    line = engine_line(python)
    first, second = (make_tiny_model(cache / "models" / f"tiny-{seed}", seed=seed) for seed in (1, 2))
    adapter = make_tiny_adapter(cache / "models" / "tiny-adapter-1", seed=1, base=first)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LocalServer())
        # What takes adapters while it serves has room for them from its launch on.
        engine = cpu_engine(python, cache, line) | ({"max_lora_rank": DEFAULT_RANK} if line == "main" else {})
        settings = {"stage_dir": cache / "demo" / "staged"}
        hosts = stack.enter_context(LocalHosts(server.url, POOL, cache / "demo", engine, settings))
        pool = stack.enter_context(RolloutPool(server.url, pool=POOL, run=RUN))
        client = stack.enter_context(connect(server.url))
        pool.publish_policy(1, checkpoint=str(first))
        for name in ("demo-1", "demo-2"):
            hosts.start(name)
        with console.status(f"starting two hosts, each with an engine at tp=8 (logs in {cache / 'demo'})"):
            wait_until_served(pool, hosts, 1)
        console.print(f"both hosts serve policy 1 after {time.monotonic() - begin:.0f} s")
        rollout = Rollout(pool, hosts, Answers(client, console), console)
        rollout.run(adapter, second)
        groups, batches = rollout.groups, rollout.batches
        twice = results_settled_twice(client, batches)
        for batch in batches:
            batch.commit()
        show_workers(client, console)
        changes = change_seconds(rollout.answers.all)
    base = ReferenceModel.from_checkpoint(first)
    checked = check(groups, {1: base, 2: base.with_adapter(adapter), 3: ReferenceModel.from_checkpoint(second)})
    console.print(f"median gap between the most alike policies' log-probs on the same tokens: {checked.median_gap:.2f}")
    print(json.dumps(summary(groups, twice, checked, changes, time.monotonic() - begin)))


def prompts(first: int, count: int) -> list[str]:
    """Short sums: what a trainer with a verifiable reward would ask."""
    return [f"{number} + {3 * number + 1} =" for number in range(first, first + count)]


class Answers:
    """What the hosts answer to the publications, shown as it comes."""

    def __init__(self, client: Redis, console: Console) -> None:
        self._client = client
        self._console = console
        self._seen = "-"
        self.all: list[Ack] = []

    def show(self) -> None:
        """Print what is new, but of the first policy, for which the hosts were started."""
        entries: Any = self._client.xrange(Keys(POOL).acks, self._seen)
        for entry, fields in entries:
            self._seen = f"({entry.decode()}"
            ack = ack_of(fields)
            if ack is None or ack.state == "received" or ack.version in (None, 1):
                continue
            self.all.append(ack)
            said = f"serves policy {ack.version}" if ack.state == "applied" else f"failed on policy {ack.version}"
            how = ack.error or ack.detail
            self._console.print(f"{ack.worker} {said}, {ack.seconds:.1f} s after it heard of it ({how})")


@dataclass
class Rollout:
    """Collects all groups, and publishes two policies on the way."""

    pool: RolloutPool
    hosts: LocalHosts
    answers: Answers
    console: Console
    batches: list[Batch] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    def run(self, adapter: Path, second: Path) -> None:
        """From the first policy to the third."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        collected = self.pool.groups(timeout=COLLECT_S)
        with Progress(*columns, console=self.console) as progress:
            self.enqueue(FOR_FIRST, policy_version=1)
            self.collect(collected, FOR_FIRST // 2, progress)
            self.publish(2, lora_path=str(adapter))
            self.enqueue(FOR_ADAPTER, policy_version=2, max_staleness=0)
            self.until_served(2)
            self.enqueue(UNDER_WAY, policy_version=2)
            self.collect(collected, FOR_FIRST + FOR_ADAPTER + UNDER_WAY_DONE, progress)
            # Both hosts at once: what they have in flight goes on under policy 3, and not on the other host.
            self.publish(3, checkpoint=str(second), min_serving=0)
            self.enqueue(FOR_SECOND, policy_version=3, max_staleness=0)
            self.collect(collected, GROUPS, progress)
            self.until_served(3)

    def enqueue(self, count: int, **options: Any) -> None:
        """So many groups more."""
        first = sum(len(batch) for batch in self.batches)
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, ignore_eos=True)
        name = f"step-{len(self.batches) + 1}"
        self.batches.append(
            self.pool.enqueue_prompts(prompts(first, count), n=SAMPLES, sampling=sampling, batch_id=name, **options)
        )

    def publish(
        self,
        version: int,
        *,
        checkpoint: str | None = None,
        lora_path: str | None = None,
        min_serving: int | None = None,
    ) -> None:
        """Publish, and say so."""
        self.pool.publish_policy(version, checkpoint=checkpoint, lora_path=lora_path, min_serving=min_serving)
        self.console.print(f"policy {version} is published, {_article(POLICIES[version])}, with work in flight")

    def collect(self, collected: Iterator[Group], until: int, progress: Progress) -> None:
        """Have so many groups in all; fewer, where the rest was settled otherwise than `ok`: lost, in the last line."""
        (task,) = progress.task_ids or [progress.add_task("groups", total=GROUPS)]
        for group in itertools.islice(collected, until - len(self.groups)):
            self.groups.append(group)
            progress.update(task, completed=len(self.groups), description=f"policy {_newest(group)}")
            self.hosts.check()
            self.answers.show()

    def until_served(self, version: int) -> None:
        """Wait until both hosts serve it."""
        over = time.monotonic() + COLLECT_S
        while True:
            self.answers.show()
            try:
                wait_until_served(self.pool, self.hosts, version, timeout=0)
            except PoolTimeout:
                if time.monotonic() > over:
                    raise
            else:
                return self.answers.show()


def _article(kind: str) -> str:
    return f"an {kind}" if kind == "adapter" else f"a {kind}"


def _newest(group: Group) -> int:
    return max(version for sample in group.samples for version in sample.versions)


def change_seconds(answers: list[Ack]) -> dict[str, float]:
    """By policy, the seconds in which the last host came to it."""
    seconds: dict[str, float] = {}
    for ack in answers:
        if ack.state == "applied":
            seconds[str(ack.version)] = round(max(ack.seconds, seconds.get(str(ack.version), 0.0)), 1)
    return seconds


def results_settled_twice(client: Redis, batches: list[Batch]) -> int:
    """Results beyond one a job, counted on the streams and not by the code that collects them."""
    keys = Keys(POOL)
    jobs: Counter[bytes] = Counter()
    for batch in batches:
        reply: Any = client.xrange(keys.results(RUN, batch.id))
        jobs.update(fields[b"job"] for _, fields in reply)
    return sum(count - 1 for count in jobs.values())


def show_workers(client: Redis, console: Console) -> None:
    """What each host did."""
    for worker in read_workers(client, Keys(POOL)):
        console.print(
            f"{worker.name}: policy {worker.policy}, {worker.jobs_settled} jobs, {worker.samples_made} samples, "
            f"{worker.tokens_made} tokens, engine {worker.engine}"
        )


def check(groups: list[Group], models: Mapping[int, ReferenceModel]) -> Checked:
    """Compute every log-prob again, by the policy that its span names; and by the others.

    Args:
        groups: The results.
        models: By policy version.

    Raises:
        RollpoolError: a result names a policy that was never published.
    """
    errors = [np.zeros(1)]
    gaps: dict[tuple[int, int], list[Any]] = {pair: [] for pair in itertools.combinations(models, 2)}
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
            for (one, other), apart in gaps.items():
                apart.append(np.abs(by_policy[one] - by_policy[other]))
    # What is not a number is not small.
    worst = np.nan_to_num(np.concatenate(errors), nan=np.inf, posinf=np.inf).max()
    medians = [float(np.median(np.concatenate(apart))) for apart in gaps.values() if apart]
    return Checked(max_error=float(worst), median_gap=min(medians, default=0.0))


def summary(
    groups: list[Group], twice: int, checked: Checked, changes: Mapping[str, float], seconds: float
) -> dict[str, object]:
    """The last line."""
    made_by = Counter(str(version) for group in groups for sample in group.samples for version in sample.versions)
    tokens: Counter[str] = Counter()
    for span in (span for group in groups for sample in group.samples for span in sample.version_spans):
        tokens[str(span.version)] += span.end - span.start
    collected = len({group.id for group in groups})
    return {
        "groups": collected,
        "samples": sum(len(group.samples) for group in groups),
        "tokens": sum(group.tokens for group in groups),
        "policies": {str(version): kind for version, kind in POLICIES.items()},
        "by_policy": dict(sorted(made_by.items())),
        "tokens_by_policy": dict(sorted(tokens.items())),
        "samples_over_a_change": sum(len(sample.versions) > 1 for group in groups for sample in group.samples),
        "change_seconds": dict(changes),
        "lost": GROUPS - collected,
        "twice": twice + len(groups) - collected,
        "median_policy_gap": round(checked.median_gap, 3),
        "max_logprob_error": round(checked.max_error, 5),
        "seconds": round(seconds, 1),
    }
