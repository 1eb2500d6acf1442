"""`HttpEngine` against a server that misbehaves as sglang-jax has been seen to."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_engine import FakeServer, completion

from rollpool.schemas.jobs import SamplingParams
from rollpool.schemas.results import VersionSpan
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.progress import ProgressWatch
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    EngineUnavailable,
    RequestRefused,
    SampleRequest,
    WeightsRefused,
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
            assert (engine.facts.lora, engine.facts.swaps) == ("none", False)
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


#: What a server can be told to change, as its document lists it.
ALL_ROUTES = {"/generate", "/update_weights_from_disk", "/load_lora_adapter", "/unload_lora_adapter"}


@pytest.fixture
async def changeable(fake: FakeServer) -> AsyncIterator[HttpEngine]:
    fake.routes = ALL_ROUTES
    fake.info = {"enable_lora": True, "max_loras_per_batch": 5}
    async with await HttpEngine.attach(fake.url, timeout_s=20) as attached:
        yield attached


async def test_what_an_engine_can_change_is_learned_from_the_routes_it_lists(changeable: HttpEngine) -> None:
    facts = changeable.facts
    assert (facts.swaps, facts.lora, facts.adapter_slots) == (True, "runtime", 4)


@pytest.mark.parametrize(
    ("routes", "about", "why"),
    [
        (None, {}, "no route /update_weights_from_disk"),
        ({"/generate"}, {}, "no route /update_weights_from_disk"),
        (ALL_ROUTES | {"/rollpool_engine"}, {"hot_swap": False, "reason": "the model is quantized"}, "is quantized"),
    ],
)
async def test_why_an_engine_has_to_restart_for_other_weights_is_logged(
    fake: FakeServer, caplog: pytest.LogCaptureFixture, routes: set[str] | None, about: dict[str, Any], why: str
) -> None:
    fake.routes, fake.about = routes, about
    with caplog.at_level(logging.INFO):
        async with await HttpEngine.attach(fake.url, timeout_s=20) as engine:
            assert not engine.facts.swaps
            assert why in caplog.text
            with pytest.raises(WeightsRefused, match="restart it on /models/b") as refused:
                await engine.swap("/models/b", 2)
            assert refused.value.restart_may_help
    assert fake.changes == []


async def test_a_swap_changes_the_weights_and_not_the_engine(fake: FakeServer, changeable: HttpEngine) -> None:
    before = changeable.facts
    fake.steps = 50
    assert await changeable.identify() == before.identity
    await changeable.swap("/models/b", 13)
    ((path, body),) = fake.changes
    assert path == "/update_weights_from_disk"
    assert (body["model_path"], body["weight_version"], body["flush_cache"]) == ("/models/b", "13", True)
    assert body["abort_all_requests"] is False
    after = changeable.facts
    assert (after.model_path, after.max_running_requests) == ("/models/b", before.max_running_requests)
    assert await changeable.identify() == after.identity != before.identity
    fake.steps = 7
    assert await changeable.identify() == after.identity
    fake.steps = 3
    assert await changeable.identify() != after.identity


async def test_who_it_is_is_told_after_a_swap_that_is_under_way(fake: FakeServer, changeable: HttpEngine) -> None:
    fake.steps = 50
    fake.may_change.clear()
    swapping = asyncio.create_task(changeable.swap("/models/b", 2))
    await until(lambda: len(fake.changes) == 1)
    asking = asyncio.create_task(changeable.identify())
    await asyncio.sleep(0)
    fake.may_change.set()
    await swapping
    assert await asking == changeable.facts.identity


@pytest.mark.parametrize(
    ("status", "said", "may_help"),
    [
        (400, b'{"success": false, "message": "tensor x is missing", "restart_may_help": false}', False),
        (400, b'{"success": false, "message": "tensor x is missing", "restart_may_help": true}', True),
        (200, b'{"success": false, "message": "tensor x is missing"}', True),  # it does not say
    ],
)
async def test_weights_that_are_refused_leave_everything_as_it_was(
    fake: FakeServer, changeable: HttpEngine, status: int, said: bytes, may_help: bool
) -> None:
    before = changeable.facts
    fake.steps, fake.refusal = 50, (status, said)
    with pytest.raises(WeightsRefused, match="/models/b: tensor x is missing") as refused:
        await changeable.swap("/models/b", 2)
    assert refused.value.restart_may_help is may_help
    assert changeable.facts == before
    assert await changeable.identify() == before.identity


async def test_after_a_swap_that_fails_nobody_knows_what_the_engine_is(
    fake: FakeServer, changeable: HttpEngine
) -> None:
    fake.refusal = (500, b"Internal Server Error")
    with pytest.raises(EngineUnavailable, match="answered 500"):
        await changeable.swap("/models/b", 2)
    assert await changeable.identify() != changeable.facts.identity


async def test_a_swap_that_loses_its_engine_says_so(fake: FakeServer, changeable: HttpEngine) -> None:
    fake.may_change.clear()
    swapping = asyncio.create_task(changeable.swap("/models/b", 2))
    await until(lambda: len(fake.changes) == 1)
    await fake.stop()
    with pytest.raises(EngineUnavailable, match="lost the engine"):
        await swapping


async def test_an_engine_that_changes_its_weights_is_not_stalled(fake: FakeServer) -> None:
    now = 0.0
    watch = ProgressWatch(lambda: now, 300, 1800)
    fake.routes = ALL_ROUTES
    fake.may_change.clear()
    async with await HttpEngine.attach(fake.url, timeout_s=20, progress=watch) as engine:
        asked = request([99])
        call = asyncio.create_task(engine.generate(asked))
        swapping = asyncio.create_task(engine.swap("/models/b", 2))
        await until(lambda: len(fake.changes) == 1 and asked.rid in fake.waiting)
        now = 1800
        assert watch.stalled() is None
        fake.may_change.set()
        await swapping
        assert watch.stalled() is None
        now += 301
        assert watch.stalled() is not None
        fake.waiting[asked.rid].set()
        with pytest.raises(EngineUnavailable):  # an abort that nobody asked for
            await call


async def test_each_token_is_under_the_version_that_the_engine_tells(fake: FakeServer, changeable: HttpEngine) -> None:
    async def answer(asked: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        said = completion(body["rid"], 5)
        versions = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 6}]
        said["meta_info"]["weight_versions"] = versions
        return web.json_response(said)

    fake.reply = answer
    done = await changeable.generate(request(new=5))
    assert done.version_spans == (VersionSpan(3, 0, 2), VersionSpan(4, 2, 5))


async def test_adapters_come_and_go_while_the_engine_serves(fake: FakeServer, changeable: HttpEngine) -> None:
    adapter = Adapter("r.g0.v1", "/adapters/1")
    for _ in range(2):
        await changeable.load_adapter(adapter)
    assert fake.lora == {"r.g0.v1": "/adapters/1"}
    await changeable.generate(request(lora_path="r.g0.v1"))
    assert fake.bodies[-1]["lora_path"] == "r.g0.v1"
    await changeable.unload_adapter("r.g0.v1")
    assert fake.lora == {}


async def test_an_adapter_that_is_refused_is_told_in_the_engines_words(
    fake: FakeServer, changeable: HttpEngine
) -> None:
    fake.refusal = (400, b'{"success": false, "message": "rank 64 is over 16", "loaded_adapters": {}}')
    for call in (changeable.load_adapter(Adapter("a", "/a")), changeable.unload_adapter("a")):
        with pytest.raises(WeightsRefused, match=r"load the adapter a.*rank 64 is over 16"):
            await call


async def test_an_engine_without_the_routes_is_never_asked_for_an_adapter(fake: FakeServer, engine: HttpEngine) -> None:
    for call in (engine.load_adapter(Adapter("a", "/a")), engine.unload_adapter("a")):
        with pytest.raises(WeightsRefused, match="restart it"):
            await call
    assert fake.changes == []


async def test_a_flush_leaves_the_engine_the_same(fake: FakeServer, engine: HttpEngine) -> None:
    fake.steps = 50
    assert await engine.identify() == engine.facts.identity
    await engine.flush_cache()
    assert fake.steps == 0
    assert await engine.identify() == engine.facts.identity
    fake.refusal = (400, b"Cache flushed. Reason: 3 requests run")
    with pytest.raises(WeightsRefused, match="3 requests run"):
        await engine.flush_cache()


async def test_an_abort_that_overtakes_its_request_is_sent_again(fake: FakeServer, engine: HttpEngine) -> None:
    asked = request([99])
    call = asyncio.create_task(engine.generate(asked))
    await asyncio.sleep(0)  # it is on its way
    await engine.abort([asked.rid])
    assert (await call).finish_reason == "abort"
    assert call.done()


async def test_an_aborted_request_counts_as_one_the_server_may_not_forget(fake: FakeServer) -> None:
    watch = ProgressWatch(lambda: 0.0, 300)
    async with await HttpEngine.attach(fake.url, timeout_s=20, progress=watch) as engine:
        asked = request([99])
        call = asyncio.create_task(engine.generate(asked))
        await until(lambda: asked.rid in fake.waiting)
        assert watch.given_up == 0
        await engine.abort([asked.rid])
        await call
        assert watch.given_up == 1


async def test_a_request_that_was_aborted_in_the_queue_gives_an_empty_completion(
    fake: FakeServer, engine: HttpEngine
) -> None:
    reached = asyncio.Event()

    async def in_queue(asked: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        fake.waiting[body["rid"]] = asyncio.Event()
        reached.set()
        await fake.waiting[body["rid"]].wait()
        reason = {"type": "abort", "message": "Abort before prefill"}
        meta = {"id": body["rid"], "finish_reason": reason, "prompt_tokens": 0, "completion_tokens": 0}
        return web.json_response({"text": "", "meta_info": meta})

    fake.reply = in_queue
    asked = request()
    call = asyncio.create_task(engine.generate(asked))
    await reached.wait()
    await engine.abort([asked.rid])
    done = await call
    assert done.logprobs is not None
    assert (done.finish_reason, done.output_ids.size, done.logprobs.size) == ("abort", 0, 0)
    assert (done.text, done.prompt_tokens, done.version_spans) == ("", 3, ())


async def test_a_chat_that_is_aborted_in_the_queue_gives_an_empty_completion(
    fake: FakeServer, engine: HttpEngine
) -> None:
    async def in_queue(asked: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        fake.waiting[body["rid"]] = asyncio.Event()
        await fake.waiting[body["rid"]].wait()
        return web.json_response({"message": "Internal server error: 'output_token_logprobs'"}, status=500)

    fake.reply = in_queue
    asked = ChatRequest(rid=new_rid(), messages=[{"role": "user", "content": "hi"}], sampling=SamplingParams())
    call = asyncio.create_task(engine.chat(asked))
    await until(lambda: asked.rid in fake.waiting)
    await engine.abort([asked.rid])
    done = await call
    assert (done.finish_reason, done.text, done.logprobs) == ("abort", "", None)


async def test_a_line_that_cannot_flush_is_not_asked_to() -> None:
    server = FakeServer(version="0.0.1")
    await server.start()
    try:
        async with await HttpEngine.attach(server.url, timeout_s=20) as engine:
            with pytest.raises(WeightsRefused, match="cannot flush"):
                await engine.flush_cache()
        assert server.changes == []
    finally:
        await server.stop()
