"""Slots of a roll-out on real servers: enough hosts go on serving, whoever asks, dies, or restarts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as Unreachable
from waiting import until

from rollpool.ops.inspect import read_status
from rollpool.schemas import Keys, WorkerStatus
from rollpool.schemas.connection import connect, connect_async
from rollpool.schemas.scripts import Turn, release_turn, renew_turn, take_turn
from rollpool.worker.policy import turn as turns
from rollpool.worker.policy.turn import ChangeTurn

pytestmark = pytest.mark.both_servers

LEASE_MS = 30_000


class Pool:
    """Hosts of which only the heartbeat is there."""

    def __init__(self, url: str) -> None:
        self.client = connect_async(url)
        self.server: Any = self.client
        self.keys = Keys("test")

    async def beat(self, *names: str, state: str = "serving") -> None:
        for name in names:
            await self.server.hset(self.keys.worker(name), mapping={"name": name, "state": state})

    async def take(self, worker: str, workers: str, *, least: int | None = None, lease_ms: int = LEASE_MS) -> Turn:
        """Names are letters."""
        return await take_turn(
            self.client, self.keys, worker, workers=list(workers), lease_ms=lease_ms, min_serving=least
        )

    async def slots(self) -> set[str]:
        return {name.decode() for name in await self.server.zrange(self.keys.rollout, 0, -1)}

    async def end_lease(self, worker: str) -> None:
        """As if it had not renewed for long."""
        await self.server.zadd(self.keys.rollout, {worker: 1}, xx=True)


@pytest.fixture
async def pool(redis_url: str) -> AsyncIterator[Pool]:
    made = Pool(redis_url)
    async with aclosing(made.client):
        yield made


# The script


@pytest.mark.parametrize(("hosts", "floor"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3), (8, 6), (9, 6), (100, 75)])
async def test_three_quarters_go_on_serving_and_of_a_few_all_but_one(pool: Pool, hosts: int, floor: int) -> None:
    names = [f"w{at}" for at in range(hosts)]
    await pool.beat(*names)
    granted = [await take_turn(pool.client, pool.keys, name, workers=names, lease_ms=LEASE_MS) for name in names]
    assert {turn.floor for turn in granted} == {floor}
    assert sum(turn.granted for turn in granted) == len(await pool.slots()) == hosts - floor
    assert [turn.granted for turn in granted] == sorted((turn.granted for turn in granted), reverse=True)


@pytest.mark.parametrize(("least", "granted"), [(0, 4), (1, 3), (3, 1), (4, 0), (9, 0)])
async def test_the_trainer_may_say_how_many_must_go_on_serving(pool: Pool, least: int, granted: int) -> None:
    await pool.beat(*"abcd")
    answers = [await pool.take(name, "abcd", least=least) for name in "abcd"]
    assert sum(answer.granted for answer in answers) == granted
    assert {answer.floor for answer in answers} == {least}


async def test_who_waits_is_told_how_many_others_serve_and_how_many_must(pool: Pool) -> None:
    await pool.beat(*"abcd")
    assert await pool.take("a", "abcd") == Turn(True, 3, 3)
    assert await pool.take("b", "abcd") == Turn(False, 2, 3)


async def test_a_freed_slot_is_the_next_ones_and_freeing_again_harms_nobody(pool: Pool) -> None:
    await pool.beat(*"ab")
    assert (await pool.take("a", "ab")).granted
    assert not (await pool.take("b", "ab")).granted
    assert await release_turn(pool.client, pool.keys, "a")
    assert (await pool.take("b", "ab")).granted
    assert not await release_turn(pool.client, pool.keys, "a")
    assert await pool.slots() == {"b"}


async def test_who_has_a_slot_gets_it_again_and_its_lease_anew(pool: Pool) -> None:
    """Its answer was lost, or it was restarted in the middle of its change."""
    await pool.beat(*"ab")
    await pool.take("a", "ab", lease_ms=10_000)
    before = await pool.server.zscore(pool.keys.rollout, "a")
    await pool.beat("b", state="broken")
    assert (await pool.take("a", "ab", least=5, lease_ms=LEASE_MS)).granted
    assert await pool.server.zscore(pool.keys.rollout, "a") >= before + 20_000


async def test_who_dies_in_its_change_frees_its_slot_by_its_lease(pool: Pool) -> None:
    await pool.beat(*"abc")
    assert (await pool.take("a", "abc")).granted
    await pool.server.delete(pool.keys.worker("a"))
    assert await pool.take("b", "bc") == Turn(False, 1, 2)  # it may come back: nobody knows yet
    await pool.end_lease("a")
    assert await pool.take("b", "bc") == Turn(True, 1, 1)
    assert await pool.slots() == {"b"}


async def test_a_lease_ends_by_the_servers_clock(pool: Pool) -> None:
    await pool.beat(*"ab")
    assert (await pool.take("a", "ab", lease_ms=50)).granted

    async def other_gets_it() -> bool:
        return (await pool.take("b", "ab")).granted

    await until(other_gets_it)


async def test_renewing_keeps_a_slot_and_gives_none(pool: Pool) -> None:
    await pool.beat(*"ab")
    assert not await renew_turn(pool.client, pool.keys, "a", lease_ms=LEASE_MS)
    assert await pool.slots() == set()
    await pool.take("a", "ab", lease_ms=10_000)
    assert await renew_turn(pool.client, pool.keys, "a", lease_ms=10**9)
    seconds, _ = await pool.server.time()
    assert await pool.server.zscore(pool.keys.rollout, "a") > 1000 * seconds + 10**8


@pytest.mark.parametrize("state", ["broken", "starting", "suspended", "paused", "stopping", "changing"])
async def test_who_does_not_serve_takes_nothing_away(pool: Pool, state: str) -> None:
    await pool.beat(*"abc")
    await pool.beat("a", state=state)
    await pool.take("b", "abc")
    assert (await pool.take("a", "abc", least=9)).granted
    assert await pool.slots() >= {"a"}


@pytest.mark.parametrize("state", ["broken", "starting", "suspended", "paused", "stopping", "changing"])
async def test_only_hosts_that_serve_count_as_serving(pool: Pool, state: str) -> None:
    await pool.beat(*"abc")
    await pool.beat("c", state=state)
    assert (await pool.take("a", "abc", least=2)) == Turn(False, 1, 2)
    assert (await pool.take("a", "abc", least=1)) == Turn(True, 1, 1)


async def test_a_host_that_changes_counts_as_there_and_one_that_is_broken_does_not(pool: Pool) -> None:
    await pool.beat(*"abcd")
    await pool.beat("d", state="changing")  # an attached engine: it took no turn
    assert (await pool.take("a", "abcd")) == Turn(False, 2, 3)
    await pool.beat("d", state="broken")
    assert (await pool.take("a", "abcd")) == Turn(True, 2, 2)


async def test_hosts_whose_heartbeats_are_gone_do_not_all_change_at_once(pool: Pool) -> None:
    """The server stood still for longer than heartbeats last."""
    answers = [await pool.take(name, "") for name in "abcd"]
    assert [answer.granted for answer in answers] == [True, False, False, False]


async def test_a_name_that_is_given_twice_counts_once(pool: Pool) -> None:
    await pool.beat(*"ab")
    assert (await pool.take("a", "aabbbb")) == Turn(True, 1, 1)


@pytest.mark.parametrize("made", ["string", "hash", "list"])
async def test_what_somebody_put_in_the_way_of_the_slots_gives_way(pool: Pool, made: str) -> None:
    put: dict[str, Callable[[str], Any]] = {
        "string": lambda key: pool.server.set(key, "x"),
        "hash": lambda key: pool.server.hset(key, "x", "y"),
        "list": lambda key: pool.server.rpush(key, "x"),
    }
    await pool.beat(*"ab")
    await put[made](pool.keys.rollout)
    assert not await release_turn(pool.client, pool.keys, "a")
    assert not await renew_turn(pool.client, pool.keys, "a", lease_ms=LEASE_MS)
    assert (await pool.take("a", "ab")).granted
    assert not (await pool.take("b", "ab")).granted


async def test_heartbeats_that_somebody_made_up_stop_nobody(pool: Pool) -> None:
    await pool.beat(*"ab")
    await pool.server.set(pool.keys.worker("c"), "a string")
    await pool.server.hset(pool.keys.worker("d"), "state", b"\xff" * 1000)
    assert (await pool.take("a", "abcd")) == Turn(True, 1, 1)


async def test_the_status_names_who_is_changing_and_not_whose_lease_is_over(pool: Pool, redis_url: str) -> None:
    seconds, _ = await pool.server.time()
    for name in "abc":
        status = WorkerStatus(name=name, host="h", pid=1, state="serving", seen_ms=1000 * seconds)
        await pool.server.hset(pool.keys.worker(name), mapping=status.fields())
    with connect(redis_url) as client:
        assert read_status(client, pool.keys).changing is None
        for name in "cba":
            assert (await pool.take(name, "abc", least=0)).granted
        await pool.end_lease("b")
        assert read_status(client, pool.keys).changing == "a, c"


# The script against what it promises

HOSTS = "abcdefghij"
STATES = ["serving", "serving", "serving", "changing", "starting", "broken", "suspended", None]
steps = st.one_of(
    st.tuples(st.just("take"), st.sampled_from(HOSTS), st.sampled_from([None, None, None, 0, 2, 7])),
    st.tuples(st.just("take"), st.sampled_from(HOSTS), st.none()),
    st.tuples(st.sampled_from(["release", "renew", "lapse"]), st.sampled_from(HOSTS), st.none()),
    st.tuples(st.just("beat"), st.sampled_from(HOSTS), st.sampled_from(STATES)),
)


class Loop:
    """One loop and one client for all examples."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.pool = Pool(url)

    def run(self, body: Callable[..., Any], *args: Any) -> None:
        self.runner.run(self.pool.server.flushall())
        self.runner.run(body(self.pool, *args))


