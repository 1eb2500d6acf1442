"""What is sent to each line of sglang-jax, and what is made of its replies."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollpool.schemas.jobs import SamplingParams
from rollpool.schemas.results import VersionSpan
from rollpool.worker.engines.dialects import Main, Post1, check_fits, error_message, pick_dialect
from rollpool.worker.engines.protocol import (
    Adapter,
    ChatRequest,
    EngineFacts,
    EngineUnavailable,
    RequestRefused,
    SampleRequest,
    new_rid,
)
from rollpool.worker.engines.settings import EngineSettings
from rollpool.worker.engines.surface import Surface, routes_of

#: A server that lists nothing.
BARE = Surface()

#: One that changes weights and adapters while it serves.
CHANGES = Surface(frozenset({"/update_weights_from_disk", "/load_lora_adapter", "/unload_lora_adapter"}))

BOTH = pytest.mark.parametrize("dialect", [Main(), Post1()], ids=["main", "post1"])

MAIN_INFO: dict[str, Any] = {
    "version": "0.0.2",
    "model_path": "/models/a",
    "tp_size": 8,
    "random_seed": 7,
    "max_running_requests": None,
    "max_total_num_tokens": 4096,
    "max_req_input_len": 250,
    "context_length": 256,
    "page_size": 1,
    "attention_backend": "native",
    "enable_lora": True,
    "max_loras_per_batch": 5,
    "skip_server_warmup": True,
    "internal_states": [
        {
            "req_to_token_pool_total": 2049,
            "running_batch_size": 3,
            "waiting_queue_size": 5,
            "available_kv_tokens": 100,
            "tree_cache_size": 900,
            "last_gen_throughput": 12.5,
            "forward_ct_decode": 40,
        }
    ],
}
POST1_INFO: dict[str, Any] = {
    "version": "0.0.1",
    "model_path": "/models/a",
    "tp_size": 8,
    "random_seed": 7,
    "max_running_requests": 16,
    "max_total_num_tokens": 4096,
    "max_req_input_len": 250,
    "internal_states": [{"last_gen_throughput": 9.0, "memory_usage": {"token_capacity": 4096}}],
}


def request(**changes: Any) -> SampleRequest:
    fields: dict[str, Any] = {
        "rid": new_rid(),
        "input_ids": np.arange(5, dtype=np.int32),
        "sampling": SamplingParams(max_new_tokens=8),
    }
    return SampleRequest(**(fields | changes))


def reply(asked: SampleRequest, rows: list[Any], **meta: Any) -> dict[str, Any]:
    filled = {
        "id": asked.rid,
        "finish_reason": {"type": "length", "length": len(rows)},
        "prompt_tokens": 5,
        "completion_tokens": len(rows),
        "output_token_logprobs": rows,
    }
    return {"text": "text", "meta_info": filled | meta}


def rows_of(count: int, first: int = 10) -> list[list[Any]]:
    return [[-0.5 - i, first + i, None] for i in range(count)]


@BOTH
def test_every_request_asks_for_logprobs_of_one_span_and_for_untrimmed_text(dialect: Main | Post1) -> None:
    body = dialect.generate_body(request())
    assert body["return_logprob"] is True
    assert body["logprob_start_len"] == -1
    assert body["sampling_params"]["skip_special_tokens"] is False
    assert body["sampling_params"]["no_stop_trim"] is True


@BOTH
def test_all_sampling_parameters_are_sent_so_that_no_default_stands_in(dialect: Main | Post1) -> None:
    sampling = SamplingParams(max_new_tokens=9, min_new_tokens=2, stop=("x",), stop_token_ids=(3,), top_k=4)
    sent = dialect.generate_body(request(sampling=sampling))["sampling_params"]
    for name, value in sampling.model_dump().items():
        assert sent[name] == (list(value) if isinstance(value, tuple) else value)
    assert "seed" not in sent
    json.dumps(sent)


def test_a_chat_asks_for_logprobs_where_mixing_kills_and_not_where_they_break_it() -> None:
    chat = ChatRequest(rid="r", messages=[{"role": "user", "content": "hi"}], sampling=SamplingParams())
    assert Main().chat_body(chat, "m")["logprobs"] is True
    assert Post1().chat_body(chat, "m")["logprobs"] is False
    body = Main().chat_body(replace(chat, sampling=SamplingParams(max_new_tokens=5, min_new_tokens=3)), "m")
    assert (body["max_completion_tokens"], body["min_tokens"]) == (5, 3)


def test_main_is_never_asked_for_the_min_p_it_ignores() -> None:
    sampling = SamplingParams(min_p=0.1)
    chat = ChatRequest(rid=new_rid(), messages=[{"role": "user", "content": "x"}], sampling=sampling)
    with pytest.raises(RequestRefused, match="ignores min_p"):
        Main().generate_body(replace(request(), sampling=sampling))
    with pytest.raises(RequestRefused, match="ignores min_p"):
        Main().chat_body(chat, "m")
    assert Post1().generate_body(replace(request(), sampling=sampling))["sampling_params"]["min_p"] == 0.1


def test_a_lora_path_goes_only_to_a_line_that_reads_it() -> None:
    assert Main().generate_body(request(lora_path="a"))["lora_path"] == "a"
    with pytest.raises(RequestRefused, match="silently ignores"):
        Post1().generate_body(request(lora_path="a"))


def test_a_rid_is_of_fixed_length_and_never_reused() -> None:
    rids = {new_rid() for _ in range(1000)}
    assert len(rids) == 1000
    assert {len(rid) for rid in rids} == {32}


@given(count=st.integers(0, 80), repeated=st.integers(0, 60))
def test_the_true_logprobs_are_the_last_ones(count: int, repeated: int) -> None:
    asked = request()
    rows = rows_of(repeated, first=500) + rows_of(count)
    completion = Main().parse_generate(reply(asked, rows, completion_tokens=count), asked)
    assert completion.output_ids.tolist() == list(range(10, 10 + count))
    assert completion.logprobs is not None
    assert completion.logprobs.shape == (count,)
    assert completion.output_ids.dtype == np.int32
    assert completion.logprobs.dtype == np.float32


def test_ids_come_from_the_logprobs_never_from_output_ids() -> None:
    asked = request()
    said = reply(asked, rows_of(3)) | {"output_ids": [1, 1]}
    assert Main().parse_generate(said, asked).output_ids.tolist() == [10, 11, 12]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_logprob_that_is_not_finite_is_the_engines_fault(value: float | None) -> None:
    asked = request()
    with pytest.raises(EngineUnavailable, match="not a finite number"):
        Main().parse_generate(reply(asked, [[-1.0, 4, None], [value, 5, None]]), asked)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda said: {"error": {"message": "boom"}},
        lambda said: [said],
        lambda said: said | {"error": "late"},
        lambda said: {"text": "x", "meta_info": said["meta_info"] | {"output_token_logprobs": None}},
        lambda said: {"text": "x", "meta_info": said["meta_info"] | {"completion_tokens": 4}},
        lambda said: {"text": "x", "meta_info": said["meta_info"] | {"completion_tokens": None}},
        lambda said: {"text": "x", "meta_info": said["meta_info"] | {"finish_reason": None}},
        lambda said: {"text": "x", "meta_info": said["meta_info"] | {"finish_reason": {"type": "abort"}}},
        lambda said: {"text": "x", "meta_info": said["meta_info"] | {"id": "of-another"}},
        lambda said: {"text": "x", "meta_info": said["meta_info"] | {"output_token_logprobs": [[1.0], 2, 3]}},
    ],
)
def test_a_reply_that_is_not_whole_is_the_engines_fault(spoil: Any) -> None:
    asked = request()
    with pytest.raises(EngineUnavailable):
        Main().parse_generate(spoil(reply(asked, rows_of(3))), asked)


@BOTH
@pytest.mark.parametrize(
    ("told", "known"),
    [({"cached_tokens": 4}, 4), ({"cached_tokens": 0}, 0), ({}, None), ({"cached_tokens": "4"}, None)],
)
def test_the_cached_part_of_the_prompt_is_told_where_the_engine_tells_it(
    dialect: Main | Post1, told: dict[str, Any], known: int | None
) -> None:
    asked = request()
    assert dialect.parse_generate(reply(asked, rows_of(3), **told), asked).cached_tokens == known


def test_an_abort_that_was_asked_for_keeps_what_there_is() -> None:
    asked = request()
    done = Main().parse_generate(reply(asked, rows_of(2), finish_reason={"type": "abort"}), asked, aborted=True)
    assert (done.finish_reason, done.output_ids.tolist()) == ("abort", [10, 11])
    bare = {"text": "cut off", "meta_info": {"id": asked.rid, "finish_reason": {"type": "abort"}}}
    nothing = Main().parse_generate(bare, asked, aborted=True)
    assert (nothing.output_ids.size, nothing.text) == (0, "")


def test_an_abort_for_the_requests_own_fault_is_a_refusal() -> None:
    asked = request()
    reason = {"type": "abort", "status_code": 400, "message": "Input length exceeds"}
    with pytest.raises(RequestRefused, match="Input length exceeds"):
        Main().parse_generate(reply(asked, [], finish_reason=reason), asked)


def test_a_chat_without_a_choice_is_the_engines_fault() -> None:
    chat = ChatRequest(rid="r", messages=[], sampling=SamplingParams())
    with pytest.raises(EngineUnavailable):
        Main().parse_chat({"choices": []}, chat)
    choice = {"message": {"content": "hello"}, "finish_reason": "stop"}
    said = {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    completion = Main().parse_chat(said, chat)
    assert (completion.text, completion.logprobs, completion.completion_tokens) == ("hello", None, 2)


@pytest.mark.parametrize(
    ("changes", "pool", "expected"),
    [
        ({}, 2049, 2048),  # half of the tokens
        ({"max_running_requests": 64}, 2049, 64),
        ({"max_running_requests": 64}, 33, 33),
        ({"attention_backend": "fa"}, 2049, 512),  # 131072 pages / 256 of one token
        ({"attention_backend": "fa", "page_size": 128}, 2049, 2048),
        ({"attention_backend": "fa", "context_length": None, "max_req_input_len": 40954}, 2049, 3),
    ],
)
def test_main_runs_the_least_of_argument_pool_and_attention_limit(
    changes: dict[str, Any], pool: int, expected: int
) -> None:
    state = MAIN_INFO["internal_states"][0] | {"req_to_token_pool_total": pool}
    info = MAIN_INFO | changes | {"internal_states": [state]}
    assert Main().parse_facts(info, BARE, identity="i").max_running_requests == expected


@pytest.mark.parametrize(("asked", "tokens", "expected"), [(16, 4096, 16), (None, 4096, 2048), (None, 10**6, 4097)])
def test_post1_runs_the_least_of_argument_and_the_pool_it_does_not_tell(
    asked: int | None, tokens: int, expected: int
) -> None:
    info = POST1_INFO | {"max_running_requests": asked, "max_total_num_tokens": tokens}
    assert Post1().parse_facts(info, BARE, identity="i").max_running_requests == expected


@pytest.mark.parametrize(
    ("changes", "surface", "expected"),
    [
        ({}, BARE, ("launch", 4)),
        ({"enable_lora": False, "lora_paths": [{"lora_name": "a"}]}, BARE, ("launch", 4)),
        ({}, CHANGES, ("runtime", 4)),
        ({}, Surface(frozenset({"/load_lora_adapter"})), ("launch", 4)),  # its slots could never be freed
        ({}, replace(CHANGES, about={"lora": "launch"}), ("launch", 4)),
        ({}, replace(CHANGES, about={"lora": "none"}), ("none", 0)),
        ({}, Surface(about={"lora": "runtime"}), ("launch", 4)),
        ({"enable_lora": None}, CHANGES, ("none", 0)),
        ({"max_loras_per_batch": 1}, CHANGES, ("none", 0)),
        ({"enable_static_lora": True}, CHANGES, ("none", 0)),
    ],
)
def test_facts_say_how_this_engine_comes_to_adapters_and_how_many(
    changes: dict[str, Any], surface: Surface, expected: tuple[str, int]
) -> None:
    told = Main().parse_facts(MAIN_INFO | changes, surface, identity="i")
    assert (told.lora, told.adapter_slots) == expected


def test_post1_has_no_adapters_whatever_it_says() -> None:
    told = Post1().parse_facts(POST1_INFO | {"enable_lora": True, "max_loras_per_batch": 5}, CHANGES, identity="i")
    assert (told.lora, told.adapter_slots) == ("none", 0)


@pytest.mark.parametrize(
    ("surface", "why"),
    [
        (CHANGES, ""),
        (replace(CHANGES, about={"hot_swap": True}), ""),
        (replace(CHANGES, about={"hot_swap": False, "reason": "tied weights"}), "tied weights"),
        (BARE, "it has no route /update_weights_from_disk"),
    ],
)
def test_weights_are_changed_only_where_a_route_is_listed_and_not_denied(surface: Surface, why: str) -> None:
    assert surface.no_swap == why
    assert Main().parse_facts(MAIN_INFO, surface, identity="i").swaps is (why == "")


@pytest.mark.parametrize("document", [None, [], {}, {"paths": None}, "x"])
def test_a_document_that_is_none_lists_no_routes(document: Any) -> None:
    assert routes_of(document) == frozenset()
    assert routes_of({"paths": {"/a": {}}}) == {"/a"}


def spans(*told: tuple[Any, Any, Any]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in told]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (spans(("7", 0, 3)), [(7, 0, 3)]),
        (spans(("7", 0, 1), ("9", 1, 3)), [(7, 0, 1), (9, 1, 3)]),
        (spans(("7", 0, 1), ("9", 1, 5)), [(7, 0, 1), (9, 1, 3)]),  # the engine sampled more than counts
        (spans(("7", 0, 3), ("9", 3, 4)), [(7, 0, 3)]),
        (spans(("7", 0, 0), ("9", 0, 3)), [(9, 0, 3)]),
        (None, []),
    ],
)
@BOTH
def test_version_spans_cover_the_tokens_that_count(
    dialect: Main | Post1, told: Any, expected: list[tuple[int, int, int]]
) -> None:
    asked = request()
    done = dialect.parse_generate(reply(asked, rows_of(3), weight_versions=told), asked)
    assert done.version_spans == tuple(VersionSpan(*span) for span in expected)


@pytest.mark.parametrize(
    "told",
    [
        [],
        spans(("7", 0, 2)),
        spans(("7", 1, 3)),
        spans(("7", 0, 1), ("9", 2, 3)),
        spans(("7", 0, 2), ("9", 1, 3)),
        spans(("7", 0, 2), ("8", 2, 1), ("9", 1, 3)),
        spans(("default", 0, 3)),
        spans(("-1", 0, 3)),
        spans((None, 0, 3)),
        [{"version": "7"}],
        "7",
        7,
    ],
)
def test_tokens_that_cannot_be_attributed_are_the_engines_fault(told: Any) -> None:
    asked = request()
    with pytest.raises(EngineUnavailable, match="which weights made them; run the request again"):
        Main().parse_generate(reply(asked, rows_of(3), weight_versions=told), asked)


def test_facts_of_a_server_that_is_not_sglang_jax_are_refused() -> None:
    with pytest.raises(EngineUnavailable, match="get_server_info"):
        Main().parse_facts({"version": "1"}, BARE, identity="i")


def test_load_counts_the_prefix_cache_as_free() -> None:
    load = Main().parse_load(MAIN_INFO)
    assert (load.running, load.waiting, load.free_kv_tokens, load.steps) == (3, 5, 1000, 40)
    assert Post1().parse_load(POST1_INFO).running is None


def test_a_stock_warm_up_that_is_still_to_come_is_waited_for() -> None:
    fresh = {"skip_server_warmup": False, "internal_states": [{"forward_ct_decode": 0}]}
    assert not Main().warmed(fresh)
    assert Main().warmed(fresh | {"skip_server_warmup": True})
    done = {"forward_ct_decode": 2, "running_batch_size": 0}
    assert Main().warmed(fresh | {"internal_states": [done]})
    assert not Main().warmed(fresh | {"internal_states": [done | {"running_batch_size": 1}]})


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("0.0.1", "0.0.1.post1"),
        ("0.0.1.post1", "0.0.1.post1"),
        ("0.0.0.dev611+gcddbf6f1c", "main"),
        ("0.0.2", "main"),
        ("0.0.10", "main"),
        ("0.1.0", "main"),
    ],
)
def test_a_version_picks_its_dialect(version: str, line: str) -> None:
    assert pick_dialect(version).line == line


def facts(**changes: Any) -> EngineFacts:
    return replace(Main().parse_facts(MAIN_INFO, BARE, identity="i"), **changes)


@pytest.mark.parametrize(
    ("prompt", "new", "fits"),
    [(200, 54, True), (200, 55, False), (249, 5, True), (250, 1, False), (0, 1, False), (400, 1, False)],
)
def test_what_the_engine_would_cut_or_abort_is_never_sent(prompt: int, new: int, fits: bool) -> None:
    asked = request(input_ids=np.zeros(prompt, np.int32), sampling=SamplingParams(max_new_tokens=new))
    if fits:
        check_fits(facts(), asked)
    else:
        with pytest.raises(RequestRefused):
            check_fits(facts(), asked)


def test_an_engine_launched_without_adapters_is_never_sent_one() -> None:
    with pytest.raises(RequestRefused, match="silently ignore"):
        check_fits(facts(lora="none"), request(lora_path="a"))
    for support in ("launch", "runtime"):
        check_fits(facts(lora=support), request(lora_path="a"))


@BOTH
def test_launch_arguments_leave_out_the_warm_up_and_limit_the_length(dialect: Main | Post1) -> None:
    settings = EngineSettings(max_seq_len=512, page_size=16, api_key="secret", extra_args=("--dtype", "float32"))
    args = dialect.launch_args(settings, model_path="/m", port=5, seed=9)
    pairs = dict(itertools.pairwise(args))
    assert "--skip-server-warmup" in args
    assert (pairs["--max-seq-len"], pairs["--context-length"]) == ("512", "512")
    assert (pairs["--random-seed"], pairs["--api-key"], pairs["--tp-size"]) == ("9", "secret", "8")
    assert args[-2:] == ["--dtype", "float32"]


ADAPTERS = (Adapter("r.g0.v1", "/a/1"), Adapter("r.g0.v2", "/a/2"))


def test_a_launch_with_lora_takes_all_modules_and_one_slot_more_than_adapters() -> None:
    settings = EngineSettings(max_lora_rank=16, adapter_slots=3, extra_args=("--dtype", "float32"))
    args = Main().launch_args(settings, model_path="/m", port=5, seed=9)
    pairs = dict(itertools.pairwise(args))
    assert "--enable-lora" in args
    assert (pairs["--max-lora-rank"], pairs["--lora-target-modules"]) == ("16", "all")
    assert pairs["--max-loras-per-batch"] == "4"
    assert "--lora-paths" not in args
    given = Main().launch_args(settings, model_path="/m", port=5, seed=9, adapters=ADAPTERS)
    at = given.index("--lora-paths")
    assert given[at + 1 :] == ["r.g0.v1=/a/1", "r.g0.v2=/a/2", "--dtype", "float32"]


def test_a_launch_without_lora_says_nothing_of_it() -> None:
    for dialect, settings in ((Main(), EngineSettings()), (Post1(), EngineSettings(max_lora_rank=16))):
        args = dialect.launch_args(settings, model_path="/m", port=5, seed=9)
        assert not [arg for arg in args if "lora" in arg]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--enable-lora",), "engine.max_lora_rank"),
        (("--max-lora-rank", "8"), "engine.max_lora_rank"),
        (("--lora-target-modules=all",), "engine.max_lora_rank"),
        (("--max-loras-per-batch", "8"), "engine.adapter_slots"),
        (("--lora-paths", "a=/a"), "published policies"),
        (("--dp-size", "2"), "v4-8"),
        (("--dp-size=4",), "v4-8"),
        (("--nnodes", "2"), "v4-8"),
        (("--port", "1"), "engine.port"),
        (("--tp-size=4",), "engine.tp_size"),
    ],
)
def test_what_cannot_be_served_is_refused_in_the_settings(args: tuple[str, ...], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        EngineSettings(extra_args=args)


def test_settings_allow_one_of_each_and_hide_the_key() -> None:
    EngineSettings(extra_args=("--dp-size", "1", "--nnodes=1"))
    assert "hunter2" not in repr(EngineSettings(api_key="hunter2"))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "too long"}}', "too long"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"object": "error", "message": "bad field", "code": 400}', "bad field"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"", "(no message)"),
    ],
)
def test_an_error_is_read_in_each_of_the_servers_shapes(body: bytes, expected: str) -> None:
    assert error_message(body) == expected


def test_a_chat_that_is_aborted_in_the_queue_of_main_is_known_by_its_error() -> None:
    error = b'{"message": "Internal server error: \'output_token_logprobs\'"}'
    assert Main().aborted_chat(500, error)
    assert not Main().aborted_chat(500, b"Internal Server Error")
    assert not Main().aborted_chat(200, error)
    assert not Post1().aborted_chat(500, error)
