"""Publishing and going back, on a real server: lineages, leases, generations, and what becomes of open jobs."""

import asyncio
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_workers import work
from redis.asyncio import Redis as AsyncRedis
from small_checkpoints import make_adapter, make_base

from rollpool.producer import (
    AsyncRolloutPool,
    PolicyRejected,
    PolicyUnknown,
    PoolTimeout,
    RolloutPool,
    SettingsError,
    StalenessRule,
)
from rollpool.schemas import Ack, Command, Keys, Policy, WorkerStatus, scripts
from rollpool.schemas.wire import unpack_command

LONG = 60.0

#: A pool object of a run.
Trainer = Callable[..., AsyncRolloutPool]


@pytest.fixture
async def trainer(redis_url: str) -> AsyncIterator[Trainer]:
    async with AsyncExitStack() as stack:

        def make(run: str = "r", **options: Any) -> AsyncRolloutPool:
            made = AsyncRolloutPool(redis_url, pool="test", run=run, **options)
            stack.push_async_callback(made.close)
            return made

        yield make


@pytest.fixture
def pool(trainer: Trainer) -> AsyncRolloutPool:
    return trainer()


async def publish(pool: AsyncRolloutPool, *versions: int) -> None:
    for version in versions:
        await pool.publish_policy(version, checkpoint=f"/c/{version}", check=False)


async def publish_adapters(pool: AsyncRolloutPool, *versions: int, **more: Any) -> None:
    for version in versions:
        await pool.publish_policy(version, lora_path=f"/l/{pool.run}/{version}", check=False, **more)


async def commands(client: Any, keys: Keys) -> list[Command]:
    return [unpack_command(fields[b"body"]) for _, fields in await client.xrange(keys.control)]


async def fields_of(client: Any, keys: Keys) -> set[str]:
    return {field.decode() for field in await client.hkeys(keys.policies)}


# What is looked at before


