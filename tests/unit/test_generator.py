"""Every job that is handed to the generator leaves it by exactly one exit, whatever its engine does."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fakes import FakeEngine, Reply, Request, completion, fake_engine, held_job, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from rollpool.schemas import EngineUnavailable, Policy, VersionSpan
from rollpool.schemas.scripts import Record
from rollpool.worker.engines.protocol import ChatRequest, Completion, RequestRefused, SampleRequest
from rollpool.worker.generator import SICK_AFTER, TRIES_PER_SAMPLE, Generator
from rollpool.worker.held import HeldJob
from rollpool.worker.suspects import least

LOST = EngineUnavailable("the connection broke")
REFUSED = RequestRefused("the prompt is too long")


@dataclass
class Exits:
    """Notes by which exit each job left."""

    finished_jobs: list[HeldJob] = field(default_factory=list)
    refusals: list[tuple[HeldJob, str]] = field(default_factory=list)
    losses: list[tuple[HeldJob, str]] = field(default_factory=list)
    expiries: list[HeldJob] = field(default_factory=list)
    misplacements: list[HeldJob] = field(default_factory=list)
    bugs: list[BaseException] = field(default_factory=list)

    def finished(self, held: HeldJob) -> None:
        assert sorted(held.samples) == list(range(held.job.n))
        self.finished_jobs.append(held)

    def refused(self, held: HeldJob, error: str) -> None:
        self.refusals.append((held, error))

    def lost(self, held: HeldJob, error: str) -> None:
        self.losses.append((held, error))

    def expired(self, held: HeldJob) -> None:
        assert held.left
        self.expiries.append(held)

    def misplaced(self, held: HeldJob) -> None:
        assert held.left
        self.misplacements.append(held)

    def broken(self, bug: BaseException) -> None:
        self.bugs.append(bug)

    def of(self, held: HeldJob) -> list[str]:
        """How this job left."""
        return (
            ["finished"] * self.finished_jobs.count(held)
            + ["refused"] * [job for job, _ in self.refusals].count(held)
            + ["lost"] * [job for job, _ in self.losses].count(held)
            + ["expired"] * self.expiries.count(held)
            + ["misplaced"] * self.misplacements.count(held)
        )


def generator(
    engine: FakeEngine,
    exits: Exits,
    *,
    target: int = 4,
    on_change: Callable[[], None] | None = None,
    sample_timeout_s: float = 600.0,
) -> Generator:
    """Deadlines are milliseconds from when the job is handed in."""
    return Generator(
        engine,
        policy=Policy(version=7, checkpoint="/policy/7", run="r"),
        decode=lambda ids: "|".join(map(str, ids)),
        target=target,
        outlet=exits,
        on_change=on_change or (lambda: None),
        seconds_to=lambda time_ms: time_ms / 1000,
        sample_timeout_s=sample_timeout_s,
    )


def suspect(index: int, company: int, **fields: Any) -> HeldJob:
    return held_job(index, record=Record(losses=2, company=company), **fields)


def job_of(request: Request) -> int:
    assert isinstance(request, SampleRequest)
    return int(request.input_ids[0])


def inside(engine: FakeEngine) -> set[int]:
    """The jobs of which the engine makes a sample now."""
    return {job_of(call.request) for call in engine.open.values()}


def answer_all(engine: FakeEngine, *, but: Iterable[int] = ()) -> None:
    for call in list(engine.open.values()):
        if job_of(call.request) not in but and not call.answer.done():
            call.answer.set_result(completion())


@pytest.fixture
def engine() -> FakeEngine:
    return fake_engine()


@pytest.fixture
def exits() -> Exits:
    return Exits()


async def settled_down() -> None:
    """Let everything that can run now run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_finished_job_has_its_samples_in_order_and_says_which_policy_made_them(
    engine: FakeEngine, exits: Exits
) -> None:
    held = held_job(n=3)
    made = generator(engine, exits)
    made.submit([held])
    await until(lambda: len(engine.open) == 3)
    for position, call in reversed(list(enumerate(engine.open.values()))):
        call.answer.set_result(completion(position + 1))
    await made.drain()
    assert exits.finished_jobs == [held]
    group = held.group("ok", worker="w", now=1.0)
    assert [sample.version_spans for sample in group.samples] == [((7, 0, 1),), ((7, 0, 2),), ((7, 0, 3),)]
    assert (made.samples_made, made.tokens_made, made.jobs, made.in_flight) == (3, 6, 0, 0)


