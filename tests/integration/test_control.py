"""Commands and the answers to them, on a real server, with hosts that are played by their heartbeats and acks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from fakes import FakeOwner
from redis.asyncio import Redis as AsyncRedis
from stage import POOL, Stage
from waiting import LONG, until

from rollpool.producer import control
from rollpool.producer.control import Heard, send, wait_for_acks
from rollpool.producer.server import Server
from rollpool.schemas import Command, Keys, Policy, PoolTimeout, WorkerStatus
from rollpool.schemas.control_log import command_of


@pytest.fixture
async def side(redis_url: str) -> AsyncIterator[Server]:
    made = Server(redis_url, "test", "r")
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "POLL_S", 0.01)


class Hosts:
    """Hosts without an engine."""

    def __init__(self, client: AsyncRedis, keys: Keys) -> None:
        self.client: Any = client
        self.keys = keys

    async def beat(self, *names: str, **status: Any) -> None:
        for name in names:
            made = WorkerStatus.model_validate({"name": name, "host": "vm", "pid": 1, "state": "serving", **status})
            await self.client.hset(self.keys.worker(name), mapping=made.fields())

    async def die(self, name: str) -> None:
        await self.client.delete(self.keys.worker(name))

    async def answer(self, name: str, command: str, state: str, at: str = "*", **more: Any) -> None:
        fields = {"worker": name, "command": command, "kind": "pause", "state": state, "seconds": 0.5, **more}
        await self.client.xadd(self.keys.acks, fields, id=at)


@pytest.fixture
def hosts(redis_client: AsyncRedis, keys: Keys) -> Hosts:
    return Hosts(redis_client, keys)


async def last(side: Server, entry: str, command: Command, timeout: float = LONG) -> Heard:
    """The end of a wait."""
    found = [heard async for heard in wait_for_acks(side, entry, command, timeout)]
    return found[-1]


def words(heard: Heard) -> list[str]:
    return [f"{ack.worker} {ack.state}" for ack in heard.latest.values()]


PAUSE = Command(kind="pause")


@pytest.mark.both_servers
async def test_a_command_is_one_entry_for_people_and_for_hosts(redis_client: AsyncRedis, keys: Keys) -> None:
    command = Command(kind="drain", within_s=5.0, workers=("a",))
    entry = await send(redis_client, keys, command)
    entries: Any = await redis_client.xrange(keys.control)
    [(found, fields)] = entries
    assert found.decode() == entry
    assert command_of(fields) == command
    assert (fields[b"kind"], fields[b"within_s"], fields[b"workers"]) == (b"drain", b"5.0", b"a")


async def test_a_wait_tells_answers_as_they_come_and_ends_with_the_last_of_them(side: Server, hosts: Hosts) -> None:
    await hosts.beat("a", "b")
    entry = await send(side.client, side.keys, PAUSE)
    said: list[str] = []
    async with aclosing(wait_for_acks(side, entry, PAUSE, LONG)) as looks:
        async for heard in looks:
            said += [f"{ack.worker} {ack.state}" for ack in heard.new]
            if not said:
                assert [worker.name for worker in heard.waiting] == ["a", "b"]
                await hosts.answer("a", entry, "received")
            elif said[-1] == "a received":
                await hosts.answer("a", entry, "applied", detail="done")
            elif said[-1] == "a applied":
                assert [worker.name for worker in heard.waiting] == ["b"]
                await hosts.answer("b", entry, "failed", error="no engine")
    assert said == ["a received", "a applied", "b failed"]
    assert [ack.error for ack in heard.failed] == ["no engine"]
    assert [ack.detail for ack in heard.applied] == ["done"]


async def test_only_hosts_that_the_command_is_for_are_waited_for(side: Server, hosts: Hosts) -> None:
    await hosts.beat("a", "b")
    command = Command(kind="pause", workers=("b",))
    entry = await send(side.client, side.keys, command)
    await hosts.answer("b", entry, "applied")
    assert words(await last(side, entry, command)) == ["b applied"]


async def test_answers_to_other_commands_and_made_up_ones_are_not_heard(side: Server, hosts: Hosts) -> None:
    await hosts.beat("a")
    entry = await send(side.client, side.keys, PAUSE)
    await hosts.answer("a", "1-0", "failed", error="of another command")
    await hosts.client.xadd(side.keys.acks, {"command": entry, "state": "applied"})
    await hosts.client.xadd(side.keys.control, {"kind": "resume", "body": b"nonsense"})
    await hosts.answer("a", entry, "applied")
    assert words(await last(side, entry, PAUSE)) == ["a applied"]


async def test_an_answer_in_the_same_millisecond_is_heard(side: Server, hosts: Hosts) -> None:
    """Streams number the entries of a millisecond apart."""
    await hosts.beat("a")
    entry = "1000-7"
    await hosts.answer("a", entry, "applied", at="1000-0")
    assert words(await last(side, entry, PAUSE)) == ["a applied"]


async def test_time_over_names_who_has_not_answered_and_what_they_do(side: Server, hosts: Hosts) -> None:
    await hosts.beat("a")
    await hosts.beat("b", error="no directory /models/2")
    await hosts.beat("c", state="changing", staging="policy 2: 10 of 20 MiB")
    command = Command(policy=Policy(version=2, checkpoint="/models/2", run="r"))
    entry = await send(side.client, side.keys, command)
    await hosts.answer("a", entry, "applied", kind="policy")
    await hosts.answer("c", entry, "received", kind="policy")
    with pytest.raises(PoolTimeout) as told:
        await last(side, entry, command, timeout=0.0)
    message = str(told.value)
    assert f"policy 2 (command {entry}): 1 applied and 0 failed after 0 s" in message
    assert "b (serving, has not received it, no directory /models/2), c (changing, policy 2: 10 of 20 MiB)." in message


async def test_a_host_that_dies_is_waited_for_no_more(side: Server, hosts: Hosts) -> None:
    await hosts.beat("a", "b")
    entry = await send(side.client, side.keys, PAUSE)
    await hosts.answer("a", entry, "applied")
    async for heard in wait_for_acks(side, entry, PAUSE, LONG):
        if heard.waiting:
            await hosts.die("b")
    assert (words(heard), heard.gone) == (["a applied"], ("b",))


async def test_what_hosts_said_that_are_long_gone_counts_for_nothing(side: Server, hosts: Hosts) -> None:
    """A policy may be published again, long after."""
    entry = await send(side.client, side.keys, PAUSE)
    await hosts.answer("old", entry, "failed", error="no disk")
    await hosts.beat("a")
    await hosts.answer("a", entry, "applied")
    assert words(await last(side, entry, PAUSE)) == ["a applied"]


async def test_a_host_that_joins_is_waited_for_where_the_command_is_a_state(side: Server, hosts: Hosts) -> None:
    await hosts.beat("a")
    entry = await send(side.client, side.keys, PAUSE)
    waited: set[str] = set()
    async for heard in wait_for_acks(side, entry, PAUSE, LONG):
        waited.update(worker.name for worker in heard.waiting)
        if waited == {"a"}:
            await hosts.beat("b")
        elif "a" not in heard.latest:
            await hosts.answer("a", entry, "applied")
            await hosts.answer("b", entry, "applied")
    assert waited == {"a", "b"}


@pytest.mark.parametrize("change", ["joins", "starts anew"])
async def test_what_is_done_once_binds_only_those_that_were_there(side: Server, hosts: Hosts, change: str) -> None:
    command = Command(kind="flush")
    await hosts.beat("a", "b")
    entry = await send(side.client, side.keys, command)
    heard = None
    async for heard in wait_for_acks(side, entry, command, LONG):
        if "a" not in heard.latest:
            await hosts.beat("c" if change == "joins" else "b", pid=2)
            await hosts.answer("a", entry, "applied")
            if change == "joins":
                await hosts.answer("b", entry, "applied")
    assert heard is not None
    assert heard.gone == (() if change == "joins" else ("b",))


async def test_a_later_command_ends_the_wait_for_those_it_is_for(side: Server, hosts: Hosts) -> None:
    await hosts.beat("a", "b")
    entry = await send(side.client, side.keys, PAUSE)
    later = await send(side.client, side.keys, Command(kind="resume", workers=("b",)))
    await hosts.answer("a", entry, "applied")
    heard = await last(side, entry, PAUSE)
    assert (words(heard), heard.voided) == (["a applied"], {"b": later})


async def test_many_answers_are_read_to_the_end(side: Server, hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_PAGE", 3)
    names = [f"w{number}" for number in range(10)]
    await hosts.beat(*names)
    entry = await send(side.client, side.keys, PAUSE)
    for name in names:
        await hosts.answer(name, entry, "applied")
    async with asyncio.timeout(LONG):
        assert len((await last(side, entry, PAUSE)).applied) == 10


async def test_hosts_at_work_obey_and_answer(stage: Stage) -> None:
    for name in ("a", "b"):
        await stage.host(FakeOwner(), name)
    side = Server(stage.url, POOL, "r")
    try:
        for command in (
            *(PAUSE, Command(kind="drain", within_s=0.0), Command(kind="concurrency", concurrency=3)),
            *(Command(kind="resume"), Command(kind="flush"), Command(kind="cancel", run="r")),
        ):
            heard = await last(side, await send(side.client, side.keys, command), command)
            assert sorted(words(heard)) == ["a applied", "b applied"], command.kind
        await until(lambda: is_at(stage, "a", "serving", target=3), "a pulls again")
        only_a = Command(kind="pause", workers=("a",))
        assert words(await last(side, await send(side.client, side.keys, only_a), only_a)) == ["a applied"]
        await until(lambda: is_at(stage, "a", "paused", target=3), "a says so")
        assert await is_at(stage, "b", "serving", target=3)
    finally:
        await side.close()


async def is_at(stage: Stage, name: str, state: str, *, target: int) -> bool:
    status = await stage.heartbeat(name)
    return status is not None and (status.state, status.target) == (state, target)
