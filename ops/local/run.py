"""A whole pool on one machine, for a first look and for developing a trainer.

Invariant: when it returns, everything it started has ended.
"""

import asyncio
import contextlib
import time
from pathlib import Path

from rich.console import Console

from rollpool.ops.local.engine_env import cache_dir, ensure_engine_env
from rollpool.ops.local.engine_settings import EngineLine, cpu_engine_env
from rollpool.ops.local.hosts import LocalHosts, cpu_engine
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import PolicyRejected, RolloutPool
from rollpool.schemas import Keys, PoolTimeout
from rollpool.schemas.connection import connect
from rollpool.worker.engines.dialects import pick_dialect
from rollpool.worker.engines.preflight import probe
from rollpool.worker.engines.settings import EngineSettings

__all__ = ["cache_dir", "engine_line", "run_local", "wait_until_served"]

#: Seconds between looks at the workers.
LOOK_EVERY_S = 1.0

#: Seconds until a host must serve: a cold start on two busy cores took under one minute.
START_S = 600.0


def engine_line(python: Path) -> EngineLine:
    """The line of sglang-jax that an interpreter has: 0.0.1.post1 is what we install, main what a user may bring."""
    report = asyncio.run(probe(EngineSettings(python=python, device="cpu", env=cpu_engine_env())))
    return pick_dialect(report.sglang_jax).line


def wait_until_served(pool: RolloutPool, hosts: LocalHosts, version: int, timeout: float = START_S) -> None:
    """Wait until every host serves `version`; a worker that ended meanwhile is told at once."""
    until = time.monotonic() + timeout
    while True:
        hosts.check()
        try:
            pool.wait_for_policy(version, timeout=LOOK_EVERY_S)
        except PoolTimeout:
            if time.monotonic() > until:
                raise
        else:
            if hosts.listed() == len(hosts.workers):
                return
            time.sleep(LOOK_EVERY_S)


def run_local(*, workers: int, model: Path | None, url: str | None, pool: str) -> None:
    """Serve until interrupted."""
    console = Console()
    cache = cache_dir()
    python = ensure_engine_env()
    checkpoint = model or make_tiny_model(cache / "models" / "tiny-1", seed=1)
    with contextlib.ExitStack() as stack:
        server_url = url or stack.enter_context(LocalServer()).url
        engine = cpu_engine(python, cache, engine_line(python))
        hosts = stack.enter_context(LocalHosts(server_url, pool, cache / "local" / pool, engine))
        trainer = stack.enter_context(RolloutPool(server_url, pool=pool, run="local"))
        version = _publish(trainer, checkpoint)
        for number in range(workers):
            hosts.start(f"local-{number + 1}")
        with console.status(f"starting {workers} hosts (logs in {cache / 'local' / pool})"):
            wait_until_served(trainer, hosts, version)
        with connect(server_url) as client:  # any run may publish next: this one only wanted hosts to serve something
            client.delete(Keys(pool).publisher)
        console.print(
            f"serving policy {version} of pool {pool!r} with {workers} hosts. In another terminal:\n"
            f"  export ROLLPOOL_URL={server_url} ROLLPOOL_POOL={pool}\n"
            "  rollpool status\n"
            "Ctrl-C ends it.",
            soft_wrap=True,  # the lines are to be copied
            highlight=False,
        )
        while True:
            hosts.check()
            time.sleep(LOOK_EVERY_S)


def _publish(trainer: RolloutPool, checkpoint: Path) -> int:
    """Publish the checkpoint as the next version, unless it is the current one already."""
    current = trainer.current_policy()
    if current is not None and current.checkpoint == str(checkpoint):
        return current.version
    version = current.version + 1 if current else 1
    with contextlib.suppress(PolicyRejected):  # somebody published meanwhile: then theirs is served
        trainer.publish_policy(version, checkpoint=str(checkpoint))
    return version
