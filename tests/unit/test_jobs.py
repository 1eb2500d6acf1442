"""Prompt jobs: what is accepted, what is refused and how it is named, which policies may run a job."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollpool.schemas import PromptJob, SamplingParams
from rollpool.schemas.jobs import PREVIEW_CHARS, preview_of


def job(**fields: Any) -> PromptJob:
    return PromptJob(**{"run": "r", "batch": "b", "index": 0, "prompt": "p", "policy_version": 5, **fields})


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        [np.int64(1), 2, np.uint8(3)],
        np.array([1, 2, 3], np.int64),
        np.array([1, 2, 3], np.uint16),
    ],
    ids=repr,
)
def test_token_ids_of_any_integer_kind_become_int32(ids: Any) -> None:
    prompt = job(prompt=ids).prompt
    assert isinstance(prompt, np.ndarray)
    assert prompt.dtype == np.dtype("<i4")
    assert prompt.tolist() == [1, 2, 3]


def test_an_int32_prompt_is_not_copied() -> None:
    ids = np.arange(4, dtype=np.int32)
    assert np.shares_memory(job(prompt=ids).prompt, ids)


def test_text_and_messages_are_kept_as_they_are() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}]
    assert job(prompt="text").prompt == "text"
    assert job(prompt=messages).prompt == messages


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("", "the text is empty"),
        ([], "empty list"),
        (None, "not NoneType"),
        (7, "not int"),
        ({"role": "user", "content": "x"}, "not dict"),
        (b"bytes", "not bytes"),
        ([1, "a"], "mixes or holds: id, str"),
        ([True, False], "mixes or holds: bool"),
        ([1.0], "mixes or holds: float"),
        ([[1]], "mixes or holds: list"),
        ([-1], r"token ids lie in 0\.\.2\^31-1, these in -1"),
        ([2**31], "these in 2147483648"),
        ([2**70], "not object"),
        (np.array([], np.int32), r"not int32 of shape \(0,\)"),
        (np.zeros((2, 2), np.int32), r"of shape \(2, 2\)"),
        (np.array([1.5]), "not float64"),
        (np.array([True]), "not bool"),
        ([{"role": "user"}], "string 'content'"),
        ([{"role": "", "content": "x"}], "string 'role'"),
        ([{"role": "user", "content": ["parts"]}], "string 'content'"),
    ],
    ids=repr,
)
def test_a_bad_prompt_is_refused_and_says_why(prompt: Any, what: str) -> None:
    with pytest.raises(ValidationError, match=what) as raised:
        job(prompt=prompt)
    assert {error["loc"][0] for error in raised.value.errors()} == {"prompt"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", ""),
        ("run", "a/b"),
        ("run", "a:b"),
        ("run", "a}b"),
        ("run", "a\n"),
        ("batch", ".hidden"),
        ("batch", "x" * 129),
        ("index", -1),
        ("n", 0),
        ("n", True),
        ("n", 2.0),
        ("lane", "urgent"),
        ("policy_version", -1),
        ("policy_version", "5"),
        ("max_staleness", -1),
        ("exact", 1),
        ("deadline_ms", -1),
        ("endpoint", "completions"),
        ("parts", 0),
        ("part", -1),
        ("min_samples", 0),
    ],
)
def test_a_bad_field_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as raised:
        job(**{field: value})
    assert {error["loc"] for error in raised.value.errors()} == {(field,)}


def test_a_job_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        job().n = 2  # type: ignore[misc]


def test_a_job_is_named_by_its_batch_and_place() -> None:
    assert job(batch="step-12", index=7).id == "step-12/7"


def test_a_part_is_named_by_its_number_where_there_are_several() -> None:
    assert job(batch="step-12", index=7, n=2, parts=4, part=3).id == "step-12/7#3"


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"parts": 2, "part": 2}, "part: 2 of 2 parts does not exist"),
        ({"n": 2, "min_samples": 3}, "min_samples: 3 is over n=2"),
        ({"n": 2, "parts": 2, "min_samples": 1}, "a split group is put together whole"),
    ],
    ids=repr,
)
def test_parts_and_fewest_samples_must_fit(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        job(**fields)


def test_without_a_minimum_all_samples_are_needed() -> None:
    assert job(n=8).fewest_samples == 8
    assert job(n=8, min_samples=6).fewest_samples == 6


@given(
    tag=st.integers(0, 10), staleness=st.none() | st.integers(0, 10), exact=st.booleans(), version=st.integers(0, 20)
)
def test_the_tag_alone_decides_which_policies_may_run_a_job(
    tag: int, staleness: int | None, exact: bool, version: int
) -> None:
    tagged = job(policy_version=tag, max_staleness=staleness, exact=exact)
    if exact:
        assert tagged.may_run_on(version) == (version == tag)
    elif staleness is None:
        assert tagged.may_run_on(version)
    else:
        assert tagged.may_run_on(version) == (version >= tag - staleness)
    if version < tagged.oldest_version:
        assert not tagged.may_run_on(version)
    assert tagged.may_run_on(tagged.oldest_version)


@pytest.mark.parametrize(
    ("prompt", "preview"),
    [
        ("short", "short"),
        ("x" * 100, "x" * PREVIEW_CHARS),
        (np.arange(5, dtype=np.int32), "0 1 2 3 4"),
        ([{"role": "system", "content": "first"}, {"role": "user", "content": "last"}], "last"),
    ],
    ids=["short", "long", "ids", "messages"],
)
def test_the_preview_is_what_a_person_recognises(prompt: Any, preview: str) -> None:
    assert job(prompt=prompt).preview() == preview


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_a_preview_never_outgrows_its_line(ids: list[int]) -> None:
    assert len(preview_of(np.array(ids, np.int32))) <= PREVIEW_CHARS


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "use -1"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: 9 is over max_new_tokens=8"),
        ({"max_tokens": 8}, "max_tokens"),
    ],
    ids=repr,
)
def test_bad_sampling_is_refused_and_says_what(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "filtered"),
    [
        ({}, False),
        ({"temperature": 0.7, "max_new_tokens": 5, "stop": ["x"], "ignore_eos": True}, False),
        ({"temperature": 0.0}, True),
        ({"top_p": 0.9}, True),
        ({"top_k": 40}, True),
        ({"min_p": 0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"presence_penalty": -0.1}, True),
        ({"min_new_tokens": 1}, True),
    ],
    ids=repr,
)
def test_sampling_says_when_logprobs_describe_another_distribution(fields: dict[str, Any], filtered: bool) -> None:
    assert SamplingParams(**fields).filtered is filtered
