"""The same training in one process: an engine on four of its devices, the trainer on the others.

An engine in a process needs sglang-jax beside the trainer, so this runs in the engine's own interpreter: another
process of it, where this one has no such engine.

Invariant: nothing is trained differently; only the line that makes the pool differs, and where the arrays lie.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from rollpool.ops import local_pool, split_devices
from rollpool.ops.local.engine_env import ensure_engine_env
from rollpool.ops.local.engine_settings import cpu_engine_env, cpu_in_process
from rollpool.producer import RolloutPool
from rollpool.schemas import RollpoolError

from . import model
from .train import FIRST, History, Learner, Score, Step
from .ways import checkpoint_learner, tiny_checkpoint

#: Of the engine's interpreter: what it must have beside sglang-jax.
_NEEDED = "import rollpool.ops.in_process, rollpool.worker, optax, rich, safetensors, matplotlib"


def runs_here() -> bool:
    """Whether this interpreter has an engine."""
    return importlib.util.find_spec("sgl_jax") is not None


@contextlib.contextmanager
def open_in_process() -> Iterator[tuple[RolloutPool, Learner]]:
    """A pool that serves version `FIRST`, and what is to be trained; on devices of this process."""
    base, split = tiny_checkpoint(), split_devices(rollout=4)
    with (
        local_pool(
            base, rollout_devices=split.rollout, train_devices=split.train, engine=cpu_in_process(), run="grpo"
        ) as pool,
        jax.default_device(split.train.devices.flat[0]),
    ):
        learner = checkpoint_learner(pool, base)
        pool.publish_policy(FIRST, params=model.load(base))
        pool.wait_for_policy(FIRST, timeout=600)
        yield pool, learner


def elsewhere(arguments: list[str], console: Console) -> History | None:
    """Run it in the engine's interpreter; None, with the reason, where that lacks something.

    Args:
        arguments: of this example, but for the way.
        console: told what happens.

    Raises:
        RollpoolError: it fails.
    """
    python = ensure_engine_env()
    environment = {**os.environ, **cpu_engine_env(8), "PYTHONUNBUFFERED": "1"}
    found = subprocess.run([python, "-c", _NEEDED], env=environment, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        what = found.stderr.strip().splitlines()[-1:] or ["it does not start"]
        console.print(f"in_process: left out, {python}: {what[0]}; {python} -m pip install '.[examples]' mends that")
        return None
    with tempfile.TemporaryDirectory(prefix="grpo-tiny-") as folder:
        saved = Path(folder) / "history.json"
        command = [str(python), "-m", "examples.grpo_tiny", "--way", "in_process", "--save", str(saved), *arguments]
        ended = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], check=False)
        if ended.returncode != 0:
            raise RollpoolError(f"in_process: {python} ended with {ended.returncode}; what it printed says why")
        return load(saved)


def save(history: History, path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(dataclasses.asdict(history), default=lambda array: array.tolist()))


def load(path: Path) -> History:
    """What `save` wrote."""
    told: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    steps = [{**step, "ratios": np.array(step["ratios"], np.float32)} for step in told["steps"]]
    return History([Score(**score) for score in told["scores"]], [Step(**step) for step in steps])
