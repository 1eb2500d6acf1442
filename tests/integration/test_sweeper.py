"""What others lost is found soon, by one host of many, and what nobody will come back to ends."""

import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psutil
import pytest
from lease_scene import LEASE_S, ME, RUN, Clock, Scene
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from waiting import until_blocking

from rollpool.schemas import Keys
from rollpool.schemas.scripts import Record, commit, exact
from rollpool.schemas.scripts.finish import EXPIRE_GRACE_MS, IDLE_RUN_MS
from rollpool.schemas.scripts.leases import RECLAIM_AT_MOST
from rollpool.worker.incarnation import Incarnation
from rollpool.worker.leases import RENEWALS_PER_LEASE
from rollpool.worker.sweeper import SWEEPS_PER_LEASE, TIDY_S

DEAD = "dead:host@1-1"

LEASE_MS = int(1000 * LEASE_S)


@pytest.fixture
def scene(redis_url: str, redis_client: AsyncRedis, keys: Keys) -> Iterator[Scene]:
    made = Scene(redis_url, redis_client, keys)
    yield made
    made.close()


# Turns


async def test_of_many_hosts_one_looks_in_an_eighth_of_a_lease(scene: Scene) -> None:
    sweepers = [scene.sweeper(me=replace(ME, worker=f"w{index}"), lease_s=800.0) for index in range(40)]
    with ThreadPoolExecutor(8) as threads:
        turns = list(threads.map(lambda sweeper: sweeper.is_my_turn(), sweepers))
    assert sum(turns) == 1
    assert not any(sweeper.is_my_turn() for sweeper in sweepers)
    assert 95_000 < scene.server.pttl(scene.keys.sweep) <= 800_000 / SWEEPS_PER_LEASE
    assert scene.server.get(scene.keys.sweep).decode() == sweepers[turns.index(True)]._me.consumer
    scene.another_turn()
    assert sweepers[7].is_my_turn()


async def test_a_turn_whose_host_died_passes_to_another(scene: Scene) -> None:
    assert scene.sweeper(lease_s=0.5).is_my_turn()
    other = scene.sweeper(me=replace(ME, worker="other"), lease_s=0.5)
    until_blocking(other.is_my_turn, "the turn passes on")


class Timed:
    """A client for which the turn ends by the test's clock, and not by the server's."""

    def __init__(self, client: Redis, clock: Clock, ends_at: dict[str, float]) -> None:
        self._client = client
        self._clock = clock
        self._ends_at = ends_at

    def set(self, name: str, value: str, *, nx: bool, px: int) -> bool | None:
        assert nx
        if self._clock.now < self._ends_at.get(name, 0.0):
            return None
        self._ends_at[name] = self._clock.now + px / 1000
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class TwoKeepers:
    """Two hosts in touch with the server for long, and a third that dies; a lease is a minute of the test's clock."""

    LEASE_S = 64.0

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.clock = Clock()
        client = Timed(scene.blocking, self.clock, {})
        self.keepers = [
            scene.keeper(me=replace(ME, worker=name), client=client, clock=self.clock, lease_s=self.LEASE_S)
            for name in ("one", "other")
        ]

    async def leases_until_back(self, *, phases: tuple[float, float], dies_at: float, other_dies_at: float) -> float:
        """Leases from the dead host's last renewal until another may run what it had.

        Args:
            phases: of the two hosts' turns, in renewals.
            dies_at: leases after the beginning, at least 1: by then both have been in touch for a whole one.
            other_dies_at: the same for the second keeper.
        """
        start, each = self.clock.now, self.LEASE_S / RENEWALS_PER_LEASE
        turns = sorted((start + (phase + k) * each, who) for who, phase in enumerate(phases) for k in range(20))
        died_at: float | None = None
        for at, who in turns:
            if who == 1 and at >= start + other_dies_at * self.LEASE_S:
                continue
            if died_at is None and at >= start + dies_at * self.LEASE_S:
                died_at = start + dies_at * self.LEASE_S
                assert await self.scene.take(DEAD), "it took its jobs when it renewed for the last time"
            self.clock.now = at
            if died_at is not None:
                self.scene.age(DEAD, int(1000 * (at - died_at)))
            self.keepers[who].turn()
            if died_at is not None and not self.scene.holders():
                self.clock.now += 10 * self.LEASE_S
                return (at - died_at) / self.LEASE_S
        raise AssertionError("it never came back")


