"""`HttpEngine` against a real sglang-jax server: that the facts its dialects rest on still hold."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from real_pool import RealEngine

from rollpool.schemas.jobs import SamplingParams
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.protocol import (
    ChatRequest,
    Completion,
    EngineUnavailable,
    RequestRefused,
    SampleRequest,
    WeightsRefused,
    new_rid,
)

pytestmark = pytest.mark.engine

#: Over 50, from where on the server repeats log-probs.
LONG = 64


@pytest.fixture
async def client(engine: RealEngine) -> AsyncIterator[HttpEngine]:
    async with await HttpEngine.attach(engine.url, timeout_s=120) as attached:
        yield attached


def request(*, prompt: int = 12, seed: int = 0, **sampling: Any) -> SampleRequest:
    ids = np.random.default_rng(seed).integers(3, 400, prompt).astype(np.int32)
    return SampleRequest(rid=new_rid(), input_ids=ids, sampling=SamplingParams(**sampling))


def assert_whole(done: Completion, length: int) -> None:
    assert done.finish_reason == "length"
    assert done.logprobs is not None
    assert len(done.output_ids) == len(done.logprobs) == done.completion_tokens == length
    assert (done.logprobs <= 0).all()


async def test_facts_match_the_launch(client: HttpEngine, engine: RealEngine) -> None:
    facts = client.facts
    assert facts.model_path == str(engine.model_path)
    assert 0 < facts.max_prompt_tokens < facts.context_length
    assert facts.max_running_requests > 0
    assert await client.identify() == facts.identity


async def test_concurrent_requests_each_get_all_their_logprobs(client: HttpEngine) -> None:
    asked = [request(seed=i, max_new_tokens=LONG + i % 5, ignore_eos=True) for i in range(16)]
    done = await asyncio.gather(*(client.generate(one) for one in asked))
    for completion, one in zip(done, asked, strict=True):
        assert_whole(completion, one.sampling.max_new_tokens)
    assert await client.identify() == client.facts.identity


async def test_greedy_is_the_same_alone_and_again(client: HttpEngine) -> None:
    first, second = [
        await client.generate(request(max_new_tokens=LONG, temperature=0.0, ignore_eos=True)) for _ in range(2)
    ]
    assert_whole(first, LONG)
    assert first.output_ids.tolist() == second.output_ids.tolist()


async def test_a_stop_token_is_kept(client: HttpEngine) -> None:
    greedy = await client.generate(request(max_new_tokens=8, temperature=0.0, ignore_eos=True))
    stop = int(greedy.output_ids[5])
    stopped = await client.generate(request(max_new_tokens=8, temperature=0.0, stop_token_ids=(stop,)))
    assert stopped.finish_reason == "stop"
    expected = greedy.output_ids.tolist()
    assert stopped.output_ids.tolist() == expected[: expected.index(stop) + 1]


async def test_the_longest_that_fits_is_generated_whole(client: HttpEngine) -> None:
    facts = client.facts
    new = facts.context_length - facts.max_prompt_tokens
    assert_whole(
        await client.generate(request(prompt=facts.max_prompt_tokens, max_new_tokens=new, ignore_eos=True)), new
    )


async def test_one_token_more_than_fits_would_be_cut_so_it_is_refused(client: HttpEngine) -> None:
    limit = client.facts.context_length
    asked = request(prompt=limit - 9, max_new_tokens=10, ignore_eos=True)
    with pytest.raises(RequestRefused):
        await client.generate(asked)
    trusting = unchecked(client)
    assert len((await trusting.generate(asked)).output_ids) == 9


async def test_the_engines_own_refusal_is_the_jobs_fault(client: HttpEngine) -> None:
    with pytest.raises(RequestRefused, match="context length"):
        await unchecked(client).generate(request(prompt=5000, max_new_tokens=1))


def unchecked(client: HttpEngine) -> HttpEngine:
    """The same connection, with limits so wide that nothing is refused before it is sent."""
    wide = replace(client.facts, context_length=10**6, max_prompt_tokens=10**6)
    return HttpEngine(client.url, wide, client._dialect, client._session)


async def test_an_adapter_is_not_sent_to_an_engine_without_any(client: HttpEngine) -> None:
    if client.facts.lora != "none":
        pytest.skip("this engine was launched with adapters")
    with pytest.raises(RequestRefused, match="silently ignore"):
        await client.generate(replace(request(max_new_tokens=2), lora_path="a"))


async def test_a_chat_beside_generation_does_not_kill_the_server(client: HttpEngine) -> None:
    chat = ChatRequest(
        rid=new_rid(),
        messages=[{"role": "user", "content": "hello"}],
        sampling=SamplingParams(max_new_tokens=LONG, ignore_eos=True),
    )
    beside = request(max_new_tokens=LONG, ignore_eos=True)
    answer, done = await asyncio.gather(client.chat(chat), client.generate(beside))
    assert answer.completion_tokens == LONG
    assert_whole(done, LONG)
    assert await client.identify() == client.facts.identity


async def aborted_midway(client: HttpEngine, asked: Callable[[], SampleRequest]) -> Completion:
    """What a request has when it is aborted after its first tokens; later each time, since machines differ."""
    for wait_s in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        one = asked()
        call = asyncio.create_task(client.generate(one))
        await asyncio.wait([call], timeout=wait_s)
        await client.abort([one.rid])
        assert call.done()  # an abort returns when its calls have
        done = await call
        assert done.finish_reason == "abort", "it was faster than the abort: ask for more tokens"
        if len(done.output_ids):
            return done
    raise AssertionError("no token within the longest wait")


async def test_an_abort_in_the_middle_returns_the_tokens_and_logprobs_there_are(client: HttpEngine) -> None:
    sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    part = await aborted_midway(client, lambda: request(max_new_tokens=200, **sampling))
    count = part.completion_tokens
    assert part.logprobs is not None
    assert 0 < len(part.output_ids) == len(part.logprobs) == count < 200
    whole = await client.generate(request(max_new_tokens=count, **sampling))
    assert whole.logprobs is not None
    assert part.output_ids.tolist() == whole.output_ids.tolist()
    np.testing.assert_allclose(part.logprobs, whole.logprobs, atol=1e-4)


async def test_what_an_abort_left_is_continued_from_its_tokens(client: HttpEngine) -> None:
    sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    first = request(max_new_tokens=100, **sampling)
    part = await aborted_midway(client, lambda: replace(first, rid=new_rid()))
    rest = replace(
        first,
        rid=new_rid(),
        input_ids=np.concatenate([first.input_ids, part.output_ids]),
        sampling=SamplingParams(max_new_tokens=100 - part.completion_tokens, **sampling),
    )
    tail, whole = await client.generate(rest), await client.generate(replace(first, rid=new_rid()))
    assert [*part.output_ids, *tail.output_ids] == whole.output_ids.tolist()


async def test_requests_that_are_aborted_while_they_wait_have_nothing(client: HttpEngine) -> None:
    many = client.facts.max_running_requests + 8
    asked = [request(seed=i, max_new_tokens=200, ignore_eos=True) for i in range(many)]
    calls = [asyncio.create_task(client.generate(one)) for one in asked]
    await asyncio.sleep(0)
    await client.abort([one.rid for one in asked])
    done = await asyncio.gather(*calls)
    assert {each.finish_reason for each in done} == {"abort"}
    assert min(len(each.output_ids) for each in done) == 0
    assert_whole(await client.generate(request(max_new_tokens=8, ignore_eos=True)), 8)


async def test_a_flush_leaves_the_engine_the_same(client: HttpEngine) -> None:
    if client.facts.line != "main":
        with pytest.raises(WeightsRefused, match="cannot flush"):
            await client.flush_cache()
        return
    await until_running(client, 0)
    await client.generate(request(max_new_tokens=8, ignore_eos=True))
    await client.flush_cache()
    assert await client.identify() == client.facts.identity


async def test_a_cancelled_call_ends_in_the_engine(client: HttpEngine) -> None:
    if client.facts.line != "main":
        pytest.skip("0.0.1.post1 does not tell what it runs")
    call = asyncio.create_task(client.generate(request(max_new_tokens=200, ignore_eos=True)))
    await until_running(client, 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until_running(client, 0)


async def until_running(client: HttpEngine, count: int) -> None:
    async with asyncio.timeout(60):
        while True:
            load = await client.load()
            if load is not None and load.running == count:
                return


async def test_nothing_listens_on_another_port(unused_tcp_port: int) -> None:
    with pytest.raises(EngineUnavailable):
        await HttpEngine.attach(f"http://127.0.0.1:{unused_tcp_port}", timeout_s=1)
