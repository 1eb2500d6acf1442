"""What a host has of a job: what others made of it, what it made itself, and what the job settles with."""

from typing import Any

import msgpack
import pytest
from fakes import entry_of, held_job, job, sample
from hypothesis import given
from hypothesis import strategies as st

from rollpool.schemas import OUTCOMES, Outcome
from rollpool.schemas.scripts import Record
from rollpool.schemas.wire import pack_model, pack_samples, unpack_group
from rollpool.worker.held import HeldJob


def test_what_other_hosts_finished_and_what_it_has_cost_come_with_the_job() -> None:
    record = Record(attempts=1, losses=2, company=3, avoid="w", history="line\n")
    held = held_job(record=record, n=3, done={2: sample(4, version=6)})
    assert held.record == record
    assert list(held.samples) == [2]
    assert held.samples[2].version_spans == ((6, 0, 4),)
    assert held.samples[2].output_ids.tolist() == [0, 1, 2, 3]


def test_a_sample_that_the_job_does_not_have_is_not_taken() -> None:
    made = job(n=2)
    done = pack_samples({-1: sample(), 0: sample(), 1: sample(), 2: sample()})
    assert sorted(HeldJob.of(entry_of(made, done=done), made, 0.0).samples) == [0, 1]


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "done",
    [
        b"",
        b"\xc1",
        pack_samples({0: sample()})[:-1],
        msgpack.packb({"schema": 1}),
        msgpack.packb({"schema": 2, "samples": []}),
        msgpack.packb({"schema": 1, "samples": [[0, {"text": "no ids"}]]}),
        msgpack.packb({"schema": 1, "samples": nested(500)}),
        msgpack.packb({"schema": 1, "samples": [[0, {"output_ids": nested(500)}]]}),
        b"\x91" * 5000 + b"\xc0",
    ],
)
def test_samples_that_cannot_be_read_are_made_again(done: bytes) -> None:
    made = job(n=2)
    assert HeldJob.of(entry_of(made, done=done), made, 0.0).samples == {}


@given(st.binary(max_size=300))
def test_bytes_of_any_kind_in_place_of_samples_harm_nobody(done: bytes) -> None:
    made = job(n=2)
    assert HeldJob.of(entry_of(made, done=done), made, 0.0).job is made


@pytest.mark.parametrize(("fields", "needed"), [({"n": 3}, 3), ({"n": 3, "min_samples": 2}, 2)])
def test_enough_is_what_the_trainer_asked_for(fields: dict[str, Any], needed: int) -> None:
    held = held_job(**fields)
    for index in range(3):
        assert held.enough == (index >= needed)
        held.samples[index] = sample()
    assert held.enough


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_only_a_group_that_is_ok_has_samples_and_they_are_in_order(outcome: Outcome) -> None:
    held = held_job(4, n=3, policy_version=5, metadata={"answer": 1})
    held.pulled_at = 10.0
    held.samples = {index: sample(index + 1) for index in (2, 0, 1)}
    group = held.group(outcome, worker="w", now=12.5, error="why")
    assert [len(each.output_ids) for each in group.samples] == ([1, 2, 3] if outcome == "ok" else [])
    assert (group.id, group.policy_version, group.worker, group.seconds) == ("b/4", 5, "w", 2.5)
    assert (group.error, group.metadata, group.prompt_ids.tolist()) == ("why", {"answer": 1}, [4, 2])


def test_a_group_is_one_that_a_trainer_can_read() -> None:
    held = held_job(n=2)
    held.samples = {0: sample(2), 1: sample(0)}
    group = held.group("ok", worker="w", now=1.0)
    read = unpack_group(pack_model(group))
    assert [each.output_ids.tolist() for each in read.samples] == [[0, 1], []]
    assert read.prompt_ids.tolist() == [0, 2]


def test_what_was_begun_elsewhere_is_apart_from_what_is_finished() -> None:
    begun = sample(2).model_copy(update={"finish_reason": "abort"})
    held = held_job(n=3, done={0: sample(), 1: begun})
    assert (sorted(held.samples), sorted(held.pieces)) == ([0], [1])


@pytest.mark.parametrize(("generation", "kept"), [(None, [0]), (3, [0]), (4, [])])
def test_what_an_abandoned_policy_made_does_not_count(generation: int | None, kept: list[int]) -> None:
    made = job(n=2)
    held = HeldJob.of(entry_of(made, done=pack_samples({0: sample()}, 3)), made, 0.0, generation=generation)
    assert sorted(held.samples) == kept
    assert held.generation == (3 if generation is None else generation)
