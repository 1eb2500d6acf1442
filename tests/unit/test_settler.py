"""What was handed to the settler is kept until the server has confirmed it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes import held_job, sample
from redis import exceptions
from redis._parsers.base import BaseParser
from waiting import until

from rollpool.schemas import Group, Keys
from rollpool.schemas.scripts import (
    READY,
    Entry,
    GiveBack,
    Place,
    Record,
    Settled,
    Settlement,
    delayed,
    exact,
    parked,
)
from rollpool.schemas.wire import pack_model, unpack_samples
from rollpool.worker import settler
from rollpool.worker.held import HeldJob
from rollpool.worker.settler import BATCH, BATCH_TOKENS, Settler


@dataclass
class FakeServer:
    """Stands in for the two scripts; raises what a test put into `errors` first.

    What a name in `refuses` stands for is refused for ever, and every call that it is part of.
    """

    errors: list[Exception] = field(default_factory=list)
    refuses: dict[str, Exception] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def settle(self, client: Any, keys: Keys, settlements: Sequence[Settlement]) -> list[Settled]:
        bodies = [pack_model(settlement.group) for settlement in settlements]
        await self._called(settlements, [f"{each.group.outcome} {each.group.index}" for each in settlements])
        assert len(bodies) == len(settlements)
        return [Settled(True, each.group.outcome) for each in settlements]

    async def give_back(self, client: Any, keys: Keys, *, consumer: str, jobs: Sequence[GiveBack]) -> list[bool]:
        assert consumer == "w:1"
        await self._called(jobs, [f"back {back.entry.job.rpartition('/')[2]}" for back in jobs])
        return [True] * len(jobs)

    async def _called(self, what: Any, names: list[str]) -> None:
        await self.open.wait()
        self.calls.append(what)
        if self.errors:
            raise self.errors.pop(0)
        for name in names:
            if name in self.refuses:
                raise self.refuses[name]
        self.confirmed += names

    @property
    def returns(self) -> dict[str, GiveBack]:
        """What was given back, by the job's name."""
        return {back.entry.job: back for call in self.calls for back in call if isinstance(back, GiveBack)}


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
    held.samples[0] = sample(tokens, text=text)
    return held.group("ok", worker="w", now=1.0)


def answer(text: str) -> Exception:
    """What redis-py makes of a server's answer: the word it begins with may be gone by then."""
    parsed: Exception = BaseParser.parse_error(text)
    return parsed


async def test_outcomes_keep_their_order(bench: Bench) -> None:
    jobs = [held_job(index) for index in range(3 * BATCH)]
    for held in jobs:
        bench.settler.settle(held, finished(held))
    await bench.settler.flushed()
    assert bench.server.confirmed == [f"ok {index}" for index in range(3 * BATCH)]
    assert [len(call) for call in bench.server.calls] == [BATCH] * 3
    assert bench.done == [held.entry for held in jobs]
    assert (bench.settler.unconfirmed, len(bench.settled)) == (0, 3 * BATCH)


WRONG_TYPE = answer("WRONGTYPE Operation against a key holding the wrong kind of value script: 1, on @user_script:1.")


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionError("gone"),
        exceptions.TimeoutError("no answer"),
        answer("OOM command not allowed when used memory > 'maxmemory'. script: 1, on @user_script:1."),
        answer("READONLY You can't write against a read only replica. script: 1, on @user_script:1."),
        answer("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
        answer("LOADING Redis is loading the dataset in memory"),
        answer("BUSY Redis is busy running a script."),
        answer("MISCONF Errors writing to the AOF file: No space left on device script: 1, on @user_script:1."),
        answer("NOREPLICAS Not enough good replicas to write. script: 1, on @user_script:1."),
        answer("NOPERM this user has no permissions to run the 'evalsha' command"),
        answer("ERR The user executing the script can't run this command or subcommand script: 1, on @user_script:1."),
        answer("ERR ACL failure in script: No permissions to access a key script: on @user_script:1."),
        answer("NOAUTH Authentication required."),
        answer("WRONGPASS invalid username-password pair or user is disabled."),
        answer("CLUSTERDOWN Hash slot not served"),
        answer("TRYAGAIN Multiple keys request during rehashing of slot"),
        answer("MOVED 1234 127.0.0.1:7001"),
        answer("ASK 1234 127.0.0.1:7001"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:20]}",
)
async def test_what_the_server_did_not_take_is_kept_and_tried_again(bench: Bench, error: Exception) -> None:
    bench.server.errors = [error] * 5
    held, back = held_job(0), held_job(1)
    bench.settler.settle(held, finished(held))
    await bench.settler.flushed()
    assert len(bench.server.calls) == 6
    bench.server.errors = [error] * 5
    bench.settler.give_back(back)
    await bench.settler.flushed()
    assert len(bench.server.calls) == 12
    assert (bench.server.confirmed, bench.done) == (["ok 0", "back 1"], [held.entry, back.entry])


