"""Results: every token has a version and a log-prob, or the sample does not exist."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollpool.schemas import Group, Sample, SamplingParams, SchemaMismatch, VersionSpan
from rollpool.schemas.result_entry import bodies_of, group_of, size_of
from rollpool.schemas.wire import pack_model


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


# Entries of a results stream


def entry(*bodies: bytes, **fields: str) -> dict[bytes, bytes]:
    """As the server has it: plain fields, and a body for each part."""
    named = {b"body" if at == 0 else f"body:{at}".encode(): body for at, body in enumerate(bodies)}
    return {name.encode(): value.encode() for name, value in fields.items()} | named


def part_of(number: int, **fields: Any) -> Group:
    made = sample(2, [(1, 0, 2)], text=f"part {number}")
    return group(made, made, worker=f"w{number % 2}", seconds=float(number), metadata={"answer": 12}, **fields)


def test_an_entry_with_a_body_is_its_group() -> None:
    body = pack_model(part_of(1))
    fields = entry(body, job="b/3", outcome="ok")
    assert pack_model(group_of("r", "b", fields)) == body
    assert (bodies_of(fields), size_of(fields)) == ([body], len(body))


def test_an_entry_of_many_parts_is_one_group_in_their_order() -> None:
    bodies = [pack_model(part_of(number)) for number in range(12)]
    fields = entry(*bodies, job="b/3", outcome="ok")
    shuffled = dict(sorted(fields.items()))  # body:10 before body:2
    joined = group_of("r", "b", shuffled)
    assert [made.text for made in joined.samples] == [f"part {at}" for at in range(12) for _ in range(2)]
    assert (joined.id, joined.outcome, joined.metadata) == ("b/3", "ok", {"answer": 12})
    assert (joined.worker, joined.seconds, joined.tokens) == ("w0,w1", 11.0, 48)
    assert size_of(shuffled) == sum(map(len, bodies))


def test_an_entry_without_a_body_says_it_all_in_plain_fields() -> None:
    fields = entry(job="b/17", outcome="cancelled", policy="12", samples="0", tokens="0", worker="", error="why")
    made = group_of("r", "b", fields)
    assert (made.run, made.batch, made.index, made.outcome) == ("r", "b", 17, "cancelled")
    assert (made.policy_version, made.error, made.samples, made.worker) == (12, "why", (), "")
    assert size_of(fields) == 0


@pytest.mark.parametrize(
    ("fields", "outcome", "policy", "error"),
    [
        ({}, "failed", 0, None),
        ({"outcome": "open"}, "failed", 0, None),
        ({"outcome": "ok", "error": ""}, "ok", 0, None),
        ({"outcome": "stale", "policy": "7,8", "error": "e"}, "stale", 0, "e"),
        ({"outcome": "stale", "policy": "9" * 5000}, "stale", 0, None),
    ],
)
def test_plain_fields_that_somebody_changed_are_read_as_far_as_they_go(
    fields: dict[str, str], outcome: str, policy: int, error: str | None
) -> None:
    made = group_of("r", "b", entry(job="b/3", **fields))
    assert (made.outcome, made.policy_version, made.error) == (outcome, policy, error)


@pytest.mark.parametrize("job", ["", "b", "b/", "b/x", "b/-1", "c/3", "b/3#1", "b/" + "9" * 5000, "b/٣"])
def test_an_entry_that_names_no_job_of_its_batch_is_refused(job: str) -> None:
    with pytest.raises(SchemaMismatch, match="names none of its jobs"):
        group_of("r", "b", entry(job=job, outcome="stale"))


def test_an_entry_of_somebody_else_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="names none of its jobs"):
        group_of("r", "b", {b"\xff": b"\xfe"})
    with pytest.raises(SchemaMismatch):
        group_of("r", "b", entry(b"no body", job="b/3"))


@given(st.dictionaries(st.sampled_from([b"job", b"body", b"body:1", b"outcome", b"policy"]) | st.binary(), st.binary()))
def test_any_entry_gives_a_group_or_schema_mismatch_alone(fields: dict[bytes, bytes]) -> None:
    try:
        group_of("r", "b", fields)
    except SchemaMismatch:
        return
