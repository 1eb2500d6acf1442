"""A completion of an attached engine is used only when the engine was the same one before and after it."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, completion, fake_engine
from waiting import until

from rollpool.schemas import EngineUnavailable, SamplingParams
from rollpool.worker.engines.attached import GuardedEngine
from rollpool.worker.engines.owner import AttachedEngine
from rollpool.worker.engines.protocol import ChatRequest, EngineLoad, SampleRequest, new_rid
from rollpool.worker.engines.settings import EngineSettings


class Attached(FakeEngine):
    """Tells who it is as a test says."""

    identity: str | Exception = "fake"
    alive: Callable[[], EngineLoad | None] = EngineLoad
    asked = 0
    answer: asyncio.Event | None = None

    async def identify(self) -> str:
        self.asked += 1
        if self.answer is not None:
            await self.answer.wait()
        await asyncio.sleep(0)
        if isinstance(self.identity, Exception):
            raise self.identity
        return self.identity

    async def load(self) -> EngineLoad | None:
        await asyncio.sleep(0)
        return self.alive()


@pytest.fixture
def engine() -> Attached:
    return Attached(fake_engine().facts, lambda _: completion())


@pytest.fixture
def guarded(engine: Attached) -> GuardedEngine:
    return GuardedEngine(engine, patience_s=60.0)


def request() -> SampleRequest:
    return SampleRequest(rid=new_rid(), input_ids=np.ones(1, np.int32), sampling=SamplingParams())


def gone() -> None:
    raise EngineUnavailable("lost the engine")


async def test_an_engine_that_stays_the_same_is_believed(engine: Attached, guarded: GuardedEngine) -> None:
    assert (await guarded.generate(request())).finish_reason == "length"
    await guarded.chat(ChatRequest(rid=new_rid(), messages=[], sampling=SamplingParams()))
    assert not guarded.replaced.is_set()


async def test_what_a_replaced_engine_made_is_not_used_and_its_successor_is_not_asked(
    engine: Attached, guarded: GuardedEngine
) -> None:
    engine.identity = "another"
    with pytest.raises(EngineUnavailable, match="was fake, is another"):
        await guarded.generate(request())
    assert guarded.replaced.is_set()
    engine.identity = "fake"  # even one that says it is the first again
    for call in (
        guarded.generate(request()),
        guarded.chat(ChatRequest(rid="", messages=[], sampling=SamplingParams())),
    ):
        with pytest.raises(EngineUnavailable, match="was replaced"):
            await call
    assert len(engine.calls) == 1


async def test_calls_that_end_together_share_a_question_that_is_asked_after_all_of_them(
    engine: Attached, guarded: GuardedEngine
) -> None:
    await asyncio.gather(*(guarded.generate(request()) for _ in range(100)))
    assert engine.asked == 1


async def test_a_question_under_way_does_not_answer_for_a_call_that_ends_later(
    engine: Attached, guarded: GuardedEngine
) -> None:
    engine.answer = asyncio.Event()
    early = asyncio.create_task(guarded.generate(request()))
    await until(lambda: engine.asked == 1)
    late = asyncio.create_task(guarded.generate(request()))
    await until(lambda: len(engine.calls) == 2 and not engine.open)
    engine.answer.set()
    await early
    engine.identity = "another"
    with pytest.raises(EngineUnavailable):
        await late
    assert engine.asked == 2


async def test_a_caller_that_leaves_does_not_take_the_answer_from_the_others(
    engine: Attached, guarded: GuardedEngine
) -> None:
    engine.answer = asyncio.Event()
    calls = [asyncio.create_task(guarded.generate(request())) for _ in range(3)]
    await until(lambda: engine.asked == 1)
    calls[0].cancel()
    engine.answer.set()
    await asyncio.gather(*calls[1:])


async def test_an_engine_that_is_silent_for_a_while_is_waited_for(engine: Attached, guarded: GuardedEngine) -> None:
    engine.identity = EngineUnavailable("did not tell who it is within 10 s")
    engine.alive = lambda: None
    call = asyncio.create_task(guarded.generate(request()))
    await until(lambda: engine.asked > 3)
    assert not call.done()
    engine.identity = "fake"
    await call


async def test_an_engine_that_is_silent_for_too_long_is_gone(engine: Attached) -> None:
    engine.identity = EngineUnavailable("did not tell who it is within 10 s")
    engine.alive = lambda: None
    with pytest.raises(EngineUnavailable, match="did not tell who it is within 0 s"):
        await GuardedEngine(engine, patience_s=0.05).confirm()


async def test_an_engine_that_is_gone_is_told_at_once(engine: Attached, guarded: GuardedEngine) -> None:
    engine.identity = EngineUnavailable("lost the engine")
    engine.alive = gone
    with pytest.raises(EngineUnavailable, match="lost the engine"):
        await guarded.generate(request())


@pytest.mark.parametrize("found_by", ["a call", "a look"])
async def test_the_watch_ends_with_the_reason_once_the_engine_is_another(
    engine: Attached, guarded: GuardedEngine, monkeypatch: pytest.MonkeyPatch, found_by: str
) -> None:
    monkeypatch.setattr("rollpool.worker.engines.owner.LOOK_EVERY_S", 0.01 if found_by == "a look" else 3600.0)
    owner = AttachedEngine(EngineSettings(url="http://127.0.0.1:1"))
    attached: Any = owner
    attached._engine = guarded
    watching = asyncio.create_task(owner.watch())
    if found_by == "a look":
        await until(lambda: engine.asked > 2)
        assert not watching.done()
        engine.identity = "another"
    else:
        engine.identity = "another"
        with pytest.raises(EngineUnavailable):
            await guarded.generate(request())
    assert "was replaced" in await watching
