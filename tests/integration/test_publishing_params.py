"""Publishing a policy by its parameters, on a real server."""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis.asyncio import Redis as AsyncRedis
from small_checkpoints import WEIGHT, make_base, random

from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.local.run import wait_until_served
from rollpool.ops.sim import made_by, make_sim_model, sim_engine
from rollpool.ops.sim.model import WEIGHT as SIM_WEIGHT
from rollpool.producer import AsyncRolloutPool, CheckpointFolder, Policy, PolicyRejected, RolloutPool
from rollpool.schemas import Keys

EMBED = "model.embed_tokens.weight"


class Memory:
    """A sink that keeps what it is given, as an engine in this process does."""

    check = False

    def __init__(self) -> None:
        self.puts: list[tuple[int, dict[str, Any]]] = []
        self.threads: list[threading.Thread] = []
        self.is_whole = True

    def put(self, version: int, tensors: Mapping[str, Any]) -> str:
        self.puts.append((version, dict(tensors)))
        self.threads.append(threading.current_thread())
        return f"memory/{version}"

    def holds(self, checkpoint: str) -> bool:
        return self.is_whole


def params(seed: int = 0) -> dict[str, Any]:
    return {WEIGHT: random(6, 4, seed), EMBED: random(8, 4, seed + 1)}


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def pool(redis_url: str, memory: Memory) -> Iterator[RolloutPool]:
    with RolloutPool(redis_url, pool="test", run="r", params=memory) as made:
        yield made


def test_a_folder_is_published_with_its_files(redis_url: str, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "out", like=make_base(tmp_path / "base"))
    with RolloutPool(redis_url, pool="test", run="r", params=folder) as pool:
        policy = pool.publish_policy(1, params=params())
        assert policy.checkpoint
        assert Path(policy.checkpoint).parent == tmp_path / "out"
        assert {file.name for file in policy.files} == {"config.json", "model.safetensors", "tokenizer.json"}
        assert all(file.digest.startswith("sha256:") for file in policy.files)


def test_a_sink_in_memory_gets_hugging_face_names_and_is_not_looked_at(pool: RolloutPool, memory: Memory) -> None:
    mapping = {"to_hf_mappings": {"table": ("model.embed_tokens.embedding", None)}}
    table = random(8, 4)
    assert pool.publish_policy(1, params={"table": table}, mapping=mapping).checkpoint == "memory/1"
    ((version, tensors),) = memory.puts
    assert version == 1
    np.testing.assert_array_equal(tensors[EMBED], table)


def test_a_blocking_pool_puts_in_the_callers_thread(pool: RolloutPool, memory: Memory) -> None:
    pool.publish_policy(1, params=params())
    assert memory.threads == [threading.current_thread()]


async def test_an_async_pool_publishes_them_too(redis_url: str, memory: Memory) -> None:
    async with AsyncRolloutPool(redis_url, pool="test", run="r", params=memory) as pool:
        policy = await pool.publish_policy(1, params=params())
        assert await pool.publish_policy(1, params=params()) == policy
    assert memory.threads == [threading.current_thread()]


def test_a_host_changes_to_what_was_written_while_it_serves(redis_url: str, tmp_path: Path) -> None:
    like = make_sim_model(tmp_path / "like", signature=5)
    folder = CheckpointFolder(tmp_path / "out", like=like)
    engine = sim_engine(step_ms=2.0, median_tokens=4, hot_swap=True)
    with (
        LocalHosts(redis_url, "test", tmp_path / "logs", engine, {"heartbeat_s": 0.2}) as hosts,
        RolloutPool(redis_url, pool="test", run="r", params=folder) as pool,
    ):
        pool.publish_policy(1, checkpoint=str(like))
        hosts.start("host")
        wait_until_served(pool, hosts, 1)
        pool.publish_policy(2, params={SIM_WEIGHT: np.zeros((8, 8), np.float32)})
        pool.wait_for_policy(2, timeout=60)
        (group,) = pool.enqueue_prompts([[7, 8]], policy_version=2, max_staleness=0).collect(timeout=60)
    assert group.samples[0].versions == (2,)
    assert made_by(5, group.prompt_ids, group.samples[0].output_ids)


# Again


