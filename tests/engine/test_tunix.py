"""Tunix's own learner and models on a pool: real workers, simulated engines.

Tunix needs Python 3.12 and pins of its own, so it is in no environment of ours: these tests are skipped without it. To
run them:

    python3.12 -m venv /opt/tunix
    /opt/tunix/bin/pip install -e '.[local,dev]' 'google-tunix==0.1.7' 'jax[cpu]'
    JAX_PLATFORMS=cpu /opt/tunix/bin/python -m pytest tests/engine/test_tunix.py
"""

import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tunix_parts import BOS, Tokenizer, shape_of_tiny

from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.run import wait_until_served
from rollpool.ops.local.tiny_model import make_tiny_model
from rollpool.ops.sim import REFUSE, made_by, make_sim_model, sim_engine
from rollpool.producer import CheckpointFolder, PoolTimeout, RolloutPool, RollpoolError, SettingsError, hf_tensors
from rollpool.producer.tunix import PoolRollout

pytestmark = [pytest.mark.timeout(280), pytest.mark.filterwarnings("default")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix", reason="no Tunix: pip install google-tunix==0.1.7 'jax[cpu]' on Python 3.12")
    import jax
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params as qwen3_params
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig

POOL = "tunix"
#: A vocabulary that has every token of a simulated engine.
VOCAB = 150_001


class SimSink:
    """Takes parameters, and gives the hosts a simulated model that stands for them."""

    check = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.puts: list[dict[str, Any]] = []
        self.threads: set[threading.Thread] = set()

    def put(self, version: int, tensors: Mapping[str, Any]) -> str:
        # What a trainer overwrites afterwards must not be what was put.
        self.puts.append({name: np.array(tensors[name]) for name in tensors})
        self.threads.add(threading.current_thread())
        return str(make_sim_model(self.folder / str(version), signature=signature(version)))

    def holds(self, checkpoint: str) -> bool:
        return Path(checkpoint).is_dir()


def signature(version: int) -> int:
    return 1000 + version


def tiny(seed: int, vocab: int = VOCAB) -> Any:
    config = qwen3.ModelConfig(
        num_layers=1,
        vocab_size=vocab,
        embed_dim=8,
        hidden_dim=16,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        norm_eps=1e-6,
        rope_theta=10_000,
        use_tied_embedding=True,
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(params=seed))


def one_device() -> Any:
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


@pytest.fixture
def sink(tmp_path: Path) -> SimSink:
    return SimSink(tmp_path / "policies")


@pytest.fixture
def pool(redis_url: str, tmp_path: Path, sink: SimSink) -> Iterator[RolloutPool]:
    engine = sim_engine(max_running_requests=16, step_ms=2.0, median_tokens=6, hot_swap=True)
    settings = {"heartbeat_s": 0.2, "drain_s": 1}
    with (
        LocalHosts(redis_url, POOL, tmp_path / "logs", engine, settings) as hosts,
        RolloutPool(redis_url, pool=POOL, run="t", params=sink) as made,
    ):
        made.publish_policy(0, checkpoint=str(make_sim_model(tmp_path / "base", signature=signature(0))))
        hosts.start("host")
        wait_until_served(made, hosts, 0)
        yield made


def config(**more: Any) -> Any:
    return RolloutConfig(max_tokens_to_generate=8, max_prompt_length=4, temperature=1.0, **more)


# A rollout by itself


def test_completions_come_in_order_with_their_tokens_and_log_probs(pool: RolloutPool) -> None:
    rollout = PoolRollout(pool=pool, tokenizer=Tokenizer(VOCAB))
    assert isinstance(rollout, BaseRollout)
    prompts = ["5 6 7", "5 6 7", "8", "9 10", "5 6 7", "9 10"]
    output = rollout.generate(prompts, config())
    assert len(output.text) == len(output.tokens) == len(output.logprobs) == len(prompts)
    for prompt, text, tokens, logprobs in zip(prompts, output.text, output.tokens, output.logprobs, strict=True):
        assert made_by(signature(0), [BOS, *map(int, prompt.split())], tokens)
        assert 0 < len(tokens) <= 8
        assert text == Tokenizer(VOCAB).decode(tokens.tolist())
        assert (tokens.dtype, logprobs.dtype, logprobs.shape) == (np.int32, np.float32, tokens.shape)
    # Samples of one prompt are different ones.
    assert len({tokens.tobytes() for tokens in (output.tokens[0], output.tokens[1], output.tokens[4])}) == 3
    expected = [[2, 5, 6, 7], [2, 5, 6, 7], [0, 0, 2, 8], [0, 2, 9, 10], [2, 5, 6, 7], [0, 2, 9, 10]]
    np.testing.assert_array_equal(output.left_padded_prompt_tokens, expected)
    assert not pool.batches


def test_a_prompt_that_is_longer_than_was_said_is_not_cut(pool: RolloutPool) -> None:
    output = PoolRollout(pool=pool, tokenizer=Tokenizer(VOCAB)).generate(["1 2 3 4 5"], config())
    np.testing.assert_array_equal(output.left_padded_prompt_tokens, [[0, 0, BOS, 1, 2, 3, 4, 5]])
    assert made_by(signature(0), [BOS, 1, 2, 3, 4, 5], output.tokens[0])


def test_weights_that_are_handed_over_make_what_is_asked_for_next(pool: RolloutPool, sink: SimSink) -> None:
    model = tiny(1)
    rollout = PoolRollout(pool=pool, tokenizer=Tokenizer(VOCAB), rollout_actor=model, rollout_config=config())
    assert rollout.version == 1
    rollout.update_params(nnx.state(tiny(2), nnx.Param), (nnx.Param,))
    output = rollout.generate(["5 6"] * 2, config())
    assert rollout.version == 2
    assert all(made_by(signature(2), [BOS, 5, 6], tokens) for tokens in output.tokens)
    assert [put["model.embed_tokens.weight"].shape for put in sink.puts] == [(VOCAB, 8)] * 2


def test_a_prompt_without_completions_is_an_error_and_leaves_nothing_open(pool: RolloutPool) -> None:
    class Failing(Tokenizer):
        def bos_id(self) -> int:
            return REFUSE

    with pytest.raises(RollpoolError, match=r"of 1 prompts .* the first is failed"):
        PoolRollout(pool=pool, tokenizer=Failing(VOCAB)).generate(["5"], config(), max_new_tokens=4)
    assert not pool.batches


def test_a_generation_that_takes_too_long_is_given_up(redis_url: str) -> None:
    with RolloutPool(redis_url, pool=POOL, run="t") as pool:
        pool.publish_policy(4, checkpoint="/models/4", check=False)
        rollout = PoolRollout(pool=pool, tokenizer=Tokenizer(VOCAB), timeout=0.2)
        with pytest.raises(PoolTimeout):
            rollout.generate(["5", "6", "6"], config())
        assert not pool.batches
        with RolloutPool.resume(pool.state_dict(), redis_url, pool=POOL) as again:
            assert not again.batches


def test_log_probs_of_the_trained_model_are_those_of_the_temperature(redis_url: str) -> None:
    model = tiny(1, vocab=32)
    prompts, completions = np.array([[0, 5, 6], [2, 3, 4]]), np.array([[7, 8], [9, 10]])
    with RolloutPool(redis_url, pool=POOL, run="t") as pool:
        pool.publish_policy(4, checkpoint="/models/4", check=False)
        settings = RolloutConfig(temperature=0.5)
        rollout = PoolRollout(
            pool=pool, tokenizer=Tokenizer(VOCAB), rollout_actor=model, rollout_config=settings, publish_first=False
        )
        found = rollout.get_per_token_logps(jax.numpy.array(prompts), jax.numpy.array(completions))
    tokens = np.concatenate([prompts, completions], 1)[1:]
    length = tokens.shape[1]
    logits, _ = model(jax.numpy.array(tokens), jax.numpy.arange(length)[None], None, np.tri(length, dtype=bool)[None])
    expected = jax.nn.log_softmax(logits[0, 2:4] / 0.5)[np.arange(2), completions[1]]
    np.testing.assert_allclose(found[1], expected, rtol=1e-4)


def test_a_trainer_that_cannot_begin_says_why(redis_url: str) -> None:
    with RolloutPool(redis_url, pool=POOL, run="t") as pool:
        with pytest.raises(SettingsError, match="tokenizer is missing"):
            PoolRollout(pool=pool)
        with pytest.raises(SettingsError, match="serves no policy"):
            PoolRollout(pool=pool, tokenizer=Tokenizer(VOCAB))


# Tunix's models


@pytest.mark.parametrize("backend", ["sglang_jax", "vllm_jax"])
def test_what_tunix_loaded_goes_back_to_what_it_was_loaded_from(tmp_path: Path, backend: str) -> None:
    path = make_tiny_model(tmp_path / "model", seed=3)
    shape = shape_of_tiny(qwen3)
    mesh = one_device()
    model = qwen3_params.create_model_from_safe_tensors(str(path), shape, mesh)
    tensors = hf_tensors(nnx.state(model, nnx.Param), type(model).mapping_for(backend))
    expected = load_file(path / "model.safetensors")
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        assert tensors.shape(name) == array.shape
        np.testing.assert_array_equal(np.asarray(tensors[name]), array, err_msg=name)
    # And so it is written, in bfloat16 too.
    written = CheckpointFolder(tmp_path / "out", like=path, dtype="bfloat16").put(1, tensors)
    again = qwen3_params.create_model_from_safe_tensors(written, shape, mesh)
    for old, new in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new, np.float32))


