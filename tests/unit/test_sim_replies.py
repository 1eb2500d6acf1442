"""The command line, the requests and the replies of a simulated engine, against what a worker sends and reads."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from rollpool.ops.sim import logprobs_of, output_of, sim_engine
from rollpool.ops.sim.arguments import VERSION, Arguments, parse_arguments
from rollpool.ops.sim.pieces import Made, Pieces
from rollpool.ops.sim.replies import (
    Asked,
    RefusedError,
    aborted_in_queue,
    chatted,
    finish_reason,
    generated,
    read_chat,
    read_generate,
    server_info,
)
from rollpool.ops.sim.scheduler import STEPS_UNTIL_FAULT, CrashError, Scheduler
from rollpool.schemas.jobs import SamplingParams
from rollpool.worker.engines.dialects import check_fits, pick_dialect
from rollpool.worker.engines.preflight import probe
from rollpool.worker.engines.protocol import ChatRequest, EngineUnavailable, RequestRefused, SampleRequest
from rollpool.worker.engines.settings import EngineSettings
from rollpool.worker.engines.surface import Surface

MAIN = pick_dialect(VERSION)
PROMPT = [5, 6, 7]


def arguments(*extra: str, **settings: Any) -> Arguments:
    made = EngineSettings(**{**sim_engine(extra_args=extra), **settings})
    return parse_arguments(MAIN.launch_args(made, model_path="/m", port=1234, seed=99))


def request(**sampling: Any) -> SampleRequest:
    return SampleRequest(rid="r", input_ids=np.array(PROMPT, np.int32), sampling=SamplingParams(**sampling))


def made(count: int, nonce: int = 11) -> Made:
    return Pieces(7, "0", nonce).made(np.array(PROMPT), count)


def asked(body: Any, context: int = 1000) -> Asked:
    return read_generate(body, "given", context)


def test_the_launch_arguments_of_a_worker_are_understood() -> None:
    read = arguments(max_seq_len=256, page_size=1, max_running_requests=5, api_key=SecretStr("k"))
    assert (read.model_path, read.host, read.port, read.random_seed) == ("/m", "127.0.0.1", 1234, 99)
    assert (read.context_length, read.max_running_requests, read.api_key) == (256, 5, "k")
    assert read.skip_server_warmup
    assert read.scheduler_options()["step_s"] == 0.02


def test_the_shape_of_the_work_is_handed_on() -> None:
    made = sim_engine(
        max_running_requests=64, step_ms=5, median_tokens=200, sigma=0, start_s=0, extra_args=("--sim-request-ms", "1")
    )
    settings = EngineSettings(**made)
    read = parse_arguments(MAIN.launch_args(settings, model_path="/m", port=1, seed=1))
    assert (read.sim_step_ms, read.sim_median_tokens, read.sim_sigma, read.sim_start_s) == (5, 200, 0, 0)
    assert read.scheduler_options()["request_s"] == 0.001
    assert read.max_running_requests == 64
    assert settings.python == Path(sys.executable)
    assert settings.launcher is not None
    assert settings.launcher.is_file()


@pytest.mark.parametrize(
    "extra", [("--no-such-flag",), ("--sim-step-ms", "0"), ("--sim-sigma", "-1"), ("--max-total-tokens", "0")]
)
def test_a_flag_that_is_wrong_ends_the_engine(extra: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*extra)
    assert extra[0] in capsys.readouterr().err


def test_each_kind_of_lora_has_the_flags_of_its_kind(capsys: pytest.CaptureFixture[str]) -> None:
    def parse(kind: str, *flags: str) -> Arguments:
        return parse_arguments(["--model-path", "/m", "--sim-lora", kind, *flags])

    flags = ("--enable-lora", "--max-loras-per-batch", "3", "--max-lora-rank", "16", "--lora-target-modules", "all")
    with pytest.raises(SystemExit):
        parse("none", *flags)
    assert "unrecognized arguments: --enable-lora" in capsys.readouterr().err
    for kind in ("launch", "runtime"):
        read = parse(kind, *flags)
        assert (read.enable_lora, read.adapter_slots, read.lora_paths) == (True, 2, {})
        assert parse(kind).adapter_slots == 0, "nobody asked for them"
    read = parse("launch", "--lora-paths", "a=/a", "/b", "--log-level-http", "info")
    assert (read.enable_lora, read.adapter_slots, read.lora_paths) == (True, 7, {"a": "/a", "/b": "/b"})


def test_the_kind_of_engine_is_handed_on() -> None:
    settings = EngineSettings(**sim_engine(hot_swap=True, lora="runtime", swap_s=3, stall_s=0))
    read = parse_arguments(MAIN.launch_args(settings, model_path="/m", port=1, seed=1))
    assert (read.sim_hot_swap, read.sim_lora, read.sim_swap_s, read.sim_stall_s) == (True, "runtime", 3, 0)
    assert read.adapter_slots == settings.adapter_slots
    assert asyncio.run(probe(settings)).lora
    assert (arguments().sim_hot_swap, arguments().sim_lora, arguments().adapter_slots) == (False, "none", 0)


def test_the_probe_tells_of_a_main_line_on_one_device() -> None:
    report = asyncio.run(probe(EngineSettings(**sim_engine())))
    assert pick_dialect(report.sglang_jax).line == "main"
    assert report.sglang_jax == VERSION
    assert report.devices == 1
    assert not report.lora


def test_what_a_worker_asks_is_understood() -> None:
    body = MAIN.generate_body(request(max_new_tokens=9, min_new_tokens=2, ignore_eos=True))
    read = asked(json.loads(json.dumps(body)))
    assert (read.rid, read.prompt_ids.tolist()) == ("r", PROMPT)
    assert (read.min_new_tokens, read.max_new_tokens, read.ignore_eos, read.logprobs) == (2, 9, True, True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "no JSON object"),
        ({}, "no list of integers"),
        ({"input_ids": []}, "no list of integers"),
        ({"input_ids": ["a"]}, "no list of integers"),
        ({"input_ids": [1.5]}, "no list of integers"),
        ({"input_ids": [[1], [2, 3]]}, "one prompt a request"),
        ({"input_ids": [1], "stream": True}, "stream"),
        ({"input_ids": [1], "lora_path": ["x"]}, "one lora_path"),
        ({"input_ids": [1], "sampling_params": 3}, "sampling_params"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": "many"}}, "max_new_tokens"),
        ({"input_ids": [1] * 1000}, "longer than the model's context length"),
        ({"input_ids": [1] * 900, "sampling_params": {"max_new_tokens": 100}}, "total of 1000 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(body: Any, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        asked(body)


def test_what_fits_by_the_facts_is_not_refused() -> None:
    info = info_of(arguments(max_seq_len=256), context=256)
    facts = MAIN.parse_facts(info, Surface(), identity="")
    longest = request(max_new_tokens=facts.context_length - len(PROMPT))
    check_fits(facts, longest)
    assert asked(MAIN.generate_body(longest), 256).max_new_tokens == facts.context_length - len(PROMPT)
    assert facts.context_length == 254, "as the real one of 256"


@pytest.mark.parametrize("count", [1, 49, 50, 51, 100, 101, 230])
def test_a_worker_reads_a_reply_whole(count: int) -> None:
    sent = request(max_new_tokens=count)
    output = output_of(7, PROMPT, 11, count)
    reason = finish_reason(output.tolist(), "length")
    reply = json.loads(generated(asked(MAIN.generate_body(sent)), made(count), reason, 0.5))
    done = MAIN.parse_generate(reply, sent)
    assert done.output_ids.tolist() == output.tolist() == reply["output_ids"]
    assert done.logprobs is not None
    assert (done.logprobs == logprobs_of(7, PROMPT, output)).all()
    assert (done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("length", 3, count)
    rows = reply["meta_info"]["output_token_logprobs"]
    assert len(rows) == count + sum(range(50, count, 50)), "earlier ones come again each 50 tokens"
    assert rows[:50] == rows[-count:][:50]


def test_without_logprobs_there_are_none() -> None:
    reply = json.loads(generated(asked({"input_ids": PROMPT}), made(3), {"type": "stop"}, 0.1))
    assert "output_token_logprobs" not in reply["meta_info"]


def test_only_an_engine_that_can_swap_tells_of_versions() -> None:
    without, told = (
        json.loads(generated(asked({"input_ids": PROMPT}), made(3), {"type": "stop"}, 0.1, versions))
        for versions in (None, [{"version": "4", "start": 0, "end": 3}])
    )
    assert "weight_versions" not in without["meta_info"]
    assert told["meta_info"]["weight_versions"] == [{"version": "4", "start": 0, "end": 3}]
    assert "weight_versions" not in aborted_in_queue("r")["meta_info"]
    assert aborted_in_queue("r", [])["meta_info"]["weight_versions"] == []


def test_an_abort_is_only_for_those_who_asked_for_it() -> None:
    empty = json.loads(generated(asked(MAIN.generate_body(request())), made(0), finish_reason([], "abort"), 0.1))
    for reply in (aborted_in_queue("r"), empty):
        assert MAIN.parse_generate(reply, request(), aborted=True).finish_reason == "abort"
        with pytest.raises(EngineUnavailable, match="nobody asked for"):
            MAIN.parse_generate(reply, request())


def test_a_chat_is_read_as_one() -> None:
    chat = ChatRequest(rid="r", messages=[{"role": "user", "content": "hé"}], sampling=SamplingParams(max_new_tokens=9))
    read = read_chat(MAIN.chat_body(chat, "/m"), "given", 1000)
    assert (read.rid, read.max_new_tokens, read.logprobs) == ("r", 9, True)
    done = MAIN.parse_chat(chatted(read, 9, "length", "/m"), chat)
    assert done.completion_tokens == 9
    assert len(done.text) == 36
    with pytest.raises(RefusedError, match="messages"):
        read_chat({"messages": "hé"}, "given", 1000)


def info_of(read: Arguments, *, context: int = 1000, **state: Any) -> dict[str, Any]:
    told = {"running": [3], "waiting": [4, 5], "paused": False, "steps": 17, "tokens": 40, "kv_tokens": 24}
    return server_info(read, context, {**told, **state}, {3: "a", 4: "b", 5: "c"})


def test_a_worker_learns_what_the_engine_is_and_does() -> None:
    read = arguments("--max-total-tokens", "100", max_running_requests=5)
    info = json.loads(json.dumps(info_of(read)))
    facts = MAIN.parse_facts(info, Surface(), identity="")
    assert (facts.line, facts.max_running_requests, facts.model_path, facts.tp_size) == ("main", 5, "/m", 1)
    assert (facts.lora, facts.adapter_slots, facts.swaps) == ("none", 0, False)
    load = MAIN.parse_load(info)
    assert (load.running, load.waiting, load.free_kv_tokens, load.steps) == (1, 2, 76, 17)
    assert info["internal_states"][0]["waiting_queue_rids"] == ["b", "c"]
    assert MAIN.warmed(info)
    assert MAIN.identity(info).endswith("|99")


def test_a_request_that_would_be_refused_by_all_is_the_jobs_fault() -> None:
    facts = MAIN.parse_facts(info_of(arguments()), Surface(), identity="")
    with pytest.raises(RequestRefused):
        check_fits(facts, request(max_new_tokens=1000))


class Said:
    """A scheduler without process, and what it told."""

    def __init__(self) -> None:
        self.told: list[list[Any]] = []
        options = arguments("--sim-request-ms", "0", "--sim-prompt-token-ms", "0").scheduler_options()
        self.scheduler = Scheduler({**options, "step_s": 1.0}, self.told.append, 0.0)

    def submit(self, key: int, tokens: int = 9, *, logprobs: bool = True, fault: str | None = None) -> None:
        what = {"prompt_tokens": 1, "tokens": tokens, "logprobs": logprobs, "fault": fault}
        self.scheduler.handle(["submit", key, what], 0.0)


def test_the_scheduler_tells_what_ended_and_answers_questions() -> None:
    said = Said()
    said.submit(0, tokens=2)
    said.scheduler.advance(2.0)
    said.scheduler.handle(["state", 8], 2.0)
    assert said.told[0] == ["ended", 0, {"tokens": 2, "aborted": False, "queued": False}]
    assert said.told[1][:2] == ["reply", 8]
    assert said.told[1][2]["tokens"] == 2


def test_a_change_says_what_each_request_has_before_anything_that_ends_after_it() -> None:
    said = Said()
    said.submit(0, tokens=3)
    said.scheduler.advance(2.0)
    said.scheduler.handle(["change", 8, {"stall_s": 0.0, "flush": True}], 2.0)
    said.scheduler.handle(["state", 9], 2.0)
    said.scheduler.advance(3.0)
    assert said.told[0] == ["reply", 8, {"ran": 1, "made": [(0, 2)]}]
    assert said.told[1][2]["steps"] == 0, "counted from the flush"
    assert said.told[2] == ["ended", 0, {"tokens": 3, "aborted": False, "queued": False}]


def test_the_cache_is_flushed_while_nobody_uses_it() -> None:
    said = Said()
    said.submit(0, tokens=3)
    for now in (1.0, 3.0):
        said.scheduler.advance(now)
        said.scheduler.handle(["flush", 8], now)
    said.scheduler.handle(["state", 9], 3.0)
    assert said.told[0] == ["reply", 8, {"flushed": False}]
    assert said.told[2] == ["reply", 8, {"flushed": True}]
    assert said.told[3][2]["steps"] == 0


def test_requests_with_and_without_logprobs_together_bring_it_down() -> None:
    said = Said()
    said.submit(0)
    with pytest.raises(CrashError, match="return_logprob"):
        said.submit(1, logprobs=False)


def test_requests_with_and_without_logprobs_one_after_the_other_do_not() -> None:
    said = Said()
    said.submit(0, tokens=2)
    said.scheduler.advance(2.0)
    said.submit(1, logprobs=False)


def test_a_lethal_request_brings_it_down_after_a_few_steps() -> None:
    said = Said()
    said.submit(0, fault="kill")
    said.scheduler.advance(STEPS_UNTIL_FAULT - 0.5)
    with pytest.raises(CrashError):
        said.scheduler.advance(STEPS_UNTIL_FAULT)


def test_after_a_hang_nothing_is_told() -> None:
    said = Said()
    said.submit(0, fault="hang")
    said.submit(1, tokens=STEPS_UNTIL_FAULT)
    said.scheduler.advance(STEPS_UNTIL_FAULT)
    assert said.scheduler.hung
    assert said.told == []
