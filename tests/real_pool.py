"""A pool of real workers with real engines, as `rollpool local` runs it, and what tests do to it.

Invariant: a test leaves it with both hosts serving the policy that is current, and no job open.
"""

import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rollpool.ops.inspect import read_workers
from rollpool.ops.local.engine_env import ensure_engine_env
from rollpool.ops.local.hosts import LocalHosts, cpu_engine
from rollpool.ops.local.reference import ReferenceModel
from rollpool.ops.local.run import cache_dir, engine_line, wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import Group, RolloutPool
from rollpool.schemas import Keys, WorkerStatus
from rollpool.schemas.connection import connect

POOL = "real"
WORKERS = ("real-1", "real-2")

#: Much shorter than the default, so that a killed worker's jobs come back within a test's patience.
LEASE_S = 3.0

#: Until a restarted host serves again, on two cores that other engines use too.
SERVE_S = 240.0


@dataclass(frozen=True)
class RealEngine:
    """One of the pool's engines, while its worker has nothing to do."""

    url: str
    model_path: Path

    def generate(self, input_ids: list[int], **sampling: Any) -> dict[str, Any]:
        """Ask it directly, past all of rollpool."""
        body = {
            "input_ids": input_ids,
            "return_logprob": True,
            "sampling_params": {"ignore_eos": True, "skip_special_tokens": False, "no_stop_trim": True} | sampling,
        }
        request = urllib.request.Request(
            f"{self.url}/generate", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            answer: dict[str, Any] = json.load(reply)
        return answer


@dataclass
class RealPool:
    """The running pool."""

    url: str
    hosts: LocalHosts
    trainer: RolloutPool
    #: Directories of the two checkpoints, by policy version.
    checkpoints: dict[int, Path]
    models: dict[int, ReferenceModel]

    def status(self, name: str) -> WorkerStatus | None:
        """A worker's heartbeat."""
        with connect(self.url) as client:
            return next((each for each in read_workers(client, Keys(POOL)) if each.name == name), None)

    def engine(self, name: str) -> RealEngine:
        """A worker's engine, to be asked directly."""
        status, policy = self.status(name), self.trainer.current_policy()
        assert status is not None
        assert policy is not None
        assert status.policy == policy.version
        return RealEngine(status.engine_url, Path(policy.source))

    def kill_worker(self, name: str) -> None:
        """SIGKILL the `rq worker` process."""
        process = self.hosts.workers[name]
        process.send_signal(signal.SIGKILL)
        process.wait()

    def engine_processes(self, name: str) -> list[psutil.Process]:
        """The server of a worker, and its children: scheduler and detokenizer."""
        server = next(
            child
            for child in psutil.Process(self.hosts.workers[name].pid).children()
            if any("serve" in part for part in child.cmdline())
        )
        return [server, *server.children(recursive=True)]

    def until_serving(self, version: int) -> None:
        """Wait until both hosts serve."""
        wait_until_served(self.trainer, self.hosts, version, SERVE_S)

    def until_busy(self, name: str) -> None:
        """Wait until a worker has samples in its engine."""
        wait_for(lambda: (status := self.status(name)) is not None and status.samples_in_flight > 0)

    def logprob_error(self, groups: Sequence[Group]) -> float:
        """Largest difference between log-probs of results and those of the policy they name, computed anew."""
        return max(self._error(group) for group in groups)

    def _error(self, group: Group) -> float:
        worst = 0.0
        for sample in group.samples:
            for span in sample.version_spans:
                again = self.models[span.version].logprobs(
                    group.prompt_ids, sample.output_ids, temperature=group.sampling.temperature
                )
                part = slice(span.start, span.end)
                worst = max(worst, float(np.abs(again[part] - sample.logprobs[part]).max()))
        return worst


def wait_for(condition: Callable[[], bool], timeout: float = 120.0) -> None:
    """Poll until it holds; fails after `timeout` seconds."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


@contextlib.contextmanager
def start_real_pool(directory: Path) -> Iterator[RealPool]:
    """Start it; the JIT cache is the user's own, so that only the first run on a machine compiles."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the oracle beside busy engines: ten times slower with two
    python, cache = ensure_engine_env(), cache_dir()
    checkpoints = {version: make_tiny_model(directory / f"tiny-{version}", seed=version) for version in (1, 2)}
    engine = cpu_engine(python, cache, engine_line(python))
    settings = {"lease_s": LEASE_S, "heartbeat_s": 0.5, "drain_s": 5}
    with (
        LocalServer() as server,
        LocalHosts(server.url, POOL, directory / "logs", engine, settings) as hosts,
        RolloutPool(server.url, pool=POOL, run="tests") as trainer,
    ):
        trainer.publish_policy(1, checkpoint=str(checkpoints[1]))
        for name in WORKERS:
            hosts.start(name)
        models = {version: ReferenceModel.from_checkpoint(path) for version, path in checkpoints.items()}
        pool = RealPool(server.url, hosts, trainer, checkpoints, models)
        pool.until_serving(1)
        yield pool
