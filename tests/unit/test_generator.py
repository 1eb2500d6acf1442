"""Every job that is handed to the generator leaves it by exactly one exit, whatever its engine does."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from fakes import FakeEngine, Reply, Request, completion, fake_engine, held_job
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from rollpool.schemas import EngineUnavailable
from rollpool.worker.engines.protocol import ChatRequest, Completion, RequestRefused, SampleRequest
from rollpool.worker.generator import SICK_AFTER, TRIES_PER_SAMPLE, Generator
from rollpool.worker.held import HeldJob

LOST = EngineUnavailable("the connection broke")
REFUSED = RequestRefused("the prompt is too long")


@dataclass
class Exits:
    """Notes by which exit each job left."""

    finished_jobs: list[HeldJob] = field(default_factory=list)
    refusals: list[tuple[HeldJob, str]] = field(default_factory=list)
    losses: list[tuple[HeldJob, str]] = field(default_factory=list)
    bugs: list[BaseException] = field(default_factory=list)

    def finished(self, held: HeldJob) -> None:
        assert sorted(held.samples) == list(range(held.job.n))
        self.finished_jobs.append(held)

    def refused(self, held: HeldJob, error: str) -> None:
        self.refusals.append((held, error))

    def lost(self, held: HeldJob, error: str) -> None:
        self.losses.append((held, error))

    def broken(self, bug: BaseException) -> None:
        self.bugs.append(bug)

    def of(self, held: HeldJob) -> list[str]:
        """How this job left."""
        return (
            ["finished"] * self.finished_jobs.count(held)
            + ["refused"] * [job for job, _ in self.refusals].count(held)
            + ["lost"] * [job for job, _ in self.losses].count(held)
        )


def generator(
    engine: FakeEngine, exits: Exits, *, target: int = 4, on_change: Callable[[], None] | None = None
) -> Generator:
    return Generator(engine, version=7, target=target, outlet=exits, on_change=on_change or (lambda: None))


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


OUTCOMES: list[Reply] = [completion(), completion(), completion(), LOST, REFUSED, None]
ACTS = ("submit", "answer", "answer", "drop", "abandon", "abandon untouched", "let run")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.lists(st.sampled_from(ACTS), max_size=40))
def test_every_job_leaves_by_exactly_one_exit(seed: int, target: int, acts: list[str]) -> None:
    asyncio.run(one_life(random.Random(seed), target, acts))


async def one_life(chance: random.Random, target: int, acts: Iterable[str]) -> None:
    exits, changes = Exits(), Counter[str]()

    def reply(request: Request) -> Reply:
        assert isinstance(request, SampleRequest)
        return chance.choice(OUTCOMES)

    engine = fake_engine(reply=reply)
    made = generator(engine, exits, target=target, on_change=lambda: changes.update(["change"]))
    submitted: list[HeldJob] = []
    returned: list[HeldJob] = []
    dropped: list[HeldJob] = []
    for act in acts:
        match act:
            case "submit":
                submitted.append(held_job(len(submitted), n=chance.randint(1, 6)))
                made.submit(submitted[-1:])
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
                assert all(not held.samples for held in untouched)
                returned += untouched
        for _ in range(chance.randint(0, 4)):
            await asyncio.sleep(0)
        assert len(engine.open) <= made.in_flight <= target
        assert made.jobs == sum(not held.left for held in submitted)
    engine.reply = lambda _: completion()
    while made.jobs:
        for call in engine.open.values():
            if not call.answer.done():
                call.answer.set_result(completion())
        await asyncio.sleep(0)
    await settled_down()
    for held in submitted:
        ways = exits.of(held) + ["returned"] * returned.count(held) + ["dropped"] * dropped.count(held)
        assert len(ways) == 1, ways
    assert engine.most_open <= target
    assert (made.in_flight, made.waiting, made.room, exits.bugs) == (0, 0, target, [])
