"""An engine in this process beside a trainer's own work: what each takes from the other, and what a swap costs.

Run with an interpreter that has sglang-jax main and rollpool[local]. Eight virtual devices, the engine on four of them
(tp=4), a train step with collectives on the other four. Rates alone and together are taken in turn, in one run. Then
the weights are swapped 20 times in the middle of sequences, and every token's log-prob is computed again, by an
independent model, with the weights of the version that its span names.

On a CPU both parts share its cores, so that together each has less: on a TPU they would share none of their chips.
"""

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rollpool.ops.local.engine_settings import cpu_engine_env, cpu_in_process

os.environ.update(cpu_engine_env(8))  # before JAX is imported

import numpy as np

from rollpool.ops import LocalPool, local_pool, split_devices
from rollpool.ops.local.reference import ReferenceModel, check_sample
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.producer import Group, SamplingParams

#: Requests at once, new tokens of each, and prompts of a measurement, each with two samples.
SLOTS, TOKENS, PROMPTS = 16, 32, 32

SAMPLING = SamplingParams(max_new_tokens=TOKENS, temperature=1.0, ignore_eos=True)


class TrainStep:
    """Forward, backward and update of a small network, its batch sharded over the trainer's devices."""

    def __init__(self, mesh: Any) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        rng = np.random.default_rng(0)
        whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("train"))
        self._weights = jax.device_put([rng.normal(0, 0.02, (512, 512)).astype("f4") for _ in range(4)], whole)
        self._batch = jax.device_put(rng.normal(0, 1, (64, 512)).astype("f4"), rows)

        def loss(weights: Any, batch: Any) -> Any:
            hidden = batch
            for matrix in weights:
                hidden = jnp.tanh(hidden @ matrix)
            return jnp.mean((hidden - batch) ** 2)

        def step(weights: Any, batch: Any) -> Any:
            gradients = jax.grad(loss)(weights, batch)
            return [matrix - 0.1 * gradient for matrix, gradient in zip(weights, gradients, strict=True)]

        self._step = jax.jit(step, donate_argnums=0)
        self.run_once()

    def run_once(self) -> None:
        """One step, to its end."""
        import jax

        self._weights = jax.block_until_ready(self._step(self._weights, self._batch))


def generated(pool: LocalPool, step: TrainStep | None) -> tuple[float, float]:
    """Tokens and train steps a second, while one batch is generated."""
    prompts = [f"{number} + {number} =" for number in range(PROMPTS)]
    began, steps = time.perf_counter(), 0
    batch = pool.enqueue_prompts(prompts, policy_version=0, n=2, sampling=SAMPLING)
    groups: list[Group] = []
    collecting = threading.Thread(target=lambda: groups.extend(batch.collect(timeout=600)))
    collecting.start()
    while step is not None and collecting.is_alive():
        step.run_once()
        steps += 1
    collecting.join()
    seconds = time.perf_counter() - began
    batch.commit()
    return sum(group.tokens for group in groups) / seconds, steps / seconds


def trained(step: TrainStep, seconds: float) -> float:
    """Train steps a second, alone."""
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step.run_once()
        steps += 1
    return steps / (time.perf_counter() - began)


def on_trainers_devices(path: Path, mesh: Any) -> dict[str, Any]:
    """A checkpoint's tensors, matrices sharded."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from safetensors.numpy import load_file

    def placed(value: Any) -> Any:
        return jax.device_put(
            value, NamedSharding(mesh, PartitionSpec("train") if value.ndim == 2 else PartitionSpec())
        )

    return {name: placed(value) for name, value in load_file(path / "model.safetensors").items()}


def swapped(pool: LocalPool, mesh: Any, models: list[Path], swaps: int) -> dict[str, Any]:
    """Swap the weights in the middle of sequences, and prove what was made."""
    references = [ReferenceModel.from_checkpoint(path) for path in models]
    params = [on_trainers_devices(path, mesh) for path in models]
    put: list[float] = []
    served: list[float] = []
    groups: list[Group] = []
    for version in range(1, swaps + 1):
        batch = pool.enqueue_prompts(
            [f"{number} - {version} =" for number in range(4)], policy_version=version - 1, n=4, sampling=SAMPLING
        )
        time.sleep(0.3)
        began = time.perf_counter()
        pool.publish_policy(version, params=params[version % 2])
        put.append(time.perf_counter() - began)
        pool.wait_for_policy(version, timeout=120)
        served.append(time.perf_counter() - began)
        groups += batch.collect(timeout=600)
        batch.commit()
    by_version = {version: references[version % 2] for version in range(swaps + 1)}
    samples = [(group.prompt_ids, sample) for group in groups for sample in group.samples]
    return {
        "swaps": swaps,
        "put_seconds": round(statistics.median(put), 3),
        "served_seconds": round(statistics.median(served), 3),
        "samples": len(samples),
        "samples_over_a_swap": sum(len(sample.version_spans) > 1 for _, sample in samples),
        "max_logprob_error": round(max(check_sample(by_version, ids, sample) for ids, sample in samples), 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--swaps", type=int, default=20)
    options = parser.parse_args()
    engine = cpu_in_process(max_running_requests=SLOTS)
    split = split_devices(rollout=4)
    with TemporaryDirectory() as folder:
        models = [make_tiny_model(Path(folder) / f"tiny-{seed}", seed=seed) for seed in (1, 2)]
        began = time.perf_counter()
        with local_pool(models[0], rollout_devices=split.rollout, train_devices=split.train, engine=engine) as pool:
            started = time.perf_counter() - began
            step = TrainStep(split.train)
            generated(pool, step)  # warm
            alone, together, steps_alone, steps_together = [], [], [], []
            for number in range(options.rounds):
                alone.append(generated(pool, None)[0])
                rates = generated(pool, step)
                together.append(rates[0])
                steps_together.append(rates[1])
                steps_alone.append(trained(step, 3.0))
                print(
                    f"round {number + 1}: tokens/s {alone[-1]:.0f} alone, {together[-1]:.0f} together; "
                    f"steps/s {steps_alone[-1]:.1f} alone, {steps_together[-1]:.1f} together",
                    flush=True,
                )
            swaps = swapped(pool, split.train, models, options.swaps)
    result = {
        "start_seconds": round(started, 1),
        "tokens_per_s": {
            "alone": round(statistics.median(alone), 1),
            "together": round(statistics.median(together), 1),
        },
        "tokens_ratio": round(statistics.median(b / a for a, b in zip(alone, together, strict=True)), 3),
        "steps_per_s": {
            "alone": round(statistics.median(steps_alone), 1),
            "together": round(statistics.median(steps_together), 1),
        },
        "steps_ratio": round(statistics.median(b / a for a, b in zip(steps_alone, steps_together, strict=True)), 3),
        "rounds": options.rounds,
        **swaps,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
