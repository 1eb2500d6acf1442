"""The simulated engine as a worker meets it: over HTTP, as a process, and under a real `rq worker`."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
from waiting import until, until_blocking

from rollpool.ops.local.hosts import LocalHosts
from rollpool.ops.sim import (
    FAIL,
    FORGET,
    HANG,
    KILL,
    REFUSE,
    logprobs_of,
    made_by,
    make_sim_model,
    sim_engine,
)
from rollpool.producer import RolloutPool
from rollpool.schemas.jobs import SamplingParams
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.process import LIFELINE_ENV, EngineProcess, free_port
from rollpool.worker.engines.process_group import alive, members
from rollpool.worker.engines.protocol import (
    ChatRequest,
    Completion,
    EngineUnavailable,
    RequestRefused,
    SampleRequest,
    new_rid,
)
from rollpool.worker.engines.settings import EngineSettings

SIGNATURE = 7

#: Never over within a test.
ENDLESS = 20_000

#: Seconds in which what happens at all would have happened; a test that relies on it can only pass wrongly.
A_WHILE = 0.3


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the user's own."""
    for name in list(os.environ):
        if name.upper().startswith("ROLLPOOL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(make_sim_model(tmp_path / "model", signature=SIGNATURE))


def settings(tmp_path: Path, **changes: Any) -> EngineSettings:
    made = sim_engine(max_running_requests=2, step_ms=2, start_s=0, median_tokens=20)
    return EngineSettings(**{**made, "jit_cache_dir": tmp_path / "jit", "start_timeout_s": 60, **changes})


class Sim:
    """A running engine, its process and its surface."""

    def __init__(self, process: EngineProcess, engine: HttpEngine) -> None:
        self.process = process
        self.engine = engine
        assert process.pid is not None
        self.server = psutil.Process(process.pid)
        (self.scheduler,) = self.server.children()

    async def asks(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.engine.url + path, json=body) as got,
        ):
            return got.status, await got.json() if got.content_type == "application/json" else None

    async def generate(self, *prompt: int, **sampling: Any) -> Completion:
        return await self.engine.generate(request(*prompt, **sampling))

    def begin(self, *prompt: int, **sampling: Any) -> "asyncio.Task[Completion]":
        return asyncio.create_task(
            self.generate(*prompt, **{"max_new_tokens": ENDLESS, "ignore_eos": True, **sampling})
        )

    async def until_runs(self, running: int, waiting: int = 0) -> None:
        async def runs() -> bool:
            load = await self.engine.load()
            return load is not None and (load.running, load.waiting) == (running, waiting)

        await until(runs, f"{running} run and {waiting} wait")


def request(*prompt: int, **sampling: Any) -> SampleRequest:
    ids = np.array(prompt or (5, 6, 7), np.int32)
    return SampleRequest(rid=new_rid(), input_ids=ids, sampling=SamplingParams(**sampling))


@pytest.fixture
async def start(tmp_path: Path, model: str) -> AsyncIterator[Callable[..., Any]]:
    processes: list[EngineProcess] = []

    async def starting(**changes: Any) -> Sim:
        process = EngineProcess(settings(tmp_path, **changes), log_path=tmp_path / f"engine-{len(processes)}.log")
        processes.append(process)
        return Sim(process, await process.start(model))

    yield starting
    for process in processes:
        await process.kill()


@pytest.fixture
async def sim(start: Callable[..., Any]) -> Sim:
    made = await start()
    assert isinstance(made, Sim)
    return made


async def until_gone(*processes: psutil.Process) -> None:
    await until(lambda: not any(alive(each) for each in processes), "the processes end")


@contextlib.asynccontextmanager
async def in_flight(*calls: "asyncio.Task[Any]") -> AsyncIterator[None]:
    """Calls that are still on their way at the end of a test."""
    yield
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_tokens_and_logprobs_are_those_of_the_policy(sim: Sim) -> None:
    done = await asyncio.gather(*(sim.generate(max_new_tokens=120, temperature=0.7) for _ in range(6)))
    for each in done:
        assert made_by(SIGNATURE, [5, 6, 7], each.output_ids)
        assert each.logprobs is not None
        assert (each.logprobs == logprobs_of(SIGNATURE, [5, 6, 7], each.output_ids)).all()
        assert each.finish_reason == ("length" if each.completion_tokens == 120 else "stop")
    assert len({each.output_ids.tobytes() for each in done}) == 6
    assert sim.engine.facts.line == "main"
    assert sim.engine.facts.max_running_requests == 2


