"""Do more hosts give more tokens, each as many as one alone? One, four and sixteen simulated hosts on one machine.

The hosts are real `rq worker` processes with simulated engines (`rollpool.ops.sim`), all on one Redis server and one
trainer, which enqueues a batch and collects it as it comes. What a shared machine could not give them is simulated: an
engine makes tokens by the clock, not by work. So the figure is about rollpool and its server alone: whether they keep
sixteen engines as full as one.

The rates are such that a v4-8 with a model of about 8 billion weights might have them, by its size, not by a
measurement: 64 requests at once, 25 ms a decode step, about 260 tokens a sample, 2,500 tokens a second. Sixteen make
some 145 samples a second, for which workers, engines, server and trainer together used 0.7 of two cores (`cpu` tells):
the machine is not the limit.

Tokens are counted by the engines, from when all of them are full until the window ends, while there is backlog left;
what the trainer got in that time stands beside it, in whole groups, so it is coarse for one host. `of_ideal` compares
with what an engine would make that never has a free slot, so that one slow host cannot hide many slow ones. The last
line is JSON.
"""

import argparse
import contextlib
import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from rollpool.ops.inspect import read_workers
from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.run import wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.sim import made_by, make_sim_model, sim_engine
from rollpool.producer import Batch, RolloutPool, SamplingParams
from rollpool.schemas import Keys
from rollpool.schemas.connection import connect

POOL, SIGNATURE = "scale", 7

#: One engine; see above.
SLOTS, STEP_MS, REQUEST_MS, PROMPT_TOKEN_MS = 64, 25.0, 0.01, 0.005
MEDIAN_TOKENS, SIGMA, MOST_TOKENS = 256, 0.4, 512
#: Tokens of a prompt, and samples of each.
PROMPT, N = 200, 4

#: Of the ideal rate, more than a host can have: sizes the batch, so that backlog is left at the end.
_SPARE = 1.3

#: Seconds until all engines must be full, and how long they then run before the window, so that their requests, which
#: begin together, end apart.
FULL_S, SETTLE_S = 120.0, 20.0

console = Console(stderr=True)


@dataclass(frozen=True)
class Count:
    """What the engines had done at one time."""

    #: By each engine's own question, seconds.
    at: tuple[float, ...]
    tokens: tuple[int, ...]
    steps: tuple[int, ...]
    running: tuple[int, ...]


def ask(urls: Sequence[str]) -> Count:
    """Ask every engine."""
    at, states = [], []
    for url in urls:
        with urllib.request.urlopen(f"{url}/get_server_info", timeout=30) as reply:
            states.append(json.load(reply)["internal_states"][0])
        at.append(time.monotonic())
    return Count(
        at=tuple(at),
        tokens=tuple(state["num_generated_tokens"] for state in states),
        steps=tuple(state["forward_ct_decode"] for state in states),
        running=tuple(state["running_batch_size"] for state in states),
    )


class Trainer:
    """Collects a batch in a thread of its own, as it comes."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.tokens = 0
        self.samples = 0
        self.groups = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._collect, name="trainer", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        try:
            for group in self._batch.collect(timeout=600):
                if group.samples:  # what is cancelled at the end has none
                    assert made_by(SIGNATURE, group.prompt_ids, group.samples[0].output_ids)
                self.groups += 1
                self.samples += len(group.samples)
                self.tokens += sum(len(sample.output_ids) for sample in group.samples)
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise what the thread met."""
        if self._error is not None:
            raise self._error

    def join(self) -> None:
        """Wait until the whole batch was collected."""
        self._thread.join()
        self.check()


def ideal(mean_tokens: float) -> float:
    """Tokens a second of an engine without a free slot: each sample stops all for its prompt once."""
    step_s = (STEP_MS + REQUEST_MS * SLOTS) / 1000
    return 1 / (step_s / SLOTS + PROMPT * PROMPT_TOKEN_MS / 1000 / mean_tokens)


def engines_of(url: str, count: int) -> list[str]:
    """The engines' addresses, from the heartbeats."""
    with connect(url) as client:
        found = [status.engine_url for status in read_workers(client, Keys(POOL))]
    assert len(found) == count, f"{len(found)} of {count} hosts are listed"
    assert all(found), "a host has no engine"
    return found


def until_full(urls: Sequence[str], hosts: LocalHosts, trainer: Trainer) -> None:
    """Wait until no engine has a free slot."""
    end = time.monotonic() + FULL_S
    while min(running := ask(urls).running) < SLOTS:
        hosts.check()
        trainer.check()
        assert time.monotonic() < end, f"of {SLOTS} slots of each engine so many run: {running}"
        time.sleep(0.5)


def rate(begin: Count, end: Count) -> float:
    """Tokens a second of all engines together."""
    rows = zip(begin.at, end.at, begin.tokens, end.tokens, strict=True)
    return sum((tokens - before) / (until - since) for since, until, before, tokens in rows)


