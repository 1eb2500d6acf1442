"""What a pool object remembers of its conversations is bounded, and a wish that is wrong is refused by its index."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollpool.producer import InvalidPrompt
from rollpool.producer.affinity import MOST_KEYS, Homes, checked_affinity
from rollpool.producer.enqueue import Draft, draft
from rollpool.schemas import PromptJob
from rollpool.schemas.wire import unpack_job


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["one", "two"])), max_size=30), st.integers(1, 4))
def test_the_keys_used_last_are_remembered_with_their_last_worker(made: list[tuple[str, str]], most: int) -> None:
    homes = Homes(most)
    for key, worker in made:
        homes.remember(key, worker)
    last = dict(made)
    order = list(dict.fromkeys(key for key, _ in reversed(made)))
    kept = set(order[:most])
    assert {key: homes.of(key) for key in last} == {key: last[key] if key in kept else None for key in last}
    assert len(homes) == len(kept) <= most


def test_a_long_run_of_short_conversations_keeps_a_bounded_number() -> None:
    homes = Homes()
    for number in range(MOST_KEYS + 10):
        homes.remember(f"talk-{number}", "w")
    assert len(homes) == MOST_KEYS


@pytest.mark.parametrize("worker", ["", "a b", "x" * 200, "ü"])
def test_what_names_no_host_is_not_wished_for(worker: str) -> None:
    homes = Homes()
    homes.remember("talk", "w")
    homes.remember("talk", worker)
    assert homes.of("talk") == "w"


def test_one_key_is_for_all_prompts_and_none_for_none() -> None:
    assert checked_affinity("talk", 3) == ["talk"] * 3
    assert checked_affinity(("a", None), 2) == ["a", None]
    assert checked_affinity(None, 2) == checked_affinity([None, None], 2) == []


@pytest.mark.parametrize(
    ("affinity", "words"),
    [
        (["a"], "1 keys for 2 prompts"),
        (["a", 3], r"affinity\[1\]"),
        (["a", ""], r"affinity\[1\]"),
        ("", r"affinity\[0\]"),
        (7, "not int"),
        (b"ab", "not bytes"),
        ({"a": 1, "b": 2}, "not dict"),
    ],
    ids=repr,
)
def test_a_wrong_key_is_refused_and_named(affinity: Any, words: str) -> None:
    with pytest.raises(InvalidPrompt, match=words):
        checked_affinity(affinity, 2)


def made(**options: Any) -> Draft:
    prompts = [np.array([index + 1]) for index in range(3)]
    return draft(prompts, **{"run": "r", "policy_version": 3, "batch_id": "b", "metadata": [1, 2, 3], **options})


def jobs(drafted: Draft) -> list[PromptJob]:
    return [unpack_job(body) for body in drafted.previews_and_bodies(None)[1::2] if isinstance(body, bytes)]


def test_each_job_wishes_for_the_host_of_its_key_and_is_the_same_otherwise() -> None:
    homes = Homes()
    homes.remember("a", "one")
    homes.remember("b", "two")
    wished, plain = jobs(made(affinity=["a", "new", "b"], homes=homes)), jobs(made())
    assert [job.host for job in wished] == ["one", None, "two"]
    for job, other in zip(wished, plain, strict=True):
        assert (job.id, job.metadata, job.prompt.tolist()) == (other.id, other.metadata, other.prompt.tolist())  # type: ignore[union-attr]
        assert job.model_dump(exclude={"host", "prompt"}) == other.model_dump(exclude={"host", "prompt"})


def test_the_wish_is_no_part_of_the_content() -> None:
    homes = Homes()
    before = made(affinity="a", homes=homes).content
    homes.remember("a", "one")
    assert made(affinity="a", homes=homes).content == before == made().content == made(affinity="z").content


def test_a_split_group_has_no_one_host_to_wish_for() -> None:
    with pytest.raises(InvalidPrompt, match="affinity: a split group"):
        made(n=4, split=2, affinity="a")
    made(n=4, split=2, affinity=[None] * 3)
