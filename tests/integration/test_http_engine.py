"""`HttpEngine` against a server that misbehaves as sglang-jax has been seen to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_engine import FakeServer

from rollpool.schemas.jobs import SamplingParams
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.progress import ProgressWatch
from rollpool.worker.engines.protocol import (
    ChatRequest,
    EngineUnavailable,
    RequestRefused,
    SampleRequest,
    new_rid,
)


def request(ids: list[int] | None = None, new: int = 4, **changes: Any) -> SampleRequest:
    return SampleRequest(
        rid=new_rid(),
        input_ids=np.array(ids or [1, 2, 3], np.int32),
        sampling=SamplingParams(max_new_tokens=new),
        **changes,
    )


@pytest.fixture
async def fake() -> AsyncIterator[FakeServer]:
    server = FakeServer()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def engine(fake: FakeServer) -> AsyncIterator[HttpEngine]:
    async with await HttpEngine.attach(fake.url, timeout_s=20) as attached:
        yield attached


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the fake's state has no event of its own
            await asyncio.sleep(0.01)


async def test_attaching_generates_before_it_believes_and_learns_what_the_engine_can(
    fake: FakeServer, engine: HttpEngine
) -> None:
    assert fake.generated == 1
    assert fake.bodies[0]["return_logprob"] is True
    facts = engine.facts
    assert (facts.line, facts.max_running_requests, facts.context_length) == ("main", 16, 254)
    assert await engine.identify() == facts.identity


async def test_attaching_to_a_fresh_post1_is_not_caught_by_its_silence() -> None:
    server = FakeServer(version="0.0.1")
    await server.start()
    try:
        async with await HttpEngine.attach(server.url, timeout_s=20) as engine:
            assert engine.facts.line == "0.0.1.post1"
            assert not engine.facts.lora
    finally:
        await server.stop()


async def test_attaching_lets_the_stock_warm_up_pass(fake: FakeServer) -> None:
    fake.skip_warmup = False
    attaching = asyncio.create_task(HttpEngine.attach(fake.url, timeout_s=20))
    await until(lambda: fake.info_calls >= 3)
    assert fake.generated == 0
    fake.steps = 2
    async with await attaching:
        assert fake.generated == 1


async def test_attaching_where_nothing_listens_says_so(unused_tcp_port: int) -> None:
    with pytest.raises(EngineUnavailable, match=r"did not generate within 1 s.*Connect"):
        await HttpEngine.attach(f"http://127.0.0.1:{unused_tcp_port}", timeout_s=1)


async def test_a_wrong_key_is_told_at_once(fake: FakeServer) -> None:
    fake.key = "right"
    with pytest.raises(EngineUnavailable, match=r"engine\.api_key"):
        await HttpEngine.attach(fake.url, timeout_s=20, api_key="wrong")
    async with await HttpEngine.attach(fake.url, timeout_s=20, api_key="right") as engine:
        await engine.generate(request())


async def test_ids_and_logprobs_are_of_one_length(engine: HttpEngine) -> None:
    done = await engine.generate(request(new=60))
    assert done.output_ids.tolist() == list(range(100, 160))
    assert done.logprobs is not None
    assert done.logprobs.tolist() == [-0.5] * 60


async def test_many_requests_run_at_once(fake: FakeServer, engine: HttpEngine) -> None:
    running = [asyncio.create_task(engine.generate(request([99]))) for _ in range(300)]
    await until(lambda: len(fake.waiting) == 300)
    for event in fake.waiting.values():
        event.set()
    ended = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(error, EngineUnavailable) for error in ended)  # an abort that nobody asked for


async def test_what_does_not_fit_is_never_sent(fake: FakeServer, engine: HttpEngine) -> None:
    for asked in (request(list(range(1, 252)), new=1), request(new=252), request(lora_path="a")):
        with pytest.raises(RequestRefused):
            await engine.generate(asked)
    assert fake.generated == 1


async def test_a_refusal_carries_the_engines_words(fake: FakeServer, engine: HttpEngine) -> None:
    async def refuse(asked: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "the adapter is unknown"}}, status=400)

    fake.reply = refuse
    with pytest.raises(RequestRefused, match="the adapter is unknown"):
        await engine.generate(request())


@pytest.mark.parametrize("status", [404, 429, 500, 503])
async def test_another_status_is_the_engines_fault(fake: FakeServer, engine: HttpEngine, status: int) -> None:
    async def fail(asked: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=status, text="Internal Server Error")

    fake.reply = fail
    with pytest.raises(EngineUnavailable, match=str(status)):
        await engine.generate(request())


@pytest.mark.parametrize("payload", [b"", b"not json", b'{"error": {"message": "x"}}', b'{"text": "no meta"}'])
async def test_a_200_that_is_no_completion_is_the_engines_fault(
    fake: FakeServer, engine: HttpEngine, payload: bytes
) -> None:
    async def garble(asked: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(body=payload)

    fake.reply = garble
    with pytest.raises(EngineUnavailable):
        await engine.generate(request())


async def test_a_connection_that_breaks_is_the_engines_fault_and_changes_its_identity(
    fake: FakeServer, engine: HttpEngine
) -> None:
    async def hang_up(asked: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(asked)
        await response.write(b'{"text')
        assert asked.transport is not None
        asked.transport.abort()
        return response

    fake.reply = hang_up
    with pytest.raises(EngineUnavailable, match="lost the engine"):
        await engine.generate(request())
    assert await engine.identify() != engine.facts.identity


async def test_another_engine_on_the_same_port_has_another_identity(fake: FakeServer, engine: HttpEngine) -> None:
    fake.steps = 50
    assert await engine.identify() == engine.facts.identity
    fake.steps = 3  # the count of a process that began anew
    assert await engine.identify() != engine.facts.identity
    fake.steps = 60
    assert await engine.identify() != engine.facts.identity  # an identity never comes back


async def test_an_engine_that_is_gone_is_told_as_such(fake: FakeServer, engine: HttpEngine) -> None:
    await fake.stop()
    with pytest.raises(EngineUnavailable, match="lost the engine"):
        await engine.generate(request())
    with pytest.raises(EngineUnavailable):
        await engine.identify()
    with pytest.raises(EngineUnavailable):
        await engine.load()


async def test_a_closed_engine_is_unavailable(engine: HttpEngine) -> None:
    await engine.close()
    for call in (engine.generate(request()), engine.load(), engine.identify()):
        with pytest.raises(EngineUnavailable, match="was closed"):
            await call


async def test_cancelling_a_call_ends_it_in_the_engine(fake: FakeServer, engine: HttpEngine) -> None:
    asked = request([99])
    call = asyncio.create_task(engine.generate(asked))
    await until(lambda: asked.rid in fake.waiting)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: fake.gone == [asked.rid])


async def test_an_abort_ends_that_request_alone_and_keeps_its_tokens(fake: FakeServer, engine: HttpEngine) -> None:
    first, second = request([99]), request([99])
    calls = [asyncio.create_task(engine.generate(asked)) for asked in (first, second)]
    await until(lambda: len(fake.waiting) == 2)
    await engine.abort([first.rid, new_rid()])
    done = await calls[0]
    assert (done.finish_reason, done.output_ids.tolist()) == ("abort", [100, 101])
    assert list(fake.waiting) == [second.rid]
    await engine.abort([second.rid])
    await calls[1]


async def test_a_chat_gives_text_alone(fake: FakeServer, engine: HttpEngine) -> None:
    asked = ChatRequest(rid=new_rid(), messages=[{"role": "user", "content": "hi"}], sampling=SamplingParams())
    done = await engine.chat(asked)
    assert (done.text, done.finish_reason, done.logprobs, done.output_ids.size) == ("hello", "stop", None, 0)


async def test_requests_and_load_are_told_to_the_progress_watch(fake: FakeServer) -> None:
    now = 0.0
    watch = ProgressWatch(lambda: now, 300)
    async with await HttpEngine.attach(fake.url, timeout_s=20, progress=watch) as engine:
        asked = request([99])
        call = asyncio.create_task(engine.generate(asked))
        await until(lambda: asked.rid in fake.waiting)
        assert watch.in_flight == 1
        now = 301
        assert watch.stalled() is not None
        load = await engine.load()
        assert load is not None
        assert (load.running, load.free_kv_tokens) == (1, 15)
        assert watch.stalled() is None
        await engine.abort([asked.rid])
        await call
        assert watch.in_flight == 0
