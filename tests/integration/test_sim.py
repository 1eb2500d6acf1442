"""The simulated engine as a worker meets it: over HTTP, as a process, and under a real `rq worker`."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
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
    adapted,
    logprobs_of,
    made_by,
    made_by_spans,
    make_sim_adapter,
    make_sim_model,
    sim_engine,
)
from rollpool.producer import RolloutPool
from rollpool.schemas.jobs import SamplingParams
from rollpool.worker.engines.http_engine import HttpEngine
from rollpool.worker.engines.process import LIFELINE_ENV, EngineProcess, free_port
from rollpool.worker.engines.process_group import alive, members
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    Completion,
    EngineUnavailable,
    RequestRefused,
    SampleRequest,
    WeightsRefused,
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


def settings(tmp_path: Path, kind: dict[str, Any] | None = None, **changes: Any) -> EngineSettings:
    made = sim_engine(max_running_requests=2, step_ms=2, start_s=0, median_tokens=20, **(kind or {}))
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


async def until_decodes(sim: Sim) -> None:
    """Until the one request has more tokens than it has now."""
    before = await sim.engine.load()
    assert before is not None

    async def decodes() -> bool:
        load = await sim.engine.load()
        return load is not None and load.running == 1 and load.steps != before.steps

    await until(decodes)


async def test_an_abort_ends_a_running_request_with_what_it_has(sim: Sim) -> None:
    asked = request(max_new_tokens=ENDLESS, ignore_eos=True)
    call = asyncio.create_task(sim.engine.generate(asked))
    await until_decodes(sim)
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


class Surface:
    """An engine that nobody but the test speaks with; started with what makes it one of its kind."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def get(self, path: str) -> tuple[int, Any]:
        async with self._session.get(self._url + path) as got:
            return got.status, await got.json() if got.content_type == "application/json" else None

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self._session.post(self._url + path, json=body) as got:
            return got.status, await got.json() if got.content_type == "application/json" else None

    def begin(self, rid: str = "", lora: str | None = None, tokens: int = 150) -> "asyncio.Task[Any]":
        """A request of so many tokens; its reply."""
        sampling = {"max_new_tokens": tokens, "ignore_eos": True}
        body = {"rid": rid, "input_ids": [5, 6, 7], "sampling_params": sampling, "return_logprob": True}
        return asyncio.create_task(self.post("/generate", **body, **({"lora_path": lora} if lora else {})))

    async def swap(self, path: Path, version: str, **options: Any) -> tuple[int, Any]:
        body = {"model_path": str(path), "weight_version": version, "flush_cache": True}
        return await self.post("/update_weights_from_disk", **{**body, "abort_all_requests": False, **options})

    async def until_runs(self, running: int, waiting: int = 0, steps: int = 1) -> None:
        async def runs() -> bool:
            (state,) = (await self.get("/get_server_info"))[1]["internal_states"]
            counts = state["running_batch_size"], state["waiting_queue_size"]
            return counts == (running, waiting) and state["forward_ct_decode"] >= steps

        await until(runs, f"{running} run and {waiting} wait")


@pytest.fixture
async def launch(tmp_path: Path, model: str) -> AsyncIterator[Callable[..., Any]]:
    """Start an engine by its command line, and wait until it answers; None when it ends instead."""
    processes: list[asyncio.subprocess.Process] = []
    async with aiohttp.ClientSession() as session:

        async def launching(*flags: str, path: Path | str = model, **env: str) -> Surface | None:
            port = free_port("127.0.0.1")
            flags = ("--port", str(port), "--skip-server-warmup", "--sim-start-s", "0", "--sim-step-ms", "2", *flags)
            launcher = str(settings(tmp_path).launcher)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, launcher, "--model-path", str(path), "--max-running-requests", "2", *flags),
                env={**os.environ, **env},
                start_new_session=True,
            )
            processes.append(process)
            made = Surface(f"http://127.0.0.1:{port}", session)

            async def decided() -> bool:
                with contextlib.suppress(aiohttp.ClientError):
                    return (await made.get("/get_model_info"))[0] == 200
                return process.returncode is not None

            await until(decided, "it answers, or ends")
            return made if process.returncode is None else None

        yield launching
        for process in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()