async def test_a_dead_hosts_jobs_are_back_within_a_lease_and_three_eighths(scene: Scene) -> None:
    chance = random.Random(1)
    keepers = TwoKeepers(scene)
    took = []
    for trial in range(40):
        await scene.put(1, batch=f"b{trial}")
        phases = (chance.random(), chance.random())
        other_dies_at = chance.choice([99.0, chance.uniform(1.3, 3.0)])
        dies_at = chance.uniform(1.3, 1.6)
        leases = await keepers.leases_until_back(phases=phases, dies_at=dies_at, other_dies_at=other_dies_at)
        took.append(leases)
        assert len(await scene.take("next:host@1-1")) == 1
        scene.server.delete(*scene.streams)
    assert min(took) >= 1.0
    assert max(took) <= 1.375


async def test_the_worst_case_is_a_host_that_dies_after_its_turn(scene: Scene) -> None:
    """It looked a moment too early, and while its turn lasted the one that lives was refused."""
    await scene.put(1)
    too_early = 1.999  # leases after the beginning; what is lost at 1 is due at 2
    refused = too_early + 0.124
    phases = (refused * RENEWALS_PER_LEASE % 1, too_early * RENEWALS_PER_LEASE % 1)
    leases = await TwoKeepers(scene).leases_until_back(phases=phases, dies_at=1.0, other_dies_at=2.0)
    assert leases == pytest.approx(refused + 1 / RENEWALS_PER_LEASE - 1.0, abs=0.001)


# Looking for what others lost


