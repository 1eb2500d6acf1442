"""Who holds a job, on a real server: what is renewed stays, what is not comes back once, and never too early."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from lease_scene import LEASE_S, ME, Clock, Flaky, Scene
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ConnectionError
from waiting import until_blocking

from rollpool.schemas import GROUP, Keys
from rollpool.schemas.connection import connect
from rollpool.schemas.scripts import READY, Entry, delayed, finish, parked
from rollpool.worker.leases import RENEWALS_PER_LEASE, LeaseKeeper

DEAD = "dead:host@1-1"


@pytest.fixture
def scene(redis_url: str, redis_client: AsyncRedis, keys: Keys) -> Iterator[Scene]:
    made = Scene(redis_url, redis_client, keys)
    yield made
    made.close()


async def test_what_is_held_is_renewed_and_what_was_released_is_not(scene: Scene) -> None:
    await scene.put(2)
    held, released = await scene.take(ME.consumer)
    keeper = scene.keeper()
    keeper.hold([held, released])
    keeper.release(released)
    scene.age(ME.consumer, 5000)
    keeper.turn()
    ages = {entry: row["time_since_delivered"] for (_, entry), row in scene.pending(ME.consumer).items()}
    assert ages[held.id] < 5000 <= ages[released.id]
    assert scene.lost == []


async def test_renewal_keeps_a_job_from_the_others_for_as_long_as_it_goes_on(scene: Scene) -> None:
    await scene.put(1)
    [entry] = await scene.take(ME.consumer)
    mine = scene.keeper()
    mine.hold([entry])
    mine.start()
    clock = Clock()
    client = connect(scene.url)
    other = scene.keeper(me=replace(ME, worker="other"), client=client, clock=clock)

    def others_turn() -> None:
        scene.another_turn()
        other.turn()
        clock.now += LEASE_S / RENEWALS_PER_LEASE  # it has been there for long, and always reached the server

    end = time.monotonic() + 1.5 * LEASE_S
    while time.monotonic() < end:
        others_turn()
        time.sleep(0.01)  # noqa: ASYNC251 - the keepers live on threads of their own
    assert scene.holders() == {ME.consumer: 1}
    mine.stop()

    def returned() -> bool:
        others_turn()
        return not scene.holders()

    until_blocking(returned, "the job comes back when renewal ends")
    assert scene.records()["b/0"].attempts == 1
    client.close()


async def test_a_dead_consumers_jobs_come_back_after_a_lease_and_not_before(scene: Scene) -> None:
    await scene.put(3)
    await scene.take(DEAD)
    clock = Clock()
    keeper = scene.keeper(clock=clock)
    keeper.turn()
    scene.age(DEAD, int(1000 * LEASE_S) * 3)
    for _ in range(RENEWALS_PER_LEASE - 1):  # however old: not before this host has been there for a lease
        clock.now += LEASE_S / RENEWALS_PER_LEASE
        keeper.turn()
        assert scene.holders() == {DEAD: 3}
    clock.now += LEASE_S / RENEWALS_PER_LEASE
    keeper.turn()
    assert scene.holders() == {}
    assert [record.attempts for record in scene.records().values()] == [1] * 3
    assert len(await scene.take("next:host@1-1")) == 3
    scene.another_turn()
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
    scene.another_turn()
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


async def end_elsewhere(scene: Scene, first: int, last: int) -> None:
    await finish(
        scene.client, scene.keys, run="r", batch="b", outcome="cancelled", error="not wanted", first=first, last=last
    )


async def test_a_thread_that_ends_by_a_bug_is_told(scene: Scene) -> None:
    bug = ZeroDivisionError()

    def broken(entries: list[Entry]) -> None:
        raise bug

    await scene.put(1)
    keeper = scene.keeper()
    keeper._on_lost = broken
    keeper.hold(await scene.take(ME.consumer))
    await end_elsewhere(scene, 0, 0)
    keeper.start()
    keeper.look_again()
    until_blocking(lambda: not keeper.is_alive(), "the thread ended")
    assert scene.bugs == [bug]


async def test_a_job_that_another_host_has_by_now_is_told_lost_once_and_stays_with_it(scene: Scene) -> None:
    await scene.put(2)
    taken, kept = await scene.take(ME.consumer)
    keeper = scene.keeper()
    keeper.hold([taken, kept])
    scene.server.xclaim(taken.stream, GROUP, "other:h@1-1", 0, [taken.id])
    keeper.turn()
    keeper.turn()
    assert scene.lost == [taken]
    assert scene.holders() == {ME.consumer: 1, "other:h@1-1": 1}


async def test_a_settled_job_is_not_told_lost_where_it_was_released_meanwhile(scene: Scene) -> None:
    await scene.put(1)
    [entry] = await scene.take(ME.consumer)
    keeper = scene.keeper()
    keeper.hold([entry])
    scene.server.xack(entry.stream, GROUP, entry.id)
    keeper.release(entry)
    keeper.turn()
    assert scene.lost == []


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
    scene.another_turn()
    keeper.turn()
    assert list(scene.pending()) == [(seen.stream, seen.id)]
    [again] = await scene.take("other:h@1-1")
    assert again.fields[b"job"] == unseen.fields[b"job"]
    assert scene.lost == []


async def test_a_job_that_was_settled_elsewhere_is_told_lost_once_and_its_entry_is_gone(scene: Scene) -> None:
    await scene.put(3)
    entries = await scene.take(ME.consumer)
    keeper = scene.keeper()
    keeper.hold(entries)
    await end_elsewhere(scene, 0, 1)
    keeper.turn()
    keeper.turn()
    assert scene.lost == entries[:2]
    assert list(scene.pending()) == [(entries[2].stream, entries[2].id)]
    assert scene.server.xlen(entries[0].stream) == 1


async def test_jobs_are_renewed_on_whatever_stream_they_came(scene: Scene) -> None:
    await scene.put(4)
    entries = await scene.take(ME.consumer)
    for entry, place in zip(entries, (READY, delayed(0), parked(0)), strict=False):
        await scene.give_back(entry, by=ME.consumer, place=place)
    held = [entries[3], *await scene.take(ME.consumer)]
    assert len({entry.stream for entry in held}) == 2
    keeper = scene.keeper()
    keeper.hold(held)
    scene.age(ME.consumer, 5000)
    keeper.turn()
    assert scene.holders() == {ME.consumer: 4}
    assert scene.idle_ms(ME.consumer) < 5000
    assert scene.lost == []


async def test_a_thread_that_is_told_to_look_again_renews_at_once_and_does_nothing_else(scene: Scene) -> None:
    await scene.put(3)
    entries = await scene.take(ME.consumer, wanted=2)
    await scene.take(DEAD)
    scene.age(DEAD, 3_600_000)
    keeper = scene.keeper(lease_s=600.0)  # its own turn is minutes away
    keeper._reachable_since = keeper._heard_at = time.monotonic() - 600.0
    keeper.hold(entries)
    keeper.start()
    scene.age(ME.consumer, 60_000)
    await end_elsewhere(scene, 0, 0)
    keeper.look_again()
    until_blocking(lambda: scene.lost == entries[:1], "it hears that the job was settled")
    assert scene.idle_ms(ME.consumer) < 60_000
    keeper.look_again()
    keeper.stop()
    assert scene.holders() == {ME.consumer: 1, DEAD: 1}
    assert not scene.server.exists(scene.keys.sweep)


async def test_a_look_that_finds_the_server_out_of_reach_counts_as_an_outage(scene: Scene) -> None:
    clock = Clock()
    client = Flaky(scene.blocking)
    keeper = scene.keeper(client=client, clock=clock)
    in_touch(keeper, clock)
    await scene.put(1)
    await scene.take(DEAD)
    scene.age(DEAD, 3_600_000)
    client.reachable = False
    keeper._turn_due = clock.now + 0.1
    with pytest.raises(ConnectionError):
        keeper._turn_or_look()
    client.reachable = True
    keeper._heard_at = None  # as the thread notes it
    clock.now += 0.1
    scene.another_turn()
    keeper._turn_or_look()
    assert scene.holders() == {DEAD: 1}


async def test_a_turn_that_is_due_is_made_though_looks_came_between(scene: Scene) -> None:
    clock = Clock()
    keeper = scene.keeper(clock=clock)
    in_touch(keeper, clock)
    keeper.turn()
    await scene.put(1)
    await scene.take(DEAD)
    scene.age(DEAD, 3_600_000)
    keeper._turn_due = clock.now + LEASE_S / RENEWALS_PER_LEASE
    for _ in range(10):
        clock.now += LEASE_S / RENEWALS_PER_LEASE / 10 - 1e-9
        scene.another_turn()
        keeper._turn_or_look()
        assert scene.holders() == {DEAD: 1}
    clock.now += 1e-6
    keeper._turn_or_look()
    assert scene.holders() == {}
    assert keeper._turn_due == pytest.approx(clock.now + LEASE_S / RENEWALS_PER_LEASE)


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
