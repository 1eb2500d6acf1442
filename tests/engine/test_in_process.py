"""Trainer and rollouts in one process: a real engine on 4 of 8 virtual devices, a trainer's work on the other 4.

What a result says of its versions is proved by the independent model in numpy (`check_sample`): every log-prob is
computed again by the weights of the version in whose span the token is.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollpool.ops.inspect import read_workers
from rollpool.ops.local.engine_settings import cpu_engine_env, cpu_in_process
from rollpool.ops.local.reference import ReferenceModel, check_sample
from rollpool.ops.local.server import LocalServer
from rollpool.ops.local.tiny_adapter import make_tiny_adapter
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import Group, PolicyRejected, SamplingParams
from rollpool.schemas import Keys
from rollpool.schemas.connection import connect


def _has_single_process_engine() -> bool:
    spec = importlib.util.find_spec("sgl_jax")
    # Where it was looked for without importing it: 0.0.1.post1 has no such module.
    places = (spec.submodule_search_locations or ()) if spec else ()
    return any((Path(place) / "srt/managers/communication.py").is_file() for place in places)


pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not _has_single_process_engine(),
        reason="needs sglang-jax main in this interpreter: with rollpool[local] and pytest, pytest-asyncio, "
        "pytest-timeout, hypothesis installed beside it, PYTHON -m pytest -p no:anyio tests/engine/test_in_process.py",
    ),
    # The engine's own dependencies are deprecated here and there.
    pytest.mark.filterwarnings("default"),
]

#: Largest difference of a log-prob that is not a fault.
TOLERANCE = 0.016

ENGINE = cpu_in_process()
SAMPLING = SamplingParams(max_new_tokens=24, temperature=1.0, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    assert "jax" not in sys.modules or os.environ.get("JAX_PLATFORMS") == "cpu", "JAX began without its devices"
    before = dict(os.environ)
    os.environ.update(cpu_engine_env(8))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_model(folder / f"tiny-{seed}", seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def references(models: list[Path]) -> list[ReferenceModel]:
    return [ReferenceModel.from_checkpoint(path) for path in models]


def on_trainers_devices(path: Path, split: Any) -> dict[str, Any]:
    """A checkpoint's tensors, sharded over the trainer's mesh where they are matrices."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from safetensors.numpy import load_file

    def placed(value: Any) -> Any:
        spec = PartitionSpec("train") if value.ndim == 2 else PartitionSpec()
        return jax.device_put(value, NamedSharding(split.train, spec))

    return {name: placed(value) for name, value in load_file(path / "model.safetensors").items()}


def opened(model: Path, **options: Any) -> tuple[Any, Any]:
    """A pool on the first four devices, and the split."""
    from rollpool.ops import local_pool, split_devices

    split = split_devices(rollout=4)
    engine = {**ENGINE, **options.pop("engine", {})}
    return local_pool(model, rollout_devices=split.rollout, train_devices=split.train, engine=engine, **options), split


@pytest.fixture(scope="module")
def scene(models: list[Path]) -> Iterator[tuple[Any, Any]]:
    pool, split = opened(models[0], engine={"max_lora_rank": 8, "adapter_slots": 2})
    with pool:
        yield pool, split


def prompts(count: int) -> list[str]:
    return [f"{number} + {number} =" for number in range(count)]


def proved(groups: list[Group], models: dict[int, ReferenceModel]) -> int:
    """See that each token is of the version it is said to be of; how many samples are of more than one."""
    mixed = 0
    for group in groups:
        for sample in group.samples:
            assert check_sample(models, group.prompt_ids, sample, temperature=1.0) < TOLERANCE, sample.version_spans
            mixed += len(sample.version_spans) > 1
    return mixed


class TrainStep:
    """Something that keeps the trainer's devices at work, with collectives over all of them."""

    def __init__(self, mesh: Any) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        self._weights = jax.device_put(jnp.eye(256), NamedSharding(mesh, PartitionSpec("train")))
        self._step = jax.jit(lambda weights: weights @ weights / jnp.linalg.norm(weights))
        self.steps = 0

    def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._weights = self._step(self._weights)
            self._weights.block_until_ready()
            self.steps += 1


def test_twenty_swaps_beside_a_train_step_each_token_of_the_version_it_names(
    scene: tuple[Any, Any], models: list[Path], references: list[ReferenceModel]
) -> None:
    pool, split = scene
    params = [on_trainers_devices(path, split) for path in models]
    step = TrainStep(split.train)
    by_version = {0: references[0]}
    groups: list[Group] = []
    for version in range(1, 21):
        batch = pool.enqueue_prompts(prompts(4), policy_version=version - 1, n=4, sampling=SAMPLING)
        step.run(0.3)
        by_version[version] = references[version % 2]
        pool.publish_policy(version, params=params[version % 2])
        step.run(0.3)
        groups += batch.collect(timeout=120)
        batch.commit()
        pool.wait_for_policy(version, timeout=60)
    assert len(groups) == 80
    assert proved(groups, by_version) > 0, "no sample was in flight over a change: nothing is shown"
    assert step.steps > 0
    pool.publish_policy(21, checkpoint=str(models[0]))  # what the next test begins with
    pool.wait_for_policy(21, timeout=60)


