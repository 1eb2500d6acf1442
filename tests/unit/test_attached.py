"""A completion of an attached engine is used only when the engine was the same one before and after it."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, completion, fake_engine
from waiting import until

from rollpool.schemas import EngineUnavailable, Policy, PolicyRejected, SamplingParams, VersionSpan
from rollpool.worker.engines.attached import GuardedEngine
from rollpool.worker.engines.owner import AttachedEngine
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    EngineLoad,
    SampleRequest,
    WeightsRefused,
    new_rid,
)
from rollpool.worker.engines.settings import EngineSettings


class Attached(FakeEngine):
    """Tells who it is as a test says."""

    identity: str | Exception = "fake"
    alive: Callable[[], EngineLoad | None] = EngineLoad
    asked = 0
    answer: asyncio.Event | None = None
    #: What was done to it beside generating.
    changes: list[str]

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

    async def load_adapter(self, adapter: Adapter) -> None:
        self.changes.append(f"load {adapter.name}")

    async def unload_adapter(self, name: str) -> None:
        self.changes.append(f"unload {name}")

    async def flush_cache(self) -> None:
        self.changes.append("flush")


@pytest.fixture
def engine() -> Attached:
    made = Attached(fake_engine().facts, lambda _: completion())
    made.changes = []
    return made


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


async def test_adapters_lie_beside_weights_that_are_not_ours_to_change(
    engine: Attached, guarded: GuardedEngine
) -> None:
    await guarded.load_adapter(Adapter("a", "/a"))
    await guarded.unload_adapter("a")
    await guarded.flush_cache()
    assert engine.changes == ["load a", "unload a", "flush"]
    assert not guarded.facts.swaps
    with pytest.raises(WeightsRefused, match="not this worker's to change") as refused:
        await guarded.swap("/models/b", 2)
    assert not refused.value.restart_may_help


async def test_an_adapter_of_a_replaced_engine_is_not_counted_on(engine: Attached, guarded: GuardedEngine) -> None:
    engine.identity = "another"
    with pytest.raises(EngineUnavailable, match="was replaced"):
        await guarded.load_adapter(Adapter("a", "/a"))
    for call in (guarded.load_adapter(Adapter("b", "/b")), guarded.unload_adapter("a"), guarded.flush_cache()):
        with pytest.raises(EngineUnavailable, match="was replaced"):
            await call
    assert engine.changes == ["load a"]


async def test_what_an_attached_engine_calls_its_weights_is_not_the_pools_version(
    engine: Attached, guarded: GuardedEngine
) -> None:
    engine.reply = lambda _: replace(completion(), version_spans=(VersionSpan(5, 0, 2),))
    assert (await guarded.generate(request())).version_spans == ()
    engine.reply = lambda _: replace(completion(), version_spans=(VersionSpan(5, 0, 1), VersionSpan(6, 1, 2)))
    with pytest.raises(EngineUnavailable, match="were changed while it generated"):
        await guarded.generate(request())


async def test_nothing_is_staged_for_an_attached_engine() -> None:
    owner = AttachedEngine(EngineSettings(url="http://127.0.0.1:1"))
    adapter = Policy(version=3, lora_path="/adapters/3", run="r")
    assert await owner.stage(adapter, lambda done, whole: None) == "/adapters/3"
    owner.keep(["/adapters/3"])
    with pytest.raises(PolicyRejected, match="not this worker's to restart"):
        await owner.merge("/models/a", adapter, "/adapters/3")