def test_a_version_published_before_is_not_written_again(redis_url: str, tmp_path: Path) -> None:
    like = make_base(tmp_path / "base")

    def published() -> Policy:
        folder = CheckpointFolder(tmp_path / "out", like=like)
        with RolloutPool(redis_url, pool="test", run="r", params=folder) as pool:
            return pool.publish_policy(1, params=params())

    first = published()
    # A trainer that was started anew repeats what it did last.
    assert published() == first
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_what_a_process_that_ended_held_is_put_again_under_its_name(pool: RolloutPool, memory: Memory) -> None:
    policy = pool.publish_policy(1, params=params())
    memory.is_whole = False
    assert pool.publish_policy(1, params=params()) == policy
    assert [version for version, _ in memory.puts] == [1, 1]


def test_a_checkpoint_that_was_deleted_cannot_be_published_again(redis_url: str, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "out", like=make_base(tmp_path / "base"))
    with RolloutPool(redis_url, pool="test", run="r", params=folder) as pool:
        policy = pool.publish_policy(1, params=params())
        assert policy.checkpoint
        Path(policy.checkpoint).rename(tmp_path / "elsewhere")
        with pytest.raises(PolicyRejected, match="policy 1 already names"):
            pool.publish_policy(1, params=params())


def test_a_version_that_was_published_otherwise_is_not_taken_for_the_params(redis_url: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    folder = CheckpointFolder(tmp_path / "out", like=base)
    with RolloutPool(redis_url, pool="test", run="r", params=folder) as pool:
        pool.publish_policy(1, checkpoint=str(base))
        with pytest.raises(PolicyRejected, match=r"policy 1 already names .*base"):
            pool.publish_policy(1, params=params())


def test_after_going_back_a_version_is_put_anew(pool: RolloutPool, memory: Memory) -> None:
    for version in (1, 2):
        pool.publish_policy(version, params=params(version))
    pool.rollback_policy(1)
    assert pool.publish_policy(2, params=params(7)).generation == 1
    assert [version for version, _ in memory.puts] == [1, 2, 2]


# What is refused, before anything is put


def test_an_older_version_is_refused_before_it_is_put(pool: RolloutPool, memory: Memory) -> None:
    pool.publish_policy(5, params=params())
    with pytest.raises(PolicyRejected, match="policy 4 is older than the current policy 5"):
        pool.publish_policy(4, params=params())
    with pytest.raises(PolicyRejected, match="version"):
        pool.publish_policy(-1, params=params())
    assert len(memory.puts) == 1


async def test_another_runs_turn_is_respected_before_anything_is_put(
    redis_url: str, pool: RolloutPool, memory: Memory, redis_client: AsyncRedis, keys: Keys
) -> None:
    async with AsyncRolloutPool(redis_url, pool="test", run="other") as other:
        await other.publish_policy(1, checkpoint="/c/1", check=False)
    with pytest.raises(PolicyRejected, match="run 'other' publishes the checkpoints"):
        pool.publish_policy(2, params=params())
    assert not memory.puts
    await redis_client.delete(keys.publisher)
    assert pool.publish_policy(2, params=params()).run == "r"


async def test_another_runs_version_is_not_taken_for_ones_own(redis_url: str, memory: Memory) -> None:
    async with AsyncRolloutPool(redis_url, pool="test", run="other") as other:
        await other.publish_policy(1, checkpoint="/c/1", check=False)
    async with AsyncRolloutPool(redis_url, pool="test", run="r", params=memory) as pool:
        with pytest.raises(PolicyRejected, match="run 'other'"):
            await pool.publish_policy(1, params=params())
    assert not memory.puts


@pytest.mark.parametrize("more", [{"checkpoint": "/c"}, {"lora_path": "/l"}, {"base": "/c"}])
def test_params_are_the_whole_source(pool: RolloutPool, memory: Memory, more: Any) -> None:
    with pytest.raises(PolicyRejected, match="give one of params, checkpoint and lora_path"):
        pool.publish_policy(1, params=params(), **more)
    assert not memory.puts


def test_a_pool_without_a_sink_says_how_to_have_one(redis_url: str) -> None:
    with (
        RolloutPool(redis_url, pool="test", run="r") as pool,
        pytest.raises(PolicyRejected, match=r"CheckpointFolder.*local_pool"),
    ):
        pool.publish_policy(1, params=params())


def test_no_source_is_refused_as_before(pool: RolloutPool) -> None:
    with pytest.raises(PolicyRejected, match="give one of checkpoint and lora_path"):
        pool.publish_policy(1)


def test_tensors_that_are_not_the_models_publish_nothing(redis_url: str, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "out", like=make_base(tmp_path / "base"))
    with RolloutPool(redis_url, pool="test", run="r", params=folder) as pool:
        with pytest.raises(PolicyRejected, match=f"lack {EMBED}"):
            pool.publish_policy(1, params={WEIGHT: random(6, 4)})
        assert pool.current_policy() is None