async def test_without_an_end_a_completion_has_just_the_tokens_asked_for(sim: Sim) -> None:
    done = await sim.generate(max_new_tokens=173, ignore_eos=True)
    assert (done.completion_tokens, done.finish_reason) == (173, "length")


async def test_no_more_run_at_once_than_there_are_slots(sim: Sim) -> None:
    calls = [sim.begin() for _ in range(5)]
    async with in_flight(*calls):
        await sim.until_runs(2, waiting=3)


async def test_a_chat_is_answered(sim: Sim) -> None:
    sampling = SamplingParams(max_new_tokens=9, ignore_eos=True)
    done = await sim.engine.chat(
        ChatRequest(rid=new_rid(), messages=[{"role": "user", "content": "hé"}], sampling=sampling)
    )
    assert done.completion_tokens == 9
    assert done.text


async def test_a_key_is_asked_for_but_not_for_health(start: Callable[..., Any]) -> None:
    sim = await start(api_key="secret")
    assert (await sim.generate(max_new_tokens=3)).completion_tokens == 3
    assert (await sim.asks("GET", "/get_model_info"))[0] == 401
    assert (await sim.asks("GET", "/health"))[0] == 200


async def test_what_the_engine_cannot_do_is_refused_with_the_reason(start: Callable[..., Any]) -> None:
    sim = await start(max_seq_len=64)
    with pytest.raises(RequestRefused, match="over the engine's 62"):
        await sim.generate(max_new_tokens=100)
    status, said = await sim.asks("POST", "/generate", {"input_ids": [1] * 70})
    assert (status, "context length" in said["error"]["message"]) == (400, True)
    assert (await sim.asks("POST", "/generate", {"input_ids": "x"}))[0] == 400
    assert (await sim.asks("GET", "/get_load"))[0] == 500


async def test_faults_of_one_request_are_its_own(sim: Sim) -> None:
    forgotten = sim.begin(FORGET, max_new_tokens=1)
    async with in_flight(forgotten):
        with pytest.raises(RequestRefused, match="refused"):
            await sim.generate(REFUSE, 1)
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match=r"500.*always fails"):
                await sim.generate(FAIL, 1)
        assert (await sim.generate(max_new_tokens=3)).completion_tokens == 3
        assert not forgotten.done()
    # A forgotten request whose client left is over: the engine ends in order.
    sim.server.terminate()
    await until_gone(sim.server, sim.scheduler)


async def test_a_lethal_request_ends_all_its_processes(sim: Sim) -> None:
    other = sim.begin()
    with pytest.raises(EngineUnavailable, match="lost the engine"):
        await sim.generate(KILL, 1)
    with pytest.raises(EngineUnavailable):
        await other
    assert "Scheduler hit an exception" in await sim.process.watch()
    await until_gone(sim.server, sim.scheduler)


async def test_a_hung_scheduler_answers_nobody_and_health_is_200(sim: Sim) -> None:
    calls = [sim.begin(), sim.begin(HANG, 1), sim.begin(max_new_tokens=1)]
    async with in_flight(*calls):
        await until(lambda: not_moving(sim))
        assert not any(call.done() for call in calls)
        assert (await sim.asks("GET", "/health"))[0] == 200
        assert alive(sim.scheduler)


async def test_a_dead_scheduler_is_not_seen_in_health_but_by_the_watch(sim: Sim) -> None:
    call = sim.begin()
    async with in_flight(call):
        await sim.until_runs(1)
        sim.scheduler.kill()
        assert f"process {sim.scheduler.pid} died" in await sim.process.watch()
        assert (await sim.asks("GET", "/health"))[0] == 200
        assert await not_moving(sim)
        assert not call.done()
        sim.server.terminate()
        await asyncio.sleep(A_WHILE)
        assert alive(sim.server), "there is something left to answer, and nobody to do it"


async def test_a_stopped_scheduler_goes_on_where_it_was(sim: Sim) -> None:
    sim.scheduler.suspend()
    call = sim.begin(max_new_tokens=3)
    assert await not_moving(sim)
    assert not call.done()
    sim.scheduler.resume()
    assert (await call).completion_tokens == 3