async def test_there_are_never_more_samples_in_the_engine_than_the_target(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=4)
    jobs = [held_job(index, n=3) for index in range(5)]
    made.submit(jobs)
    assert (made.in_flight, made.waiting, made.room) == (4, 11, -11)
    while made.jobs:
        await until(lambda: bool(engine.open) or not made.jobs)
        for call in list(engine.open.values())[:2]:
            call.answer.set_result(completion())
        await settled_down()
    assert engine.most_open == 4
    assert exits.finished_jobs == jobs
    assert made.room == 4


async def test_a_job_larger_than_the_target_runs(engine: FakeEngine, exits: Exits) -> None:
    engine.reply = lambda _: completion()
    made = generator(engine, exits, target=4)
    made.submit([held_job(n=50)])
    await made.drain()
    assert (len(exits.finished_jobs), engine.most_open) == (1, 4)


async def test_a_lost_connection_is_tried_again_beside_the_finished_siblings(engine: FakeEngine, exits: Exits) -> None:
    replies: list[Reply] = [completion(1), LOST, completion(2), LOST, completion(3)]
    engine.reply = lambda _: replies.pop(0)
    held = held_job(n=3)
    made = generator(engine, exits)
    made.submit([held])
    await made.drain()
    assert exits.of(held) == ["finished"]
    assert len(engine.calls) == 5
    assert len({call.request.rid for call in engine.calls}) == 5


async def test_a_sample_that_is_lost_every_time_loses_its_job_once(engine: FakeEngine, exits: Exits) -> None:
    engine.reply = lambda _: LOST
    held = held_job(n=4)
    made = generator(engine, exits)
    made.submit([held])
    await made.drain()
    assert exits.losses == [(held, "the connection broke")]
    by_rid = Counter(call.request.rid for call in engine.calls)
    assert max(by_rid.values()) == 1
    assert len(engine.calls) <= 4 * TRIES_PER_SAMPLE


async def test_a_job_is_refused_once_even_when_several_of_its_samples_are(engine: FakeEngine, exits: Exits) -> None:
    held = held_job(n=4)
    made = generator(engine, exits)
    made.submit([held])
    await until(lambda: len(engine.open) == 4)
    for call in engine.open.values():
        call.answer.set_exception(RequestRefused("too long"))
    await made.drain()
    assert exits.refusals == [(held, "too long")]
    assert exits.losses == []


async def test_a_refusal_ends_the_siblings_in_the_engine_and_starts_no_others(engine: FakeEngine, exits: Exits) -> None:
    bad, good = held_job(0, n=6), held_job(1)
    made = generator(engine, exits, target=4)
    made.submit([bad, good])
    await until(lambda: len(engine.open) == 4)
    siblings = list(engine.open.values())
    siblings[0].answer.set_exception(REFUSED)
    await until(lambda: len(engine.open) == 1)
    assert all(call.cancelled for call in siblings[1:])
    assert len(engine.calls) == 5
    next(iter(engine.open.values())).answer.set_result(completion())
    await made.drain()
    assert (exits.of(bad), exits.of(good)) == (["refused"], ["finished"])
    assert made.room == 4


async def test_dropping_a_job_ends_its_calls_and_tells_nobody(engine: FakeEngine, exits: Exits) -> None:
    dropped, kept = held_job(0, n=3), held_job(1, n=3)
    made = generator(engine, exits, target=4)
    made.submit([dropped, kept])
    await until(lambda: len(engine.open) == 4)
    made.drop(dropped)
    await until(lambda: len(engine.open) == 3)
    assert sum(call.cancelled for call in engine.calls) == 3
    for call in list(engine.open.values()):
        call.answer.set_result(completion())
    await made.drain()
    assert (exits.of(dropped), exits.of(kept)) == ([], ["finished"])
    assert (made.in_flight, made.waiting, made.room) == (0, 0, 4)