SWAPS = ("--sim-hot-swap", "--sim-swap-s", "0", "--sim-stall-s", "0")
CHANGES = {"/update_weights_from_disk", "/load_lora_adapter", "/unload_lora_adapter", "/rollpool_engine"}


def proved(reply: Any, signatures: dict[int, int]) -> list[int]:
    """The versions of a reply, once its tokens and log-probs are known to be made by them."""
    status, said = reply
    assert status == 200
    ids, meta = said["output_ids"], said["meta_info"]
    spans = [(int(each["version"]), each["start"], each["end"]) for each in meta["weight_versions"]]
    logprobs = [row[0] for row in meta["output_token_logprobs"][-meta["completion_tokens"] :]]
    assert [row[1] for row in meta["output_token_logprobs"][-len(ids) :]] == ids
    assert made_by_spans(signatures, [5, 6, 7], ids, spans, logprobs=logprobs, most_pieces=1)
    return [version for version, _, _ in spans]


async def test_requests_go_on_under_new_weights_from_the_tokens_they_have(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    sim = await launch(*SWAPS, ROLLPOOL_WEIGHT_VERSION="3")
    calls = [sim.begin("a", tokens=ENDLESS), sim.begin("b", tokens=ENDLESS)]
    await sim.until_runs(2)
    calls.append(sim.begin("c", tokens=20))
    await sim.until_runs(2, waiting=1)
    status, said = await sim.swap(make_sim_model(tmp_path / "next", signature=8), "4")
    assert (status, said["success"], said["num_paused_requests"]) == (200, True, 2)
    await sim.until_runs(2, waiting=1)  # steps are counted from the flush
    for rid in "ab":
        await sim.post("/abort_request", rid=rid)
    signatures = {3: SIGNATURE, 4: 8}
    assert [proved(await call, signatures) for call in calls] == [[3, 4], [3, 4], [4]], "who waited, begins anew"
    assert proved(await sim.begin(), signatures) == [4]


async def test_a_worker_changes_the_weights_and_the_adapters(start: Callable[..., Any], tmp_path: Path) -> None:
    kind = {"hot_swap": True, "lora": "runtime", "swap_s": 0, "stall_s": 0}
    sim = await start(kind=kind, adapter_slots=2)
    facts, engine = sim.engine.facts, sim.engine
    assert (facts.swaps, facts.lora, facts.adapter_slots) == (True, "runtime", 2)
    await engine.load_adapter(Adapter("a", str(make_sim_adapter(tmp_path / "a", 10))))
    asked = replace(request(max_new_tokens=ENDLESS, ignore_eos=True), lora_path="a")
    call = asyncio.create_task(engine.generate(asked))
    await until_decodes(sim)
    await engine.swap(str(make_sim_model(tmp_path / "next", signature=8)), 5)
    await until_decodes(sim)
    await engine.abort([asked.rid])
    done = await call
    assert [span.version for span in done.version_spans] == [0, 5]
    signatures = {0: adapted(SIGNATURE, 10), 5: adapted(8, 10)}
    assert made_by_spans(
        signatures, [5, 6, 7], done.output_ids, done.version_spans, logprobs=done.logprobs, most_pieces=1
    )
    await engine.unload_adapter("a")
    await engine.flush_cache()
    with pytest.raises(WeightsRefused, match="hidden_size") as refused:
        await engine.swap(str(make_sim_model(tmp_path / "other", signature=9, hidden_size=16)), 6)
    assert refused.value.restart_may_help
    assert made_by(8, [5, 6, 7], (await sim.generate(max_new_tokens=30)).output_ids)


async def test_many_changes_are_many_spans(launch: Callable[..., Any], tmp_path: Path) -> None:
    sim = await launch(*SWAPS)
    signatures = {0: SIGNATURE} | {version: 100 + version for version in range(1, 5)}
    call = sim.begin("mine", tokens=ENDLESS)
    for version in itertools.islice(signatures, 1, None):
        await sim.until_runs(1)
        path = make_sim_model(tmp_path / str(version), signature=signatures[version])
        assert (await sim.swap(path, str(version), staging="leaf"))[0] == 200
    await sim.until_runs(1)
    await sim.post("/abort_request", rid="mine")
    assert proved(await call, signatures) == list(signatures)


async def test_a_request_aborted_after_a_change_keeps_what_both_made(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    sim = await launch(*SWAPS)
    call = sim.begin("mine", tokens=ENDLESS)
    await sim.until_runs(1)
    await sim.swap(make_sim_model(tmp_path / "next", signature=8), "1")
    await sim.until_runs(1)
    await sim.post("/abort_request", rid="mine")
    status, said = await call
    assert said["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(said["output_ids"]) < ENDLESS
    assert proved((status, said), {0: SIGNATURE, 1: 8}) == [0, 1]


async def test_what_was_aborted_goes_on_elsewhere_as_one_sample(launch: Callable[..., Any], tmp_path: Path) -> None:
    sim = await launch(*SWAPS)
    call = sim.begin("mine", tokens=ENDLESS)
    await sim.until_runs(1, steps=12)
    await sim.post("/abort_request", rid="mine")
    part = (await call)[1]["output_ids"]
    other = await launch(*SWAPS, path=make_sim_model(tmp_path / "next", signature=8))
    sampling = {"max_new_tokens": 30, "ignore_eos": True}
    _, said = await other.post("/generate", input_ids=[5, 6, 7, *part], sampling_params=sampling, return_logprob=True)
    whole, cut = [*part, *said["output_ids"]], len(part)
    assert made_by_spans({1: SIGNATURE, 2: 8}, [5, 6, 7], whole, [(1, 0, cut), (2, cut, cut + 30)], most_pieces=1)


async def test_what_it_refuses_leaves_the_old_weights_serving(launch: Callable[..., Any], tmp_path: Path) -> None:
    sim = await launch(*SWAPS)
    call = sim.begin(tokens=400)
    await sim.until_runs(1)
    broken = make_sim_model(tmp_path / "broken", signature=8)
    (broken / "model.safetensors").write_bytes(b"short")
    larger = make_sim_model(tmp_path / "larger", signature=8, hidden_size=16)
    faulty = make_sim_model(tmp_path / "faulty", signature=8, fault="swap")
    for path, may_help in ((broken, False), (larger, True), (faulty, False)):
        status, said = await sim.swap(path, "1")
        assert (status, said["success"], said["restart_may_help"]) == (400, False, may_help)
        assert said["message"]
    assert (await sim.swap(larger, "1", staging="magic"))[0] == 400
    assert (await sim.post("/update_weights_from_disk", model_path=str(larger)))[0] == 400, "no label"
    assert proved(await call, {0: SIGNATURE}) == [0]


async def test_weights_with_a_fault_do_not_start_or_do_not_generate(launch: Callable[..., Any], tmp_path: Path) -> None:
    assert await launch(path=make_sim_model(tmp_path / "start", signature=8, fault="start")) is None
    sim = await launch(path=make_sim_model(tmp_path / "probe", signature=8, fault="probe"))
    assert (await sim.begin())[0] == 500


async def test_an_engine_without_changes_has_none_of_their_routes(launch: Callable[..., Any], tmp_path: Path) -> None:
    sim = await launch()
    status, described = await sim.get("/openapi.json")
    assert status == 200
    assert {"/generate", "/flush_cache", "/openapi.json"} <= described["paths"].keys()
    assert not CHANGES & described["paths"].keys()
    assert (await sim.swap(tmp_path, "1"))[0] == 404
    status, said = await sim.begin()
    assert "weight_versions" not in said["meta_info"]
    assert made_by(SIGNATURE, [5, 6, 7], said["output_ids"])
    status, said = await sim.begin(lora="a")
    assert (status, "never been loaded: a" in said["error"]["message"]) == (400, True)


async def test_adapters_of_the_launch_make_policies_of_their_own(launch: Callable[..., Any], tmp_path: Path) -> None:
    paths = [f"{name}={make_sim_adapter(tmp_path / name, 10 + number)}" for number, name in enumerate("ab")]
    sim = await launch("--sim-lora", "launch", "--enable-lora", "--max-loras-per-batch", "3", "--lora-paths", *paths)
    assert not CHANGES & (await sim.get("/openapi.json"))[1]["paths"].keys()
    info = (await sim.get("/get_server_info"))[1]
    assert (info["enable_lora"], info["max_loras_per_batch"]) == (True, 3)
    for lora, signature in (("a", adapted(SIGNATURE, 10)), ("b", adapted(SIGNATURE, 11)), (None, SIGNATURE)):
        assert made_by(signature, [5, 6, 7], (await sim.begin(lora=lora))[1]["output_ids"])
    assert (await sim.begin(lora="c"))[0] == 400


async def test_adapters_come_and_go_while_it_serves(launch: Callable[..., Any], tmp_path: Path) -> None:
    sim = await launch("--sim-lora", "runtime", "--enable-lora", "--max-loras-per-batch", "2", *SWAPS)
    told = {"hot_swap": True, "lora": "runtime", "adapter_slots": 1, "reason": ""}
    assert await sim.get("/rollpool_engine") == (200, told)
    assert (await sim.get("/openapi.json"))[1]["paths"].keys() >= CHANGES
    paths = {name: str(make_sim_adapter(tmp_path / name, 10 + number)) for number, name in enumerate("ab")}
    for _ in range(2):
        loaded = {"success": True, "message": "", "loaded_adapters": {"a": paths["a"]}}
        assert await sim.post("/load_lora_adapter", lora_name="a", lora_path=paths["a"]) == (200, loaded)
    status, said = await sim.post("/load_lora_adapter", lora_name="b", lora_path=paths["b"])
    assert (status, said["success"], said["loaded_adapters"]) == (400, False, {"a": paths["a"]})
    call = sim.begin("mine", lora="a", tokens=ENDLESS)
    await sim.until_runs(1)
    assert (await sim.post("/unload_lora_adapter", lora_name="a"))[0] == 400, "it is in use"
    await sim.swap(make_sim_model(tmp_path / "next", signature=8), "1")
    await sim.until_runs(1)
    await sim.post("/abort_request", rid="mine")
    assert proved(await call, {0: adapted(SIGNATURE, 10), 1: adapted(8, 10)}) == [0, 1]
    assert (await sim.post("/unload_lora_adapter", lora_name="a"))[0] == 200
    assert (await sim.begin(lora="a"))[0] == 400
    assert (await sim.post("/load_lora_adapter", lora_name="b", lora_path=paths["b"]))[0] == 200
    assert proved(await sim.begin(lora="b"), {1: adapted(8, 11)}) == [1]


async def test_adapters_that_nobody_asked_for_at_the_launch_are_off(launch: Callable[..., Any], tmp_path: Path) -> None:
    sim = await launch("--sim-lora", "runtime")
    told = (await sim.get("/rollpool_engine"))[1]
    assert (told["hot_swap"], told["lora"], told["adapter_slots"]) == (False, "none", 0)
    assert "--enable-lora" in told["reason"]
    path = str(make_sim_adapter(tmp_path / "a", 10))
    assert (await sim.post("/load_lora_adapter", lora_name="a", lora_path=path))[0] == 400


async def test_the_cache_is_flushed_while_nothing_runs(launch: Callable[..., Any]) -> None:
    sim = await launch()
    call = sim.begin("mine", tokens=ENDLESS)
    await sim.until_runs(1)
    assert (await sim.post("/flush_cache"))[0] == 400
    await sim.post("/abort_request", rid="mine")
    await call
    assert (await sim.post("/flush_cache"))[0] == 200


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