async def not_moving(sim: Sim) -> bool:
    """True once the scheduler does not say what it does."""
    try:
        async with asyncio.timeout(A_WHILE):
            await sim.engine.load()
    except TimeoutError:
        return True
    return False


async def test_requests_with_and_without_logprobs_together_end_the_engine(sim: Sim) -> None:
    call = sim.begin()
    await sim.until_runs(1)
    with pytest.raises(aiohttp.ClientError):
        await sim.asks("GET", "/health_generate")
    with pytest.raises(EngineUnavailable):
        await call
    assert "return_logprob" in await sim.process.watch()


async def test_a_health_check_alone_generates(sim: Sim) -> None:
    before = await sim.engine.load()
    assert (await sim.asks("GET", "/health_generate"))[0] == 200
    after = await sim.engine.load()
    assert before is not None
    assert after is not None
    assert (before.steps or 0) + 1 == after.steps


async def test_an_abort_ends_a_running_request_with_what_it_has(sim: Sim) -> None:
    asked = request(max_new_tokens=ENDLESS, ignore_eos=True)
    call = asyncio.create_task(sim.engine.generate(asked))
    before = await sim.engine.load()
    assert before is not None

    async def decodes() -> bool:
        load = await sim.engine.load()
        return load is not None and load.running == 1 and load.steps != before.steps

    await until(decodes)
    await sim.engine.abort([asked.rid])
    done = await call
    assert done.finish_reason == "abort"
    assert 0 < done.completion_tokens < ENDLESS
    assert made_by(SIGNATURE, [5, 6, 7], done.output_ids)
    await sim.process.stop()


async def test_an_abort_matches_by_prefix(sim: Sim) -> None:
    def posting(rid: str) -> "asyncio.Task[Any]":
        sampling = {"max_new_tokens": ENDLESS, "ignore_eos": True}
        body = {"rid": rid, "input_ids": [5], "sampling_params": sampling, "return_logprob": True}
        return asyncio.create_task(sim.asks("POST", "/generate", body))

    calls = [posting("ab-1"), posting("ab-10")]
    await sim.until_runs(2)
    await sim.asks("POST", "/abort_request", {"rid": "ab-"})
    await sim.until_runs(2)
    await sim.asks("POST", "/abort_request", {"rid": "ab-1"})
    for _, said in await asyncio.gather(*calls):
        assert said["meta_info"]["finish_reason"]["type"] == "abort"


async def test_an_abort_in_the_queue_leaks_so_that_the_engine_never_drains(sim: Sim) -> None:
    running = [sim.begin(max_new_tokens=100) for _ in range(2)]
    await sim.until_runs(2)
    asked = request()
    queued = asyncio.create_task(sim.engine.generate(asked))
    await sim.until_runs(2, waiting=1)
    await sim.engine.abort([asked.rid])
    done = await queued
    assert (done.finish_reason, done.completion_tokens) == ("abort", 0)
    await asyncio.gather(*running)
    pausing = asyncio.create_task(sim.asks("POST", "/pause_generation", {"mode": "abort"}))
    sim.server.terminate()
    async with in_flight(pausing):
        await asyncio.sleep(A_WHILE)
        assert not pausing.done()
        assert alive(sim.server)


async def test_a_client_that_leaves_ends_its_request(sim: Sim) -> None:
    call = sim.begin()
    await sim.until_runs(1)
    call.cancel()
    await sim.until_runs(0)
    sim.server.terminate()
    await until_gone(sim.server, sim.scheduler)


async def test_sigterm_lets_what_runs_finish(sim: Sim) -> None:
    calls = [sim.begin(max_new_tokens=100) for _ in range(3)]
    await sim.until_runs(2, waiting=1)
    sim.server.terminate()
    assert [done.completion_tokens for done in await asyncio.gather(*calls)] == [100] * 3
    await until_gone(sim.server, sim.scheduler)


