"""Tunix's model beside a real engine in one process: its weights, handed over in memory, make the next completions.

It needs Tunix and the main line of sglang-jax in one environment, in which both have the JAX that the engine pins:

    PYTHON -m pip install '.[local]' 'google-tunix==0.1.7' 'jax==0.10.2' pytest pytest-asyncio pytest-timeout hypothesis
    PYTHON -m pytest -p no:anyio tests/engine/test_tunix_in_process.py
"""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from tunix_parts import Tokenizer, shape_of_tiny

from rollpool.ops.local.engine_settings import cpu_engine_env, cpu_in_process
from rollpool.ops.local.reference import ReferenceModel
from rollpool.ops.local.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("tunix", "sgl_jax")),
        reason="needs Tunix and sglang-jax main in one environment; this file's first lines say how",
    ),
]

#: Largest difference of a log-prob that is not a fault.
TOLERANCE = 0.016


def test_weights_of_a_tunix_model_make_the_completions_that_come_after_it_was_handed_over(tmp_path: Path) -> None:
    os.environ.update(cpu_engine_env(8))
    import jax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params as qwen3_params
    from tunix.rl.rollout.base_rollout import RolloutConfig

    from rollpool.ops import local_pool, split_devices
    from rollpool.producer.tunix import PoolRollout

    paths = [make_tiny_model(tmp_path / f"tiny-{seed}", seed=seed) for seed in (1, 2)]
    shape = shape_of_tiny(qwen3)
    split = split_devices(rollout=4)
    trainers = jax.sharding.Mesh(split.train.devices.reshape(2, 2), ("fsdp", "tp"))
    with local_pool(
        paths[0], rollout_devices=split.rollout, train_devices=split.train, engine=cpu_in_process()
    ) as pool:
        first, second = (qwen3_params.create_model_from_safe_tensors(str(path), shape, trainers) for path in paths)
        settings = RolloutConfig(max_tokens_to_generate=12, max_prompt_length=8, temperature=1.0)
        rollout = PoolRollout(pool=pool, tokenizer=Tokenizer(vocab=512), rollout_actor=first, rollout_config=settings)
        for path, model in ((paths[0], None), (paths[1], second)):
            if model is not None:
                rollout.update_params(nnx.state(model, nnx.Param))
            output = rollout.generate(["5 6 7", "5 6 7", "9 10"], settings)
            reference = ReferenceModel.from_checkpoint(path)
            for prompt, tokens, logprobs in zip(
                output.left_padded_prompt_tokens, output.tokens, output.logprobs, strict=True
            ):
                again = reference.logprobs(prompt[prompt != 0], tokens, temperature=1.0)
                assert np.abs(again - logprobs).max() < TOLERANCE