@contextmanager
def looped(url: str) -> Iterator[Loop]:
    loop = Loop(url)
    try:
        yield loop
    finally:
        loop.runner.run(loop.pool.client.aclose())
        loop.runner.close()


@pytest.fixture
def loop(redis_url: str) -> Iterator[Loop]:
    with looped(redis_url) as made:
        yield made


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(walk=st.lists(steps, min_size=5, max_size=40))
def test_no_order_of_asking_leaves_fewer_serving_than_must(loop: Loop, walk: list[tuple[str, str, Any]]) -> None:
    loop.run(walked, walk)


async def walked(pool: Pool, walk: list[tuple[str, str, Any]]) -> None:
    """Each answer is what a plain reading of the rule gives."""
    states: dict[str, str | None] = dict.fromkeys(HOSTS, "serving")
    slots = set[str]()
    await pool.beat(*HOSTS)
    for action, name, what in walk:
        if action == "beat":
            states[name] = what
            await pool.server.delete(pool.keys.worker(name))
            if what is not None:
                await pool.beat(name, state=what)
        elif action == "take":
            there = {host for host, state in states.items() if state in ("serving", "changing")} | slots | {name}
            floor = len(there) - max(1, -(-len(there) // 4)) if what is None else what
            others = {host for host, state in states.items() if state == "serving"} - slots - {name}
            free = name in slots or states[name] not in ("serving", None)
            expected = Turn(free or len(others) >= floor, len(others), floor)
            assert await pool.take(name, HOSTS, least=what) == expected
            if expected.granted:
                slots.add(name)
        elif action == "release":
            assert await release_turn(pool.client, pool.keys, name) == (name in slots)
            slots.discard(name)
        elif action == "lapse":
            await pool.end_lease(name)
            if name in slots:  # purged at the next claim
                slots.discard(name)
                await pool.server.zrem(pool.keys.rollout, name)
        else:
            assert await renew_turn(pool.client, pool.keys, name, lease_ms=LEASE_MS) == (name in slots)
        assert await pool.slots() == slots


# As a host uses it


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TRY_EVERY_S", 0.005)
    monkeypatch.setattr(turns, "NAMES_EVERY_S", 0.0)


@pytest.mark.parametrize(("hosts", "least"), [(1, None), (2, None), (8, None), (12, None), (6, 2), (6, 5)])
async def test_of_many_that_change_at_once_enough_go_on_serving(
    pool: Pool, often: None, hosts: int, least: int | None
) -> None:
    """As a host does it: the slot, the state, the change, the state, the slot."""
    names = [f"w{at}" for at in range(hosts)]
    await pool.beat(*names)
    floor = hosts - max(1, -(-hosts // 4)) if least is None else least
    serving, fewest = set(names), hosts

    async def change(name: str, rounds: int) -> None:
        nonlocal fewest
        for _ in range(rounds):
            turn = ChangeTurn(pool.client, pool.keys, name)
            await turn.take(least)
            serving.remove(name)
            fewest = min(fewest, len(serving))
            await pool.beat(name, state="changing")
            await asyncio.sleep(0.01)
            serving.add(name)
            await pool.beat(name)
            await turn.release()

    async with asyncio.timeout(60):
        await asyncio.gather(*(change(name, 3) for name in names))
    assert fewest == floor  # never fewer, and as many at once as may
    assert await pool.slots() == set()


async def test_who_waits_says_what_for_until_it_has_its_turn(pool: Pool, often: None) -> None:
    await pool.beat(*"ab")
    mine, others = (ChangeTurn(pool.client, pool.keys, name) for name in "ab")
    assert mine.waiting_for == ""
    await others.take()
    assert others.waiting_for == ""
    waiting = asyncio.create_task(mine.take())
    await until(lambda: mine.waiting_for)
    assert mine.waiting_for == "its turn to change: 0 other hosts would go on serving, and 1 must"
    await others.release()
    await waiting
    assert mine.waiting_for == ""
    await mine.release()


async def test_who_stops_waiting_waits_for_nothing_and_leaves_no_slot(pool: Pool, often: None) -> None:
    await pool.beat(*"ab")
    mine, others = (ChangeTurn(pool.client, pool.keys, name) for name in "ab")
    await others.take()
    waiting = asyncio.create_task(mine.take())
    await until(lambda: mine.waiting_for)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await mine.release()
    await mine.release()
    assert (mine.waiting_for, await pool.slots()) == ("", {"b"})
    await others.release()


async def test_a_turn_is_kept_for_as_long_as_the_change_takes(
    pool: Pool, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "RENEW_EVERY_S", 0.005)
    await pool.beat(*"ab")
    mine = ChangeTurn(pool.client, pool.keys, "a")
    await mine.take()
    for _ in range(3):
        before = await pool.server.zscore(pool.keys.rollout, "a")

        async def renewed(before: float = before) -> bool:
            return bool(await pool.server.zscore(pool.keys.rollout, "a") > before)

        await until(renewed)
    await mine.release()
    assert await pool.slots() == set()


async def test_a_worker_that_was_restarted_in_its_change_has_its_turn_already(pool: Pool, often: None) -> None:
    await pool.beat(*"abcd")
    before = ChangeTurn(pool.client, pool.keys, "a")
    await before.take()
    await pool.beat("b", state="broken")
    again = ChangeTurn(pool.client, pool.keys, "a")
    async with asyncio.timeout(30):
        await again.take(min_serving=9)
    await again.release()
    await before.release()
    assert await pool.slots() == set()


class Flaky:
    """A client whose answers get lost, after the server did what was asked."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self.lost = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def evalsha(self, *args: Any) -> Any:
        answer = await self._client.evalsha(*args)
        if self.lost:
            self.lost -= 1
            raise Unreachable("the answer was lost")
        return answer


async def test_an_answer_that_got_lost_costs_no_second_slot_and_no_wait(pool: Pool, often: None) -> None:
    await pool.beat(*"abcd")
    await pool.take("z", "")  # the server knows the script by now
    await release_turn(pool.client, pool.keys, "z")
    flaky: Any = Flaky(pool.client)
    flaky.lost = 1
    mine = ChangeTurn(flaky, pool.keys, "a")
    async with asyncio.timeout(30):
        await mine.take()
    assert flaky.lost == 0
    assert await pool.slots() == {"a"}
    await mine.release()


async def test_a_host_that_dies_in_its_change_blocks_the_others_no_longer_than_its_lease(
    pool: Pool, often: None
) -> None:
    await pool.beat(*"abcd")
    dead, mine = (ChangeTurn(pool.client, pool.keys, name) for name in "ab")
    await dead.take()
    waiting = asyncio.create_task(mine.take())
    await until(lambda: mine.waiting_for)
    assert dead._renewal is not None
    dead._renewal.cancel()
    await pool.server.delete(pool.keys.worker("a"))
    await pool.end_lease("a")
    await waiting
    await mine.release()
