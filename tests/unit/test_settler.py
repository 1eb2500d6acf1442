"""What was handed to the settler is kept until the server has confirmed it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fakes import held_job
from redis.exceptions import ConnectionError, ResponseError
from waiting import until

from rollpool.schemas import Group, Keys, Sample, VersionSpan
from rollpool.schemas.scripts import Entry, GiveBack, Settled, Settlement
from rollpool.schemas.wire import pack_model
from rollpool.worker import settler
from rollpool.worker.held import HeldJob
from rollpool.worker.settler import BATCH, BATCH_TOKENS, Settler


@dataclass
class FakeServer:
    """Stands in for the two scripts; raises what a test put into `errors` first."""

    errors: list[Exception] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def settle(self, client: Any, keys: Keys, settlements: Sequence[Settlement]) -> list[Settled]:
        bodies = [pack_model(settlement.group) for settlement in settlements]
        await self._called(settlements)
        assert len(bodies) == len(settlements)
        self.confirmed += [f"{each.group.outcome} {each.group.index}" for each in settlements]
        return [Settled(True, each.group.outcome) for each in settlements]

    async def give_back(self, client: Any, keys: Keys, *, consumer: str, jobs: Sequence[GiveBack]) -> list[bool]:
        await self._called(jobs)
        self.confirmed += [f"back {back.job.index} {back.attempts}" for back in jobs]
        return [True] * len(jobs)

    async def _called(self, what: Any) -> None:
        await self.open.wait()
        self.calls.append(what)
        if self.errors:
            raise self.errors.pop(0)


@dataclass
class Bench:
    server: FakeServer
    settler: Settler
    done: list[Entry]
    settled: list[Settled]


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    server = FakeServer()
    server.open.set()
    monkeypatch.setattr(settler, "settle", server.settle)
    monkeypatch.setattr(settler, "give_back", server.give_back)
    monkeypatch.setattr(settler, "RETRY_S", 0.0)
    done: list[Entry] = []
    settled: list[Settled] = []
    client: Any = None
    made = Settler(client, Keys("test"), consumer="w:1", on_done=done.append, on_settled=settled.extend)
    running = asyncio.create_task(made.run())
    yield Bench(server, made, done, settled)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def finished(held: HeldJob, *, tokens: int = 1, text: str = "x") -> Group:
    ids = np.zeros(tokens, np.int32)
    held.samples[0] = Sample.model_construct(
        output_ids=ids,
        logprobs=ids.astype(np.float32),
        text=text,
        finish_reason="stop",
        version_spans=(VersionSpan(0, 0, tokens),),
    )
    return held.group("ok", worker="w", now=1.0)


async def test_outcomes_keep_their_order(bench: Bench) -> None:
    jobs = [held_job(index) for index in range(3 * BATCH)]
    for held in jobs:
        bench.settler.settle(held, finished(held))
    await bench.settler.flushed()
    assert bench.server.confirmed == [f"ok {index}" for index in range(3 * BATCH)]
    assert [len(call) for call in bench.server.calls] == [BATCH] * 3
    assert bench.done == [held.entry for held in jobs]
    assert (bench.settler.unconfirmed, len(bench.settled)) == (0, 3 * BATCH)


@pytest.mark.parametrize("error", [ConnectionError("gone"), ResponseError("OOM command not allowed")])
async def test_what_the_server_did_not_take_is_kept_and_tried_again(bench: Bench, error: Exception) -> None:
    bench.server.errors = [error] * 5
    held = held_job()
    bench.settler.settle(held, finished(held))
    await bench.settler.flushed()
    assert len(bench.server.calls) == 6
    assert (bench.server.confirmed, bench.done) == (["ok 0"], [held.entry])


async def test_nothing_is_done_before_the_server_has_confirmed_it(bench: Bench) -> None:
    bench.server.open.clear()
    held, back = held_job(0), held_job(1)
    bench.settler.settle(held, finished(held))
    bench.settler.give_back(back)
    flushed = asyncio.create_task(bench.settler.flushed())
    for _ in range(20):
        await asyncio.sleep(0)
    assert (bench.settler.unconfirmed, bench.done, flushed.done()) == (2, [], False)
    bench.server.open.set()
    await flushed
    assert (bench.settler.unconfirmed, len(bench.done)) == (0, 2)


async def test_flushed_covers_what_is_handed_in_during_a_flush(bench: Bench) -> None:
    bench.server.open.clear()
    first, second = held_job(0), held_job(1)
    bench.settler.settle(first, finished(first))
    for _ in range(5):
        await asyncio.sleep(0)
    bench.settler.settle(second, finished(second))
    bench.server.open.set()
    await bench.settler.flushed()
    assert bench.server.confirmed == ["ok 0", "ok 1"]


async def test_flushed_returns_at_once_where_nothing_was_handed_in(bench: Bench) -> None:
    await bench.settler.flushed()


async def test_only_a_loss_costs_an_attempt(bench: Bench) -> None:
    bench.settler.give_back(held_job(0))
    bench.settler.give_back(held_job(1), lost=True)
    await bench.settler.flushed()
    assert bench.server.confirmed == ["back 0 0", "back 1 1"]


async def test_a_job_that_is_handed_in_has_left_the_host(bench: Bench) -> None:
    settled, returned = held_job(0), held_job(1)
    bench.settler.settle(settled, settled.group("stale", worker="w", now=1.0))
    bench.settler.give_back(returned, parked_for=3)
    assert (settled.left, returned.left) == (True, True)
    await bench.settler.flushed()


async def test_large_results_go_in_calls_a_server_accepts(bench: Bench) -> None:
    for index in range(5):
        held = held_job(index)
        bench.settler.settle(held, finished(held, tokens=BATCH_TOKENS // 2))
    await bench.settler.flushed()
    assert [len(call) for call in bench.server.calls] == [2, 2, 1]
    held = held_job(9)
    bench.settler.settle(held, finished(held, tokens=2 * BATCH_TOKENS))
    await bench.settler.flushed()
    assert bench.server.confirmed[-1] == "ok 9"


async def test_a_result_that_cannot_be_encoded_fails_alone(bench: Bench) -> None:
    jobs = [held_job(index) for index in range(3)]
    for held in jobs:
        bench.settler.settle(held, finished(held, text="half of a pair: \ud83d" if held.job.index == 1 else "x"))
    await bench.settler.flushed()
    assert bench.server.confirmed == ["ok 0", "failed 1", "ok 2"]
    [call] = bench.server.calls
    assert "cannot be encoded" in call[1].dead


async def test_a_stopped_settler_keeps_what_is_not_confirmed(bench: Bench) -> None:
    bench.server.open.clear()
    held = held_job()
    bench.settler.settle(held, finished(held))
    await until(lambda: bench.settler.unconfirmed == 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(bench.settler.flushed(), 0.01)
    assert bench.done == []
