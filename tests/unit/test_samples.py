"""A sample that is made in pieces has every token once, with the version that made it, and never too many."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import completion, job, sample
from hypothesis import given
from hypothesis import strategies as st

from rollpool.schemas import Sample, SamplingParams, VersionSpan
from rollpool.worker.engines.protocol import Completion
from rollpool.worker.samples import ask_for, can_go_on, is_piece, sample_of

PROMPT = np.array([1, 2, 3], np.int32)


def made(
    version: int, first: int, tokens: int, *, reason: str = "abort", spans: tuple[VersionSpan, ...] = ()
) -> Completion:
    return Completion(
        output_ids=np.arange(first, first + tokens, dtype=np.int32),
        logprobs=np.full(tokens, -float(version), np.float32),
        text="?",
        finish_reason=reason,  # type: ignore[arg-type]
        prompt_tokens=3,
        completion_tokens=tokens,
        version_spans=spans,
    )


def decode(ids: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]") -> str:
    return " ".join(map(str, ids.tolist()))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=5), st.integers(1, 24), st.integers(0, 30))
def test_however_often_it_is_interrupted_it_is_whole(
    pieces: list[tuple[int, int]], budget: int, most_prompt: int
) -> None:
    sampling = SamplingParams(max_new_tokens=budget, min_new_tokens=budget // 2)
    piece: Sample | None = None
    for version, tokens in pieces:
        ask = ask_for(PROMPT, sampling, piece, most_prompt + 3)
        kept = 0 if ask.piece is None else len(ask.piece.output_ids)
        assert len(ask.input_ids) == 3 + kept <= max(3, most_prompt + 3)
        assert kept + ask.sampling.max_new_tokens == budget
        assert ask.sampling.min_new_tokens <= ask.sampling.max_new_tokens
        tokens = min(tokens, ask.sampling.max_new_tokens - 1)
        piece = sample_of(made(version, kept, tokens), version, ask.piece, decode)
        assert is_piece(piece)
    ask = ask_for(PROMPT, sampling, piece, most_prompt + 3)
    kept = 0 if ask.piece is None else len(ask.piece.output_ids)
    last = made(9, kept, ask.sampling.max_new_tokens, reason="length")
    whole = Sample.model_validate(sample_of(last, 9, ask.piece, decode).model_dump())
    assert whole.output_ids.tolist() == list(range(budget))
    for span in whole.version_spans:
        assert set(whole.logprobs[span.start : span.end].tolist()) == {-float(span.version)}
    assert all(
        one.version != other.version for one, other in zip(whole.version_spans, whole.version_spans[1:], strict=False)
    )
    assert whole.finish_reason == "length"
    assert whole.text == ("?" if kept == 0 else decode(whole.output_ids))


def test_spans_that_the_engine_tells_are_moved_behind_the_piece() -> None:
    begun = sample_of(made(1, 0, 2), 1, None, decode)
    told = (VersionSpan(1, 0, 1), VersionSpan(2, 1, 3))
    whole = sample_of(made(2, 2, 3, reason="stop", spans=told), 2, begun, decode)
    assert whole.version_spans == ((1, 0, 3), (2, 3, 5))


def test_a_sample_without_a_token_has_one_empty_span() -> None:
    assert sample_of(made(4, 0, 0), 4, None, decode).version_spans == ((4, 0, 0),)


def test_what_an_engine_does_not_take_as_a_prompt_is_made_again() -> None:
    begun = sample_of(made(1, 0, 10), 1, None, decode)
    ask = ask_for(PROMPT, SamplingParams(max_new_tokens=32), begun, 7)
    assert ask.input_ids.tolist() == [1, 2, 3, 0, 1, 2, 3]
    assert ask.piece is not None
    assert ask.piece.version_spans == ((1, 0, 4),)
    assert ask.sampling.max_new_tokens == 28


@pytest.mark.parametrize(
    ("fields", "possible"),
    [
        ({}, True),
        ({"exact": True}, False),
        ({"endpoint": "chat", "prompt": "p"}, False),
        ({"sampling": SamplingParams(frequency_penalty=0.5)}, False),
        ({"sampling": SamplingParams(presence_penalty=0.5)}, False),
        ({"sampling": SamplingParams(stop=("\n",))}, False),
        ({"sampling": SamplingParams(stop_token_ids=(7,))}, True),
    ],
)
def test_only_what_an_engine_would_go_on_with_alike_is_gone_on_with(fields: dict[str, Any], possible: bool) -> None:
    assert can_go_on(job(**fields)) == possible


def test_the_cached_part_of_the_prompt_is_that_of_the_first_request() -> None:
    begun = sample_of(replace(made(1, 0, 2), cached_tokens=2), 1, None, decode)
    ended = sample_of(replace(made(1, 2, 2, reason="length"), cached_tokens=5), 1, begun, decode)
    assert (begun.cached_tokens, ended.cached_tokens) == (2, 2)
    assert sample_of(made(1, 0, 2), 1, None, decode).cached_tokens is None


def test_a_finished_sample_is_no_piece() -> None:
    assert not is_piece(sample())
    assert is_piece(sample_of(made(1, 0, 1), 1, None, decode))
    assert not is_piece(sample_of(completion(), 1, None, decode))