async def test_what_the_server_refuses_for_ever_is_let_go_and_keeps_no_other_waiting(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.server.refuses = {"ok 1": WRONG_TYPE, "back 4": WRONG_TYPE}
    jobs = [held_job(index) for index in range(6)]
    for held in jobs[:3]:
        bench.settler.settle(held, finished(held))
    for held in jobs[3:]:
        bench.settler.give_back(held)
    await bench.settler.flushed()
    assert bench.server.confirmed == ["ok 0", "ok 2", "back 3", "back 5"]
    assert len(bench.settled) == 2
    assert (bench.done, bench.settler.unconfirmed) == ([held.entry for held in jobs], 0)
    told = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 2
    assert "WRONGTYPE" in told[0].getMessage()
    after = held_job(7)
    bench.settler.settle(after, finished(after))
    await bench.settler.flushed()
    assert bench.server.confirmed[-1] == "ok 7"


async def test_an_outage_while_the_refused_one_is_looked_for_loses_none_of_the_others(bench: Bench) -> None:
    bench.server.refuses = {"ok 1": WRONG_TYPE}
    bench.server.errors = [
        WRONG_TYPE,
        exceptions.ConnectionError("gone"),
        exceptions.ResponseError("MISCONF"),
        exceptions.ConnectionError("gone"),
    ]
    for index in range(4):
        held = held_job(index)
        bench.settler.settle(held, finished(held))
    await bench.settler.flushed()
    assert bench.server.confirmed == ["ok 0", "ok 2", "ok 3"]


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


@pytest.mark.parametrize("place", [READY, delayed(1234), parked(7), exact(7)], ids=lambda place: place.name)
async def test_a_planned_move_costs_nothing_wherever_it_leads(bench: Bench, place: Place) -> None:
    before = Record(attempts=1, faults=1, losses=3, company=4, avoid="w", history="line\n")
    bench.settler.give_back(held_job(0, record=before), place)
    await bench.settler.flushed()
    back = bench.server.returns["b/0"]
    assert (back.record, back.place, back.done) == (before, place, b"")


async def test_a_loss_costs_what_its_record_says(bench: Bench) -> None:
    after = Record(losses=1, company=1)
    bench.settler.give_back(held_job(0), record=after)
    bench.settler.give_back(held_job(1, record=after), record=Record())
    await bench.settler.flushed()
    assert bench.server.returns["b/0"].record == after
    assert bench.server.returns["b/1"].record == Record()


async def test_finished_samples_go_with_a_job_that_is_given_back(bench: Bench) -> None:
    held = held_job(n=4, done={3: sample(3, version=1)})
    held.samples[1] = sample(2, version=2)
    held.pieces[0] = sample(1, version=2).model_copy(update={"finish_reason": "abort"})
    held.generation = 4
    bench.settler.give_back(held)
    await bench.settler.flushed()
    read = unpack_samples(bench.server.returns["b/0"].done)
    spans = {index: each.version_spans for index, each in read.samples}
    assert spans == {0: ((2, 0, 1),), 1: ((2, 0, 2),), 3: ((1, 0, 3),)}
    assert read.generation == 4


async def test_samples_that_cannot_be_encoded_are_left_out_and_the_job_goes_back(bench: Bench) -> None:
    held = held_job(n=2)
    held.samples[0] = sample(text="half of a pair: \ud83d")
    bench.settler.give_back(held)
    await bench.settler.flushed()
    assert bench.server.returns["b/0"].done == b""
    assert bench.done == [held.entry]


async def test_a_part_is_settled_as_the_part_it_is(bench: Bench) -> None:
    whole, part = held_job(0), held_job(1, parts=3, part=2)
    for held in (whole, part):
        bench.settler.settle(held, finished(held))
    await bench.settler.flushed()
    [call] = bench.server.calls
    assert [(each.part, each.entry.job) for each in call] == [(0, "b/0"), (2, "b/1#2")]


async def test_an_entry_that_is_no_job_is_settled_with_the_reason(bench: Bench) -> None:
    held = held_job(0)
    bench.settler.settle_entry(held.entry, held.group("failed", worker="w", now=1.0), dead="no job")
    await bench.settler.flushed()
    [[settlement]] = bench.server.calls
    assert (settlement.entry, settlement.dead) == (held.entry, "no job")
    assert bench.done == [held.entry]


async def test_a_job_that_is_handed_in_has_left_the_host(bench: Bench) -> None:
    settled, returned = held_job(0), held_job(1)
    bench.settler.settle(settled, settled.group("stale", worker="w", now=1.0))
    bench.settler.give_back(returned, parked(3))
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


async def test_large_jobs_go_back_in_calls_a_server_accepts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settler, "BATCH_BYTES", 30_000)
    for index in range(5):
        held = held_job(index, n=2)
        held.samples[0] = sample(1500)  # some 12 kB
        bench.settler.give_back(held)
    await bench.settler.flushed()
    assert [len(call) for call in bench.server.calls] == [2, 2, 1]
    held = held_job(9, n=2)
    held.samples[0] = sample(10_000)
    bench.settler.give_back(held)
    await bench.settler.flushed()
    assert bench.server.confirmed[-1] == "back 9"