# Tunix's learner


def test_grpo_trains_on_a_pool(pool: RolloutPool, sink: SimSink) -> None:
    mesh = one_device()
    actor, reference, role = tiny(1), tiny(1), rl_cluster.Role
    seen: list[tuple[str, str]] = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(set(completion))) for completion in completions]

    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=Tokenizer(VOCAB),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
            rollout_engine=partial(PoolRollout, pool=pool),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.sgd(0.5), eval_every_n_steps=100, max_steps=4, mini_batch_size=2
            ),
            rollout_config=config(),
        ),
    )
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=reward,
        algo_config=grpo_learner.GRPOConfig(num_generations=2, num_iterations=2, beta=0.04),
    )
    learner.train([{"prompts": np.array(["5 6", "7 8 9"])}, {"prompts": np.array(["11 12", "13"])}])

    assert cluster.rollout.version == 3
    made = {prompt: [tokens for other, tokens in seen if other == prompt] for prompt, _ in seen}
    assert {prompt: len(samples) for prompt, samples in made.items()} == dict.fromkeys(
        ["5 6", "7 8 9", "11 12", "13"], 2
    )
    # The first step used the first weights, the second those that the first step made.
    for version, prompts in ((1, ["5 6", "7 8 9"]), (2, ["11 12", "13"])):
        for prompt in prompts:
            ids = [BOS, *map(int, prompt.split())]
            assert all(made_by(signature(version), ids, Tokenizer(VOCAB).encode(text)) for text in made[prompt])
    # Each hand-over was of what had been trained meanwhile, from the trainer's thread.
    first, second, last = (put["model.layers.0.self_attn.o_proj.weight"] for put in sink.puts)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, last)
    now = hf_tensors(nnx.state(cluster.actor_trainer.model, nnx.Param), type(actor).mapping_for("sglang_jax"))
    np.testing.assert_array_equal(now["model.layers.0.self_attn.o_proj.weight"], last)
    assert sink.threads == {threading.current_thread()}
