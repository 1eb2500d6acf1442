"""The real engine's share of a storm: one host with sglang-jax on CPU, in a pool of its own.

Invariant: nothing is installed for it; where the engine is not there the storm goes without.
"""

import os
from pathlib import Path

from rollpool.ops.local.engine_env import PYTHON_ENV, cache_dir, ensure_engine_env, environment_name
from rollpool.ops.local.hosts import LocalHosts, cpu_engine
from rollpool.ops.local.run import engine_line
from rollpool.ops.local.tiny_model import make_tiny_model
from storm.faults import Fault
from storm.policies import Policies
from storm.stage import HOST_SETTINGS, Pool, Stage

NAME = "real"

#: A compilation on two busy cores takes so long that a shorter sample timeout would call it a loss.
SETTINGS = {**HOST_SETTINGS, "sample_timeout_s": 120.0}


def installed() -> bool:
    """True when the engine's environment is there."""
    return bool(os.environ.get(PYTHON_ENV)) or (cache_dir() / environment_name() / "rollpool-complete").is_file()


def checkpoints() -> list[Path]:
    """Two tiny models, kept in the cache with the programs that were compiled for them."""
    return [make_tiny_model(cache_dir() / "models" / f"tiny-{seed}", seed=seed) for seed in (1, 2)]


def real_pool(stage: Stage, models: list[Path]) -> Pool:
    """The pool; its host is not started."""
    python = ensure_engine_env()
    engine = cpu_engine(python, cache_dir(), engine_line(python))
    hosts = LocalHosts(stage.proxy.url, NAME, stage.directory / "hosts", engine, SETTINGS)
    policies = Policies(stage.directory, NAME, models, simulated=False)
    pool = Pool(NAME, hosts, [f"{NAME}-0"], policies)
    stage.pools[NAME] = pool
    return pool


def real_faults(seconds: float) -> list[Fault]:
    """Few, since each costs this engine half a minute of two cores: its worker, its engine, its policy."""
    parts = ((0.2, "worker_kill"), (0.4, "policy"), (0.55, "engine_kill"), (0.7, "scheduler_kill"))
    return [Fault(at=part * seconds, kind=kind, victim=0.0, seconds=1.0, share=1.0) for part, kind in parts]