def occupancy(begin: Count, end: Count) -> float:
    """The share of the slots of the steps that were done, which a request had."""
    return (sum(end.tokens) - sum(begin.tokens)) / (sum(end.steps) - sum(begin.steps)) / SLOTS


def cpu_seconds() -> float:
    """What this process and all that it started have used: workers, engines, server and trainer."""
    me = psutil.Process()
    used = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def measure(url: str, pool: RolloutPool, hosts: LocalHosts, seconds: float) -> dict[str, float]:
    """The figures of the hosts that run."""
    count = len(hosts.workers)
    urls = engines_of(url, count)
    samples = _SPARE * ideal(MEDIAN_TOKENS) / MEDIAN_TOKENS * count * (seconds + SETTLE_S + 15)
    prompts = np.random.default_rng(count).integers(0, 100_000, (int(samples / N), PROMPT))
    batch = pool.enqueue_prompts(
        list(prompts.astype(np.int32)), policy_version=1, n=N, sampling=SamplingParams(max_new_tokens=MOST_TOKENS)
    )
    trainer = Trainer(batch)
    until_full(urls, hosts, trainer)
    time.sleep(SETTLE_S)
    begin, got, had, worked = ask(urls), trainer.tokens, trainer.samples, cpu_seconds()
    time.sleep(seconds)
    end, cpu = ask(urls), (cpu_seconds() - worked) / seconds
    collected, finished = trainer.tokens - got, trainer.samples - had
    hosts.check()
    trainer.check()
    left = len(batch) - trainer.groups - count * SLOTS * 2 // N
    assert left > 0, "the backlog ran out, so the engines were not kept full for want of work"
    batch.cancel()
    trainer.join()
    batch.commit()
    made = rate(begin, end)
    return {
        "tokens_per_s": round(made, 1),
        "collected_tokens_per_s": round(collected / (end.at[0] - begin.at[0]), 1),
        "samples_per_s": round(finished / (end.at[0] - begin.at[0]), 1),
        "of_ideal": round(made / count / ideal(collected / finished), 4),
        "occupancy": round(occupancy(begin, end), 4),
        "cpu": round(cpu, 2),
    }


def run(counts: Sequence[int], seconds: float) -> dict[str, Any]:
    """All counts of hosts, one after the other, on one server; what the last line shows."""
    engine = sim_engine(
        max_running_requests=SLOTS,
        step_ms=STEP_MS,
        median_tokens=MEDIAN_TOKENS,
        sigma=SIGMA,
        extra_args=("--sim-request-ms", str(REQUEST_MS), "--sim-prompt-token-ms", str(PROMPT_TOKEN_MS)),
    )
    # An engine that has leaked requests of a cancelled batch does not end by SIGTERM, as a real one.
    engine["stop_timeout_s"] = 2.0
    figures: dict[int, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rollpool-scale-")))
        server = stack.enter_context(LocalServer())
        hosts = stack.enter_context(LocalHosts(server.url, POOL, directory, engine, {"drain_s": 1.0}))
        pool = stack.enter_context(RolloutPool(server.url, pool=POOL, run="bench"))
        pool.publish_policy(1, checkpoint=str(make_sim_model(directory / "model", signature=SIGNATURE)))
        for count in counts:
            for number in range(len(hosts.workers), count):
                hosts.start(f"sim-{number + 1}")
            wait_until_served(pool, hosts, 1)
            figures[count] = measure(server.url, pool, hosts, seconds)
            console.print(f"{count} hosts: {figures[count]}")
    return summary(figures)


def summary(figures: dict[int, dict[str, float]]) -> dict[str, Any]:
    """What the last line shows; each ratio is to the fewest hosts."""
    fewest = min(figures)
    alone = figures[fewest]["tokens_per_s"] / fewest

    def each(name: str) -> dict[str, float]:
        return {str(count): figure[name] for count, figure in figures.items()}

    ratios = {count: round(figure["tokens_per_s"] / count / alone, 4) for count, figure in figures.items()}
    return {
        "hosts": each("tokens_per_s"),
        "per_host_ratio": {str(count): ratio for count, ratio in ratios.items() if count != fewest},
        "of_ideal": each("of_ideal"),
        "occupancy": each("occupancy"),
        "collected_tokens_per_s": each("collected_tokens_per_s"),
        "samples_per_s": each("samples_per_s"),
        "cpu": each("cpu"),
        "cores": psutil.cpu_count(),
        "slots": SLOTS,
        "step_ms": STEP_MS,
    }


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 4, 16], help="rising")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each window")
    options = parser.parse_args()
    print(json.dumps(run(sorted(options.hosts), options.seconds)))


if __name__ == "__main__":
    main()