async def test_an_answer_that_comes_as_its_job_is_dropped_is_ignored(engine: FakeEngine, exits: Exits) -> None:
    held = held_job()
    made = generator(engine, exits)
    made.submit([held])
    await until(lambda: len(engine.open) == 1)
    next(iter(engine.open.values())).answer.set_result(completion())
    made.drop(held)
    await settled_down()
    assert exits.of(held) == []
    assert (made.in_flight, made.jobs) == (0, 0)


async def test_a_job_that_was_lost_on_its_way_to_the_generator_is_not_begun(engine: FakeEngine, exits: Exits) -> None:
    held = held_job()
    made = generator(engine, exits)
    made.drop(held)
    made.submit([held])
    await made.drain()
    assert (made.jobs, made.abandon(), engine.calls) == (0, [], [])


async def test_only_untouched_jobs_are_abandoned_for_a_drain(engine: FakeEngine, exits: Exits) -> None:
    part_done, running, waiting = held_job(0, n=4), held_job(1, n=3), held_job(2)
    made = generator(engine, exits, target=4)
    made.submit([part_done, running, waiting])
    await until(lambda: len(engine.open) == 4)
    for call in list(engine.open.values())[:3]:
        call.answer.set_result(completion())
    await until(lambda: len(engine.calls) == 7 and len(engine.open) == 4)
    assert made.abandon(started=False) == [waiting]
    engine.reply = lambda _: completion()
    for call in list(engine.open.values()):
        call.answer.set_result(completion())
    await made.drain()
    assert [exits.of(held) for held in (part_done, running, waiting)] == [["finished"], ["finished"], []]


async def test_a_job_with_a_finished_sample_and_none_in_the_engine_counts_as_begun(
    engine: FakeEngine, exits: Exits
) -> None:
    half = held_job(n=2)
    made = generator(engine, exits, target=1)
    made.submit([half, held_job(1)])
    await until(lambda: len(engine.open) == 1)
    next(iter(engine.open.values())).answer.set_result(completion())
    while not half.samples:  # noqa: ASYNC110 - the very moment: its next sample begins one turn later
        await asyncio.sleep(0)
    assert half not in made.abandon(started=False)
    engine.reply = lambda _: completion()
    for call in list(engine.open.values()):
        call.answer.set_result(completion())
    await made.drain()
    assert exits.of(half) == ["finished"]


async def test_abandoning_all_returns_every_job_and_stops_the_engine(engine: FakeEngine, exits: Exits) -> None:
    jobs = [held_job(index, n=3) for index in range(3)]
    made = generator(engine, exits, target=4)
    made.submit(jobs)
    await until(lambda: len(engine.open) == 4)
    assert sorted(held.job.index for held in made.abandon()) == [0, 1, 2]
    assert made.abandon() == []
    await made.drain()
    await until(lambda: not engine.open)
    assert all(call.cancelled for call in engine.calls)
    assert [exits.of(held) for held in jobs] == [[], [], []]


async def test_a_drain_of_nothing_returns(engine: FakeEngine, exits: Exits) -> None:
    await generator(engine, exits).drain()


async def test_a_drain_waits_for_jobs_that_come_meanwhile(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits)
    made.submit([held_job(0)])
    drained = asyncio.create_task(made.drain())
    await until(lambda: len(engine.open) == 1)
    made.submit([held_job(1)])
    for _ in range(2):
        await until(lambda: bool(engine.open))
        assert not drained.done()
        next(iter(engine.open.values())).answer.set_result(completion())
        await settled_down()
    await drained


async def test_a_bug_is_told_and_the_job_can_still_be_given_back(engine: FakeEngine, exits: Exits) -> None:
    engine.reply = lambda _: KeyError("a bug")
    held = held_job()
    made = generator(engine, exits)
    made.submit([held])
    await until(lambda: bool(exits.bugs))
    await made.drain()
    assert (made.abandon(), exits.of(held)) == ([held], [])


async def test_a_call_that_its_client_cancels_loses_the_job_and_not_the_host(engine: FakeEngine, exits: Exits) -> None:
    held = held_job(n=2)
    made = generator(engine, exits)
    made.submit([held])
    await until(lambda: len(engine.open) == 2)
    next(iter(engine.open.values())).answer.cancel()
    await made.drain()
    assert (exits.of(held), exits.bugs, made.jobs) == (["lost"], [], 0)


