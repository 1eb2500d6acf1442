"""Who holds a job, on a real server: what is renewed stays, what is not comes back once, and never too early."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
from fakes import job
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ConnectionError
from waiting import until_blocking

from rollpool.schemas import GROUP, Keys
from rollpool.schemas.connection import connect
from rollpool.schemas.scripts import Entry, enqueue, pull
from rollpool.schemas.scripts.leases import RECLAIM_AT_MOST
from rollpool.schemas.wire import pack_model
from rollpool.worker.leases import RENEWALS_PER_LEASE, Incarnation, LeaseKeeper

#: Short enough to wait for, and long enough for a loaded machine to renew in time.
LEASE_S = 1.0

ME = Incarnation.current("me")


class Clock:
    """Monotonic seconds, by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Flaky:
    """A client of a server that can be out of reach; counts what was asked of it."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self.reachable = True

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if not self.reachable:
                raise ConnectionError("out of reach")
            return getattr(self._client, name)(*args, **options)

        return call


class Scene:
    def __init__(self, url: str, client: AsyncRedis, keys: Keys) -> None:
        self.blocking = connect(url)
        self.server: Any = self.blocking
        self.client = client
        self.keys = keys
        self.stream = keys.jobs("r", "default")
        self.lost: list[Entry] = []
        self.bugs: list[BaseException] = []

    async def put(self, count: int) -> None:
        jobs = [job(index) for index in range(count)]
        bodies = [part for made in jobs for part in (made.preview(), pack_model(made))]
        options: Any = {"run": "r", "batch": "b", "lane": "default", "content": "c", "policy": 0, "n": 1}
        await enqueue(self.client, self.keys, previews_and_bodies=bodies, **options)

    async def take(self, by: str, wanted: int = 100) -> list[Entry]:
        return await pull(self.client, self.keys, streams=self.keys.lanes("r"), consumer=by, wanted=wanted, version=0)

    def keeper(
        self, *, me: Incarnation = ME, client: Any = None, clock: Callable[[], float] | None = None
    ) -> LeaseKeeper:
        made = LeaseKeeper(
            client or self.blocking,
            me,
            lease_s=LEASE_S,
            on_lost=self.lost.extend,
            on_bug=self.bugs.append,
            clock=clock or time.monotonic,
        )
        made.watch(self.keys.lanes("r"))
        return made

    def holders(self) -> dict[str, int]:
        consumers = self.server.xinfo_consumers(self.stream, GROUP)
        return {row["name"].decode(): row["pending"] for row in consumers if row["pending"]}

    def age(self, consumer: str, milliseconds: int) -> None:
        """Make what a consumer holds look as if it was not renewed for so long."""
        rows = self.server.xpending_range(self.stream, GROUP, "-", "+", 10_000, consumer)
        for row in rows:
            ids = [row["message_id"]]
            self.server.xclaim(self.stream, GROUP, consumer, 0, ids, idle=milliseconds, justid=True)

    def idle_ms(self, consumer: str) -> int:
        rows = self.server.xpending_range(self.stream, GROUP, "-", "+", 10_000, consumer)
        return int(max(row["time_since_delivered"] for row in rows))

    def attempts(self) -> list[bytes | None]:
        return [fields.get(b"attempts") for _, fields in self.server.xrange(self.stream)]


@pytest.fixture
def scene(redis_url: str, redis_client: AsyncRedis, keys: Keys) -> Iterator[Scene]:
    made = Scene(redis_url, redis_client, keys)
    yield made
    made.blocking.close()


async def test_what_is_held_is_renewed_and_what_was_released_is_not(scene: Scene) -> None:
    await scene.put(2)
    held, released = await scene.take(ME.consumer)
    keeper = scene.keeper()
    keeper.hold([held, released])
    keeper.release(released)
    scene.age(ME.consumer, 5000)
    keeper.turn()
    rows = scene.server.xpending_range(scene.stream, GROUP, "-", "+", 10, ME.consumer)
    ages = {row["message_id"].decode(): row["time_since_delivered"] for row in rows}
    assert ages[held.id] < 5000 <= ages[released.id]
    assert scene.lost == []


async def test_renewal_keeps_a_job_from_the_others_for_as_long_as_it_goes_on(scene: Scene) -> None:
    await scene.put(1)
    [entry] = await scene.take(ME.consumer)
    mine = scene.keeper()
    mine.hold([entry])
    mine.start()
    clock = Clock()
    other = scene.keeper(me=replace(ME, worker="other"), client=connect_again(scene), clock=clock)
    end = time.monotonic() + 1.5 * LEASE_S
    while time.monotonic() < end:
        other.turn()
        clock.now += LEASE_S / RENEWALS_PER_LEASE  # it has been there for long, and always reached the server
        time.sleep(0.01)  # noqa: ASYNC251 - the keepers live on threads of their own
    assert scene.holders() == {ME.consumer: 1}
    mine.stop()

    def returned() -> bool:
        other.turn()
        return not scene.holders()

    until_blocking(returned, "the job comes back when renewal ends")
    assert scene.attempts() == [b"1"]
    other._client.close()


def connect_again(scene: Scene) -> Redis:
    options = scene.blocking.connection_pool.connection_kwargs
    return connect(f"redis://{options['host']}:{options['port']}/{options['db']}")


async def test_a_dead_consumers_jobs_come_back_after_a_lease_and_not_before(scene: Scene) -> None:
    await scene.put(3)
    await scene.take("dead:host@1-1")
    clock = Clock()
    keeper = scene.keeper(clock=clock)
    keeper.turn()
    scene.age("dead:host@1-1", int(1000 * LEASE_S) * 3)
    for _ in range(RENEWALS_PER_LEASE - 1):  # however old: not before this host has been there for a lease
        clock.now += LEASE_S / RENEWALS_PER_LEASE
        keeper.turn()
        assert scene.holders() == {"dead:host@1-1": 3}
    clock.now += LEASE_S / RENEWALS_PER_LEASE
    keeper.turn()
    assert scene.holders() == {}
    assert scene.attempts() == [b"1"] * 3
    await scene.take("next:host@1-1")
    keeper.turn()
    assert scene.holders() == {"next:host@1-1": 3}  # fresh: theirs


def in_touch(keeper: LeaseKeeper, clock: Clock) -> None:
    """Have reached the server for a whole lease."""
    for _ in range(RENEWALS_PER_LEASE + 1):
        keeper.turn()
        clock.now += LEASE_S / RENEWALS_PER_LEASE


async def test_nobody_reclaims_for_one_lease_after_an_outage(scene: Scene) -> None:
    clock = Clock()
    client = Flaky(scene.blocking)
    keeper = scene.keeper(client=client, clock=clock)
    in_touch(keeper, clock)
    client.reachable = False
    for _ in range(8):
        with pytest.raises(ConnectionError):
            keeper.turn()
        clock.now += LEASE_S / RENEWALS_PER_LEASE
    await scene.put(1)
    await scene.take("cut-off-too:host@1-1")
    scene.age("cut-off-too:host@1-1", 2000)
    client.reachable = True
    for _ in range(RENEWALS_PER_LEASE):
        keeper.turn()
        assert scene.holders() == {"cut-off-too:host@1-1": 1}
        clock.now += LEASE_S / RENEWALS_PER_LEASE
    keeper.turn()
    assert scene.holders() == {}


async def test_an_outage_that_the_client_sat_out_by_itself_counts_as_well(scene: Scene) -> None:
    clock = Clock()
    keeper = scene.keeper(clock=clock)
    in_touch(keeper, clock)
    await scene.put(1)
    await scene.take("cut-off-too:host@1-1")
    scene.age("cut-off-too:host@1-1", 2000)
    clock.now += 2 * LEASE_S  # one call, which got through at last
    keeper.turn()
    assert scene.holders() == {"cut-off-too:host@1-1": 1}


async def test_the_thread_outlives_an_outage(scene: Scene) -> None:
    await scene.put(1)
    [entry] = await scene.take(ME.consumer)
    client = Flaky(scene.blocking)
    keeper = scene.keeper(client=client)
    keeper.hold([entry])
    client.reachable = False
    keeper.start()
    time.sleep(LEASE_S)  # noqa: ASYNC251 - a few turns of the thread
    client.reachable = True
    scene.age(ME.consumer, 60_000)
    until_blocking(lambda: scene.idle_ms(ME.consumer) < 60_000, "it renews again")
    keeper.stop()
    assert not keeper.is_alive()


async def test_a_thread_that_ends_by_a_bug_is_told(scene: Scene) -> None:
    bug = ZeroDivisionError()

    def broken() -> float:
        raise bug

    keeper = scene.keeper(clock=broken)
    keeper.start()
    until_blocking(lambda: not keeper.is_alive(), "the thread ended")
    assert scene.bugs == [bug]


async def test_a_job_that_another_host_has_by_now_is_told_lost_once_and_stays_with_it(scene: Scene) -> None:
    await scene.put(2)
    taken, kept = await scene.take(ME.consumer)
    keeper = scene.keeper()
    keeper.hold([taken, kept])
    scene.server.xclaim(scene.stream, GROUP, "other:h@1-1", 0, [taken.id])
    keeper.turn()
    keeper.turn()
    assert scene.lost == [taken]
    assert scene.holders() == {ME.consumer: 1, "other:h@1-1": 1}


async def test_a_settled_job_is_not_told_lost_where_it_was_released_meanwhile(scene: Scene) -> None:
    await scene.put(1)
    [entry] = await scene.take(ME.consumer)
    keeper = scene.keeper()
    keeper.hold([entry])
    scene.server.xack(scene.stream, GROUP, entry.id)
    keeper.release(entry)
    keeper.turn()
    assert scene.lost == []


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
    keeper = scene.keeper()
    assert keeper.take_over() == 0  # it runs
    process.kill()
    process.wait()
    assert keeper.take_over() == 1
    assert scene.holders() == dict.fromkeys(others, 1)
    assert keeper.take_over() == 0


async def test_a_predecessor_that_held_more_than_one_call_returns_is_taken_over_whole(scene: Scene) -> None:
    ended = replace(ME, pid=999_999_999)
    await scene.put(2 * RECLAIM_AT_MOST + 3)
    assert len(await scene.take(ended.consumer, wanted=10_000)) == 2 * RECLAIM_AT_MOST + 3
    assert scene.keeper().take_over() == 2 * RECLAIM_AT_MOST + 3


async def test_streams_that_are_gone_or_were_never_a_groups_are_nobodys(scene: Scene) -> None:
    scene.server.xadd(scene.keys.jobs("r", "high"), {"x": "y"})
    clock = Clock()
    keeper = scene.keeper(clock=clock)
    assert keeper.take_over() == 0
    in_touch(keeper, clock)


async def test_own_entries_whose_delivery_was_never_seen_come_back(scene: Scene) -> None:
    await scene.put(2)
    seen, unseen = await scene.take(ME.consumer)  # the reply with the second is lost
    clock = Clock()
    keeper = scene.keeper(clock=clock)
    keeper.hold([seen])
    in_touch(keeper, clock)
    scene.age(ME.consumer, int(2000 * LEASE_S))
    keeper.turn()
    assert scene.holders() == {ME.consumer: 1}
    [row] = scene.server.xpending_range(scene.stream, GROUP, "-", "+", 10)
    assert row["message_id"].decode() == seen.id
    [again] = await scene.take("other:h@1-1")
    assert again.fields[b"job"] == unseen.fields[b"job"]
    assert scene.lost == []


async def test_jobs_come_and_go_while_the_thread_renews(scene: Scene) -> None:
    """The held are changed by one thread and read by another."""
    await scene.put(200)
    entries = await scene.take(ME.consumer, wanted=200)
    keeper = scene.keeper()
    stop = threading.Event()
    errors: list[BaseException] = []

    def turn() -> None:
        try:
            while not stop.is_set():
                keeper.turn()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=turn)
    thread.start()
    for _ in range(20):
        keeper.hold(entries)
        for entry in entries:
            keeper.release(entry)
    stop.set()
    thread.join()
    assert (errors, scene.lost) == ([], [])
