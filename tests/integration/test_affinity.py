"""A job that wishes for a host: it runs there where it can, elsewhere where it cannot, and once in any case."""

import asyncio
import itertools
import time
from collections import Counter

import pytest
from fakes import FakeOwner, completion
from stage import POOL, RUN, Stage, make_quick, running
from waiting import until

from rollpool.producer import AsyncRolloutPool, Group
from rollpool.schemas import WorkerStatus
from rollpool.worker import puller

#: Seconds for which a job is left to its host here: far over what that needs to take it.
LEAVE_S = 5.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    monkeypatch.setattr(puller, "LEAVE_S", LEAVE_S)


async def two_hosts(stage: Stage, **owners: FakeOwner) -> dict[str, FakeOwner]:
    """Started, and listed as serving."""
    given = {name: owners.get(name) or FakeOwner() for name in ("one", "two")}
    for name, owner in given.items():
        await stage.host(owner, name)
    for name in given:
        await until_listed(stage, name)
    return given


async def until_listed(stage: Stage, name: str) -> None:
    async def listed() -> bool:
        beat = await stage.heartbeat(name)
        return beat is not None and beat.state == "serving"

    await until(listed, f"{name} is listed")


async def turn(stage: Stage, number: int, key: str | None = "talk") -> Group:
    batch = await stage.enqueue(prompts=[[7] * (number + 1)], batch_id=f"{key}-{number}", affinity=key)
    [group] = [group async for group in batch.collect(timeout=60)]
    await batch.commit()
    return group


async def wish_for(stage: Stage, name: str) -> None:
    """The pool object remembers that a turn was made there."""
    stage.pool._homes.remember("talk", name)


async def test_a_conversation_stays_on_one_host(stage: Stage) -> None:
    await two_hosts(stage)
    workers = Counter([(await turn(stage, number)).worker for number in range(20)])
    assert workers.most_common(1)[0][1] >= 17, workers
    assert sum(workers.values()) == 20


async def test_conversations_side_by_side_stay_each_on_its_host(stage: Stage) -> None:
    await two_hosts(stage, one=FakeOwner(slots=2), two=FakeOwner(slots=2))

    async def talk(key: str) -> list[str]:
        return [(await turn(stage, number, key)).worker for number in range(6)]

    made = await asyncio.gather(*(talk(f"talk-{number}") for number in range(8)))
    moves = sum(before != after for workers in made for before, after in itertools.pairwise(workers))
    assert moves <= 4, made


@pytest.mark.parametrize("wished", ["one", "two"])
async def test_a_job_is_left_to_the_host_it_wishes_for_at_no_cost(stage: Stage, wished: str) -> None:
    owners = await two_hosts(stage, one=FakeOwner(holding=True), two=FakeOwner(holding=True))
    await wish_for(stage, wished)
    await stage.enqueue(4, batch_id="b", affinity="talk")
    await until(lambda: len(owners[wished].engine.open) == 4)
    for call in list(owners[wished].engine.open.values()):
        call.answer.set_result(completion())
    groups = await stage.settled("b", *["ok"] * 4)
    assert {group.worker for group in groups} == {wished}
    assert await stage.dead() == []


async def test_a_host_that_is_gone_is_not_waited_for(stage: Stage) -> None:
    await two_hosts(stage)
    await wish_for(stage, "never-there")
    began = time.monotonic()
    await turn(stage, 0)
    assert time.monotonic() - began < LEAVE_S


async def test_a_host_that_leaves_lets_the_conversation_go_on_elsewhere(stage: Stage) -> None:
    await stage.host(FakeOwner(), "stays")
    async with stage.hosted(FakeOwner(), "leaves"):
        await until_listed(stage, "leaves")
        await wish_for(stage, "leaves")
        assert (await turn(stage, 0)).worker == "leaves"
    assert (await turn(stage, 1)).worker == "stays"
    assert (await turn(stage, 2)).worker == "stays"


