"""Results: every token has a version and a log-prob, or the sample does not exist."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollpool.schemas import Group, Sample, SamplingParams, VersionSpan


def sample(tokens: int, spans: Any, **fields: Any) -> Sample:
    return Sample(
        **{
            "output_ids": np.arange(tokens, dtype=np.int32),
            "logprobs": np.zeros(tokens, np.float32),
            "text": "t",
            "finish_reason": "stop",
            "version_spans": spans,
            **fields,
        }
    )


def group(*samples: Sample, **fields: Any) -> Group:
    return Group(
        **{
            "run": "r",
            "batch": "b",
            "index": 3,
            "outcome": "ok",
            "policy_version": 1,
            "prompt_ids": np.arange(3, dtype=np.int32),
            "samples": samples,
            "sampling": SamplingParams(),
            **fields,
        }
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_spans_that_follow_each_other_cover_a_sample(lengths: list[int]) -> None:
    ends = np.cumsum(lengths).tolist()
    spans = [(version, start, end) for version, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    made = sample(ends[-1], spans)
    assert made.versions == tuple(range(len(lengths)))
    assert all(isinstance(span, VersionSpan) for span in made.version_spans)


@pytest.mark.parametrize(
    ("tokens", "spans", "what"),
    [
        (3, [], "spans end at 0, the sample at 3"),
        (3, [(1, 0, 2)], "spans end at 2, the sample at 3"),
        (3, [(1, 0, 4)], "spans end at 4, the sample at 3"),
        (3, [(1, 1, 3)], "not contiguous"),
        (3, [(1, 0, 1), (2, 2, 3)], "not contiguous"),
        (3, [(1, 0, 2), (2, 1, 3)], "not contiguous"),
        (3, [(1, 0, 3), (2, 3, 2)], "not contiguous"),
    ],
)
def test_a_token_without_exactly_one_version_is_refused(tokens: int, spans: Any, what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        sample(tokens, spans)


def test_a_token_without_a_logprob_is_refused() -> None:
    with pytest.raises(ValidationError, match="3 tokens but 2 log-probs"):
        sample(3, [(1, 0, 3)], logprobs=np.zeros(2, np.float32))


def test_a_sample_of_text_alone_needs_no_tokens() -> None:
    assert sample(0, [], text="an answer").versions == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_ids", np.arange(3, dtype=np.int64)),
        ("output_ids", np.zeros((3, 1), np.int32)),
        ("logprobs", np.zeros(3, np.float64)),
        ("finish_reason", "tired"),
        ("version_spans", [(1, 0)]),
    ],
)
def test_an_array_of_another_kind_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        sample(3, [(1, 0, 3)], **{field: value})
    assert {error["loc"][0] for error in raised.value.errors()} == {field}


def test_a_list_written_by_hand_becomes_an_array() -> None:
    made = sample(2, [(1, 0, 2)], output_ids=[4, 5], logprobs=[-0.5, -1])
    assert made.output_ids.dtype == np.int32
    assert made.logprobs.dtype == np.float32
    assert (made.output_ids.tolist(), made.logprobs.tolist()) == ([4, 5], [-0.5, -1.0])


def test_a_group_counts_the_tokens_of_all_its_samples() -> None:
    made = group(sample(3, [(1, 0, 3)]), sample(2, [(1, 0, 2)]), sample(0, []))
    assert made.tokens == 5
    assert made.id == "b/3"


def test_a_group_says_when_its_sampling_was_filtered() -> None:
    assert not group().filtered
    assert group(sampling=SamplingParams(top_k=5)).filtered


def test_an_outcome_is_one_of_the_five() -> None:
    with pytest.raises(ValidationError, match="outcome"):
        group(outcome="lost")
