"""Bad days of the server, with hosts at work: slow, out of memory, emptied, killed. See docs/guarantees.md."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from fakes import FakeOwner, completion
from stage import POOL, RUN, Stage, make_quick, staged
from waiting import until

from rollpool.ops.local.server import LocalServer, default_server
from rollpool.producer import AsyncBatch, AsyncRolloutPool, BacklogFull
from rollpool.schemas.result_entry import group_of
from rollpool.worker import settler

pytestmark = pytest.mark.both_servers


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    monkeypatch.setattr(settler, "RETRY_S", 0.05)


async def results_of(stage: Stage, batch: str) -> Counter[int]:
    """Results by index, counted on the stream itself."""
    entries = await stage.server.xrange(stage.keys.results(RUN, batch))
    return Counter(group_of(RUN, batch, fields).index for _, fields in entries)


async def test_a_server_that_stands_still_for_longer_than_a_lease_costs_no_job_a_second_run(stage: Stage) -> None:
    owners = [FakeOwner(holding=True) for _ in range(2)]
    for owner, name in zip(owners, ("one", "two"), strict=True):
        await stage.host(owner, name, lease_s=0.5)
    await stage.enqueue(10, batch_id="b")
    await until(lambda: sum(len(owner.engine.open) for owner in owners) == 10)
    await stage.server.client_pause(1500, all=True)  # three leases, in which nobody can renew
    await stage.server.ping()
    await asyncio.sleep(1.0)  # two more, in which a host that reclaimed too early would run them again
    assert sum(len(owner.engine.calls) for owner in owners) == 10
    for owner in owners:
        for call in list(owner.engine.open.values()):
            call.answer.set_result(completion())
    await stage.settled("b", *["ok"] * 10)
    assert set((await results_of(stage, "b")).values()) == {1}


async def test_a_server_out_of_memory_refuses_new_batches_and_settles_the_old_when_it_has_room(stage: Stage) -> None:
    owner = FakeOwner(slots=40, holding=True)
    host = await stage.host(owner)
    await stage.enqueue(20, batch_id="b")
    await until(lambda: len(owner.engine.open) == 20)
    await stage.server.config_set("maxmemory", "1mb")  # less than an empty server uses
    try:
        with pytest.raises(BacklogFull):
            await stage.enqueue(1, batch_id="more")
        for call in list(owner.engine.open.values()):
            call.answer.set_result(completion())
        await until(lambda: not owner.engine.open)
        assert (await stage.states("b")).count("open") == 20
        assert host.busy, "what is finished is kept until the server takes it"
    finally:
        await stage.server.config_set("maxmemory", "0")
    await stage.settled("b", *["ok"] * 20)
    assert set((await results_of(stage, "b")).values()) == {1}
    assert len(owner.engine.calls) == 20, "no sample was made twice"


async def test_a_batch_that_the_server_lost_is_enqueued_again_by_whoever_collects_it(stage: Stage) -> None:
    owner = FakeOwner(slots=2, holding=True)
    await stage.host(owner, lease_s=0.5)
    batch = await stage.enqueue(6, batch_id="b")
    collecting = asyncio.create_task(collect(batch))
    await until(lambda: len(owner.engine.open) == 3)
    next(iter(owner.engine.open.values())).answer.set_result(completion())
    await until(lambda: batch.report().ok == 1)
    await stage.server.flushall()
    owner.engine.reply = lambda _: completion()

    async def finish_what_runs() -> bool:
        for call in list(owner.engine.open.values()):
            if not call.answer.done():
                call.answer.set_result(completion())
        return collecting.done()

    await until(finish_what_runs)
    assert sorted(collecting.result()) == list(range(6)), "each once, though one was collected before the loss"


async def collect(batch: AsyncBatch) -> list[int]:
    """Indexes in the order they came."""
    return [group.index async for group in batch.collect(timeout=60)]


async def test_a_server_that_is_killed_again_and_again_loses_nothing_it_answered(tmp_path: Path) -> None:
    with LocalServer(binary=default_server(), directory=tmp_path, appendonly=True, appendfsync="always") as server:
        async with staged(server.url) as stage:
            owner = FakeOwner(slots=4)
            host = await stage.host(owner, lease_s=0.5)
            batches = []
            for number in range(4):
                batches.append(await stage.enqueue(50, batch_id=f"b-{number}"))
                await until(lambda: host.settled > 0)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.restart)
            for batch in batches:
                assert sorted(await collect(batch)) == list(range(50))
                assert set((await results_of(stage, batch.id)).values()) == {1}


class LosesOneReply:
    """A way to the server on which the first reply to a script is lost, with its connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.lost = 0

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while data := await reader.read(1 << 16):
                to_server.write(data)
                reply = await from_server.read(1 << 16)
                if b"EVAL" in data and not self.lost:
                    self.lost += 1
                    return
                writer.write(reply)
        finally:
            for end in (writer, to_server):
                end.close()


async def test_an_enqueue_whose_reply_was_lost_enqueues_once(stage: Stage) -> None:
    way = LosesOneReply(int(stage.url.rpartition(":")[2].partition("/")[0]))
    proxy = await asyncio.start_server(way.pass_on, "127.0.0.1")
    port = proxy.sockets[0].getsockname()[1]
    async with proxy, AsyncRolloutPool(f"redis://127.0.0.1:{port}/0", pool=POOL, run=RUN) as pool:
        batch = await pool.enqueue_prompts([[index + 1] for index in range(5)], policy_version=0, batch_id="b")
    assert way.lost == 1
    assert len(batch) == 5
    assert await stage.states("b") == ["open"] * 5
    assert await stage.server.xlen(stage.keys.jobs(RUN, "default")) == 5
    await stage.host(FakeOwner())
    await stage.settled("b", *["ok"] * 5)
    assert set((await results_of(stage, "b")).values()) == {1}