async def test_only_what_was_not_renewed_for_a_lease_is_returned_and_says_so(scene: Scene) -> None:
    await scene.put(3)
    [late] = await scene.take(DEAD, wanted=1)
    await scene.take("live:host@1-1", wanted=1)
    scene.age(DEAD, LEASE_MS)
    scene.age("live:host@1-1", LEASE_MS // 2)
    scene.sweeper(wall_clock=lambda: 1_700_000_000.0).sweep(now=0.0)
    assert scene.holders() == {"live:host@1-1": 1}
    [(name, record)] = scene.records().items()
    assert name == late.job
    assert record.history == "2023-11-14T22:13:20Z its worker's lease ended\n"
    assert (record.attempts, record.losses, record.avoid) == (1, 1, "dead")


async def test_each_loss_adds_a_line_and_the_job_runs_before_the_backlog(scene: Scene) -> None:
    await scene.put(2)
    sweeper = scene.sweeper()
    for losses in (1, 2, 3):
        [entry] = await scene.take(DEAD, wanted=1)
        assert entry.job == "b/0"
        scene.age(DEAD, LEASE_MS)
        sweeper.sweep(now=0.0)
        record = scene.records()["b/0"]
        assert (record.losses, record.history.count("\n")) == (losses, losses)


@pytest.mark.parametrize(
    ("losses", "company", "after"),
    [
        (1, None, None),
        (2, None, None),
        (2, 5, 5),
        (3, None, 8),
        (3, 500, 8),
        (3, 5, 5),
        (4, None, 1),
        (4, 5, 1),
        (9, 8, 1),
    ],
)
async def test_a_job_that_several_workers_were_lost_with_runs_in_small_company_and_then_alone(
    scene: Scene, losses: int, company: int | None, after: int | None
) -> None:
    """Machines are lost far more often than jobs kill them, and take along all they have each time."""
    entries = await scene.take_with(DEAD, *[Record(losses=losses - 1, company=company)] * 20)
    assert len(entries) == 20
    scene.age(DEAD, LEASE_MS)
    scene.sweeper().sweep(now=0.0)
    records = scene.records().values()
    assert len(records) == 20
    assert {(record.company, record.losses) for record in records} == {(after, losses)}
    assert {(record.attempts, record.faults) for record in records} == {(1, 0)}


async def test_a_job_that_ran_alone_when_its_worker_was_lost_is_charged_itself(scene: Scene) -> None:
    await scene.take_with(DEAD, Record(losses=2, company=1))
    scene.age(DEAD, LEASE_MS)
    scene.sweeper().sweep(now=0.0)
    record = scene.records()["b/0"]
    assert (record.attempts, record.faults, record.losses, record.company) == (0, 1, 3, 1)


async def test_a_suspect_that_waits_for_the_others_to_leave_is_not_charged_when_its_worker_is_lost(
    scene: Scene,
) -> None:
    await scene.take_with(DEAD, *[Record()] * 5, Record(losses=2, company=1))
    scene.age(DEAD, LEASE_MS)
    scene.sweeper().sweep(now=0.0)
    record = scene.records()["b/5"]
    assert (record.attempts, record.faults, record.losses, record.company) == (0, 0, 3, 1)


async def test_more_than_one_call_returns_is_returned_whole(scene: Scene) -> None:
    await scene.put(2 * RECLAIM_AT_MOST + 3)
    await scene.take(DEAD, wanted=10_000)
    scene.age(DEAD, LEASE_MS)
    scene.sweeper().sweep(now=0.0)
    assert scene.holders() == {}
    records = scene.records().values()
    assert len(records) == 2 * RECLAIM_AT_MOST + 3
    assert {record.company for record in records} == {None}


async def test_a_settled_job_of_a_dead_host_does_not_come_back(scene: Scene) -> None:
    await scene.put(1)
    await scene.take(DEAD)
    scene.server.hset(scene.keys.batch(RUN, "b"), 0, "ok")
    scene.age(DEAD, LEASE_MS)
    scene.sweeper().sweep(now=0.0)
    assert (scene.holders(), scene.records()) == ({}, {})


# Predecessors


@pytest.fixture
def predecessor() -> Iterator[tuple[Incarnation, subprocess.Popen[bytes]]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = int(psutil.Process(process.pid).create_time())
    yield Incarnation("me", socket.gethostname(), process.pid, started), process
    process.kill()
    process.communicate()


async def test_an_ended_predecessors_jobs_are_taken_over_at_once_and_nobody_elses(
    scene: Scene, predecessor: tuple[Incarnation, "subprocess.Popen[bytes]"]
) -> None:
    before, process = predecessor
    await scene.put(6)
    others = [
        ME.consumer,
        replace(before, worker="other").consumer,
        replace(before, host="elsewhere").consumer,
        "me:somebody",
    ]
    for consumer in [before.consumer, *others]:
        assert len(await scene.take(consumer, wanted=1)) == 1
    sweeper = scene.sweeper()
    assert sweeper.take_over() == 0  # it runs
    process.kill()
    process.wait()
    assert sweeper.take_over() == 1
    assert scene.holders() == dict.fromkeys(others, 1)
    assert "its worker ended and was restarted" in scene.records()["b/0"].history
    assert sweeper.take_over() == 0


async def test_a_predecessor_is_taken_over_whole_on_all_streams(scene: Scene) -> None:
    ended = replace(ME, pid=999_999_999)
    waited = await scene.take_with(ended.consumer, *[Record()] * 5)
    await scene.put(2 * RECLAIM_AT_MOST + 3, batch="more")
    assert len(await scene.take(ended.consumer, wanted=10_000)) == 2 * RECLAIM_AT_MOST + 3
    assert waited[0].stream == scene.keys.retries
    assert scene.keeper().take_over() == 2 * RECLAIM_AT_MOST + 8
    assert scene.holders() == {}


async def test_what_was_lost_of_a_run_that_this_host_never_heard_of_is_returned_too(scene: Scene) -> None:
    sweeper = scene.sweeper()  # of a host whose hands are full: it pulls nothing
    sweeper.sweep(now=0.0)
    await scene.put(2)
    await scene.take(DEAD, wanted=2)
    scene.age(DEAD, LEASE_MS)
    sweeper.sweep(now=1.0)
    assert set(scene.records()) == {"b/0", "b/1"}


async def test_streams_without_a_group_have_no_predecessors(scene: Scene) -> None:
    scene.server.xadd(scene.keys.jobs(RUN, "high"), {"x": "y"})
    sweeper = scene.sweeper()
    assert sweeper.take_over() == 0
    sweeper.sweep(now=0.0)


# What nobody will come back to


async def server_ms(scene: Scene) -> int:
    seconds, micros = scene.server.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def test_jobs_end_when_their_deadline_is_over_wherever_they_are(scene: Scene) -> None:
    now = await server_ms(scene)
    await scene.put(3, deadline_ms=now - EXPIRE_GRACE_MS - 1000)
    await scene.put(1, batch="later", deadline_ms=now + 3_600_000)
    await scene.put(1, batch="within-grace", deadline_ms=now)
    held, waiting = await scene.take(ME.consumer, wanted=2)
    await scene.give_back(waiting, by=ME.consumer)
    keeper = scene.keeper()
    keeper.hold([held])
    scene.sweeper().expire()
    assert [scene.state(index) for index in range(3)] == ["expired"] * 3
    assert [scene.state(batch=batch) for batch in ("later", "within-grace")] == ["open"] * 2
    keeper.turn()
    assert scene.lost == [held]
    assert (scene.holders(), scene.records()) == ({}, {})
    assert [entry.job for entry in await scene.take(ME.consumer)] == ["later/0", "within-grace/0"]


async def test_every_turn_looks_at_deadlines_also_where_another_host_looks_for_the_lost(scene: Scene) -> None:
    await scene.put(1, deadline_ms=await server_ms(scene) - EXPIRE_GRACE_MS - 1000)
    keeper = scene.keeper()
    scene.server.set(scene.keys.sweep, "another")
    keeper.turn()
    assert scene.state() == "expired"


def beat(scene: Scene, worker: str, **fields: str) -> None:
    scene.server.hset(scene.keys.worker(worker), mapping={"name": worker, "state": "serving", **fields})


async def wait_exactly(scene: Scene, version: int) -> None:
    """One job that waits for a host on this version."""
    await scene.put(1)
    [entry] = await scene.take(ME.consumer)
    await scene.give_back(entry, by=ME.consumer, place=exact(version))


async def test_an_exact_job_is_stale_once_no_host_serves_its_version(scene: Scene) -> None:
    await wait_exactly(scene, 3)
    scene.server.set(scene.keys.policy, 5)
    beat(scene, "old", policy="3")
    beat(scene, "starting", policy="")
    sweeper = scene.sweeper()
    sweeper.sweep(now=0.0)
    assert scene.state() == "open"
    beat(scene, "old", policy="5")
    sweeper.sweep(now=0.1)  # soon, since a job waits so
    assert scene.state() == "stale"
    assert (scene.server.zcard(scene.keys.exact(RUN)), scene.records()) == (0, {})


async def test_an_exact_job_waits_for_the_only_host_on_its_version_while_that_restarts_its_engine(scene: Scene) -> None:
    await wait_exactly(scene, 3)
    scene.server.set(scene.keys.policy, 5)
    beat(scene, "old", state="starting", policy="", heading="3")
    scene.sweeper().sweep(now=0.0)
    assert scene.state() == "open"
    beat(scene, "old", state="changing", policy="", heading="5")
    scene.sweeper().sweep(now=0.0)
    assert scene.state() == "stale"


@pytest.mark.parametrize(
    ("adapters", "state"), [("r:2,3", "open"), ("other:3 r:3", "open"), ("r:4", "stale"), ("other:3", "stale")]
)
async def test_an_exact_job_waits_for_a_host_that_has_the_adapter_of_its_run(
    scene: Scene, adapters: str, state: str
) -> None:
    await wait_exactly(scene, 3)
    scene.server.set(scene.keys.run_policy(RUN), 5)
    beat(scene, "host", policy="1", adapters=adapters)
    scene.sweeper().sweep(now=0.0)
    assert scene.state() == state


async def test_of_many_runs_each_with_exact_jobs_is_looked_at_soon(scene: Scene) -> None:
    sweeper = scene.sweeper()
    sweeper.sweep(now=0.0)
    await wait_exactly(scene, 3)
    scene.server.sadd(scene.keys.runs, *(f"other-{at}" for at in range(50)))
    scene.server.set(scene.keys.policy, 5)
    sweeper.sweep(now=0.1)
    assert scene.state() == "stale"


@pytest.mark.parametrize("version", [5, 6])
async def test_an_exact_job_waits_for_what_is_current_or_still_to_come(scene: Scene, version: int) -> None:
    await wait_exactly(scene, version)
    scene.server.set(scene.keys.policy, 5)
    scene.sweeper().sweep(now=0.0)
    assert scene.state() == "open"


async def test_heartbeats_that_somebody_made_up_stop_nobody(scene: Scene) -> None:
    await wait_exactly(scene, 3)
    scene.server.set(scene.keys.policy, 5)
    for at, made_up in enumerate(
        ("x", "-1", "²", "9" * 5000, "3.0", ":3", "a:b:3", f"{RUN}:{'9' * 5000},²,-3", ": , :")
    ):
        beat(scene, f"w{at}", policy=made_up, heading=made_up, adapters=made_up)
    scene.server.hset(scene.keys.worker("empty"), "other", "x")
    scene.server.set(scene.keys.worker("wrong"), "a string")
    scene.sweeper().sweep(now=0.0)
    assert scene.state() == "stale"


async def test_a_key_of_another_type_in_the_way_keeps_no_lost_job(scene: Scene) -> None:
    await scene.put(1)
    for key in (scene.keys.exact(RUN), scene.keys.policy, scene.keys.run_policy(RUN), scene.keys.deadlines):
        scene.server.rpush(key, "a list")
    keeper = scene.keeper(clock=(clock := Clock()))
    for _ in range(2):
        await scene.take(DEAD)
        for _ in range(RENEWALS_PER_LEASE + 1):
            scene.age(DEAD, LEASE_MS)
            keeper.turn()
            clock.now += LEASE_S / RENEWALS_PER_LEASE
        assert scene.holders() == {}
        scene.another_turn()


def forgotten(scene: Scene) -> Callable[[], bool]:
    return lambda: not scene.server.sismember(scene.keys.runs, RUN)


async def test_a_run_that_ended_is_forgotten_after_a_while(scene: Scene) -> None:
    await scene.put(1)
    [entry] = await scene.take(ME.consumer)
    is_forgotten = forgotten(scene)
    long_ago = await server_ms(scene) - IDLE_RUN_MS - 1000
    sweeper = scene.sweeper()

    def sweep_after(seconds: float) -> bool:
        scene.server.hset(scene.keys.run(RUN), "touched_ms", long_ago)
        sweeper.sweep(now=seconds)
        return is_forgotten()

    assert not sweep_after(0.0)  # a job is open
    await commit(scene.client, scene.keys, run=RUN, batch="b")
    scene.server.xack(entry.stream, "workers", entry.id)
    scene.server.xdel(entry.stream, entry.id)
    scene.server.hset(scene.keys.run(RUN), "open", 0)
    scene.server.delete(scene.keys.open_batches(RUN))
    assert not sweep_after(TIDY_S - 1)  # nothing urgent: looked at once a minute
    assert sweep_after(TIDY_S)
    assert scene.server.ttl(scene.keys.run(RUN)) > 0
    assert not scene.server.exists(*scene.keys.lanes(RUN))


async def test_a_run_that_paused_for_less_is_not_forgotten(scene: Scene) -> None:
    await scene.put(1)
    scene.server.hset(scene.keys.run(RUN), mapping={"open": 0, "touched_ms": await server_ms(scene)})
    scene.server.delete(scene.keys.open_batches(RUN), *scene.streams)
    scene.sweeper().sweep(now=0.0)
    assert not forgotten(scene)()