async def test_a_dead_host_that_is_still_listed_is_waited_for_no_longer_than_a_moment(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puller, "LEAVE_S", 0.3)
    ghost = WorkerStatus(name="ghost", host="h", pid=1, state="serving", policy=0)
    await stage.server.hset(stage.keys.worker("ghost"), mapping=ghost.fields())
    await stage.host(FakeOwner(), "one")
    await wish_for(stage, "ghost")
    began = time.monotonic()
    assert (await turn(stage, 0)).worker == "one"
    assert time.monotonic() - began >= 0.3, "it was left to the ghost first"
    assert (await turn(stage, 1)).worker == "one", "the conversation is at home here now"


async def test_a_host_that_serves_no_policy_for_the_job_is_not_waited_for(stage: Stage) -> None:
    old = WorkerStatus(name="old", host="h", pid=1, state="serving", policy=0)
    await stage.server.hset(stage.keys.worker("old"), mapping=old.fields())
    await stage.host(FakeOwner(), "new", initial="/policy/3", initial_version=3)
    await wish_for(stage, "old")
    began = time.monotonic()
    await stage.enqueue(1, batch_id="b", affinity="talk", policy_version=3, max_staleness=0)
    [group] = await stage.settled("b", "ok")
    assert group.worker == "new"
    assert time.monotonic() - began < LEAVE_S


async def test_a_full_host_keeps_nobody_waiting_for_long(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puller, "LEAVE_S", 0.3)
    full = FakeOwner(slots=1, holding=True)
    async with running(stage.made(full, "full")):
        await until_listed(stage, "full")
        await stage.enqueue(2, batch_id="much")
        await until(lambda: full.engines and full.engine.open)
        await stage.host(FakeOwner(), "free")
        await wish_for(stage, "full")
        held = len(full.engine.calls)
        assert (await turn(stage, 0)).worker == "free"
        assert len(full.engine.calls) == held
        for call in list(full.engine.open.values()):
            call.answer.set_result(completion())
        await stage.settled("much", "ok", "ok")


async def test_what_its_host_gives_back_is_for_anybody(stage: Stage) -> None:
    first = FakeOwner(holding=True)
    async with running(stage.made(first, "first", drain_s=0.0)):
        await until_listed(stage, "first")
        await wish_for(stage, "first")
        await stage.enqueue(1, batch_id="b", affinity="talk")
        await until(lambda: first.engine.open)
    record = (await stage.records())["b/0"]
    assert (record.passed, record.attempts, record.losses) == ("first", 0, 0)
    again = WorkerStatus(name="first", host="h", pid=1, state="serving", policy=0)  # it serves again at once
    await stage.server.hset(stage.keys.worker("first"), mapping=again.fields())
    began = time.monotonic()
    await stage.host(FakeOwner(), "second")
    [group] = await stage.settled("b", "ok")
    assert group.worker == "second"
    assert time.monotonic() - began < LEAVE_S


async def test_a_repeated_enqueue_returns_the_first_batch_wherever_it_wishes_to_run_meanwhile(stage: Stage) -> None:
    await wish_for(stage, "one")
    first = await stage.enqueue(2, batch_id="b", affinity="talk")
    await wish_for(stage, "two")
    assert await stage.enqueue(2, batch_id="b", affinity="talk") is first
    assert await stage.enqueue(2, batch_id="b") is first, "the wish is no part of the content"
    assert (await stage.server.hget(stage.keys.batch(RUN, "b"), "size")) == b"2"
    await first.cancel()


async def test_a_resumed_trainer_repeats_its_enqueue_and_goes_on(stage: Stage) -> None:
    await two_hosts(stage)
    await turn(stage, 0)
    await stage.enqueue(prompts=[[7, 7]], batch_id="talk-1", affinity="talk")
    state = stage.pool.state_dict()
    async with await AsyncRolloutPool.resume(state, stage.url, pool=POOL) as pool:
        batch = await pool.enqueue_prompts([[7, 7]], policy_version=0, batch_id="talk-1", affinity="talk")
        [group] = [group async for group in batch.collect(timeout=60)]
        assert pool._homes.of("talk") == group.worker
        await batch.commit()


async def test_a_batch_that_the_server_lost_is_enqueued_again_with_its_wish(stage: Stage) -> None:
    await wish_for(stage, "one")
    batch = await stage.enqueue(2, batch_id="b", affinity="talk")
    await stage.server.flushall()
    await two_hosts(stage)
    groups = [group async for group in batch.collect(timeout=60)]
    assert sorted(group.index for group in groups) == [0, 1]