def test_an_adapter_is_served_beside_parameters_from_memory(
    scene: tuple[Any, Any], models: list[Path], references: list[ReferenceModel], tmp_path: Path
) -> None:
    pool, _ = scene
    version = pool.current_policy().version
    adapter = make_tiny_adapter(tmp_path / "adapter", seed=5, base=models[0])
    pool.publish_policy(version + 1, lora_path=str(adapter))
    pool.wait_for_policy(version + 1, timeout=60)
    batch = pool.enqueue_prompts(prompts(4), policy_version=version + 1, n=2, exact=True, sampling=SAMPLING)
    groups = list(batch.collect(timeout=120))
    batch.commit()
    assert len(groups) == 4
    proved(groups, {version + 1: references[0].with_adapter(adapter), version: references[0]})


def test_what_does_not_fit_is_refused_to_the_trainer_and_serving_goes_on(
    scene: tuple[Any, Any], models: list[Path], references: list[ReferenceModel]
) -> None:
    pool, split = scene
    version = pool.current_policy().version
    params = on_trainers_devices(models[1], split)
    norm = "model.norm.weight"
    for wrong, said in (
        ({**params, "more": params[norm]}, "no more"),
        ({name: value for name, value in params.items() if name != norm}, f"no tensor for {norm}"),
        ({**params, norm: params[norm] * np.nan}, "not finite"),
        ({**params, norm: params[norm][:128]}, "shape"),
    ):
        with pytest.raises(PolicyRejected, match=said):
            pool.publish_policy(version + 10, params=wrong)
    assert pool.current_policy().version == version


def test_arrays_may_be_deleted_as_soon_as_they_are_published(
    models: list[Path], references: list[ReferenceModel]
) -> None:
    pool, split = opened(models[0], engine={"staging": "leaf"})
    with pool:
        params = on_trainers_devices(models[1], split)
        pool.publish_policy(1, params=params)
        for array in params.values():
            array.delete()
        pool.wait_for_policy(1, timeout=60)
        batch = pool.enqueue_prompts(prompts(4), policy_version=1, n=2, exact=True, sampling=SAMPLING)
        groups = list(batch.collect(timeout=120))
        assert len(groups) == 4
        proved(groups, {1: references[1]})


def test_an_engine_that_fails_is_started_anew_and_loses_nothing(
    models: list[Path], references: list[ReferenceModel]
) -> None:
    pool, split = opened(models[0])
    with pool:
        batch = pool.enqueue_prompts(prompts(8), policy_version=0, n=4, sampling=SAMPLING)
        owner = pool._pool._publisher._sink
        scheduler = owner._engine.embedded.scheduler

        def fail(requests: Any) -> None:
            raise RuntimeError("a fault of the engine")

        scheduler.process_input_requests = fail
        groups = list(batch.collect(timeout=240))
        assert len(groups) == 8
        proved(groups, {0: references[0]})
        batch.commit()
        pool.publish_policy(1, params=on_trainers_devices(models[1], split))
        pool.wait_for_policy(1, timeout=60)


def test_others_may_look_on_where_the_server_is_given(models: list[Path], references: list[ReferenceModel]) -> None:
    with LocalServer() as server:
        pool, _ = opened(models[0], url=server.url, pool="seen")
        with pool, connect(server.url) as client:
            [worker] = read_workers(client, Keys("seen"))
            assert worker.state == "serving"
            assert worker.engine_url == "in process, devices 0,1,2,3"


def test_a_chat_is_answered_with_text(scene: tuple[Any, Any]) -> None:
    pool, _ = scene
    chat = [{"role": "user", "content": "1 + 1 ="}]
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    version = pool.current_policy().version
    batch = pool.enqueue_prompts(
        [chat], policy_version=version, max_staleness=2, endpoint="chat", logprobs=False, sampling=sampling
    )
    [group] = batch.collect(timeout=60)
    assert group.samples[0].text
    batch.commit()


def test_the_process_keeps_its_handlers_and_gets_its_memory_back(models: list[Path]) -> None:
    import asyncio
    import logging

    import jax

    def settings() -> list[Any]:
        handlers = [signal.getsignal(number) for number in (signal.SIGQUIT, signal.SIGCHLD, signal.SIGTERM)]
        return [handlers, list(logging.getLogger().handlers), type(asyncio.get_event_loop_policy())]

    before, threads = settings(), set(threading.enumerate())
    held = sum(array.nbytes for array in jax.live_arrays())
    pool, _ = opened(models[0])
    pool.close()
    assert settings() == before
    left = [thread.name for thread in set(threading.enumerate()) - threads if not thread.name.startswith("tqdm")]
    assert not left
    weights = (models[0] / "model.safetensors").stat().st_size
    assert sum(array.nbytes for array in jax.live_arrays()) - held < weights / 10


SCRIPT = """
import sys, threading
from rollpool.ops import local_pool, split_devices
split = split_devices(rollout=4)
pool = local_pool(sys.argv[1], rollout_devices=split.rollout, engine={engine!r})
batch = pool.enqueue_prompts(["1 + 1 ="], policy_version=0, n=2)
print(sum(1 for _ in batch.collect(timeout=60)), "groups")
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "pool.close()"])
def test_a_process_ends_when_its_program_does(models: list[Path], end: str) -> None:
    script = SCRIPT.format(engine=ENGINE, end=end)
    run = subprocess.run(
        [sys.executable, "-c", script, str(models[0])], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == (3 if "3" in end else 0), run.stderr[-3000:]
    assert "1 groups" in run.stdout
    assert "Traceback" not in run.stderr, run.stderr[-3000:]