async def test_a_policy_is_published_with_the_files_of_its_source(
    pool: AsyncRolloutPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    checkpoint = await pool.publish_policy(1, checkpoint="./base")
    assert checkpoint.checkpoint == str(base)
    assert {file.name for file in checkpoint.files} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(file.digest.startswith("sha256:") and file.size for file in checkpoint.files)
    lora = await pool.publish_policy(2, lora_path=str(adapter))
    assert (lora.base, len(lora.files)) == (str(base), 2)
    assert await pool.current_policy() == lora


async def test_a_source_that_is_not_whole_is_told_to_no_host(
    pool: AsyncRolloutPool, tmp_path: Path, redis_client: Any, keys: Keys
) -> None:
    base = make_base(tmp_path / "base")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(PolicyRejected, match="still being written"):
        await pool.publish_policy(1, checkpoint=str(base))
    with pytest.raises(PolicyRejected, match="check=False"):
        await pool.publish_policy(1, checkpoint="/only/on/hosts")
    assert await redis_client.keys() == []
    assert (await pool.publish_policy(1, checkpoint="/only/on/hosts", check=False)).files == ()


async def test_what_was_published_is_not_read_again_to_publish_it_again(pool: AsyncRolloutPool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    first = await pool.publish_policy(1, checkpoint=str(base))
    (base / "model.safetensors").unlink()
    assert await pool.publish_policy(1, checkpoint=str(base)) == first


async def test_a_checkpoint_on_a_web_server_is_looked_at_there(pool: AsyncRolloutPool, tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            policy = await pool.publish_policy(1, checkpoint=f"{url}/base")
            with pytest.raises(PolicyRejected, match=r"base2/config\.json is missing"):
                await pool.publish_policy(2, checkpoint=f"{url}/base2")
        finally:
            server.shutdown()
            thread.join()
    sizes = {file.name: file.size for file in policy.files}
    assert sizes == {name: (tmp_path / "base" / name).stat().st_size for name in sizes}
    assert len(sizes) == 3


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


async def test_sources_outside_the_roots_are_refused_also_unseen(trainer: Trainer, tmp_path: Path) -> None:
    pool = trainer(model_roots=[str(tmp_path / "models"), "gs://bucket/models"])
    for source in ("/etc", "gs://bucket/models2/1", str(tmp_path / "models" / ".." / "x"), "org/name"):
        with pytest.raises(PolicyRejected, match="ROLLPOOL_MODEL_ROOTS"):
            await pool.publish_policy(1, checkpoint=source, check=False)
    await pool.publish_policy(1, checkpoint="gs://bucket/models/1", check=False)
    with pytest.raises(PolicyRejected, match="outside"):
        await pool.publish_policy(2, lora_path="gs://bucket/models/2", base="/etc", check=False)


async def test_the_roots_come_from_the_environment(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLPOOL_MODEL_ROOTS", json.dumps(["/models"]))
    with pytest.raises(PolicyRejected, match="outside"):
        await trainer().publish_policy(1, checkpoint="/c/1", check=False)
    await trainer(model_roots=[]).publish_policy(1, checkpoint="/c/1", check=False)
    for wrong in ("/models", "[1]", '"/models"'):
        monkeypatch.setenv("ROLLPOOL_MODEL_ROOTS", wrong)
        with pytest.raises(SettingsError, match="ROLLPOOL_MODEL_ROOTS"):
            trainer()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "one of checkpoint and lora_path"),
        ({"checkpoint": "/c", "lora_path": "/l"}, "one of checkpoint and lora_path"),
        ({"checkpoint": "/c", "base": "/b"}, "base"),
        ({"checkpoint": "/c", "mode": "sometimes"}, "mode"),
        ({"checkpoint": "/c", "min_serving": -1}, "min_serving"),
    ],
    ids=str,
)
async def test_a_policy_that_makes_no_sense_is_refused(
    pool: AsyncRolloutPool, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(PolicyRejected, match=why):
        await pool.publish_policy(1, check=False, **fields)


async def test_how_hosts_are_to_change_travels_with_the_command(
    pool: AsyncRolloutPool, redis_client: Any, keys: Keys
) -> None:
    policy = await pool.publish_policy(1, checkpoint="/c/1", mode="requeue", way="restart", min_serving=3, check=False)
    told = Command(policy=policy, mode="requeue", way="restart", min_serving=3)
    assert await commands(redis_client, keys) == [told]


# Lineages


async def test_each_run_has_adapters_of_its_own_beside_the_checkpoints(trainer: Trainer) -> None:
    one, other = trainer("one"), trainer("other")
    await publish_adapters(one, 1)
    assert (await one.current_policy()).base is None  # type: ignore[union-attr]
    assert await other.current_policy() is None
    await publish(other, 5)
    assert (await one.current_policy()).version == 5, "its adapter is on the hosts' own model"  # type: ignore[union-attr]
    with pytest.raises(PolicyRejected, match="policy 5 is not newer than the current policy 5"):
        await publish_adapters(one, 5)
    await publish_adapters(one, 6)
    await publish_adapters(other, 6, 7)
    assert (await one.current_policy()) == Policy(version=6, lora_path="/l/one/6", base="/c/5", run="one")
    assert (await other.current_policy()).version == 7  # type: ignore[union-attr]
    with pytest.raises(PolicyRejected, match="older than the current policy 7"):
        await publish_adapters(other, 3)


async def test_an_adapter_belongs_on_the_current_checkpoint(pool: AsyncRolloutPool) -> None:
    await publish_adapters(pool, 1, base="/c/own")
    await publish(pool, 2, 3)
    with pytest.raises(PolicyRejected, match="is for '/c/2', and the current checkpoint is policy 3, '/c/3'"):
        await publish_adapters(pool, 4, base="/c/2")
    await publish_adapters(pool, 4, base="/c/3")
    await publish(pool, 5)
    await publish_adapters(pool, 4)  # again, though its base is the current one no more
    with pytest.raises(PolicyRejected, match="already names '/l/r/4' on '/c/3'"):
        await publish_adapters(pool, 4, base="/c/5")
    with pytest.raises(PolicyRejected, match="adapter '/l/r/4' is that of policy 4 already"):
        await pool.publish_policy(6, lora_path="/l/r/4", check=False)


async def test_the_admission_rule_counts_the_adapters_of_a_run_that_has_some(trainer: Trainer) -> None:
    pool = trainer(staleness_rule=StalenessRule(max_staleness=0, batch_size=1))
    await publish(pool, 1)
    await publish_adapters(pool, 2)
    await pool.enqueue_prompts(["a"], policy_version=2)
    waiting = asyncio.create_task(pool.enqueue_prompts(["b"], policy_version=3, timeout=LONG))
    await publish_adapters(pool, 3)
    await waiting


# One publisher at a time


async def test_one_run_publishes_checkpoints_at_a_time(trainer: Trainer, redis_client: Any, keys: Keys) -> None:
    one, other = trainer("one"), trainer("other")
    await publish(one, 1)
    with pytest.raises(
        PolicyRejected, match=r"run 'one' publishes the checkpoints of pool 'test', for (900|899) s more"
    ):
        await publish(other, 2)
    with pytest.raises(PolicyRejected, match="run 'one' publishes"):
        await publish(other, 0)
    await publish(other, 1)  # the same again is harmless, whoever does it
    assert await redis_client.get(keys.publisher) == b"one"
    await publish_adapters(other, 2)
    await redis_client.pexpire(keys.publisher, 1000)
    await publish(trainer("one"), 2)
    assert await redis_client.pttl(keys.publisher) > 1000
    await redis_client.delete(keys.publisher)  # as when the lease is over
    await publish(other, 3)
    with pytest.raises(PolicyRejected, match="run 'other' publishes"):
        await one.rollback_policy(2)


async def test_of_many_trainers_at_once_one_wins_each_version(trainer: Trainer, redis_client: Any, keys: Keys) -> None:
    """Trainers of one run, as after a restart whose predecessor lives on."""
    last, wins = 30, dict[int, list[int]]()

    async def train(name: int) -> None:
        pool = trainer()
        for version in range(1, last + 1):
            try:
                await pool.publish_policy(version, checkpoint=f"/c/{name}/{version}", check=False)
            except PolicyRejected:
                continue
            wins.setdefault(version, []).append(name)

    await asyncio.gather(*map(train, range(8)))
    policies = [command.policy for command in await commands(redis_client, keys) if command.policy]
    told = [(policy.version, policy.source) for policy in policies]
    assert told == sorted(told, key=lambda each: each[0])
    assert told == [(version, f"/c/{winner}/{version}") for version, [winner] in sorted(wins.items())]
    assert told[-1][0] == last
    assert await fields_of(redis_client, keys) == {str(version) for version, _ in told}


async def test_of_many_runs_at_once_one_has_the_checkpoints(trainer: Trainer, redis_client: Any, keys: Keys) -> None:
    refusals: list[str] = []

    async def train(run: str) -> bool:
        try:
            await trainer(run).publish_policy(1, checkpoint=f"/c/{run}", check=False)
        except PolicyRejected as error:
            refusals.append(str(error))
            return False
        return True

    won = await asyncio.gather(*(train(f"run-{number}") for number in range(12)))
    assert sum(won) == 1
    assert all("publishes the checkpoints" in refusal for refusal in refusals)
    assert await redis_client.get(keys.publisher) == f"run-{won.index(True)}".encode()


async def test_publishing_and_going_back_at_once_leave_a_log_that_says_what_is_current(
    trainer: Trainer, redis_client: Any, keys: Keys
) -> None:
    await publish(trainer(), 1)

    async def train(name: int) -> None:
        for step in range(10):
            pool = trainer()
            try:
                if (name + step) % 3:
                    version = (await pool.current_policy()).version + 1  # type: ignore[union-attr]
                    await pool.publish_policy(version, checkpoint=f"/c/{name}/{step}", check=False)
                else:
                    await pool.rollback_policy()
            except (PolicyRejected, PolicyUnknown):
                continue

    await asyncio.gather(*map(train, range(6)))
    current = 1
    generations = []
    for command in (await commands(redis_client, keys))[1:]:
        assert command.policy is not None
        went_back = command.policy.version <= current
        generations.append(command.policy.generation)
        assert generations[-1] == (generations[-2] if len(generations) > 1 else 0) + went_back
        current = command.policy.version
    assert generations[-1] > 0
    assert await redis_client.get(keys.policy) == str(current).encode()
    assert (await trainer().current_policy()).version == current  # type: ignore[union-attr]
    live = [int(field) for field in await fields_of(redis_client, keys) if "@" not in field]
    assert max(live) == current


# Going back


async def test_going_back_abandons_the_versions_after_it(pool: AsyncRolloutPool, redis_client: Any, keys: Keys) -> None:
    await publish(pool, 1, 2, 4, 5)
    back = await pool.rollback_policy(2)
    assert back == Policy(version=2, checkpoint="/c/2", run="r", generation=1)
    assert await pool.current_policy() == back
    assert await fields_of(redis_client, keys) == {"1", "2", "4@0", "5@0"}
    assert (await commands(redis_client, keys))[-1] == Command(policy=back)
    for version in (4, 5):
        with pytest.raises(PolicyUnknown, match=f"policy {version} was abandoned"):
            await pool.rollback_policy(version)
        with pytest.raises(PolicyUnknown, match=f"policy {version} was abandoned"):
            await pool.wait_for_policy(version)
    with pytest.raises(PolicyUnknown, match="policy 3 was never published"):
        await pool.rollback_policy(3)
    # Numbers may be used again, and sources of abandoned ones.
    again = await pool.publish_policy(4, checkpoint="/c/5", check=False)
    assert (again.version, again.generation) == (4, 1)
    assert await pool.rollback_policy() == back.model_copy(update={"generation": 2})
    assert await fields_of(redis_client, keys) == {"1", "2", "4@0", "5@0", "4@1"}
    assert (await pool.rollback_policy()).version == 1
    with pytest.raises(PolicyRejected, match="no version before 1"):
        await pool.rollback_policy()


async def test_before_anything_was_published_there_is_nothing_to_go_back_to(pool: AsyncRolloutPool) -> None:
    with pytest.raises(PolicyRejected, match="no version before"):
        await pool.rollback_policy()
    with pytest.raises(PolicyUnknown, match="never published"):
        await pool.rollback_policy(1)


async def test_a_run_with_adapters_goes_back_among_them(trainer: Trainer, redis_client: Any, keys: Keys) -> None:
    one, other = trainer("one"), trainer("other")
    await publish(one, 1, 2)
    await publish_adapters(one, 3, 4, 5)
    await publish_adapters(other, 3, 4)
    back = await one.rollback_policy()
    assert (back.version, back.lora_path, back.generation, back.base) == (4, "/l/one/4", 1, "/c/2")
    assert await fields_of(redis_client, keys) == {"1", "2", "one:3", "one:4", "one:5@0", "other:3", "other:4"}
    assert (await other.current_policy()).generation == 0  # type: ignore[union-attr]
    assert (await other.publish_policy(5, lora_path="/l/other/5", check=False)).generation == 0
    with pytest.raises(PolicyUnknown, match="among the adapters of run one"):
        await one.rollback_policy(1)
    await publish(one, 6)
    with pytest.raises(PolicyRejected, match="an adapter for '/c/2', and the current checkpoint is policy 6"):
        await one.rollback_policy(3)


async def test_a_trainer_that_was_gone_back_behind_publishes_no_more(trainer: Trainer) -> None:
    """It lives on beside the one that took its place."""
    old, new = trainer(), trainer()
    await publish(old, 1, 2, 3)
    await new.rollback_policy(1)
    with pytest.raises(PolicyRejected, match=r"went back to policy 1 since .*rollback_policy\(1\)"):
        await publish(old, 4)
    with pytest.raises(PolicyRejected, match="went back to policy 1"):
        await old.rollback_policy()
    await publish(new, 2)
    # Whoever says that it knows may go on.
    assert (await old.rollback_policy(2)).generation == 1
    await publish(old, 3)


async def test_a_server_that_lost_its_data_is_published_to_again(trainer: Trainer, redis_client: Any) -> None:
    pool = trainer()
    await publish(pool, 1, 2)
    await pool.rollback_policy(1)
    await redis_client.flushall()
    await publish(pool, 1)


async def outcomes(client: Any, keys: Keys, run: str, batch: str) -> list[str]:
    states = await client.hgetall(keys.batch(run, batch))
    return [states[name].decode() for name in sorted(states) if name.isdigit()]


async def test_what_was_asked_of_abandoned_versions_is_stale(trainer: Trainer, redis_client: Any, keys: Keys) -> None:
    one, other, lora = trainer("one"), trainer("other"), trainer("lora")
    await publish(one, 1, 2, 3)
    await publish_adapters(lora, 4)
    for pool in (one, other, lora):
        for tag in (0, 1, 2, 3, 9):
            await pool.enqueue_prompts(["a", "b"], policy_version=tag, batch_id=f"b{tag}", n=2, split=2)
    await work(redis_client, keys, run="one", most=11)  # b0, b1, one group of b2 and half the other
    await one.rollback_policy(1)
    assert await outcomes(redis_client, keys, "one", "b2") == ["ok", "stale"]
    assert await outcomes(redis_client, keys, "one", "b3") == ["stale", "stale"]
    assert await outcomes(redis_client, keys, "one", "b9") == ["open", "open"]
    assert await outcomes(redis_client, keys, "other", "b1") == ["open", "open"]
    assert await outcomes(redis_client, keys, "lora", "b3") == ["open", "open"]
    groups = [group async for group in other.batches["b3"].collect(LONG)]
    assert groups == []
    assert [group.error for group in other.batches["b3"].dropped] == [
        "policy 3 was abandoned: its lineage went back to policy 1"
    ] * 2
    assert set(await redis_client.hgetall(keys.generations)) == {b"checkpoints"}, "nothing is left to do"


@pytest.mark.parametrize("how", ["rollback", "publish"])
async def test_what_a_dead_trainer_left_to_settle_is_settled_by_the_next_call(
    trainer: Trainer, redis_client: Any, keys: Keys, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pool = trainer()
    await publish(pool, 1, 2)
    for batch in ("a", "b"):
        await pool.enqueue_prompts(["x"] * 3, policy_version=2, batch_id=batch)
    finish = scripts.finish

    async def dies(client: AsyncRedis, keys: Keys, **of: Any) -> int:
        if of["batch"] == "b":
            raise ConnectionResetError("the trainer died here")
        return int(await finish(client, keys, **of))

    with monkeypatch.context() as patch:
        patch.setattr(scripts, "finish", dies)
        with pytest.raises(ConnectionResetError):
            await pool.rollback_policy(1)
    assert await outcomes(redis_client, keys, "r", "a") == ["stale"] * 3
    assert await outcomes(redis_client, keys, "r", "b") == ["open"] * 3
    # The number means another policy from now on.
    after = trainer()
    if how == "rollback":
        assert (await after.rollback_policy(1)).generation == 1
    await until_later(redis_client)
    await after.enqueue_prompts(["x"], policy_version=2, batch_id="new")
    await publish(after, 2)
    assert await outcomes(redis_client, keys, "r", "b") == ["stale"] * 3
    assert await outcomes(redis_client, keys, "r", "new") == ["open"]
    assert set(await redis_client.hgetall(keys.generations)) == {b"checkpoints"}


async def until_later(client: Any) -> None:
    """The server's clock has another millisecond."""
    start = await client.time()
    while (await client.time())[0] == start[0] and (await client.time())[1] // 1000 == start[1] // 1000:
        pass


async def test_the_admission_rule_leaves_room_after_going_back(trainer: Trainer, redis_client: Any, keys: Keys) -> None:
    """What was trained on stays so, though its policies are abandoned: else the run would stand still for ever."""
    pool = trainer(staleness_rule=StalenessRule(max_staleness=0, batch_size=1))
    await publish(pool, 0)
    for step in range(4):
        batch = await pool.enqueue_prompts(["a"], policy_version=step)
        await work(redis_client, keys)
        assert len([group async for group in batch.collect(LONG)]) == 1
        await batch.commit()
        await publish(pool, step + 1)
    await pool.rollback_policy(1)
    await pool.enqueue_prompts(["a"], policy_version=1, timeout=0)


# Waiting


async def beat(client: Any, keys: Keys, name: str, **status: Any) -> None:
    made = WorkerStatus.model_validate({"name": name, "host": "h", "pid": 1, "state": "serving", **status})
    await client.hset(keys.worker(name), mapping=made.fields())


async def serves(pool: AsyncRolloutPool, version: int, **enough: Any) -> bool:
    try:
        await pool.wait_for_policy(version, timeout=0, **enough)
    except PoolTimeout:
        return False
    return True


async def test_so_many_workers_may_be_waited_for(pool: AsyncRolloutPool, redis_client: Any, keys: Keys) -> None:
    await publish(pool, 1)
    for name, policy in (("a", 1), ("b", 1), ("c", 0)):
        await beat(redis_client, keys, name, policy=policy)
    assert await serves(pool, 1, workers=2)
    assert not await serves(pool, 1, workers=3)
    assert await serves(pool, 1, workers=1, fraction=0.6)
    assert not await serves(pool, 1, workers=1, fraction=0.7)
    assert not await serves(pool, 1)
    with pytest.raises(
        PoolTimeout, match=r"not served by 4 workers after 0 s: 2 of 3 do; not yet: c \(serving, policy 0\)"
    ):
        await pool.wait_for_policy(1, workers=4, timeout=0)
    with pytest.raises(PolicyRejected, match="workers"):
        await pool.wait_for_policy(1, workers=0)


async def test_a_run_waits_for_its_own_adapters(trainer: Trainer, redis_client: Any, keys: Keys) -> None:
    one, other = trainer("one"), trainer("other")
    await publish(one, 1)
    await publish_adapters(one, 2, 3)
    await publish_adapters(other, 2, 3, 4)
    await beat(redis_client, keys, "a", policy=1, adapters="one:2 other:2,3")
    assert await serves(one, 1)
    assert await serves(one, 2)
    assert not await serves(one, 3)
    assert await serves(other, 3)
    assert not await serves(other, 4)
    with pytest.raises(PoolTimeout, match=r"a \(serving, policy 1, 2\)"):
        await one.wait_for_policy(3, timeout=0)
    with pytest.raises(PolicyUnknown):
        await one.wait_for_policy(4)


async def test_a_worker_on_an_abandoned_version_does_not_count(
    pool: AsyncRolloutPool, redis_client: Any, keys: Keys
) -> None:
    await publish(pool, 1, 2, 3)
    await pool.rollback_policy(1)
    await beat(redis_client, keys, "a", policy=3, generation=0)
    assert not await serves(pool, 1)
    await beat(redis_client, keys, "a", policy=1, generation=0)  # the same weights, that are only not yet called so
    assert await serves(pool, 1)
    await publish(pool, 2)
    await beat(redis_client, keys, "a", policy=2, generation=0)
    assert not await serves(pool, 2)
    await beat(redis_client, keys, "a", policy=2, generation=1)
    assert await serves(pool, 2)
    await publish_adapters(pool, 3, 4)
    await pool.rollback_policy()
    await beat(redis_client, keys, "a", policy=2, generation=1, adapters="r:4")
    assert not await serves(pool, 3)


async def test_a_wait_ends_when_its_policy_is_abandoned(trainer: Trainer, redis_client: Any, keys: Keys) -> None:
    pool = trainer()
    await publish(pool, 1, 2)
    await beat(redis_client, keys, "a", policy=1)
    waiting = asyncio.create_task(pool.wait_for_policy(2, timeout=LONG))
    await trainer().rollback_policy(1)
    with pytest.raises(PolicyUnknown, match="abandoned"):
        await waiting


async def test_a_failure_of_another_policy_of_the_same_number_does_not_count(
    trainer: Trainer, redis_client: Any, keys: Keys
) -> None:
    one, other = trainer("one"), trainer("other")
    await publish_adapters(one, 1, 2)
    await publish_adapters(other, 1, 2)
    await beat(redis_client, keys, "a", policy=0, adapters="one:1 other:1")

    async def fail(entry: bytes, error: str) -> None:
        ack = Ack(worker="a", command=entry.decode(), version=2, state="failed", seconds=1.0, error=error)
        fields = {name: "" if value is None else value for name, value in ack.model_dump().items()}
        await redis_client.xadd(keys.acks, fields)

    entries = [entry for entry, _ in await redis_client.xrange(keys.control)]
    await redis_client.xadd(keys.acks, {"hello": "world"})
    await redis_client.xadd(
        keys.acks, {"worker": "a", "command": "none", "version": 2, "state": "failed", "seconds": 1}
    )
    await fail(entries[3], "of the other run")
    assert not await serves(one, 2)
    with pytest.raises(PolicyRejected, match="of the other run"):
        await serves(other, 2)
    await one.rollback_policy(1)
    await fail(entries[1], "of the abandoned one")
    await publish_adapters(one, 2)
    assert not await serves(one, 2)


def test_blocking_code_goes_back_too(redis_url: str, tmp_path: Path) -> None:
    with RolloutPool(redis_url, pool="test", run="r", model_roots=[str(tmp_path)]) as pool:
        for version in (1, 2):
            pool.publish_policy(version, checkpoint=str(make_base(tmp_path / str(version))))
        assert pool.rollback_policy().version == 1
        with pytest.raises(PolicyRejected, match="outside"):
            pool.publish_policy(2, checkpoint="/etc", check=False)
        with pytest.raises(PoolTimeout, match="no live worker"):
            pool.wait_for_policy(1, workers=1, timeout=0)
