"""The ways to give hosts new weights: a checkpoint, an adapter, or the parameters themselves in one process.

Invariant: a way decides how a pool is made and how a version is published, and nothing else; whatever it started has
ended when its pool is closed.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from rollpool.ops.local.engine_env import cache_dir, ensure_engine_env
from rollpool.ops.local.engine_settings import EngineLine
from rollpool.ops.local.hosts import LocalHosts, cpu_engine
from rollpool.ops.local.run import engine_line, wait_until_served
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import CheckpointFolder, RolloutPool

from . import lora, model
from .train import FIRST, Learner

Way = Literal["checkpoint", "lora", "in_process"]
WAYS: tuple[Way, ...] = ("checkpoint", "lora", "in_process")

POOL, RUN = "grpo-tiny", "grpo-tiny"

#: Found by trying. An adapter learns as well from 1e-2 at staleness 0, but at 2 the first steps then go so far that the
#: tokens that come back say nothing about the policy that is trained.
CHECKPOINT_LR, LORA_LR = 1e-3, 4e-3


def tiny_checkpoint() -> Path:
    """The random model that training begins with; the demo's."""
    return make_tiny_model(cache_dir() / "models" / "tiny-1", seed=1)


def line_of_engine() -> EngineLine:
    """Which sglang-jax there is: adapters and one process need main."""
    return engine_line(ensure_engine_env())


@contextlib.contextmanager
def open_way(way: Way, line: EngineLine) -> Iterator[tuple[RolloutPool, Learner]]:
    """A pool that serves version `FIRST`, and what is to be trained.

    Args:
        way: Not `in_process`.
        line: Of the engine.
    """
    base = tiny_checkpoint()
    with (
        tempfile.TemporaryDirectory(prefix="grpo-tiny-") as folder,
        LocalServer() as server,
        LocalHosts(server.url, POOL, Path(folder) / "hosts", _engine(way, line), _settings(folder)) as hosts,
        RolloutPool(server.url, pool=POOL, run=RUN, params=CheckpointFolder(f"{folder}/policies", like=base)) as pool,
    ):
        pool.publish_policy(FIRST, checkpoint=str(base))
        hosts.start("grpo-tiny-1")
        wait_until_served(pool, hosts, FIRST)
        yield pool, checkpoint_learner(pool, base) if way == "checkpoint" else lora_learner(pool, base, Path(folder))


def checkpoint_learner(pool: RolloutPool, base: Path) -> Learner:
    """All weights are trained, and each version is a checkpoint: a restart on 0.0.1.post1, a swap on main."""
    config = model.Config.read(base)
    return Learner(
        initial=model.load(base),
        logprobs=lambda params, ids: model.token_logprobs(params, config, ids),
        publish=lambda version, params: pool.publish_policy(version, params=params, min_serving=0),
        learning_rate=CHECKPOINT_LR,
    )


def lora_learner(pool: RolloutPool, base: Path, folder: Path) -> Learner:
    """An adapter is trained, and each version is one on the same base: loaded while the engine serves."""
    config, weights = model.Config.read(base), model.load(base)

    def logprobs(adapter: lora.Adapter, ids: jax.Array) -> Any:
        return model.token_logprobs(lora.merged(weights, adapter), config, ids)

    def publish(version: int, adapter: lora.Adapter) -> Any:
        saved = lora.save_adapter(folder / f"adapter-{version}", adapter, base)
        return pool.publish_policy(version, lora_path=str(saved), min_serving=0)

    return Learner(lora.new_adapter(weights), logprobs, publish, LORA_LR)


def _engine(way: Way, line: EngineLine) -> dict[str, Any]:
    engine = cpu_engine(ensure_engine_env(), cache_dir(), line)
    # What takes adapters while it serves has room for them from its launch on.
    return engine | {"max_lora_rank": lora.RANK} if way == "lora" else engine


def _settings(folder: str) -> dict[str, Any]:
    return {"stage_dir": f"{folder}/staged"}