async def test_a_chat_is_sent_as_messages_and_comes_back_as_text(engine: FakeEngine, exits: Exits) -> None:
    answer = Completion(
        output_ids=completion().output_ids[:0],
        logprobs=None,
        text="hello",
        finish_reason="stop",
        prompt_tokens=3,
        completion_tokens=2,
    )
    engine.reply = lambda _: answer
    text, ids = held_job(0, prompt="hi", endpoint="chat"), held_job(1, endpoint="chat")
    made = generator(engine, exits)
    made.submit([text, ids])
    await made.drain()
    assert exits.of(text) == ["finished"]
    [call] = engine.calls
    assert isinstance(call.request, ChatRequest)
    assert call.request.messages == [{"role": "user", "content": "hi"}]
    assert text.samples[0].version_spans == ((7, 0, 0),)
    assert "not token ids" in exits.refusals[0][1]


async def test_nothing_is_begun_or_lost_while_the_engine_is_out_of_reach(
    engine: FakeEngine, exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollpool.worker.generator.ASK_AGAIN_S", 0.01)
    made = generator(engine, exits, target=4)
    jobs = [held_job(index) for index in range(3)]
    made.submit(jobs)
    await until(lambda: len(engine.open) == 3)
    engine.dead = LOST
    next(iter(engine.open.values())).answer.set_exception(LOST)
    await until(lambda: len(engine.open) == 2)
    late = held_job(3)
    made.submit([late])
    await asyncio.sleep(0.05)
    assert (len(engine.calls), exits.losses) == (3, [])
    engine.dead = None
    await until(lambda: len(engine.calls) == 5)
    engine.reply = lambda _: completion()
    for call in list(engine.open.values()):
        call.answer.set_result(completion())
    await made.drain()
    assert [exits.of(held) for held in [*jobs, late]] == [["finished"]] * 4


async def test_what_waits_for_a_dead_engine_can_be_given_back(engine: FakeEngine, exits: Exits) -> None:
    begun, waiting = held_job(0, n=4), held_job(1)
    made = generator(engine, exits, target=4)
    made.submit([begun, waiting])
    await until(lambda: len(engine.open) == 4)
    engine.fail_all(LOST)
    await until(lambda: not engine.open)
    assert made.abandon(started=False) == [waiting]
    assert made.abandon() == [begun]
    await made.drain()
    await until(lambda: made.in_flight == 0)
    assert exits.losses == []


async def test_an_engine_that_answers_but_only_loses_jobs_is_sick(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=2)
    engine.reply = lambda _: LOST  # while `load` goes on answering
    jobs = [held_job(index) for index in range(20)]
    made.submit(jobs)
    await until(made.sick.is_set)
    await until(lambda: made.in_flight == 0)
    assert SICK_AFTER <= len(exits.losses) <= SICK_AFTER + 1
    assert len(made.abandon(started=False)) == 20 - len(exits.losses)


async def test_a_few_jobs_that_fail_among_others_make_no_engine_sick(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=1)
    replies = iter(3 * ([LOST] * TRIES_PER_SAMPLE * (SICK_AFTER - 1) + [completion()]))
    engine.reply = lambda _: next(replies)
    made.submit([held_job(index) for index in range(3 * SICK_AFTER)])
    await made.drain()
    assert not made.sick.is_set()


# What others finished


async def test_only_what_is_missing_of_a_job_is_made(engine: FakeEngine, exits: Exits) -> None:
    engine.reply = lambda _: completion(5)
    held = held_job(n=4, done={0: sample(version=3), 2: sample(version=3)})
    made = generator(engine, exits)
    made.submit([held])
    await made.drain()
    assert (exits.of(held), len(engine.calls), made.samples_made) == (["finished"], 2, 2)
    assert [held.samples[index].versions for index in range(4)] == [(3,), (7,), (3,), (7,)]


async def test_a_job_whose_samples_were_all_made_elsewhere_finishes_at_once(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=1)
    busy, whole = held_job(0, n=3), held_job(1, n=2, done={0: sample(), 1: sample()}, deadline_ms=20)
    made.submit([busy, whole])
    assert exits.finished_jobs == [whole]
    assert made.jobs == 1
    await asyncio.sleep(0.05)
    assert exits.of(whole) == ["finished"]
    engine.reply = lambda _: completion()
    answer_all(engine)
    await made.drain()
    assert exits.of(busy) == ["finished"]


async def test_what_others_began_and_this_host_did_not_is_untouched(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=1)
    running, waiting = held_job(0), held_job(1, n=2, done={0: sample()})
    made.submit([running, waiting])
    await until(lambda: inside(engine) == {0})
    assert made.abandon(started=False) == [waiting]
    assert sorted(waiting.samples) == [0]


# Deadlines


async def test_a_job_whose_deadline_comes_is_expired_once_and_leaves_the_engine(
    engine: FakeEngine, exits: Exits
) -> None:
    made = generator(engine, exits, target=4)
    late, other = held_job(0, n=3, deadline_ms=30), held_job(1, n=2)
    # Its first sample is answered at once: whoever answered it later could find that the deadline was earlier.
    answers = iter([completion()])
    engine.reply = lambda _: next(answers, None)
    made.submit([late, other])
    await until(lambda: exits.expiries == [late])
    assert sorted(late.samples) == [0]
    await until(lambda: inside(engine) == {1} and len(engine.open) == 2)  # its credits go to the others
    assert sum(call.cancelled for call in engine.calls) == 2
    answer_all(engine)
    await made.drain()
    assert (exits.of(late), exits.of(other), made.room) == (["expired"], ["finished"], 4)


@pytest.mark.parametrize("deadline_ms", [0, 1])
async def test_a_job_that_waits_here_expires_as_well(engine: FakeEngine, exits: Exits, deadline_ms: int) -> None:
    made = generator(engine, exits, target=1)
    running, waiting = held_job(0), held_job(1, deadline_ms=deadline_ms)
    made.submit([running, waiting])
    await until(lambda: exits.expiries == [waiting])
    answer_all(engine)
    await made.drain()
    assert [job_of(call.request) for call in engine.calls] == [0]


WAYS_OUT = ("finished", "refused", "lost", "dropped", "abandoned")


@pytest.mark.parametrize("way", WAYS_OUT)
async def test_a_job_that_left_before_its_deadline_is_not_waited_for(
    engine: FakeEngine, exits: Exits, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    alarms: list[asyncio.TimerHandle] = []

    def call_later(delay: float, callback: Callable[..., object], *args: Any, **options: Any) -> asyncio.TimerHandle:
        alarms.append(loop.call_at(loop.time() + delay, callback, *args, **options))
        return alarms[-1]

    made = generator(engine, exits)
    held = held_job(deadline_ms=10**9)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_later", call_later)
        made.submit([held])
    [alarm] = alarms
    await until(lambda: len(engine.open) == 1)
    assert not alarm.cancelled()
    [call] = engine.open.values()
    match way:
        case "finished":
            call.answer.set_result(completion())
        case "refused":
            call.answer.set_exception(REFUSED)
        case "lost":
            engine.reply = lambda _: LOST
            call.answer.set_exception(LOST)
        case "dropped":
            made.drop(held)
        case "abandoned":
            made.abandon()
    await made.drain()
    assert alarm.cancelled()
    assert exits.expiries == []


async def test_a_job_that_expires_frees_the_way_for_those_behind_it(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits)
    running, alone, behind = held_job(0), suspect(1, 1, deadline_ms=30), held_job(2)
    made.submit([running, alone, behind])
    await until(lambda: inside(engine) == {0})
    assert made.room == 0
    await until(lambda: inside(engine) == {0, 2})
    assert (exits.of(alone), made.room) == (["expired"], 2)


# A sample that never ends


async def test_a_sample_that_the_engine_forgot_is_lost_without_another_try(engine: FakeEngine, exits: Exits) -> None:
    engine.reply = lambda request: None if job_of(request) == 0 else completion()
    made = generator(engine, exits, target=4, sample_timeout_s=0.2)
    forgotten = held_job(0, n=1)
    made.submit([forgotten, *[held_job(index, n=2) for index in range(1, 20)]])
    await until(lambda: len(exits.finished_jobs) == 19 and bool(exits.losses))
    [(held, error)] = exits.losses
    assert held is forgotten
    assert "sample_timeout_s=0.2" in error
    assert [call.cancelled for call in engine.calls if job_of(call.request) == 0] == [True]
    assert not made.sick.is_set()
    await made.drain()
    await until(lambda: made.room == 4)


async def test_what_is_finished_of_a_job_survives_a_sample_that_was_forgotten(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=4, sample_timeout_s=0.2)
    held = held_job(n=3)
    made.submit([held])
    await until(lambda: len(engine.open) == 3)
    for call in list(engine.open.values())[:2]:
        call.answer.set_result(completion())
    await made.drain()
    assert (exits.of(held), sorted(held.samples)) == (["lost"], [0, 1])


async def test_an_engine_that_forgets_everything_is_sick(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=2, sample_timeout_s=0.02)
    jobs = [held_job(index, n=2) for index in range(20)]
    made.submit(jobs)
    await until(made.sick.is_set)
    await until(lambda: made.in_flight == 0)
    assert SICK_AFTER <= len(exits.losses) <= SICK_AFTER + 1
    assert len(made.abandon(started=False)) == 20 - len(exits.losses)


# Company


@pytest.mark.parametrize("place", range(5))
async def test_a_suspect_runs_alone_from_its_first_sample_to_its_last(
    engine: FakeEngine, exits: Exits, place: int
) -> None:
    made = generator(engine, exits, target=4)
    jobs = [held_job(index, n=2) for index in range(4)]
    jobs.insert(place, suspect(9, 1, n=7))
    made.submit(jobs)
    while made.jobs:
        await until(lambda: bool(engine.open))
        assert inside(engine) == {9} or 9 not in inside(engine)
        next(iter(engine.open.values())).answer.set_result(completion())  # one by one: never in step
        await settled_down()
    assert exits.finished_jobs == jobs
    order = [job_of(call.request) for call in engine.calls]
    assert order == [held.job.index for held in jobs for _ in range(held.job.n)]


@pytest.mark.parametrize("company", [2, 3])
async def test_a_suspect_runs_in_the_company_it_may_have(engine: FakeEngine, exits: Exits, company: int) -> None:
    made = generator(engine, exits, target=8)
    jobs = [held_job(0), held_job(1), suspect(2, company, n=2), *[held_job(index) for index in range(3, 8)]]
    made.submit(jobs)
    await settled_down()
    first = {0, 1} if company == 2 else {0, 1, 2}
    assert inside(engine) == first
    if company == 2:
        answer_all(engine, but=[1])
        await settled_down()
        assert inside(engine) == {1, 2}
    answer_all(engine, but=[2])
    await settled_down()
    assert inside(engine) == {2, *range(3, 2 + company)}
    assert made.room == 0
    answer_all(engine)
    await settled_down()
    assert inside(engine) == set(range(2 + company, 8))  # the suspect has left: normal flow again
    answer_all(engine)
    await made.drain()
    assert exits.bugs == []
    assert Counter(held.job.index for held in exits.finished_jobs) == Counter(range(8))


async def test_there_is_no_room_while_a_job_needs_others_to_leave(engine: FakeEngine, exits: Exits) -> None:
    changes = Counter[str]()
    made = generator(engine, exits, target=8, on_change=lambda: changes.update(["change"]))
    made.submit([held_job(0), held_job(1)])
    assert (made.room, made.companies) == (6, [None, None])
    made.submit([suspect(2, 1)])
    assert made.room == 0
    assert sorted(made.companies, key=str) == [1, None, None]
    await until(lambda: inside(engine) == {0, 1})
    answer_all(engine)
    await until(lambda: inside(engine) == {2})
    assert made.room == 0
    before = changes.total()
    answer_all(engine)
    await until(lambda: made.room == 8)
    assert changes.total() > before, "the puller hears of it"
    assert made.companies == []


async def test_a_suspect_with_room_for_company_leaves_room(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=8)
    made.submit([suspect(0, 3)])
    assert made.room > 0
    assert made.seats == 2
    made.submit([held_job(1), held_job(2)])
    assert made.room == made.seats == 0


async def test_the_strictest_of_several_suspects_counts(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits, target=8)
    made.submit([suspect(0, 3), suspect(1, 2), held_job(2)])
    await settled_down()
    assert inside(engine) == {0, 1}
    answer_all(engine, but=[0])
    await settled_down()
    assert inside(engine) == {0, 2}


@pytest.mark.parametrize("way", ["dropped", "refused", "lost", "abandoned untouched"])
async def test_the_flow_goes_on_when_a_suspect_leaves_however_it_leaves(
    engine: FakeEngine, exits: Exits, way: str
) -> None:
    made = generator(engine, exits, target=4)
    alone, behind = suspect(0, 1, n=2), held_job(1, n=2)
    if way == "abandoned untouched":
        made.submit([held_job(2), alone])
        await until(lambda: inside(engine) == {2})
        assert made.abandon(started=False) == [alone]
        made.submit([behind])
    else:
        made.submit([alone, behind])
        await until(lambda: len(engine.open) == 2)
        assert inside(engine) == {0}
        call = next(iter(engine.open.values()))
        if way == "dropped":
            made.drop(alone)
        elif way == "refused":
            call.answer.set_exception(REFUSED)
        else:
            engine.reply = lambda request: LOST if job_of(request) == 0 else None
            call.answer.set_exception(LOST)
    await until(lambda: 1 in inside(engine))
    assert made.room == (1 if way == "abandoned untouched" else 2)
    answer_all(engine)
    await made.drain()
    assert exits.of(behind) == ["finished"]


async def test_jobs_that_never_reached_a_dying_engine_are_not_taken_for_its_company(
    engine: FakeEngine, exits: Exits
) -> None:
    made = generator(engine, exits, target=8)
    running, alone, behind = [held_job(0), held_job(1)], suspect(2, 1), held_job(3)
    made.submit([*running, alone, behind])
    await until(lambda: inside(engine) == {0, 1})
    engine.fail_all(LOST)
    await until(lambda: not engine.open)
    assert set(made.abandon(started=False)) == {alone, behind}
    assert set(made.abandon()) == set(running)


OUTCOMES: list[Reply] = [completion(), completion(), completion(), LOST, REFUSED, None]
ACTS = ("submit", "answer", "answer", "drop", "abandon", "abandon untouched", "let run")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.lists(st.sampled_from(ACTS), max_size=40))
def test_every_job_leaves_by_exactly_one_exit(seed: int, target: int, acts: list[str]) -> None:
    asyncio.run(one_life(random.Random(seed), target, acts))


async def one_life(chance: random.Random, target: int, acts: Iterable[str]) -> None:
    exits, changes = Exits(), Counter[str]()
    too_many: list[set[int]] = []

    def reply(request: Request) -> Reply:
        allowed = least(submitted[index].record.company for index in begun())
        if allowed is not None and len(begun()) > allowed:
            too_many.append(begun())
        return chance.choice(OUTCOMES)

    def begun() -> set[int]:
        """What an engine that dies now takes along: also where the job's next sample is still to begin."""
        seen = {job_of(call.request) for call in engine.calls}
        return {index for index in seen if not submitted[index].left} | inside(engine)

    engine = fake_engine(reply=reply)
    made = generator(engine, exits, target=target, on_change=lambda: changes.update(["change"]))
    submitted: list[HeldJob] = []
    returned: list[HeldJob] = []
    dropped: list[HeldJob] = []
    for act in acts:
        match act:
            case "submit":
                record = Record(company=chance.choice([None, None, None, 1, 1, 2, 3]))
                n, deadline_ms = chance.randint(1, 6), chance.choice([None, None, 10**9, 0])
                done = {index: sample() for index in range(n) if chance.random() < 0.1}
                held = held_job(len(submitted), n=n, record=record, done=done, deadline_ms=deadline_ms)
                submitted.append(held)
                made.submit([held])
            case "answer":
                for call in list(engine.open.values())[:2]:
                    if not call.answer.done():
                        call.answer.set_result(completion())
            case "drop":
                still = [held for held in submitted if not held.left]
                dropped += still[:1]
                for held in still[:1]:
                    made.drop(held)
            case "abandon":
                returned += made.abandon()
            case "abandon untouched":
                untouched = made.abandon(started=False)
                assert not {held.job.index for held in untouched} & {job_of(call.request) for call in engine.calls}
                returned += untouched
        for _ in range(chance.randint(0, 4)):
            await asyncio.sleep(0)
        assert len(engine.open) <= made.in_flight <= target
        assert made.jobs == sum(not held.left for held in submitted)
        if (limit := least(made.companies)) is not None and made.jobs >= limit:
            assert made.room == 0
    made_so_far = reply
    engine.reply = lambda request: made_so_far(request) and completion()
    for _ in range(10_000):
        if not made.jobs:
            break
        answer_all(engine)
        await asyncio.sleep(0)
    assert not made.jobs, "every job ends"
    await settled_down()
    for held in submitted:
        ways = exits.of(held) + ["returned"] * returned.count(held) + ["dropped"] * dropped.count(held)
        assert len(ways) == 1, ways
    assert engine.most_open <= target
    assert (made.in_flight, made.waiting, made.room, exits.bugs) == (0, 0, target, [])
    assert too_many == [], "a job had more company in the engine than its record allows"


# Changes of policy under what runs


async def test_what_is_interrupted_keeps_the_tokens_that_were_made(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits)
    one, two = held_job(0, n=2), held_job(1, exact=True)
    made.submit([one, two])
    await until(lambda: len(engine.open) == 3)
    engine.partial = lambda request: completion(job_of(request) + 1)
    assert set(await made.interrupt()) == {one, two}
    assert {index: len(piece.output_ids) for index, piece in one.pieces.items()} == {0: 1, 1: 1}
    assert not two.pieces, "an exact job is not gone on with"
    assert len(engine.aborted) == 2
    await settled_down()
    assert made.in_flight == 0
    assert exits.of(one) == exits.of(two) == []


async def test_an_interrupted_sample_that_ended_meanwhile_is_finished(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits)
    held = held_job(0, n=1)
    made.submit([held])
    await until(lambda: len(engine.open) == 1)
    answer_all(engine)
    assert await made.interrupt() == []
    assert exits.of(held) == ["finished"]


async def test_an_engine_that_is_gone_has_no_tokens_to_hand_out(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits)
    held = held_job(0)
    made.submit([held])
    await until(lambda: len(engine.open) == 1)
    engine.dead = LOST
    assert await made.interrupt() == [held]
    assert not held.pieces


async def test_nothing_begins_after_an_interruption_until_it_goes_on(engine: FakeEngine, exits: Exits) -> None:
    made = generator(engine, exits)
    assert await made.interrupt() == []
    held = held_job(0)
    made.submit([held])
    await settled_down()
    assert not engine.open
    made.go_on()
    await until(lambda: len(engine.open) == 1)


async def test_a_piece_that_came_with_the_job_is_gone_on_with(engine: FakeEngine, exits: Exits) -> None:
    begun = sample(2, version=3).model_copy(update={"finish_reason": "abort"})
    held = held_job(0, done={0: begun})
    generator(engine, exits).submit([held])
    await until(lambda: len(engine.open) == 1)
    [call] = engine.open.values()
    assert isinstance(call.request, SampleRequest)
    assert call.request.input_ids.tolist() == [0, 2, 0, 1]
    call.answer.set_result(completion(3, first=5))
    await until(lambda: exits.of(held) == ["finished"])
    assert held.samples[0].output_ids.tolist() == [0, 1, 5, 6, 7]
    assert held.samples[0].version_spans == ((3, 0, 2), (7, 2, 5))
    assert held.samples[0].text == "0|1|5|6|7"


async def test_tokens_of_a_policy_that_the_tag_forbids_are_not_kept(engine: FakeEngine, exits: Exits) -> None:
    held = held_job(0, policy_version=7, exact=True)
    generator(engine, exits).submit([held])
    await until(lambda: len(engine.open) == 1)
    [call] = engine.open.values()
    call.answer.set_result(replace(completion(2), version_spans=(VersionSpan(7, 0, 1), VersionSpan(8, 1, 2))))
    await until(lambda: exits.of(held) == ["misplaced"])
    assert not held.samples


async def test_a_job_on_an_adapter_names_it_and_its_tokens_are_the_adapters(engine: FakeEngine, exits: Exits) -> None:
    held = held_job(0, policy_version=9)
    held.adapter, held.version = "r.g2.v9", 9
    generator(engine, exits).submit([held])
    await until(lambda: len(engine.open) == 1)
    [call] = engine.open.values()
    assert isinstance(call.request, SampleRequest)
    assert call.request.lora_path == "r.g2.v9"
    call.answer.set_result(completion(2))
    await until(lambda: exits.of(held) == ["finished"])
    assert held.samples[0].version_spans == ((9, 0, 2),)