async def test_of_two_requests_of_one_id_the_later_gets_the_reply_of_the_first(sim: Sim) -> None:
    first, second = request(1, max_new_tokens=90, ignore_eos=True), request(2, max_new_tokens=900, ignore_eos=True)
    bodies = [{**sim.engine._dialect.generate_body(each), "rid": "same"} for each in (first, second)]
    answered = asyncio.create_task(sim.asks("POST", "/generate", bodies[0]))
    async with in_flight(answered):
        await sim.until_runs(1)
        _, said = await sim.asks("POST", "/generate", bodies[1])
        assert made_by(SIGNATURE, [1], said["output_ids"])
        assert not made_by(SIGNATURE, [2], said["output_ids"])
        assert not answered.done()


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_new_and_old_requests_wait_out_a_pause(sim: Sim, mode: str) -> None:
    call = sim.begin(max_new_tokens=200)
    await sim.until_runs(1)
    assert (await sim.asks("POST", "/pause_generation", {"mode": mode}))[0] == 200
    later = sim.begin(max_new_tokens=3)
    steps = await sim.engine.load()
    await asyncio.sleep(A_WHILE)
    assert await sim.engine.load() == steps
    assert not call.done()
    assert not later.done()
    assert (await sim.asks("POST", "/continue_generation", {}))[0] == 200
    done = await call
    assert done.completion_tokens == 200
    assert made_by(SIGNATURE, [5, 6, 7], done.output_ids)
    assert (await later).completion_tokens == 3


async def test_a_pause_that_aborts_ends_what_runs(sim: Sim) -> None:
    asked = request(max_new_tokens=ENDLESS, ignore_eos=True)
    body = sim.engine._dialect.generate_body(asked)
    call = asyncio.create_task(sim.asks("POST", "/generate", body))
    await sim.until_runs(1)
    assert (await sim.asks("POST", "/pause_generation", {"mode": "abort"}))[0] == 200
    _, said = await call
    assert said["meta_info"]["finish_reason"]["type"] == "abort"
    assert (await sim.asks("POST", "/continue_generation", {}))[0] == 200
    assert (await sim.generate(max_new_tokens=3)).completion_tokens == 3


async def test_an_engine_on_something_else_ends_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    process = EngineProcess(settings(tmp_path), log_path=tmp_path / "engine.log")
    with pytest.raises(EngineUnavailable, match="no model of a simulated engine"):
        await process.start(str(tmp_path / "other"))


async def test_nothing_is_left_when_the_worker_that_started_it_is_gone(tmp_path: Path, model: str) -> None:
    made = settings(tmp_path)
    read_end, write_end = os.pipe()
    port = free_port(made.host)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(made.launcher), "--model-path", model, "--port", str(port), "--skip-server-warmup"),
        env={**os.environ, LIFELINE_ENV: str(read_end)},
        pass_fds=(read_end,),
        start_new_session=True,
    )
    try:
        os.close(read_end)
        async with await HttpEngine.attach(f"http://127.0.0.1:{port}") as engine:
            assert engine.facts.model_path == model
        assert len(members(process.pid)) == 2
    finally:
        os.close(write_end)
        assert await process.wait() == -signal.SIGKILL
    await until(lambda: not members(process.pid))


@pytest.fixture
def hosts(redis_url: str, tmp_path: Path) -> Iterator[LocalHosts]:
    engine = {**sim_engine(step_ms=2, start_s=0), "jit_cache_dir": str(tmp_path / "jit")}
    with LocalHosts(redis_url, "test", tmp_path / "logs", engine, {"heartbeat_s": 0.2}) as made:
        yield made


def test_a_real_worker_serves_it_in_the_place_of_an_engine(redis_url: str, hosts: LocalHosts, model: str) -> None:
    prompts = [np.random.default_rng(seed).integers(0, 1000, 5 + seed) for seed in range(50)]
    with RolloutPool(redis_url, pool="test", run="r") as pool:
        pool.publish_policy(1, checkpoint=model)
        hosts.start("a")
        batch = pool.enqueue_prompts(prompts, policy_version=1, n=2, sampling=SamplingParams(max_new_tokens=64))
        groups = list(batch.collect(timeout=120))
        batch.commit()
    assert sorted(group.prompt_ids.tolist() for group in groups) == sorted(prompt.tolist() for prompt in prompts)
    for group in groups:
        assert len(group.samples) == 2
        for sample in group.samples:
            assert made_by(SIGNATURE, group.prompt_ids, sample.output_ids)
            assert sample.logprobs is not None
            assert (sample.logprobs == logprobs_of(SIGNATURE, group.prompt_ids, sample.output_ids)).all()
    until_blocking(lambda: hosts.listed() == 1, "the worker goes on")
    hosts.check()
