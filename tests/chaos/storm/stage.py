"""One pool to be broken: server, proxy, hosts, trainers and tap, with what the storm knows of them.

Invariant: workers and trainers reach the server through the proxy alone; whoever measures goes past it. Everything ends
with the `with` block.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from redis.exceptions import RedisError

from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.server import LocalServer
from rollpool.ops.sim import FAIL, FORGET, HANG, KILL, REFUSE, sim_engine
from rollpool.schemas import RollpoolError
from storm import wire
from storm.children import HOME, Children
from storm.mixed import MixedHosts
from storm.policies import Policies
from storm.proxy import Proxy

#: Short, so that many faults fit into ten minutes; how a pool recovers with its defaults is measured elsewhere.
LEASE_S = 3.0
HOST_SETTINGS: dict[str, Any] = {
    "lease_s": LEASE_S,
    "heartbeat_s": 0.5,
    "drain_s": 1.0,
    # Over what the longest sample takes here, several times.
    "sample_timeout_s": 10.0,
}

#: An engine that hangs is found out within this: longer than a stopped worker sleeps, or it would blame its engine.
STALL_S = 8.0

#: Prompts that make a simulated engine fail, by the kind of poison.
ORDERS = {"kill": KILL, "hang": HANG, "refuse": REFUSE, "forget": FORGET, "fail": FAIL}

#: Seconds until the hosts must serve.
SERVE_S = 120.0


@dataclass
class Pool:
    """One pool of a stage."""

    name: str
    hosts: MixedHosts | LocalHosts
    #: Names of its workers.
    workers: list[str]
    policies: Policies
    runs: list[str] = field(default_factory=list)


class Stage:
    """What the faults are done to; made by `build`."""

    def __init__(self, directory: Path, server: LocalServer, proxy: Proxy, children: Children) -> None:
        self.directory = directory
        self.server = server
        self.proxy = proxy
        self.children = children
        self.pools: dict[str, Pool] = {}
        #: Held by whoever starts or ends the server.
        self.server_lock = threading.Lock()
        self.direct = wire.direct(server.port)

    def publish(self, pool: Pool, **options: Any) -> int:
        """Publish the next checkpoint of a pool, however often it takes; returns its version."""
        return pool.policies.publish(self.proxy.url, _again, **options)

    def publish_adapter(self, pool: Pool, run: str) -> int:
        """The same of an adapter of a run."""
        return pool.policies.publish_adapter(self.proxy.url, run, _again)

    def go_back(self, pool: Pool) -> int:
        """Have the last checkpoint abandoned; the version that is current then."""
        return pool.policies.go_back(self.proxy.url, _again)

    def serving(self, pool: Pool) -> int:
        """Workers of a pool that serve, by their heartbeats."""
        found = 0
        for key in wire.keys(self.direct, pool.name, "workers"):
            state: Any = self.direct.hget(key, "state")
            found += state == b"serving"
        return found

    def until_serving(self, pool: Pool) -> None:
        """Wait until every worker of a pool serves.

        Raises:
            RollpoolError: one ended, or it took too long.
        """
        until = time.monotonic() + SERVE_S
        while self.serving(pool) < len(pool.workers):
            pool.hosts.check()
            if time.monotonic() > until:
                raise RollpoolError(f"not all hosts of {pool.name} serve after {SERVE_S:.0f} s; see {self.directory}")
            time.sleep(0.2)

    def add_trainers(self, pool: Pool, runs: Sequence[str], settings: dict[str, Any]) -> None:
        """Start trainers of a pool, one a run."""
        for run in runs:
            pool.runs.append(run)
            mine = {"url": self.proxy.url, "pool": pool.name, "run": run, "directory": str(self.directory)}
            self.children.add(run, "storm.trainer", mine | settings)

    def add_tap(self) -> None:
        """Start the tap."""
        settings = {"port": self.server.port, "pools": list(self.pools), "directory": str(self.directory)}
        self.children.add("tap", "storm.tap", settings)

    def counts(self) -> tuple[int, int]:
        """Jobs enqueued and jobs open, by the server's counters: for the progress line alone."""
        enqueued = open_jobs = 0
        with contextlib.suppress(RedisError):
            for pool in self.pools.values():
                for run in pool.runs:
                    found: Any = self.direct.hmget(f"{wire.prefix(pool.name)}runs:{run}", "enqueued", "open")
                    enqueued, open_jobs = enqueued + int(found[0] or 0), open_jobs + int(found[1] or 0)
        return enqueued, open_jobs

    def engine(self, pool: Pool, worker: str) -> list[psutil.Process]:
        """The engine of a worker: its server, then the server's children; empty while it has none."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(pool.hosts.workers[worker].pid).children():
                if any(part.endswith(("launch.py", "serve.py", "serve_cpu.py")) for part in child.cmdline()):
                    return [child, *child.children(recursive=True)]
        return []

    def stop_tap(self) -> None:
        """Let the tap read to the end."""
        (self.directory / "tap-stop").touch()
        until = time.monotonic() + 30.0
        while not (self.directory / "tap-done").exists():
            if time.monotonic() > until or self.children.ended("tap") not in (None, 0):
                tail = self.children.log("tap").read_text(errors="replace")[-2000:]
                raise RollpoolError(f"the tap did not come to its end: {tail}")
            time.sleep(0.05)


def _again(call: Callable[[], object], seconds: float = 60.0) -> None:
    """Repeat until it works: the server may be away."""
    until = time.monotonic() + seconds
    while True:
        try:
            call()
        except RollpoolError:
            if time.monotonic() > until:
                raise
            time.sleep(0.3)
        else:
            return


#: How the engines of a pool change what they serve, host by host, over and over.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"hot_swap": True, "lora": "runtime", "swap_s": 0.6, "stall_s": 0.1},
    {"hot_swap": True, "swap_s": 0.6, "stall_s": 0.1},
    {"lora": "launch"},
    {"lora": "runtime"},
    {"hot_swap": True, "lora": "runtime", "swap_s": 0.1},
)


def sim_pool(stage: Stage, name: str, workers: int, policies: Policies) -> Pool:
    """A pool of hosts with simulated engines of all kinds; not started."""
    names = [f"{name}-{number}" for number in range(workers)]
    hosts = {worker: _sim_hosts(stage, name, worker, KINDS[at % len(KINDS)]) for at, worker in enumerate(names)}
    pool = Pool(name, MixedHosts(hosts), names, policies)
    stage.pools[name] = pool
    return pool


def _sim_hosts(stage: Stage, pool: str, worker: str, kind: dict[str, Any]) -> LocalHosts:
    engine = {
        **sim_engine(max_running_requests=16, step_ms=20.0, median_tokens=40, sigma=0.5, start_s=0.2, **kind),
        "adapter_slots": 2,
        "stall_timeout_s": STALL_S,
        "start_timeout_s": 60.0,
        "stop_timeout_s": 2.0,
    }
    settings = {**HOST_SETTINGS, "stage_dir": str(stage.directory / "staged" / worker)}
    return LocalHosts(stage.proxy.url, pool, stage.directory / "hosts", engine, settings)


def start_hosts(pool: Pool) -> None:
    """Start all workers of a pool."""
    for worker in pool.workers:
        pool.hosts.start(worker)


def breaking(kind: str | None) -> dict[str, str]:
    """The environment by which workers started from now on run a broken script."""
    if kind is None:
        return {}
    path = os.pathsep.join(part for part in (str(HOME / "storm" / "broken"), os.environ.get("PYTHONPATH", "")) if part)
    return {"PYTHONPATH": path, "STORM_BREAK": kind}


@contextlib.contextmanager
def build(directory: Path, appendfsync: Literal["always", "everysec"], broken: str | None) -> Iterator[Stage]:
    """Start server and proxy; what is added later ends with them."""
    directory.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    with (
        LocalServer(directory=directory / "server", appendonly=True, appendfsync=appendfsync) as server,
        Proxy(server.port) as proxy,
        Children(directory, env) as children,
        contextlib.ExitStack() as stack,
    ):
        stage = Stage(directory, server, proxy, children)
        stack.callback(stage.direct.close)
        stack.callback(_end_hosts, stage)
        # Workers take their environment from this process.
        changed = breaking(broken)
        stack.callback(_restore, {name: os.environ.get(name) for name in changed})
        os.environ.update(changed)
        yield stage


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _end_hosts(stage: Stage) -> None:
    """End all hosts: none may be asleep, and the server has to be there for them to say farewell."""
    for pool in stage.pools.values():
        for worker in pool.hosts.workers.values():
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(signal.SIGCONT)
    with stage.server_lock:
        stage.server.start()
    for pool in stage.pools.values():
        pool.hosts.stop()
